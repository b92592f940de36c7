"""However a pass is entered, whatever is changed after patching, at whatever size: windows and the report says so, or full attention and
the report and an error or a warning say so."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
import scalediff.patching.call
from tests.scalediff.patching.research_models import Attention
from tests.scalediff.patching.test_entries import ENTRIES, conditions, latents, store_forward
from tests.scalediff.patching.test_unlisted import made
from tests.scalediff.research_models import DiT, PixArt, SiT, UNet

MODELS: dict[str, Callable[[], nn.Module]] = {"DiT": DiT, "SiT": SiT, "PixArt": PixArt, "UNet": UNet}
SIZES = [(4, 4), (2, 3), (8, 2), (9, 6), (6, 9), (8, 8), (5, 12)]
SDPA = F.scaled_dot_product_attention


def by_hand(attention: Attention) -> Callable[[Tensor], Tensor]:
    """The forward of an attention module without scaled_dot_product_attention."""

    def forward(x: Tensor) -> Tensor:
        q, k, v = attention.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        out: Tensor = attention.proj((weights @ v).transpose(1, 2).flatten(2))
        return out

    return forward


def attentions(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]


def nothing(model: nn.Module) -> None:
    pass


def all_by_hand(model: nn.Module) -> None:
    for _, attention in attentions(model):
        attention.forward = by_hand(attention)


def last_by_hand(model: nn.Module) -> None:
    attention = attentions(model)[-1][1]
    attention.forward = by_hand(attention)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "nothing": nothing,
    "a stored forward": lambda model: store_forward(model, []),
    "all by hand": all_by_hand,
    "the last by hand": last_by_hand,
}


@dataclass(frozen=True)
class Case:
    """One drawn use of a patched model."""

    model: str
    entry: str
    change: str
    size: tuple[int, int]
    grid: tuple[int, int] | None
    levels: int | None
    passes_before: int
    strict: bool

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad():
            if self.model == "UNet":
                x = latents(self.size)[:, :, ::2, ::2].contiguous()
                out: Tensor = model.forward(x) if "forward" in self.entry else model(x)
                return out
            return ENTRIES[self.entry](model, latents(self.size), *conditions(self.model))


def drawn(seed: int) -> Case:
    rng = random.Random(seed)
    model = rng.choice(list(MODELS))
    grid, levels = rng.choice([None, None, None, (7, 7), (2, 2)]), rng.choice([None, 3, 3]) if model == "UNet" else None
    return Case(
        model, rng.choice(list(ENTRIES)), rng.choice(list(CHANGES)), rng.choice(SIZES), grid, levels, rng.randrange(2), rng.random() < 0.5
    )  # fmt: skip


class Spy:
    """Counts the calls that are computed in windows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls, own = 0, scalediff.patching.call.Call.attend

        def attend(*args: Any) -> Tensor:
            self.calls += 1
            return own(*args)

        monkeypatch.setattr(scalediff.patching.call.Call, "attend", attend)


@pytest.mark.parametrize("seed", range(60))
def test_windows_and_the_report_says_so_or_full_attention_and_it_is_said(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(seed)
    model, twin = made(MODELS[case.model]), made(MODELS[case.model])
    CHANGES[case.change](twin)
    full, names = case.run(twin), [name for name, _ in attentions(model)]
    spy, said = Spy(monkeypatch), list[str]()
    with (
        scalediff.patch_model(model, grid=case.grid, levels=case.levels, strict=case.strict) as handle,
        warnings.catch_warnings(record=True) as warned,
    ):
        warnings.simplefilter("always")
        for passed in range(case.passes_before + 1):
            if passed == case.passes_before:
                CHANGES[case.change](model)
                spy.calls = 0
            try:
                out = case.run(model)
            except ValueError as error:
                said.append(str(error))
                out = full
        said += [str(warning.message) for warning in warned]
        report = handle.report
    windowed = {row.module for row in report.patched}
    assert spy.calls == sum(row.taken or 0 for row in report.rows), case
    above = case.size[0] * case.size[1] > 16
    if spy.calls:
        assert not torch.equal(out, full) or said, case
        assert windowed, case
        left = set(names) - windowed
        assert not left or said or case.passes_before == 0, (case, left)
        assert all(row.why for row in report.rows if row.module in left), case
    else:
        assert not windowed, case
        assert (out - full).abs().max() <= 1e-12 * full.abs().max(), case
        assert said or not above, case
    if not said:  # nothing was wrong: every attention that the model calls is windowed above the native size, and none below it
        assert windowed == (set(names) if above else set()) or case.change == "the last by hand", case
    assert F.scaled_dot_product_attention is SDPA
