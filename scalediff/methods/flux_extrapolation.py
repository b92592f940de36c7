"""FLUX.1 above its trained size: longer rotary wavelengths, sharper attention, and a token grid that moves by half a token.

HiFlow, arXiv:2504.06232, after I-Max, arXiv:2410.07536.

Legend: B batch, C channels, Y x X latent grid, T text tokens.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.cascade.borrowing import intercept_denoiser
from scalediff.cascade.latents import pack, unpack
from scalediff.families.grid import Grid
from scalediff.patching.networks import denoiser_of


def is_flux(pipe: Any) -> bool:
    """Whether the pipeline's denoiser is FLUX.1's, with its positions and attention."""
    return any(cls.__name__ == "FluxTransformer2DModel" for cls in type(denoiser_of(pipe)).__mro__)


@dataclass
class Extrapolation:
    """What changes in FLUX.1 for a stage; `applied` is its context.

    Attributes:
        size: Latent grid `(Y, X)` of the stage.
        rope_scale: Factor of the base of the rotary positions; 1 leaves them.
        native_tokens: Number of image tokens that the model was trained with. Queries are multiplied by sqrt(log L / log N), with L tokens
            in the pass and N = native_tokens + T, as many as in training. None leaves them.
        shift_patches: Pad the latents by one zero on each side in every other step, the first included, so that tokens hold other
            2 x 2 latents.
    """

    size: Grid
    rope_scale: float
    native_tokens: int | None
    shift_patches: bool
    _sharpness: float = field(default=1.0, init=False)

    @contextmanager
    def applied(self, pipe: Any) -> Iterator[None]:
        """Change the pipeline's denoiser, and restore it on exit."""
        denoiser: Any = denoiser_of(pipe)
        theta = denoiser.pos_embed.theta
        parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]

        def run(forward: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
            return self._run(forward, dict(zip(parameters, args, strict=False)) | dict(named), step=pipe.scheduler.calls_done)

        with ExitStack() as undo:
            if self.native_tokens is not None:
                for module in denoiser.modules():
                    for norm in (getattr(module, "norm_q", None), getattr(module, "norm_added_q", None)):
                        if isinstance(norm, nn.Module):
                            undo.callback(norm.register_forward_hook(self._sharpen).remove)
            undo.callback(setattr, denoiser.pos_embed, "theta", theta)
            denoiser.pos_embed.theta = theta * self.rope_scale
            undo.enter_context(intercept_denoiser(pipe, run))
            yield

    def _sharpen(self, module: nn.Module, args: Any, query: Tensor) -> Tensor:
        return query * self._sharpness

    def _run(self, forward: Callable[..., Any], given: dict[str, Any], *, step: int) -> Any:
        padded = self.shift_patches and step % 2 == 0
        if padded:
            if any(given.get(name) is not None for name in ("controlnet_block_samples", "controlnet_single_block_samples")):
                raise NotImplementedError("shift_patches does not support a ControlNet, which has tokens of its own; turn it off")
            given["hidden_states"] = pack(F.pad(unpack(given["hidden_states"], self.size), (1, 1, 1, 1)))
            given["img_ids"] = _ids(self.size[0] // 2 + 1, self.size[1] // 2 + 1, like=given["img_ids"])
        text = given["encoder_hidden_states"].shape[1]
        if self.native_tokens is not None:
            self._sharpness = math.sqrt(math.log(given["hidden_states"].shape[1] + text) / math.log(self.native_tokens + text))
        output = forward(**given)
        if not padded:
            return output
        inner = pack(unpack(output[0], (self.size[0] + 2, self.size[1] + 2))[..., 1:-1, 1:-1])
        return (inner,) if isinstance(output, tuple) else type(output)(sample=inner)


def _ids(rows: int, columns: int, *, like: Tensor) -> Tensor:
    """FLUX's position ids `[rows columns, 3]` of a token grid: 0, row, column."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    return torch.stack([torch.zeros_like(y), y, x], dim=-1).view(-1, 3).to(like)
