"""`Provider`, the interface of an implementation, and the library's own providers.

A provider computes one of three functions: `"window"` is neighborhood patch attention, `"full"` attention to the whole grid, `"views"` full
attention inside every one of MultiDiffusion's overlapping views of native size. Each is checked against its own definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.attention.gate import Outputs
from bench.attention.shapes import Inputs, Task
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels._launch import device_name, device_refusal, has_triton
from scalediff_kernels.neighborhood import config

BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CPU_SCORES = 2**29  # at most, that a CPU holds in memory


def image_and_text(found: tuple[Tensor, Tensor | None]) -> Outputs:
    return Outputs(found[0].flatten(1, 2), found[1])


class Ready(NamedTuple):
    """A provider prepared for a task."""

    run: Callable[[Any], Any]  # the call that is timed
    lay: Callable[[Inputs], Any] = lambda inputs: inputs  # to what `run` takes, as a model with this provider would hold them; not timed
    unlay: Callable[[Any], Outputs] = image_and_text  # from what `run` returns; not timed
    backend: str = ""  # what answers, where it is not one of torch's attention
    setup_ms: float | None = None  # of what is made once for a shape


@dataclass
class Provider:
    name: str
    make: Callable[[Task], Ready]
    function: Literal["window", "full", "views"] = "window"
    backend: str = ""  # the only one that torch's attention may use; any when empty
    rules: tuple[str, ...] = ("", "window", "global")  # for text, that it can follow
    unavailable: Callable[[Task], str] = lambda task: ""  # why it cannot run a task here; empty where it may
    work: Callable[[Task], int | None] | None = None  # FLOPs of one call with its padding, where these are not the useful ones

    def refusal(self, task: Task) -> str:
        """Why it cannot run the task; empty where it may."""
        if task.rule not in self.rules:
            return f"it cannot attend to text by the rule {task.rule!r}: see the rule {self.rules[-1]!r}"
        if task.device == "cpu" and self.backend in ("cudnn", "efficient"):
            return f"torch has no {self.backend} attention on CPUs"
        return self.unavailable(task) or (scores_refusal(task) if self.backend == "math" else "")

    def executed(self, task: Task) -> int | None:
        """FLOPs of one call with its padding; None where they are unknown."""
        return self.work(task) if self.work else task.flops(self.function)

    def prepare(self, task: Task) -> Ready:
        """Allow the backend alone around every call: once a call, however many windows it loops over."""
        ready = self.make(task)
        return ready._replace(run=sdpa_kernel(BACKENDS[self.backend])(ready.run)) if self.backend else ready


def scores_refusal(task: Task) -> str:
    """Why a provider that stores all scores cannot run on this CPU; empty if it can."""
    scores = task.shape.batch * task.shape.heads * task.shape.tokens**2
    if task.device != "cpu" or scores <= CPU_SCORES:
        return ""
    return f"on a CPU scores of all pairs of tokens may take {4 * CPU_SCORES / 1e9:.1f} GB, got {4 * scores / 1e9:.1f} GB"


def no_triton(task: Task) -> str:
    """Why the kernels cannot run a task here; empty where they can."""
    if task.device == "cpu":
        return "the kernel needs a CUDA or ROCm device; Triton's interpreter is nothing to time"
    return (device_refusal(torch.device(task.device)) or "") if has_triton() else "the triton package is not installed"


def no_second_choice(task: Task) -> str:
    """Why the kernels in plain Triton cannot run a task here as a second choice; empty where they can."""
    first = device_name(torch.device(task.device)) != "sm_90"
    return no_triton(task) or ("the kernels in plain Triton are the first choice here: see triton" if first else "")


def second_choice(task: Task) -> Ready:
    """The kernels in plain Triton, on devices for which the table of launch configurations has another kernel first."""
    from scalediff_kernels.neighborhood import launch

    plain = patch.object(launch, "launch_config", lambda problem, device, _: config.block_config(problem, device))
    first = ours(task, impl="triton")
    return first._replace(run=plain(first.run))


def ours(task: Task, *, impl: Literal["triton", "sdpa"]) -> Ready:
    """One of the library's implementations."""
    how: dict[str, Any] = {"window": task.shape.window, "patch": task.shape.patch, "impl": impl}
    if not task.rule:
        return Ready(lambda inputs: (neighborhood_patch_attention(*inputs.image, **how), None))
    how["text_queries"] = task.rule
    return Ready(lambda inputs: joint_neighborhood_patch_attention(*inputs.image, *inputs.text, text_rope=inputs.rope, **how))


def tiled_flops(
    task: Task, device: str = "", *, choose: Callable[[config.Problem, str], config.LaunchConfig] = config.launch_config
) -> int:
    """Of the kernel: tiles that hold a query, blocks of keys that hold a key, registers of D rounded up to a power of two."""
    s, width = task.shape, config.ceil_power_of_two(max(task.shape.head_dim, config.MIN_BLOCK))
    device, total = device or device_name(torch.device(task.device)), 0
    for queries in ("image", "text") if task.rule else ("image",):
        whole = queries == "text" and task.rule == "global"  # one window over the grid
        window, tile = (s.grid, s.grid) if whole else (task.window, s.patch)
        problem = config.Problem(s.grid, window, tile, s.head_dim, task.dtype.itemsize, s.text, queries, rope=task.rule == "window")
        chosen = choose(problem, device)
        keys = _round_up(window[0], chosen.key_box[0]) * _round_up(window[1], chosen.key_box[1]) + _round_up(s.text, chosen.text_block)
        if queries == "image":
            axes = zip(task.spans, chosen.query_box, strict=True)
            rows = prod(sum(_round_up(p.query_stop - p.query_start, box) for p in spans) for spans, box in axes)
        else:
            rows = _round_up(s.text, chosen.query_box[1]) * (1 if whole else prod(map(len, task.spans)))
        total += 4 * s.batch * s.heads * width * rows * keys
    return total


plain_flops = partial(tiled_flops, choose=config.block_config)  # of the kernels in plain Triton


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to
