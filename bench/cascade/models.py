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

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cost.flops import MODELS
from scalediff.families.grid import Grid

SEED = 0
PROMPT = "a full moon over snowy mountains at night"
Made = tuple[Any, dict[str, Any]]  # a pipeline, and the arguments of its call that say what to draw
_SCORES = 2.0  # standard deviation of the attention scores of random weights, about
_NO_TEXT = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))


@dataclass(frozen=True)
class Subject:
    """A model and its pipeline.

    Attributes:
        title: For people.
        sizes: Pixels per side that are measured by default.
        dtype: Of weights and latents.
        make: Builds the pipeline on a device; the same weights every time on one device.
        inputs: Arguments of one pass of the denoiser over a Y x X latent grid, to count its work.
        head_dim: D of self-attention, by which torch's backend is chosen on a GPU.
        window: Key/value window in tokens; None for the model's own.
        small: Fit for a CPU.
    """

    title: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[str], Made]
    inputs: Callable[[int, int], dict[str, Any]]
    head_dim: int = 64
    window: Grid | None = None
    small: bool = False


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


def _autoencoder(*, small: bool, channels: int, **scale: float) -> Any:
    """SDXL's (4 latent channels) or FLUX's (16), which has no pointwise convolutions; or a small one of 4 channels."""
    import diffusers

    widths: tuple[int, ...]
    if small:
        widths, config = (8, 8), {"norm_num_groups": 4, "sample_size": 16, "latent_channels": 4, "shift_factor": 0.1, "scaling_factor": 0.4}
    else:
        widths, config = (128, 256, 512, 512), {"layers_per_block": 2, "sample_size": 1024, "latent_channels": channels, **scale}
    config |= dict.fromkeys(("use_quant_conv", "use_post_quant_conv"), channels == 4 and not small)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(widths), "up_block_types": ("UpDecoderBlock2D",) * len(widths)}
    return diffusers.AutoencoderKL(block_out_channels=widths, **blocks, **config).eval()


def _embeddings(device: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    draw = Draw(SEED)
    return {name: draw(*shape).to(device, dtype) for name, shape in shapes.items()}


def _sdxl(device: str, *, small: bool = False) -> Made:
    import diffusers

    dtype, (tokens, width, pooled) = (torch.float32, (6, 32, 32)) if small else (torch.bfloat16, (77, 2048, 1280))
    with _seeded("cpu" if small else device, dtype):
        unet = ZOO["SDXL"].build(SEED) if small else MODELS["sdxl"].denoiser().eval()
        vae = _autoencoder(small=small, channels=4, scaling_factor=0.13025)
        for name, parameter in () if small else unet.named_parameters():
            if name.endswith("attn1.to_q.weight"):  # as initialised, the products of queries and keys have a variance of a third
                parameter.mul_(3 * _SCORES)
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    parts = {"unet": unet.to(device), "vae": vae.to(device), "scheduler": scheduler, **_NO_TEXT}
    shapes = {"prompt_embeds": (1, tokens, width), "pooled_prompt_embeds": (1, pooled)}
    shapes |= {f"negative_{name}": shape for name, shape in shapes.items()}
    return diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False), _embeddings(device, dtype, shapes)


def _flux(device: str, *, small: bool = False) -> Made:
    import diffusers

    dtype, (tokens, width, pooled) = (torch.float32, (6, 32, 32)) if small else (torch.bfloat16, (512, 4096, 768))
    with _seeded("cpu" if small else device, dtype):
        transformer = ZOO["FLUX.1"].build(SEED) if small else MODELS["flux"].denoiser().eval()
        vae = _autoencoder(small=small, channels=16, scaling_factor=0.3611, shift_factor=0.1159)
        for name, parameter in () if small else transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):  # queries and keys have a variance of one
                parameter.fill_(_SCORES)
    shift = {"base_image_seq_len": 4, "max_image_seq_len": 64} if small else {}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **shift)
    pipe = diffusers.FluxPipeline(transformer=transformer.to(device), vae=vae.to(device), scheduler=scheduler, **_NO_TEXT)
    return pipe, _embeddings(device, dtype, {"prompt_embeds": (1, tokens, width), "pooled_prompt_embeds": (1, pooled)})


def _demo(device: str) -> Made:
    return scalediff.load_demo().to(device), {"prompt": PROMPT}


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
    "demo": Subject("the embedded model", (128, 256), _F32, _demo, _demo_inputs, small=True),
}
TRUE = tuple(name for name, subject in SUBJECTS.items() if not subject.small)
SMALL = tuple(name for name, subject in SUBJECTS.items() if subject.small)
GROWTH_SIZES = (128, 256, 512, 1024)
GROWTH_METHODS = ("npa", "authors", "cascade-full", "multidiffusion", "demofusion", "direct")
