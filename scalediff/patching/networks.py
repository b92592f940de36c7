"""The networks of a pipeline, their handles, and the pipeline's original call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, cast, get_args

from torch import nn

from scalediff.families import family_of
from scalediff.families.base import Family
from scalediff.patching.handle import Handle
from scalediff.patching.subclass import ATTRIBUTE, original_class
from scalediff.patching.target import Target

_EDITING = frozenset({"control_mask", "mask", "mask_image", "strength", "video"})  # arguments of calls that edit
# Arguments of calls with a strength that the cascade cannot run, and why.
_CHANGE_OBSTACLES = {
    "image_reference": "its picture is also among the tokens, at a size that the pipeline chooses",
    "original_inference_steps": "its schedule depends on the strength",
    "source_prompt": "it starts from the noise that a second prompt explains",
    "depth_map": "it estimates the depth of one picture size",
    "video": "it changes a video",
}


def denoiser_of(model: Any) -> nn.Module:
    """The network that a pipeline calls at every step. For a module, the module itself, without torch.compile's wrapper.

    Raises:
        TypeError: The model is neither a module nor a pipeline with a `unet` or `transformer`.
    """
    return next(net for _, net in named_networks(model))


def networks_of(model: Any) -> list[nn.Module]:
    """The denoiser of a pipeline and its ControlNets."""
    return [net for _, net in named_networks(model)]


def named_networks(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The denoiser of a pipeline and then its ControlNets, each with the prefix of its modules in reports."""
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


def padding_parts(model: Any) -> list[nn.Module]:
    """The networks of a pipeline whose convolutions see the picture: denoiser, ControlNets, autoencoder, adapter. A module is its own."""
    others = () if isinstance(model, nn.Module) else (getattr(model, "vae", None), getattr(model, "adapter", None))
    return [*networks_of(model), *(uncompiled(part) for part in others if isinstance(part, nn.Module))]


def uncompiled(model: Any) -> Any:
    """The module inside torch.compile's wrapper. The wrapper calls it, so patching it patches both."""
    return getattr(model, "_orig_mod", model)


def handle_of(model: Any) -> Handle | None:
    """The handle of a patched pipeline or denoiser; None if it is not patched."""
    target: Target | None = denoiser_of(model).__dict__.get(ATTRIBUTE)
    return cast(Handle, target.handle) if target is not None else None


def family_in_use(denoiser: nn.Module) -> Family | None:
    """The family of a denoiser: that with which it was patched, or else the known one."""
    target: Target | None = denoiser.__dict__.get(ATTRIBUTE)
    return target.family if target is not None else family_of(denoiser)


def is_text_to_image(pipeline_class: type) -> bool:
    """Whether a pipeline class draws from text: its call takes a prompt, a size and latents, and needs no picture to edit."""
    original = original_class(pipeline_class)
    parameters = inspect.signature(original.__call__).parameters
    if not {"prompt", "height", "width", "latents"} <= set(parameters) or not _EDITING.isdisjoint(parameters):
        return False
    encode: Any = getattr(original, "encode_prompt", None)
    if encode is not None and "image" in inspect.signature(encode).parameters:  # the text is encoded together with the picture
        return False
    return not may_edit_picture(original) or _is_optional(parameters["image"])


def may_edit_picture(pipeline_class: type) -> bool:
    """Whether the call of a pipeline class takes a picture to edit or to refer to. With a ControlNet, `image` is the condition."""
    original = original_class(pipeline_class)
    return "image" in inspect.signature(original.__call__).parameters and "controlnet" not in inspect.signature(original).parameters


def changes_picture(pipeline_class: type) -> bool:
    """Whether a pipeline class changes a picture through an autoencoder: its call takes a prompt, the picture and a strength."""
    original = original_class(pipeline_class)
    latent = "vae" in inspect.signature(original).parameters
    return latent and {"prompt", "image", "strength"} <= set(inspect.signature(original.__call__).parameters)


def obstacle_to_changes(pipeline_class: type) -> str:
    """Why the cascade cannot run a pipeline class that changes a picture; empty if it can."""
    original = original_class(pipeline_class)
    parameters = set(inspect.signature(original.__call__).parameters)
    encode: Any = getattr(original, "encode_prompt", None)
    if encode is not None and "image" in inspect.signature(encode).parameters:
        return "it encodes the prompt together with the picture"
    return next((why for name, why in _CHANGE_OBSTACLES.items() if name in parameters), "")


def _is_optional(parameter: inspect.Parameter) -> bool:
    """Whether an argument may be left out. Many required pictures also have the default None, so the type must allow None too."""
    return parameter.default is None and type(None) in get_args(parameter.annotation)


def original_call(pipe: Any) -> Callable[..., Any]:
    """The unpatched `__call__` of the pipeline's class; the pipeline is its first argument."""
    call: Callable[..., Any] = original_class(type(pipe)).__call__
    return call
