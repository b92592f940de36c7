"""What the hook costs beside the attention it calls: `python -m bench.hook`.

Every row is a difference of two calls on tensors so small that the work is next to nothing, timed in turn: with the hook and without.
A median is that of the differences. The CSV is bench/results/hook-<machine>.csv.
"""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.benchmark import Timer

import scalediff
from bench.harness import rows as harness
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.patching import plan

RESULTS = harness.ROOT / "bench" / "results"
SDPA = F.scaled_dot_product_attention
LIMIT = 30.0  # microseconds per attention call
ROUNDS, CALLS = 41, 300
Pair = tuple[str, Callable[[], Any], Callable[[], Any]]


def differences(ours: Callable[[], Any], bare: Callable[[], Any]) -> tuple[float, float, float]:
    """Microseconds per call, percentiles 20, 50 and 80 over the rounds."""
    timers = [Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()) for call in (ours, bare)]
    for timer in timers:
        timer.timeit(CALLS)
    spent = torch.tensor([[timer.timeit(CALLS).median for timer in timers] for _ in range(ROUNDS)], dtype=torch.float64)
    gaps = 1e6 * (spent[:, 0] - spent[:, 1])
    p20, p50, p80 = torch.quantile(gaps, torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return p20, p50, p80


def attention_calls(name: str, grid: tuple[int, int], text: int) -> Iterator[Pair]:
    """A call that is taken, its parts cut and joined but no window computed, against nothing; calls that are not, against torch's own."""
    spec = ZOO[name]
    model = spec.build()
    draw = Draw()
    q, k, v = (draw(1, 2, grid[0] * grid[1] + spec.text, 16) for _ in range(3))
    other = draw(1, 2, text, 16)
    with scalediff.patch_model(model, window=WINDOW):
        spec.run(model, grid)  # the first pass names the callers, once
        target = model.__dict__["_scalediff"]
        entered = target.begin(model, (), spec.inputs(draw, grid, 1))
        assert entered is not None
        try:
            with mock.patch.multiple(plan, neighborhood_patch_attention=_image, joint_neighborhood_patch_attention=_joint):
                yield f"{name}: a call that is taken", lambda: F.scaled_dot_product_attention(q, k, v), lambda: None
            yield (
                f"{name}: a call that is refused",
                lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True),
                lambda: SDPA(q, k, v, is_causal=True),
            )
            yield (
                f"{name}: a call that is not",
                lambda: F.scaled_dot_product_attention(q, other, other),
                lambda: SDPA(q, other, other),
            )
        finally:
            target.end(model, entered, finished=False)


def _image(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
    return q


def _joint(q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
    return q, text_q


class _Still(nn.Module):
    """A denoiser without work: what remains is the pass."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.config = like.config

    def forward(self, sample: Tensor, timestep: int, encoder_hidden_states: Tensor) -> Tensor:
        return sample


def forwards() -> Iterator[Pair]:
    """A whole forward pass of a U-Net without work, at its native size and above."""
    cls = type("UNet2DConditionModel", (_Still,), {})
    bare = cls(ZOO["SD1.5"].build())
    patched = copy.deepcopy(bare)
    draw = Draw()
    text = draw(1, 6, 32)
    scalediff.patch_model(patched, strict=False)
    for what, grid in (("native size", WINDOW), ("above", (8, 8))):
        x = draw(1, 4, *grid)
        yield f"a forward pass, {what}", lambda x=x: patched(x, 0, text), lambda x=x: bare(x, 0, text)  # type: ignore[misc]


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description="Microseconds that the hook adds to attention calls and forward passes.").parse_args(arguments)
    warnings.filterwarnings("ignore", message="scalediff: .* causal")  # the refused call is what is timed
    facts = harness.facts()
    records = []
    with torch.no_grad():
        for pairs in (attention_calls("SD1.5", (8, 8), 7), attention_calls("FLUX.1", (8, 8), 7), forwards()):
            for name, ours, bare in pairs:
                p20, p50, p80 = differences(ours, bare)
                print(f"{name:36} {p50:6.1f} us  ({p20:.1f} - {p80:.1f})")
                records.append({"row": name, "p20_us": f"{p20:.2f}", "p50_us": f"{p50:.2f}", "p80_us": f"{p80:.2f}"} | facts)
    path = RESULTS / f"hook-{harness.slug(facts['machine'])}.csv"
    harness.write_rows(path, ("row", "p20_us", "p50_us", "p80_us", *harness.FACTS), records)
    print(path.relative_to(harness.ROOT))
    slow = [r["row"] for r in records if "a call" in r["row"] and float(r["p50_us"]) > LIMIT]
    if slow:
        raise SystemExit(f"over {LIMIT} microseconds: {', '.join(slow)}")


if __name__ == "__main__":
    main()
