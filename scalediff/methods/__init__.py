"""Other published methods, to compare ScaleDiff with. Each runs the unmodified pipeline call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from scalediff.cascade.results import Stage
from scalediff.methods.demofusion import DemoFusion, demofusion
from scalediff.methods.multidiffusion import MultiDiffusion, multidiffusion

__all__ = ["METHODS", "DemoFusion", "Method", "MultiDiffusion"]


class Method(NamedTuple):
    """One published method.

    Attributes:
        options: The dataclass of its options.
        run: The function `run(pipe, arguments, size, settings, options, on_stage=..., progress=...)`, which returns the stages.
    """

    options: type[Any]
    run: Callable[..., list[Stage]]


METHODS: Mapping[str, Method] = MappingProxyType(
    {"multidiffusion": Method(MultiDiffusion, multidiffusion), "demofusion": Method(DemoFusion, demofusion)}
)
