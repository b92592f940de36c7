"""The models that `bench.cascade` draws with: SDXL and FLUX.1-dev at their true size with random weights, and small ones.

Nothing is downloaded. Text is random embeddings of the true shape; only the embedded model has trained weights and a prompt. Random
queries are scaled up, so that attention has something to choose among and a wrong attention shows in the picture.

Legend: Y x X latent grid, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff import load_demo
from scalediff.cost.models import MODELS
from scalediff.families.grid import Grid

SEED = 0
_PROMPT = {"prompt": "a full moon over snowy mountains at night"}
Made = tuple[Any, dict[str, Any]]  # a pipeline, and the arguments of its call that say what to draw
_NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
_NO_POINTWISE = {"use_quant_conv": False, "use_post_quant_conv": False}
_SMALL_AUTOENCODER = {"norm_num_groups": 4, "sample_size": 16, "latent_channels": 4, "shift_factor": 0.1, "scaling_factor": 0.4}


@dataclass(frozen=True)
class Subject:
    title: str  # for people
    sizes: tuple[int, ...]  # pixels per side that are measured by default
    dtype: torch.dtype  # of weights and latents
    make: Callable[[str], Made]  # on a device; the same weights every time on one device
    inputs: Callable[[int, int], dict[str, Any]]  # arguments of one pass of the denoiser over Y x X latents, to count its work
    head_dim: int = 64  # of self-attention, by which torch's backend is chosen on a GPU
    window: Grid | None = None  # key/value window in tokens, if not the model's own
    small: bool = False  # fit for a CPU


@contextmanager
def _seeded(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their weights on the device, in the dtype and from `SEED`."""
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device == "cuda" else []), torch.device(device), torch.no_grad():
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _random(
    name: str, specimen: str, device: str, *, small: bool, text: tuple[int, int, int], queries: tuple[str, ...], factor: float,
    **autoencoder: Any,
) -> tuple[Any, Any, dict[str, Any]]:  # fmt: skip
    """A random denoiser, its autoencoder and text, of true size or small; `text` is tokens, their width and the pooled width.

    Parameters that end like `queries` are multiplied by `factor`, so that attention scores have a standard deviation of about 2.
    """
    import diffusers

    dtype = torch.float32 if small else torch.bfloat16
    widths = (8, 8) if small else (128, 256, 512, 512)
    config = _SMALL_AUTOENCODER | _NO_POINTWISE if small else {"layers_per_block": 2, "sample_size": 1024, **autoencoder}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    with _seeded("cpu" if small else device, dtype):
        denoiser: Any = ZOO[specimen].build(SEED) if small else MODELS[name].denoiser().eval()
        vae = diffusers.AutoencoderKL(block_out_channels=widths, **blocks, **config).eval()
        for key, parameter in () if small else denoiser.named_parameters():
            if key.endswith(queries):
                parameter.mul_(factor)
    draw, (tokens, width, pooled) = Draw(SEED), (6, 32, 32) if small else text
    texts = {"prompt_embeds": draw(1, tokens, width).to(device, dtype), "pooled_prompt_embeds": draw(1, pooled).to(device, dtype)}
    return denoiser.to(device), vae.to(device), texts


def _sdxl(device: str, *, small: bool = False) -> Made:
    import diffusers

    # As initialised, the products of queries and keys have a variance of a third.
    how: dict[str, Any] = {"queries": ("attn1.to_q.weight",), "factor": 6.0, "latent_channels": 4, "scaling_factor": 0.13025}
    unet, vae, texts = _random("sdxl", "SDXL", device, small=small, text=(77, 2048, 1280), **how)
    beta = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **beta)
    pipe = diffusers.StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=scheduler, add_watermarker=False, **_NO_TEXT)
    return pipe, texts | {f"negative_{name}": embedding.flip(-1) for name, embedding in texts.items()}


def _flux(device: str, *, small: bool = False) -> Made:
    import diffusers

    queries = ("norm_q.weight", "norm_added_q.weight")  # queries and keys have a variance of one
    how: dict[str, Any] = {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159, **_NO_POINTWISE}
    transformer, vae, texts = _random(
        "flux", "FLUX.1", device, small=small, text=(512, 4096, 768), queries=queries, factor=2.0, **how
    )  # fmt: skip
    shift = {"base_image_seq_len": 4, "max_image_seq_len": 64} if small else {}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **shift)
    return diffusers.FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **_NO_TEXT), texts


def _small_inputs(name: str, tokens: int, y: int, x: int) -> dict[str, Any]:
    """`tokens` latents along an axis make a token."""
    with torch.device("cpu"):
        return ZOO[name].inputs(Draw(), (y // tokens, x // tokens), 1)


def _demo_inputs(y: int, x: int) -> dict[str, Any]:
    return {"sample": torch.empty(1, 4, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": torch.empty(1, 24, 64)}


_F32, _BF16 = torch.float32, torch.bfloat16
_SDXL_INPUTS, _FLUX_INPUTS = partial(_small_inputs, "SDXL", 1), partial(_small_inputs, "FLUX.1", 2)
SUBJECTS: Mapping[str, Subject] = {
    "sdxl": Subject("SDXL base 1.0, random weights", (2048, 4096), _BF16, _sdxl, MODELS["sdxl"].inputs, head_dim=64),
    "flux": Subject("FLUX.1-dev, random weights", (2048, 4096), _BF16, _flux, MODELS["flux"].inputs, head_dim=128),
    "sdxl-small": Subject("a small random SDXL", (16, 32), _F32, partial(_sdxl, small=True), _SDXL_INPUTS, window=WINDOW, small=True),
    "flux-small": Subject("a small random FLUX", (32, 64), _F32, partial(_flux, small=True), _FLUX_INPUTS, window=WINDOW, small=True),
    "demo": Subject("the embedded model", (128, 256), _F32, lambda device: (load_demo().to(device), _PROMPT), _demo_inputs, small=True),
}
TRUE = tuple(name for name, subject in SUBJECTS.items() if not subject.small)
SMALL = tuple(name for name, subject in SUBJECTS.items() if subject.small)
GROWTH_SIZES = (128, 256, 512, 1024)
GROWTH_METHODS = ("npa", "authors", "cascade-full", "multidiffusion", "demofusion", "direct")
