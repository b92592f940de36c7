"""A stand-in for the parts of ComfyUI that the nodes use, so that they can be tested without it.

Every part names the contract that it keeps. The contracts are those of ComfyUI 0.3.64 and, where it differs, of the development version of
November 2026. Only what the nodes rely on is here; no code is ComfyUI's.

Legend: B batch, S tokens, H heads, D head dim.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Wrappers = dict[str, dict[str, list[Callable[..., Any]]]]


class WrappersMP:
    """Contract (comfy/patcher_extension.py): names of the places that can be wrapped."""

    APPLY_MODEL = "apply_model"
    DIFFUSION_MODEL = "diffusion_model"


class WrapperExecutor:
    """Contract (comfy/patcher_extension.py): a wrapper gets the executor of the next one; `original` and `class_obj` are the innermost."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: list[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        following = WrapperExecutor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](following, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.execute(*args, **kwargs)


def wrapped(function: Callable[..., Any], of: Any, kind: str, options: dict[str, Any]) -> WrapperExecutor:
    """Contract: the wrappers of all keys, in the order of the keys, are in `transformer_options["wrappers"]`."""
    found = [w for keyed in options.get("wrappers", {}).get(kind, {}).values() for w in keyed]
    return WrapperExecutor(function, of, found)


def wrap_attn(function: Callable[..., Any]) -> Callable[..., Any]:
    """Contract (comfy/ldm/modules/attention.py): the override in `transformer_options` is called in place of the function.

    It gets the function, and `_inside_attn_wrapper=True`, which keeps it from being called again, but not `preferred_attention`.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        kwargs.pop("preferred_attention", None)
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            options = kwargs.get("transformer_options") or {}
            if "optimized_attention_override" in options:
                return options["optimized_attention_override"](function, *args, **kwargs)
        return function(*args, **kwargs)

    return call


@wrap_attn
def optimized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Contract: `[B, S, H D]`, or `[B, H, S, D]` with `skip_reshape`; likewise the output. Masks may lack the axes of batch and heads."""
    if not skip_reshape:
        dim = q.shape[-1] // heads
        q, k, v = (x.unflatten(-1, (-1, dim)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.ndim == 2 else mask
        mask = mask[:, None] if mask.ndim == 3 else mask
    grouped = kwargs.get("enable_gqa", False)
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=kwargs.get("scale"), enable_gqa=grouped)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def copy_nested(options: dict[str, Any]) -> dict[str, Any]:
    """Contract (create_model_options_clone): dictionaries and lists are copied, what they hold is shared."""
    return {key: copy_nested(v) if isinstance(v, dict) else list(v) if isinstance(v, list) else v for key, v in options.items()}


class ModelPatcher:
    """Contract (comfy/model_patcher.py): a model with options. Clones share the network; 0.3.64 deep-copies the options of a clone."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.load_device = model, torch.device("cpu")
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: Wrappers = {}
        self.object_patches: dict[str, Any] = {}
        self.copy_options: Callable[[dict[str, Any]], dict[str, Any]] = copy.deepcopy

    def clone(self) -> ModelPatcher:
        other = ModelPatcher(self.model)
        other.copy_options = self.copy_options
        other.model_options = self.copy_options(self.model_options)
        other.wrappers = {kind: {key: list(w) for key, w in keyed.items()} for kind, keyed in self.wrappers.items()}
        other.object_patches = dict(self.object_patches)
        return other

    def get_model_object(self, name: str) -> Any:
        return self.object_patches.get(name, functools.reduce(getattr, name.split("."), self.model))

    def add_object_patch(self, name: str, value: Any) -> None:
        self.object_patches[name] = value

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Callable[..., Any]) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Callable[..., Any]]:
        return self.wrappers.get(kind, {}).get(key, [])

    def set_model_sampler_post_cfg_function(self, function: Callable[..., Any]) -> None:
        before = self.model_options.get("sampler_post_cfg_function", [])
        self.model_options["sampler_post_cfg_function"] = [*before, function]

    def set_model_attn1_replace(self, function: Callable[..., Any], block: str, number: int) -> None:
        self._replace("attn1", (block, number), function)

    def set_model_attn2_replace(self, function: Callable[..., Any], block: str, number: int) -> None:
        self._replace("attn2", (block, number), function)

    def _replace(self, name: str, block: tuple[str, int], function: Callable[..., Any]) -> None:
        self.model_options["transformer_options"].setdefault("patches_replace", {}).setdefault(name, {})[block] = function


class LatentFormat:
    """Contract (comfy/latent_formats.py): latents of nodes are those of the VAE, and the model's own are scaled and shifted."""

    latent_dimensions, latent_rgb_factors = 2, None

    def __init__(self, channels: int = 4, scale: float = 0.5, shift: float = 0.1) -> None:
        self.latent_channels, self.scale, self.shift = channels, scale, shift

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.shift) * self.scale

    def process_out(self, latent: Tensor) -> Tensor:
        return latent / self.scale + self.shift


class EPS:
    """Contract (comfy/model_sampling.py): x = x0 + sigma eps; the network gets x / sqrt(1 + sigma^2)."""

    sigma_max = 14.0

    def noise_scaling(self, sigma: float, noise: Tensor, latent: Tensor) -> Tensor:
        return latent + sigma * noise

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x / (1 + sigma.view(-1, *[1] * (x.ndim - 1)) ** 2) ** 0.5


class CONST:
    """Contract (comfy/model_sampling.py): x = (1 - sigma) x0 + sigma eps, a flow."""

    sigma_max = 1.0

    def noise_scaling(self, sigma: float, noise: Tensor, latent: Tensor) -> Tensor:
        return (1 - sigma) * latent + sigma * noise

    def calculate_input(self, sigma: Tensor, x: Tensor) -> Tensor:
        return x


class BaseModel(nn.Module):
    """Contract (comfy/model_base.py): the network, its latents and its noise. `apply_model` returns the estimate of the clean latents."""

    def __init__(self, net: nn.Module, sampling: Any, latent_format: LatentFormat, unet_config: dict[str, Any]) -> None:
        super().__init__()
        self.diffusion_model, self.model_sampling, self.latent_format = net, sampling, latent_format
        self.model_config = SimpleNamespace(unet_config=unet_config)

    def process_latent_in(self, latent: Tensor) -> Tensor:
        return self.latent_format.process_in(latent)

    def process_latent_out(self, latent: Tensor) -> Tensor:
        return self.latent_format.process_out(latent)

    def apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Any = {}, **kwargs: Any,  # noqa: B006  # as ComfyUI's
    ) -> Tensor:  # fmt: skip
        executor = wrapped(self._apply_model, self, WrappersMP.APPLY_MODEL, transformer_options)
        out: Tensor = executor.execute(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        return out

    def _apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: Any, **kwargs: Any
    ) -> Tensor:  # fmt: skip
        scaled = self.model_sampling.calculate_input(t, x)
        output = self.diffusion_model(
            scaled, t, context=c_crossattn, control=control, transformer_options=dict(transformer_options), **kwargs
        )
        return x - output * t.view(-1, *[1] * (x.ndim - 1))


def options_of(model: ModelPatcher) -> dict[str, Any]:
    """Contract (comfy/sampler_helpers.py): the model's wrappers are in the `transformer_options` of a run."""
    options = copy_nested(model.model_options["transformer_options"])
    options["wrappers"] = copy_nested(model.wrappers)
    return options


class KSampler:
    """Contract (comfy/samplers.py): the schedule of a sampler; `start_step` drops its first steps."""

    SAMPLERS, SCHEDULERS = ("euler",), ("simple",)

    def __init__(
        self, model: Any, steps: int, device: Any, sampler: str, scheduler: str, denoise: float, model_options: dict[str, Any]
    ) -> None:
        assert denoise == 1.0
        self.sigmas = torch.linspace(model.get_model_object("model_sampling").sigma_max, 0, steps + 1)


def prepare_noise(latent: Tensor, seed: int, noise_inds: list[int] | None = None) -> Tensor:
    """Contract (comfy/sample.py): noise on the CPU, from a seed; of a batch, the noise of the given numbers."""
    count = len(latent) if noise_inds is None else max(noise_inds) + 1
    noise = torch.randn(count, *latent.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=latent.dtype)
    return noise if noise_inds is None else noise[noise_inds]


def reshaped_mask(noise_mask: Tensor | None, latent: Tensor) -> Tensor:
    """Contract (comfy/utils.py): a mask of any size, one where the picture is drawn anew; with frames, it is taken for frames."""
    if noise_mask is None:
        return torch.ones(())
    if latent.ndim == 5:
        frames = noise_mask if noise_mask.ndim == 5 else noise_mask.reshape(1, 1, -1, *noise_mask.shape[-2:])
        return F.interpolate(frames, latent.shape[2:], mode="trilinear")
    mask = F.interpolate(noise_mask.reshape(-1, 1, *noise_mask.shape[-2:]), latent.shape[-2:], mode="bilinear")
    return mask.repeat(-(-len(latent) // len(mask)), 1, 1, 1)[: len(latent)]


def sample(
    model: ModelPatcher,
    noise: Tensor,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    positive: Any,
    negative: Any,
    latent_image: Tensor,
    *,
    denoise: float,
    start_step: int,
    force_full_denoise: bool,
    noise_mask: Tensor | None,
    callback: Callable[..., None],
    disable_pbar: bool,
    seed: int,
) -> Tensor:
    """Contract (comfy/sample.py): guidance by two calls, post-CFG functions on the estimate in the model's latents, Euler's steps."""
    assert (sampler_name, scheduler) == ("euler", "simple")
    sampling = model.get_model_object("model_sampling")
    sigmas = KSampler(model, steps, None, sampler_name, scheduler, denoise, model.model_options).sigmas[start_step:]
    latent = model.model.process_latent_in(latent_image) if latent_image.count_nonzero() else latent_image
    x, mask = sampling.noise_scaling(float(sigmas[0]), noise, latent), reshaped_mask(noise_mask, latent)
    with torch.no_grad():
        for step, (sigma, following) in enumerate(itertools.pairwise(sigmas)):
            batch = sigma.expand(len(x))
            x = x * mask + sampling.noise_scaling(float(sigma), noise, latent) * (1 - mask)
            guesses = []
            for cond in (positive, negative):
                options = options_of(model) | {"sigmas": batch, "sample_sigmas": sigmas}
                context = cond[0][0].expand(len(x), -1, -1).to(x)
                guesses.append(model.model.apply_model(x, batch, c_crossattn=context, transformer_options=options))
            denoised = guesses[1] + cfg * (guesses[0] - guesses[1])
            for function in model.model_options.get("sampler_post_cfg_function", []):
                denoised = function({"denoised": denoised, "sigma": batch, "input": x, "model": model.model})
            denoised = denoised * mask + latent * (1 - mask)
            callback(step, denoised, x, len(sigmas) - 1)
            x = x + (x - denoised) / sigma * (following - sigma)
    return model.model.process_latent_out(x)


class VAE:
    """Contract (comfy/sd.py): pictures `[B, height, width, 3]` in [0, 1]; latents unscaled; video autoencoders have an axis for frames,
    and take pictures for the frames of one video."""

    def __init__(self, channels: int = 4, ratio: int = 8, *, frames: bool = False) -> None:
        rng = torch.Generator().manual_seed(7)
        self.ratio, self.frames, self.calls = ratio, frames, list[str]()
        self.mix = torch.linalg.qr(torch.randn(channels, 3, generator=rng))[0]

    def spacial_compression_decode(self) -> int:
        return self.ratio

    def decode(self, latents: Tensor) -> Tensor:
        self.calls.append("decode")
        picture = torch.einsum("bc...,cr->b...r", latents, self.mix) * 0.1 + 0.5
        picture = picture.repeat_interleave(self.ratio, dim=-3).repeat_interleave(self.ratio, dim=-2)
        return picture.clamp(0, 1)

    def encode(self, pixels: Tensor) -> Tensor:
        self.calls.append("encode")
        assert not self.frames or len(pixels) == 1, "pictures, not the frames of a video"
        small = F.avg_pool2d(pixels.movedim(-1, 1), self.ratio)
        latents = torch.einsum("br...,cr->bc...", (small - 0.5) / 0.1, self.mix)
        return latents[:, :, None] if self.frames else latents


def timestep_features(timesteps: Tensor, width: int) -> Tensor:
    """`[B, width]`: sines of the timestep, in its dtype."""
    return torch.sin(timesteps[:, None] * torch.arange(1, width + 1, dtype=timesteps.dtype) / math.e)
