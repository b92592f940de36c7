"""Feature caches in a run: what a run does not support, and what a cache must know about a stage.

To a cache every stage is a picture of its own: it begins with an empty cache, because another stage has other tokens. But a stage runs the
last steps of a schedule, while the settings of a cache are those of the whole schedule.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from scalediff.cascade.borrowing import runs_in_halves
from scalediff.patching.caches import EXACT, cache_hooks, cache_names, check_jitter, reset_caches
from scalediff.patching.networks import networks_of
from scalediff.patching.subclass import is_replaced
from scalediff.settings import Jitter, Settings


def check_caches(pipe: Any, settings: Settings, *, calls: int, late: int, jitter: Jitter, split_guidance: bool) -> None:
    """Check that a run is right with the caches of a pipeline.

    Args:
        pipe: The pipeline.
        settings: Settings of the run.
        calls: Number of model calls of the whole schedule.
        late: Number of stages that run only the last steps of the schedule, with a base stage that redraws a picture.
        jitter: How the patch grid moves in the stages above the base.
        split_guidance: As in `generate`.

    Raises:
        ValueError: A cache was made for another number of steps, or does not allow this jitter.
        NotImplementedError: A cache cannot begin in the middle of a schedule, or would mix the two halves of a guided batch; or as
            `runs_in_halves`.
        RuntimeError: cache-dit was enabled on the denoiser alone, or after the pipeline was patched.
    """
    halves = runs_in_halves(pipe, settings, split=split_guidance)
    for net in networks_of(pipe):
        names = cache_names(net)
        if "cache-dit" in names and ("_context_manager" not in pipe.__dict__ or is_replaced(pipe, "__call__")):
            raise RuntimeError("cache-dit would keep its cache from stage to stage: enable it on the pipeline, and before patch_model")
        check_jitter(net, jitter if settings.attention == "npa" else "none")
        if late and "FasterCache" in names:
            raise NotImplementedError("FasterCache cannot begin a stage in the middle of a schedule, where it skips attention at once")
        mixed = [name for name in names if name not in EXACT]
        if mixed and halves:
            raise NotImplementedError(
                f"{mixed[0]} would mix the halves of a guided batch: it needs split_guidance=False and guidance_until=1, got "
                f"{split_guidance=} and guidance_until={settings.guidance_until}"
            )
        for name, hook in cache_hooks(net):
            if name == "MagCache" and (given := hook.config.num_inference_steps) != calls:
                raise ValueError(f"MagCacheConfig must have the {calls} model calls of the run, got num_inference_steps={given}")


def check_no_caches(pipe: Any, method: str) -> None:
    """Check that a pipeline has no caches, for methods that call the model several times in a step, or in parts of the picture.

    Raises:
        NotImplementedError: It has one.
    """
    for net in networks_of(pipe):
        for name in cache_names(net):
            raise NotImplementedError(f"{method} does not support feature caches, got {name}")


@contextmanager
def caches_of_stage(pipe: Any, *, calls: int, dropped: int) -> Iterator[None]:
    """Empty the caches of a pipeline before and after a stage, and tell them which part of the schedule it runs.

    Shares of the steps, and numbers of first steps that are computed in full, are those of the stage. What depends on the noise level moves
    with it: MagCache's ratios are the last ones, and TaylorSeer's `disable_cache_after_step` counts from the start of the whole schedule.

    Args:
        pipe: The pipeline.
        calls: Number of model calls of the stage.
        dropped: Number of model calls at the start of the schedule that the stage leaves out.
    """
    nets = networks_of(pipe)
    changes = [change for net in nets for change in _stage_settings(net, calls, dropped)]
    before = [(hook, name, getattr(hook, name)) for hook, name, _ in changes]
    try:
        for net in nets:
            reset_caches(net)
        for hook, name, value in changes:
            setattr(hook, name, value)
        yield
    finally:
        for hook, name, value in before:
            setattr(hook, name, value)
        for net in nets:
            reset_caches(net)


def _stage_settings(net: nn.Module, calls: int, dropped: int) -> Iterator[tuple[Any, str, Any]]:
    """The settings of caches that are other ones in a stage: hook, name of the attribute, and value."""
    for cache, hook in cache_hooks(net):
        if cache == "MagCache":
            ratios = None if hook.config.mag_ratios is None else hook.config.mag_ratios[-calls:]
            yield hook, "config", replace(hook.config, num_inference_steps=calls, mag_ratios=ratios)
        elif cache == "TaylorSeerCache" and hook.disable_cache_after_step is not None:
            yield hook, "disable_cache_after_step", max(hook.disable_cache_after_step - dropped, 0)


def cache_settings(pipe: Any) -> list[Any]:
    """The settings of every cache hook of a pipeline, which determine what is skipped; empty without a cache."""
    return [[name, *_settings_of(hook)] for net in networks_of(pipe) for name, hook in cache_hooks(net)]


def _settings_of(hook: Any) -> list[dict[str, Any]]:
    own = {name: value for name, value in vars(hook).items() if value is None or isinstance(value, int | float | str | tuple)}
    state = getattr(hook, "state_manager", None)
    return [own, dict(vars(hook.config)) if hasattr(hook, "config") else {}, {} if state is None else dict(state._init_kwargs)]
