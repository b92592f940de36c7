"""What the attention benchmark compares: one class per implementation, the library's here, others beside it.

A provider computes one of three functions: `"window"` is neighborhood patch attention, `"full"` attention to the whole grid, `"views"` full
attention inside every one of MultiDiffusion's overlapping views of native size. Each is gated against its own definition.

Legend: B batch, H heads, G key heads, Y x X token grid, T text tokens, D head dim, W x W window, P x P patch, n windows.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

from bench.attention.gate import Outputs
from bench.attention.shapes import Inputs, Task
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels._launch import device_name, device_refusal, has_triton
from scalediff_kernels.neighborhood import config, windowed_sdpa

REFERENCE_FLOPS = 20e9


class Ready(NamedTuple):
    """A provider made ready for a task.

    Attributes:
        lay: Inputs to what `run` takes, as a model that used this provider would hold them; not timed.
        run: The call that is timed.
        unlay: What `run` returns to `Outputs`; not timed.
        backend: Who answers, in words, given what `run` takes.
        setup_ms: Made once for a shape, outside the clock, and timed apart.
    """

    lay: Callable[[Inputs], Any]
    run: Callable[[Any], Any]
    unlay: Callable[[Any], Outputs]
    backend: Callable[[Any], str] = lambda laid: ""
    setup_ms: float | None = None


class Provider:
    """One implementation.

    Attributes:
        name: On the command line and in rows.
        function: What it computes.
    """

    name: str
    function: Literal["window", "full", "views"] = "window"

    def refusal(self, task: Task) -> str | None:
        """Why it cannot run the task, in a sentence; None where it may."""
        return None

    def memory(self, task: Task) -> int:
        """Bytes that a call takes beside its inputs, its result among them: an estimate from above."""
        return result_bytes(task)

    def executed(self, task: Task) -> int | None:
        """FLOPs of one call, padding among them; None where that is not known."""
        return task.flops(self.function)

    def prepare(self, task: Task) -> Ready:
        raise NotImplementedError


class Ours(Provider):
    """The library, one of its implementations named."""

    def __init__(self, impl: Literal["triton", "sdpa", "reference"]) -> None:
        self.name, self.impl = impl, impl

    def refusal(self, task: Task) -> str | None:
        if self.impl == "reference" and task.flops("window") > REFERENCE_FLOPS:
            return f"the reference is run up to {REFERENCE_FLOPS / 1e9:.0f} GFLOPs, got {task.flops('window') / 1e9:.0f}"
        if self.impl != "triton":
            return None
        if task.device == "cpu":
            return "the kernel needs a CUDA or ROCm device; Triton's interpreter is nothing to time"
        return device_refusal(torch.device(task.device)) if has_triton() else "the triton package is not installed"

    def memory(self, task: Task) -> int:
        if self.impl == "triton":  # and of text queries fp32 sums, of whole tiles, of every part of their windows
            rows = 128 * -(-task.shape.text // 128)
            sums = 4 * task.shape.batch * rows * task.shape.heads * config.ceil_power_of_two(max(task.shape.head_dim, config.MIN_BLOCK))
            parts = min(config.MOST_PARTS, prod(map(len, task.spans))) if task.rule == "window" else 1
            return result_bytes(task) + parts * sums
        s, (rows, columns) = task.shape, task.window
        needed = result_bytes(task)
        if s.text:  # keys of a window or of all with text before them, queries of a patch; text of a row of windows, turned in fp32
            needed += held_bytes(task, s.tokens, 4 * s.key_heads) + held_bytes(task, prod(s.patch) + s.text, 4 * s.heads)
            needed += 4 * 4 * s.batch * (len(task.spans[1]) + 1) * s.text * s.heads * s.head_dim
        else:  # of a row of windows queries as they are, laid out, attended and laid back, and keys and values
            needed += held_bytes(task, rows * s.grid[1], 4 * s.heads + 2 * s.key_heads)
        if self.impl == "sdpa":
            return needed
        scores = max((prod(s.patch) + s.text) * (rows * columns + s.text), s.text * s.tokens)
        return needed * 4 // task.dtype.itemsize + 3 * 4 * s.batch * s.heads * scores

    def executed(self, task: Task) -> int | None:
        return _tiled_flops(task, device_name(torch.device(task.device))) if self.impl == "triton" else task.flops("window")

    def prepare(self, task: Task) -> Ready:
        how: dict[str, Any] = {"window": task.shape.window, "patch": task.shape.patch, "impl": self.impl}

        def run(inputs: Inputs) -> tuple[Tensor, Tensor | None]:
            if not task.rule:
                return neighborhood_patch_attention(*inputs.image, **how), None
            return joint_neighborhood_patch_attention(*inputs.image, *inputs.text, text_rope=inputs.rope, text_queries=task.rule, **how)  # type: ignore[arg-type]

        def backend(inputs: Inputs) -> str:
            if self.impl != "sdpa":
                return ""
            chosen: list[str] = []

            def seen(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
                chosen.append(answers(q, k, v))
                return F.scaled_dot_product_attention(q, k, v, **how)

            with mock.patch.object(windowed_sdpa, "_sdpa", seen):
                run(inputs)
            return " and ".join(dict.fromkeys(chosen))

        return Ready(as_is, run, image_and_text, backend)


def answers(q: Tensor, k: Tensor, v: Tensor) -> str:
    """The backend that torch chooses for these tensors, `[B, H, S, D]`, among those enabled."""
    choice = torch._fused_sdp_choice(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    return SDPBackend(choice).name.lower().removesuffix("_attention")


def _tiled_flops(task: Task, device: str) -> int:
    """Of the kernel: tiles that hold a query, blocks of keys that hold a key, registers of D rounded up to a power of two."""
    s, width = task.shape, config.ceil_power_of_two(max(task.shape.head_dim, config.MIN_BLOCK))
    total = 0
    for queries in ("image", "text") if task.rule else ("image",):
        spread = queries == "text" and task.rule == "global"  # one window over the grid
        window, patch = (s.grid, s.grid) if spread else (task.window, s.patch)
        chosen = config.launch_config(config.Problem(s.grid, window, patch, s.head_dim, task.dtype.itemsize, s.text, queries), device)
        keys = _round_up(window[0], chosen.key_box[0]) * _round_up(window[1], chosen.key_box[1]) + _round_up(s.text, chosen.text_block)
        if queries == "image":
            axes = zip(task.spans, chosen.query_box, strict=True)
            rows = prod(sum(_round_up(p.query_stop - p.query_start, box) for p in spans) for spans, box in axes)
        else:
            rows = _round_up(s.text, chosen.query_box[1]) * (1 if spread else prod(map(len, task.spans)))
        total += 4 * s.batch * s.heads * width * rows * keys
    return total


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def result_bytes(task: Task) -> int:
    return held_bytes(task, task.shape.tokens, task.shape.heads)


def held_bytes(task: Task, tokens: int, heads: int) -> int:
    """Of so many tokens, in the task's dtype."""
    return task.dtype.itemsize * task.shape.batch * tokens * heads * task.shape.head_dim


def heads_first(x: Tensor) -> Tensor:
    """`[B, ..., H, D]` to `[B, H, S, D]`."""
    return x.flatten(1, -3).transpose(1, 2)


def as_is(inputs: Inputs) -> Inputs:
    return inputs


def image_and_text(found: tuple[Tensor, Tensor | None]) -> Outputs:
    return Outputs(found[0].flatten(1, 2), found[1])
