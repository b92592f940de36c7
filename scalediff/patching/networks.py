"""The networks of a pipeline, and whether they are patched."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast

from torch import nn

from scalediff.patching.handle import Handle
from scalediff.patching.subclass import ATTRIBUTE, own_class
from scalediff.patching.target import Target


def denoiser_of(model: Any) -> nn.Module:
    """The network that a pipeline calls at every step; a module is its own denoiser, a compiled one that within.

    Raises:
        TypeError: neither a module nor a pipeline with a `unet` or `transformer`.
    """
    return next(net for _, net in named_networks(model))


def nets_of(model: Any) -> list[nn.Module]:
    """The denoiser of a pipeline and its ControlNets."""
    return [net for _, net in named_networks(model)]


def named_networks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The denoiser of a pipeline and then its ControlNets, with their names in reports."""
    if isinstance(model, nn.Module):
        yield "", uncompiled(model)
        return
    denoisers = [part for name in ("unet", "transformer") if isinstance(part := getattr(model, name, None), nn.Module)]
    if not denoisers:
        raise TypeError(f"expected an nn.Module or a diffusers pipeline with a unet or transformer, got {type(model).__name__}")
    yield "", uncompiled(denoisers[0])
    control = getattr(model, "controlnet", None)
    if isinstance(control, nn.Module):
        control = uncompiled(control)
        nets = getattr(control, "nets", None)
        if nets is None:
            yield "controlnet.", control
        for i, net in enumerate(nets or ()):
            yield f"controlnet.nets.{i}.", uncompiled(net)


def uncompiled(model: Any) -> Any:
    """The module within torch.compile's wrapper; the wrapper calls it, so a patch of it is a patch of both."""
    return getattr(model, "_orig_mod", model)


def handle_of(model: Any) -> Handle | None:
    """The handle of a patched pipeline or denoiser."""
    target: Target | None = denoiser_of(model).__dict__.get(ATTRIBUTE)
    return cast(Handle, target.handle) if target is not None else None


def is_text_to_image(kind: type) -> bool:
    """Whether calls of a pipeline class take a prompt, a size and latents, and no picture to change: then they can run a stage."""
    own = own_class(kind)
    names, parts = (set(inspect.signature(of).parameters) for of in (own.__call__, own))
    # Beside a ControlNet, `image` is the condition; a picture to change comes with a strength.
    pictures = {"mask_image", "strength"} if "controlnet" in parts else {"image", "mask_image"}
    return {"prompt", "height", "width", "latents"} <= names and names.isdisjoint(pictures)


def original_call(pipe: Any) -> Callable[..., Any]:
    """The pipeline class's own `__call__`, patched or not; the pipeline is its first argument."""
    call: Callable[..., Any] = own_class(type(pipe)).__call__
    return call
