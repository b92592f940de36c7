"""What a patch costs beside the attention it calls: `python -m bench.hook`.

Every row is a difference of two calls on tensors so small that the work is next to nothing, timed in turn: with the hook and without.
Percentiles are those of the differences. The CSV is bench/results/hook-<machine>.csv.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from functools import partial
from itertools import chain
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import scalediff
from bench.harness.command import Benchmark, parser_of
from bench.harness.facts import FACTS
from bench.harness.rows import Row
from bench.harness.timing import percentiles
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.patching import call

SDPA = F.scaled_dot_product_attention
LIMIT = 30.0  # microseconds per attention call
ROUNDS, CALLS = 41, 300
MODELS, GRIDS = ("SD1.5", "FLUX.1"), {"native size": WINDOW, "above": (8, 8)}
CALLED = [f"{name}: a call that is {what}" for name in MODELS for what in ("taken", "refused", "not")]
FIELDS = ("row", "p20_us", "p50_us", "p80_us", *FACTS)
Pair = tuple[str, Callable[[], Any], Callable[[], Any]]


def differences(ours: Callable[[], Any], bare: Callable[[], Any]) -> dict[str, str]:
    """Microseconds per call, percentiles 20, 50 and 80 over the rounds."""
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in (ours, bare)]
    spent = [[timer.timeit(CALLS).median for timer in timers] for _ in range(ROUNDS + 1)]
    gaps = [1e6 * (hooked - plain) for hooked, plain in spent[1:]]  # the first round warms up
    return {f"{name}_us": f"{value:.2f}" for name, value in percentiles(gaps)._asdict().items()}


class Processor:
    """Stands where a model's attention processor does on the stack."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, attn: nn.Module, *tensors: Any, **options: Any) -> Any:
        return self.function(*tensors, **options)


def in_module(self: nn.Module, processor: Processor, *tensors: Any, **options: Any) -> Any:
    """Call a function as the forward of the attention module `self` would."""
    return processor(self, *tensors, **options)


def attention_calls(name: str) -> Iterator[Pair]:
    """A call that is taken, cut and joined without computing a window, against nothing; other calls against torch's own."""
    spec, draw = ZOO[name], Draw()
    model, grid = spec.build(), GRIDS["above"]
    q, k, v = (draw(1, 2, prod(grid) + spec.text, 16) for _ in range(3))
    other = draw(1, 2, 7, 16)
    module = next(part for part in model.modules() if hasattr(part, "set_processor") and hasattr(part, "processor"))
    hooked, bare = Processor(lambda *tensors, **options: F.scaled_dot_product_attention(*tensors, **options)), Processor(SDPA)
    image: Any = {"neighborhood_patch_attention": lambda q, *_, **__: q}
    joint: Any = {"joint_neighborhood_patch_attention": lambda q, k, v, text_q, *_, **__: (q, text_q)}
    with scalediff.patch_model(model, window=WINDOW):
        spec.run(model, grid)  # the first pass names the callers, once
        target = model.__dict__["_scalediff"]
        entered = target.begin(model, (), spec.inputs(draw, grid, 1))
        assert entered is not None
        try:
            with mock.patch.multiple(call, **image, **joint):
                nothing = Processor(lambda q, *_: q)
                ours, plain = (partial(in_module, module, one, q, k, v) for one in (hooked, nothing))
                yield f"{name}: a call that is taken", ours, plain
            for what, tensors, causal in (("refused", (q, k, v), True), ("not", (q, other, other), False)):
                ours, plain = (partial(in_module, module, one, *tensors, is_causal=causal) for one in (hooked, bare))
                yield f"{name}: a call that is {what}", ours, plain
        finally:
            target.end(model, entered, finished=False)


def forwards() -> Iterator[Pair]:
    """A whole forward pass of a U-Net without work, at its native size and above: what remains is the pass."""
    unet = ZOO["SD1.5"].build()
    still = {
        "forward": lambda self, sample, timestep, encoder_hidden_states: sample, "config": unet.config, "__module__": type(unet).__module__,
    }  # fmt: skip
    bare = type("UNet2DConditionModel", (nn.Module,), still)()
    patched, draw = copy.deepcopy(bare), Draw()
    text = draw(1, 6, 32)
    scalediff.patch_model(patched, strict=False)
    for what, grid in GRIDS.items():
        x = draw(1, 4, *grid)
        yield f"a forward pass, {what}", lambda x=x: patched(x, 0, text), lambda x=x: bare(x, 0, text)  # type: ignore[misc]


def measured(finished: Set[str]) -> Iterator[tuple[str, Row]]:
    """A row for every pair that is not finished; exits with a message where a call costs more than LIMIT."""
    warnings.filterwarnings("ignore", message="scalediff: .* causal")  # the refused call is what is timed
    slow = []
    for name, ours, bare in chain(*map(attention_calls, MODELS), forwards()):
        if name not in finished:
            row = differences(ours, bare)
            yield name, row
            slow += [name] if name in CALLED and float(row["p50_us"]) > LIMIT else []
    if slow:
        raise SystemExit(f"over {LIMIT} microseconds: {', '.join(slow)}")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    parser = parser_of("hook", "Microseconds that the hook adds to attention calls and forward passes.")
    options = parser.parse_args(arguments)
    wanted = dict.fromkeys([*CALLED, *(f"a forward pass, {what}" for what in GRIDS)], True)
    Benchmark("hook", FIELDS, FACTS, line).run(parser, options, arguments, wanted=wanted, measure=measured)


def line(row: Row) -> str:
    return f"{row['row']:36} {row['p50_us']} us  ({row['p20_us']} - {row['p80_us']})"


if __name__ == "__main__":
    main()
