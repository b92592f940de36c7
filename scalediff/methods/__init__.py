"""Other published methods, to compare ScaleDiff with. Each runs the unmodified pipeline call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from scalediff.cascade.results import Stage
from scalediff.cascade.upsampling import Upsampler
from scalediff.methods.accdiffusion import AccDiffusion, accdiffusion
from scalediff.methods.demofusion import DemoFusion, demofusion
from scalediff.methods.diffusehigh import DiffuseHigh, diffusehigh
from scalediff.methods.direct import Direct, direct
from scalediff.methods.hiflow import HiFlow, hiflow
from scalediff.methods.multidiffusion import MultiDiffusion, multidiffusion
from scalediff.methods.scalecrafter import ScaleCrafter, scalecrafter
from scalediff.methods.super_resolution import SuperResolution, super_resolution

__all__ = [
    "METHODS",
    "AccDiffusion",
    "DemoFusion",
    "DiffuseHigh",
    "Direct",
    "HiFlow",
    "Method",
    "MethodOptions",
    "MultiDiffusion",
    "ScaleCrafter",
    "SuperResolution",
    "method_names",
    "method_title",
    "resolve_method",
]

MethodOptions = Any  # an object of one of the classes in METHODS


class Method(NamedTuple):
    """One published method.

    Attributes:
        options: The dataclass of its options.
        run: The function `run(pipe, arguments, size, settings, options, on_stage=..., progress=...)`, which returns the stages.
        in_parts: Whether the denoiser sees a part of the picture at a time, so that the run needs less memory than is estimated.
    """

    options: type[Any]
    run: Callable[..., list[Stage]]
    in_parts: bool = False


METHODS: Mapping[str, Method] = MappingProxyType({
    "direct": Method(Direct, direct),
    "super-resolution": Method(SuperResolution, super_resolution, in_parts=True),
    "diffusehigh": Method(DiffuseHigh, diffusehigh),
    "hiflow": Method(HiFlow, hiflow),
    "scalecrafter": Method(ScaleCrafter, scalecrafter),
    "multidiffusion": Method(MultiDiffusion, multidiffusion, in_parts=True),
    "demofusion": Method(DemoFusion, demofusion, in_parts=True),
    "accdiffusion": Method(AccDiffusion, accdiffusion, in_parts=True),
})  # fmt: skip


def method_names() -> tuple[str, ...]:
    """The names of all methods that `generate` accepts, ScaleDiff first."""
    return "scalediff", *METHODS


def method_title(name: str) -> str:
    """What labels call a method: by the name of its paper, `DiffuseHigh` for diffusehigh; what no paper has named stays as it is."""
    if name == "scalediff":
        return "ScaleDiff"
    return name if name in ("direct", "super-resolution") else METHODS[name].options.__name__


def resolve_method(method: str | MethodOptions, upsampler: Upsampler | None = None) -> MethodOptions:
    """The options object behind the argument `method` of `generate`, with its `upsampler` if one is given.

    Raises:
        ValueError: There is no such method, or it has no upsampler.
    """
    named = METHODS.get(method) if isinstance(method, str) else None
    options: MethodOptions = method if named is None else named.options()
    if not any(type(options) is one.options for one in METHODS.values()):
        raise ValueError(f"method must be one of {', '.join(method_names())}, or an options object of one, got {method!r}")
    if upsampler is None:
        return options
    if not any(one.name == "upsampler" for one in fields(options)):
        raise ValueError(f"method={method!r} does not support upsampler")
    return replace(options, upsampler=upsampler)
