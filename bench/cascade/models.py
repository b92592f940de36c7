"""What `bench.cascade` runs: models at their true size with random weights, built on the device from their configurations, and small ones.

Nothing is downloaded. Text is random embeddings of the true shape; the embedded model alone has a prompt and trained weights.
Random queries and keys are made larger than their initialisation has them, so that attention has something to choose among, and a wrong
attention shows in the picture.

Legend: B batch, Y x X latent grid, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cost.flops import MODELS
from scalediff.families.grid import Grid

SEED = 0
PROMPT = "a full moon over snowy mountains at night"
_SCORES = 2.0  # standard deviation of the scores of random weights, about


@dataclass(frozen=True)
class Subject:
    """A model and its pipeline.

    Attributes:
        name: On the command line and in rows.
        title: For people.
        sizes: Pixels per side that are measured where none are named.
        dtype: Of weights and latents.
        make: The pipeline on a device, and the arguments of its call that say what to draw.
        inputs: Of one pass of its denoiser for a latent grid, whatever device is the default: values do not matter, but for positions.
        head_dim: D of its self-attention, for the choice of torch's backend on a GPU.
        window: Key/value window in tokens, where the model does not say what it was trained on; None: its own.
        small: Fit for a CPU.
    """

    name: str
    title: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[str], tuple[Any, dict[str, Any]]]
    inputs: Callable[[int, int], dict[str, Any]]
    head_dim: int = 64
    window: Grid | None = None
    small: bool = False

    def build(self, device: str) -> tuple[Any, dict[str, Any]]:
        """The pipeline, its progress bar hidden, and what its call draws; the same weights every time on one device.

        Raises:
            ImportError: diffusers or transformers is missing.
        """
        pipe, arguments = self.make(device)
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments


@contextmanager
def _made(device: str, dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have their weights on the device and in the dtype, from a seed of their own."""
    before = torch.get_default_dtype()
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(SEED)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def _autoencoder(channels: int, **scale: float) -> Any:
    """That of SDXL (4 channels) or FLUX (16): the same but for a pointwise convolution, which FLUX has not."""
    import diffusers

    pointwise = {"use_quant_conv": channels == 4, "use_post_quant_conv": channels == 4}
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **pointwise, **scale,
    ).eval()  # fmt: skip


def _small_autoencoder() -> Any:
    import diffusers

    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, sample_size=16, use_quant_conv=False, use_post_quant_conv=False,
        shift_factor=0.1, scaling_factor=0.4, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip


def _embeddings(device: str, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    draw = Draw(SEED)
    return {name: draw(*shape).to(device, dtype) for name, shape in shapes.items()}


def _sdxl_pipeline(unet: nn.Module, vae: Any) -> Any:
    import diffusers

    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="leading", steps_offset=1
    )
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.StableDiffusionXLPipeline(unet=unet, vae=vae, scheduler=scheduler, add_watermarker=False, **texts)


def _sdxl_shapes(tokens: int, width: int, pooled: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"prompt_embeds": (1, tokens, width), "pooled_prompt_embeds": (1, pooled)}
    return shapes | {f"negative_{name}": shape for name, shape in shapes.items()}


def _sdxl(device: str) -> tuple[Any, dict[str, Any]]:
    with _made(device, torch.bfloat16), torch.no_grad():
        unet = MODELS["sdxl"].denoiser().eval()
        for name, module in unet.named_modules():
            if name.endswith("attn1.to_q"):  # layers begin with weights whose products have a variance of a third
                module.weight.mul_(3 * _SCORES)
        vae = _autoencoder(4, scaling_factor=0.13025)
    pipe = _sdxl_pipeline(unet, vae)
    return pipe, _embeddings(device, torch.bfloat16, _sdxl_shapes(77, 2048, 1280))


def _small_sdxl(device: str) -> tuple[Any, dict[str, Any]]:
    pipe = _sdxl_pipeline(ZOO["SDXL"].build(SEED), _small_autoencoder()).to(device)
    return pipe, _embeddings(device, torch.float32, _sdxl_shapes(6, 32, 32))


def _flux_pipeline(transformer: nn.Module, vae: Any, **shift: int) -> Any:
    import diffusers

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, **shift)
    texts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return diffusers.FluxPipeline(transformer=transformer, vae=vae, scheduler=scheduler, **texts)


def _flux(device: str) -> tuple[Any, dict[str, Any]]:
    with _made(device, torch.bfloat16), torch.no_grad():
        transformer = MODELS["flux"].denoiser().eval()
        for name, parameter in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):  # queries and keys have a variance of one
                parameter.fill_(_SCORES)
        vae = _autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159)
    shapes = {"prompt_embeds": (1, 512, 4096), "pooled_prompt_embeds": (1, 768)}
    return _flux_pipeline(transformer, vae), _embeddings(device, torch.bfloat16, shapes)


def _small_flux(device: str) -> tuple[Any, dict[str, Any]]:
    pipe = _flux_pipeline(ZOO["FLUX.1"].build(SEED), _small_autoencoder(), base_image_seq_len=4, max_image_seq_len=64).to(device)
    return pipe, _embeddings(device, torch.float32, {"prompt_embeds": (1, 6, 32), "pooled_prompt_embeds": (1, 32)})


def _demo(device: str) -> tuple[Any, dict[str, Any]]:
    import scalediff

    return scalediff.load_demo().to(device), {"prompt": PROMPT}


def _small_sdxl_inputs(y: int, x: int) -> dict[str, Any]:
    with torch.device("cpu"):
        return ZOO["SDXL"].inputs(Draw(), (y, x), 1)


def _small_flux_inputs(y: int, x: int) -> dict[str, Any]:
    with torch.device("cpu"):
        return ZOO["FLUX.1"].inputs(Draw(), (y // 2, x // 2), 1)


def _demo_inputs(y: int, x: int) -> dict[str, Any]:
    text = torch.empty(1, 24, 64)
    return {"sample": torch.empty(1, 4, y, x), "timestep": torch.tensor(1.0), "encoder_hidden_states": text}


_F32, _BF16 = torch.float32, torch.bfloat16
SUBJECTS: Mapping[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject("sdxl", "SDXL base 1.0, random weights", (2048, 4096), _BF16, _sdxl, MODELS["sdxl"].inputs, 64),
        Subject("flux", "FLUX.1-dev, random weights", (2048, 4096), _BF16, _flux, MODELS["flux"].inputs, 128),
        Subject("sdxl-small", "a small random SDXL", (16, 32), _F32, _small_sdxl, _small_sdxl_inputs, window=WINDOW, small=True),
        Subject("flux-small", "a small random FLUX", (32, 64), _F32, _small_flux, _small_flux_inputs, window=WINDOW, small=True),
        Subject("demo", "the embedded model", (128, 256), _F32, _demo, _demo_inputs, small=True),
    )
}
TRUE = tuple(name for name, subject in SUBJECTS.items() if not subject.small)
SMALL = tuple(name for name, subject in SUBJECTS.items() if subject.small)
GROWTH_SIZES = (128, 256, 512, 1024)
GROWTH_METHODS = ("npa", "authors", "cascade-full", "multidiffusion", "demofusion", "direct")
