"""What each of several processes computes with an autoencoder whose pictures are split by rows."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import diffusers
import torch
from torch import Tensor, distributed

import scalediff
from scalediff.cascade import memory, run
from scalediff.cascade.borrowing import tiled
from scalediff.cascade.splitting import split_autoencoder
from scalediff.cascade.streaming import streamed
from scalediff_kernels.distributed import bands
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.drawn_ranks import changed, draw_demo, drawn, drawn_in_halves, with_workdir
from tests.scalediff.cascade.further_pipelines import deep_compression_autoencoder
from tests.scalediff.cascade.test_pipelines import built
from tests.scalediff.cascade.test_streaming import autoencoder, both, inputs

NATIVE = (8, 8)  # pixels, below all pictures here
MANY = {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}


def flux2() -> Any:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.AutoencoderKLFlux2(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks).double().eval()


def sliced() -> Any:
    vae = autoencoder()
    vae.enable_slicing()
    return vae


# Autoencoders whose rows are split, and pictures (height, width): of few rows of latents in a band or more, and of an odd number.
SPLIT: dict[str, tuple[Callable[[], Any], tuple[int, int]]] = {
    "attention": (autoencoder, (48, 20)),
    "no attention": (lambda: autoencoder((8, 16), 2, **MANY), (24, 12)),
    "odd rows": (lambda: autoencoder((8, 8)), (12, 20)),
    "one size": (lambda: autoencoder((8,)), (20, 11)),
    "slices": (sliced, (16, 20)),
    "FLUX.2": (flux2, (24, 16)),
}


def other_processor() -> Any:
    from diffusers.models.attention_processor import SlicedAttnProcessor

    vae = autoencoder()
    vae.encoder.mid_block.attentions[0].set_processor(SlicedAttnProcessor(1))
    return vae


def compiled() -> Any:
    vae = autoencoder()
    vae.decoder.up_blocks[0].compile(backend="eager")
    return vae


def in_windows() -> Any:
    vae = autoencoder()
    scalediff.patch_model(vae.decoder, patch_size=1, window=(2, 2))
    return vae


def hooked() -> Any:
    vae = autoencoder()
    vae.decoder.conv_in._hf_hook = object()
    return vae


def of_qwen() -> Any:
    return built("Qwen-Image")[0].vae.double()


def in_tiles() -> Any:
    vae = autoencoder()
    vae.enable_tiling()
    return vae


# Autoencoders that every rank computes whole, why, and pictures.
WHOLE: dict[str, tuple[Callable[[], Any], str, tuple[int, int]]] = {
    "Qwen-Image": (of_qwen, "AutoencoderKLQwenImage has no encoder and decoder of AutoencoderKL", (16, 16)),
    "DC-AE": (lambda: deep_compression_autoencoder().double(), "AutoencoderDC has no encoder and decoder of AutoencoderKL", (64, 64)),
    "processor": (other_processor, "AutoencoderKL has attention processors that may see one band alone: SlicedAttnProcessor", (16, 20)),
    "compiled": (compiled, "parts of AutoencoderKL are compiled", (32, 20)),
    "windows": (in_windows, "the attention of AutoencoderKL is patched", (16, 20)),
    "hooks": (hooked, "the layers of AutoencoderKL have hooks, such as those of offloading", (32, 20)),
    "rows": (autoencoder, "", (36, 20)),
    "native": (autoencoder, "", (8, 8)),
    "tiles": (in_tiles, "", (64, 64)),
}


# Sizes (height, width), the largest number of elements of a band, and the number of sizes that are one group.
STREAMED = (("bands", (48, 20), 1, 1), ("joined", (48, 20), 1, 2), ("one band", (48, 20), 2**20, 1), ("few rows", (16, 20), 1, 2))


@contextmanager
def messages() -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """The shapes of what this process sends to its neighbours, and of what it gives all others."""
    seen: list[tuple[str, tuple[int, ...]]] = []
    send, gather = distributed.batch_isend_irecv, bands.all_gather

    def sent(operations: Any) -> Any:
        seen.extend(("sent", tuple(one.tensor.shape)) for one in operations if one.op is distributed.isend)
        return send(operations)

    def gathered(whole: Tensor, part: Tensor, group: Any) -> None:
        seen.append(("gathered", tuple(part.shape)))
        gather(whole, part, group)

    distributed.batch_isend_irecv, bands.all_gather = sent, gathered  # type: ignore[assignment]
    try:
        yield seen
    finally:
        distributed.batch_isend_irecv, bands.all_gather = send, gather


def pictures(vae: Any, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Latents and pictures of a batch of two; of a video autoencoder with one frame."""
    if hasattr(vae.config, "block_out_channels"):
        return inputs(vae, *size, batch=2)
    factor = 32 if type(vae).__name__ == "AutoencoderDC" else 2
    given = [torch.randn(1, n, *(side // f for side in size), generator=seeded(), dtype=torch.float64) for n, f in ((4, factor), (3, 1))]
    if factor == 2:
        given = [x[:, :, None] for x in given]
    return given[0], given[1]


@torch.no_grad()
def computed(vae: Any, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if type(vae).__name__ == "AutoencoderDC":
        return vae.decode(given[0]).sample, vae.encode(given[1]).latent
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="scalediff: a part of Decoder runs full attention: it uses xformers")
        return both(vae, *given)


def split_rows() -> dict[str, Any]:
    """Decoded and encoded by all ranks together, and the messages of it."""
    found: dict[str, Any] = {}
    for name, (build, size) in SPLIT.items():
        vae = build()
        given, before = pictures(vae, size), state_of(vae)
        with messages() as seen, split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, {}) as split:
            rows: list[int] = []
            hook = vae.decoder.conv_in.register_forward_pre_hook(lambda module, args, rows=rows: rows.append(args[0].shape[2]))
            found[name] = {"results": computed(vae, given), "rows": rows, "ranks": split.ranks_at(*size)}
            hook.remove()
        found[name] |= {"messages": list(seen), "restored": state_of(vae) == before}
    return found


def rounded() -> dict[str, tuple[Tensor, Tensor]]:
    """In lower precision, in which norms copy a few channels at a time."""
    found, bands.NORM_ELEMENTS = {}, 2**8
    for dtype in (torch.float32, torch.bfloat16):
        vae = autoencoder().to(dtype)
        with split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, {}):
            found[str(dtype)] = computed(vae, pictures(vae, (48, 20)))
    bands.NORM_ELEMENTS = 2**26
    return found


def whole_on_every_rank() -> dict[str, Any]:
    """Why an autoencoder is not split, what it sends, and whether its results have the bits of one process."""
    found: dict[str, Any] = {}
    for name, (build, _, size) in WHOLE.items():
        vae = build()
        runs = name not in ("hooks", "compiled")
        given = pictures(vae, size)
        expected = computed(vae, given) if runs else given
        with split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, {}) as split, messages() as seen:
            same = all(map(torch.equal, computed(vae, given) if runs else given, expected))
        found[name] = {"why": split.obstacle, "messages": seen, "same": same}
    vae = autoencoder()
    given = pictures(vae, (32, 20))
    expected = computed(vae, given)
    with split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, {}), messages() as seen, ThreadPoolExecutor(1) as other:
        same = all(map(torch.equal, other.submit(computed, vae, given).result(), expected))
    found["another thread"] = {"why": "", "messages": seen, "same": same}
    return found


def streamed_rows() -> dict[str, Any]:
    """Decoded and encoded by all ranks together, each in bands of its rows; and whole, where a rank has fewer rows than the halos."""
    found: dict[str, Any] = {}
    for name, size, elements, joined in STREAMED:
        vae = autoencoder((8, 8))
        given = pictures(vae, size)
        how: dict[str, Any] = {"elements": elements, "joined": joined}
        with split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, {}), streamed(vae, **how), messages() as seen:
            found[name] = {"results": computed(vae, given), "messages": seen}
    return found


def different() -> dict[str, str]:
    """What is said of ranks with different autoencoders, options or pictures, and of other stages, before anything is drawn."""
    rank, said = distributed.get_rank(), dict[str, str]()

    def attempt(name: str, vae: Any, options: dict[str, Any], given: tuple[Tensor, Tensor]) -> None:
        try:
            with split_autoencoder(vae, (distributed.group.WORLD,), NATIVE, options):
                computed(vae, given)
        except ValueError as error:
            said[name] = str(error)

    vae = autoencoder()
    given = pictures(vae, (32, 20))
    attempt("options", vae, {"vae_tiling": rank == 1}, given)
    attempt("latents", vae, {}, (given[0] + rank, given[1]))
    other = copy.deepcopy(vae)
    next(other.parameters()).data.add_(rank)
    attempt("weights", other, {}, given)
    pipe = scalediff.load_demo()
    pipe.unet.register_forward_pre_hook(lambda module, args: said.setdefault("drawn", "the U-Net was called"))
    for name, how in (("sizes", {"height": 128 + 64 * rank}), ("steps", {"steps": 2 + rank})):
        try:
            draw_demo(pipe, mesh=distributed.group.WORLD, **how)
        except ValueError as error:
            said[name] = str(error)
    return said


def parts_on_one_rank() -> dict[str, Any]:
    """A run whose autoencoder does not fit into the memory of the second rank alone: all ranks run it in parts."""
    pipe = scalediff.load_demo()
    seen: list[tuple[bool | None, int]] = []

    @contextmanager
    def watched(vae: Any, *, on: bool | None, joined: int = 1) -> Iterator[None]:
        seen.append((on, joined))
        with tiled(vae, on=on, joined=joined):
            yield

    before, run.tiled = (memory.total_bytes, run.joined_sizes), watched  # type: ignore[attr-defined]
    memory.total_bytes = lambda device: 0 if distributed.get_rank() == 1 else 2**60
    run.joined_sizes = lambda *what, **more: 1 + distributed.get_rank()  # type: ignore[attr-defined]
    try:
        draw_demo(pipe, mesh=distributed.group.WORLD, force=True)
    finally:
        run.tiled, (memory.total_bytes, run.joined_sizes) = tiled, before  # type: ignore[attr-defined]
    return {"seen": seen}


_ALL = (
    split_rows, streamed_rows, rounded, whole_on_every_rank, different, parts_on_one_rank, drawn, drawn_in_halves, changed, with_workdir,
)  # fmt: skip
CASES: dict[str, Callable[[], Any]] = {case.__name__: case for case in _ALL}
