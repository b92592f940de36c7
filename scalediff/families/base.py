"""The contract of a model family."""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from scalediff.families.grid import AttentionSite, Grid, Layout, Role
from scalediff.families.rotation import TextRotation
from scalediff.settings import Preset

Arguments = Mapping[str, Any]
T = TypeVar("T")


class Reader:
    """Values read out of tensors, once per tensor: a pipeline hands the same ids and masks to every step, and reading waits for the GPU."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[weakref.ref[Tensor], Any]] = {}

    def __call__(self, tensor: Tensor, what: Callable[..., T], *arguments: int) -> T:
        """`what(tensor, *arguments)`, remembered for as long as the tensor lives unchanged."""
        if tensor.is_inference():  # it has no version to tell a change by
            return what(tensor, *arguments)
        key = (id(tensor), tensor._version, what, *arguments)
        known = self._known.get(key)
        if known is not None and known[0]() is tensor:
            value: T = known[1]
            return value
        if len(self._known) > 64:
            self._known = {k: v for k, v in self._known.items() if v[0]() is not None}
        value = what(tensor, *arguments)
        self._known[key] = (weakref.ref(tensor), value)
        return value


@dataclass(frozen=True)
class Cascade:
    """What the cascade must know of a family.

    Attributes:
        presets: The presets for a denoiser, by name; `"default"` is among them, `"paper"` where the paper has one.
        patch: Latents of a token along an axis.
        size_multiple: Pixels that a pipeline of this family wants its sizes to be a multiple of, beside those of a token.
        packed: The pipeline hands out and takes packed latents `[B, Y X / 4, 4 C]`.
        guidance: The argument of the pipeline's call that the guidance scale goes to.
        negative: The negative prompt that stands for none, where the pipeline does not guide without one.
        conditional: Where the prompt's pass stands in a batch that classifier-free guidance has doubled, `"first"` or `"last"`; empty
            where guidance is no second half of a batch.
        trained_size: The pipeline's attribute, in pixels, beyond which it stretches positions and sharpens attention. Windows are
            of trained size: neither is due.
    """

    presets: Callable[[nn.Module], Mapping[str, Preset]]
    patch: int = 2
    size_multiple: int = 1
    packed: bool = False
    guidance: str = "guidance_scale"
    negative: str | None = None
    conditional: Literal["first", "last", ""] = ""
    trained_size: str = ""


def _no_rotation(denoiser: nn.Module) -> TextRotation | None:
    return None


@dataclass(frozen=True)
class Family:
    """One model family.

    Attributes:
        denoiser: Class name of the denoiser.
        grid_source: For people: where `layout` reads the grid.
        text: For people: how text enters.
        native_grid: The token grid that a denoiser was trained on, at its finest level; None where it does not say.
        layout: How the tokens of a forward pass lie, from its arguments; raises `Unreadable`.
        roles: Patterns of module names, and what the modules attend to; the first that is found counts.
        role: What the others attend to.
        level: How often the grid of a module has been halved.
        rotation: How a denoiser rotates, where text is turned for each window.
        cascade: None where only the hook knows the family.
        refusal: Why a denoiser of this class is not patched, in a sentence; empty where it is.
        refused_as: The error that says so: legal but missing, or nothing that could be patched.
        listed: Its attention modules are those with a processor; of other models they are known when they call.
    """

    denoiser: str
    grid_source: str = ""
    text: str = ""
    native_grid: Callable[[nn.Module], Grid | None] = field(default=lambda denoiser: None)
    layout: Callable[[nn.Module, Arguments, Reader], Layout] = field(default=lambda denoiser, arguments, read: Layout((0, 0), ()))
    roles: tuple[tuple[str, Role], ...] = ()
    role: Role = "self"
    level: Callable[[nn.Module, str], int] = field(default=lambda denoiser, name: 0)
    rotation: Callable[[nn.Module], TextRotation | None] = _no_rotation
    cascade: Cascade | None = None
    refusal: str = ""
    refused_as: type[Exception] = NotImplementedError
    listed: bool = True

    def sites(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """The attention modules of a denoiser, as far as they are known before they call."""
        if not self.listed:
            return ()
        found = []
        for name, module in denoiser.named_modules():
            if hasattr(module, "processor") and hasattr(module, "set_processor"):
                role = next((role for pattern, role in self.roles if re.search(pattern, name)), self.role)
                if role == "self" and getattr(module, "is_cross_attention", False) and module.added_kv_proj_dim is None:
                    role = "cross"
                found.append(AttentionSite(name, role, self.level(denoiser, name), _obstacle(module)))
        return tuple(found)


_ATTENTION = {"scaled_dot_product_attention", "dispatch_attention_fn"}


def _obstacle(attention: nn.Module) -> str:
    """A processor that names neither of the two in its call computes attention by itself."""
    processor = type(attention.processor)
    calls = [cls.__dict__["__call__"] for cls in processor.__mro__ if "__call__" in cls.__dict__]
    if "AddedKV" in processor.__name__:
        return f"{processor.__name__} puts text among the keys of the image"
    names = {name for call in calls for name in getattr(getattr(call, "__code__", None), "co_names", _ATTENTION)}
    return "" if names & _ATTENTION else f"{processor.__name__} does not call scaled_dot_product_attention"
