"""Models in the structure of published research code: windows as a mask by hand, the same bits at native size and after unpatching."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff import Layout, Sequence, TextRotation
from tests.conftest import seeded, state_of
from tests.scalediff.families.test_families import allowed
from tests.scalediff.patching.test_entries import ENTRIES
from tests.scalediff.patching.test_unlisted import SDPA, made
from tests.scalediff.research_models import DiT, Flux, Hourglass, HunyuanDiT, LuminaNext, PixArt, SiT, UNet, ids_of

NATIVE, GRID, TEXT = (4, 4), (10, 6), 5


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=seeded(), dtype=torch.float64)


def halves(grid: tuple[int, int]) -> tuple[Any, ...]:
    return random(1, 4, 2 * grid[0], 2 * grid[1]).expand(2, -1, -1, -1), torch.full((2,), 0.5, dtype=torch.float64)


def classes(grid: tuple[int, int]) -> tuple[Any, ...]:
    return *halves(grid), torch.tensor([3, 10])


def captions(grid: tuple[int, int]) -> tuple[Any, ...]:
    return *halves(grid), random(2, TEXT, 8)


def packed(grid: tuple[int, int]) -> tuple[Any, ...]:
    image = random(1, grid[0] * grid[1], 16)
    return image, ids_of(grid, 3), random(1, TEXT, 8), torch.zeros(TEXT, 3, dtype=torch.float64), torch.ones(1, dtype=torch.float64)


def pixels(grid: tuple[int, int]) -> tuple[Any, ...]:
    return random(2, 4, *grid), torch.full((2,), 0.5, dtype=torch.float64)


def grid_of_ids(arguments: Any) -> tuple[int, int]:
    last = arguments["img_ids"][-1]
    return int(last[1]) + 1, int(last[2]) + 1


@dataclass(frozen=True)
class Case:
    """A model, its inputs at a grid, what `patch_model` must be told, and the grids and text of its image attention."""

    kind: Callable[[], nn.Module]
    inputs: Callable[[tuple[int, int]], tuple[Any, ...]]
    arguments: dict[str, Any] = field(default_factory=dict)
    grids: tuple[tuple[int, int], ...] = (GRID,)
    text: int = 0
    entries: tuple[str, ...] = ("call", "forward", "forward_with_cfg")
    modules: int = 2


CASES = {
    "DiT": Case(DiT, classes),
    "SiT": Case(SiT, classes),
    "PixArt": Case(PixArt, captions),
    "Lumina-Next": Case(LuminaNext, captions, {"window": NATIVE}, modules=1),
    "HunyuanDiT": Case(HunyuanDiT, captions, {"window": NATIVE}, entries=("call", "forward"), modules=1),
    "FLUX": Case(
        Flux, packed, {"grid": grid_of_ids, "text": ("prefix", "txt"), "window": NATIVE}, text=TEXT, entries=("call", "forward"), modules=1
    ),
    "U-Net": Case(UNet, lambda grid: pixels(grid)[:1], {"levels": 3}, ((10, 6), (5, 3), (3, 2)), entries=("call", "forward"), modules=3),
    "hourglass": Case(Hourglass, pixels, {"levels": 2, "window": NATIVE}, ((10, 6), (5, 3)), entries=("call", "forward"), modules=1),
}


class Masked:
    """Stands in for scaled_dot_product_attention: the windows of every level as masks, everything else as it is."""

    def __init__(self, case: Case) -> None:
        self.masks, self.calls = {}, 0
        for level, grid in enumerate(case.grids):
            window = tuple(n // 2**level for n in NATIVE)
            area = grid[0] * grid[1]
            mask = torch.ones(case.text + area, case.text + area, dtype=torch.bool)
            mask[case.text :, case.text :] = allowed(grid, window, tuple(max(1, n // 2) for n in window))  # type: ignore[arg-type]
            self.masks[case.text + area] = mask

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        if q.shape[-2] == k.shape[-2] and k.shape[-2] in self.masks:
            self.calls += 1
            attn_mask = self.masks[k.shape[-2]]
        return SDPA(q, k, v, attn_mask, **options)


def enter(entry: str, model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        if entry == "forward_with_cfg":
            return ENTRIES[entry](model, *inputs)
        out: Tensor = model(*inputs) if entry == "call" else model.forward(*inputs)
        return out


@pytest.mark.parametrize(("name", "entry"), [(name, entry) for name, case in CASES.items() for entry in case.entries])
def test_windows_are_those_of_a_mask_by_hand(name: str, entry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = made(case.kind)
    plain, native, state = enter(entry, model, case.inputs(GRID)), enter(entry, model, case.inputs(NATIVE)), state_of(model)
    with warnings.catch_warnings(), scalediff.patch_model(model, text_queries="global", **case.arguments) as handle:
        warnings.simplefilter("error")
        assert torch.equal(enter(entry, model, case.inputs(NATIVE)), native)
        out = enter(entry, model, case.inputs(GRID))
        assert len(handle.report.patched) == case.modules
        taken = sum(row.taken or 0 for row in handle.report.rows)
    assert state_of(model) == state
    assert torch.equal(enter(entry, model, case.inputs(GRID)), plain)
    by_hand = Masked(case)
    monkeypatch.setattr(F, "scaled_dot_product_attention", by_hand)
    expected = enter(entry, model, case.inputs(GRID))
    assert taken == by_hand.calls
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (out - plain).abs().max() > 1e-5 * plain.abs().max()


def test_levels_left_out_are_said() -> None:
    """One grid for a U-Net of three levels: the deeper calls run full attention, and the report and a warning say so."""
    model = made(UNet)
    with scalediff.patch_model(model) as handle, pytest.warns(UserWarning, match=r"attentions.1 runs full attention: .*tokens of 10 x 6"):
        enter("call", model, CASES["U-Net"].inputs(GRID))
    assert [row.status for row in handle.report.rows] == ["patched", "untouched", "untouched"]


class Pooled(UNet):
    """Levels that round down, which `levels=` does not describe."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.AvgPool2d(2) for _ in range(2))


def test_a_layout_gives_other_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    grids = ((10, 6), (5, 3), (2, 1))
    model, case = made(Pooled), Case(Pooled, lambda grid: pixels(grid)[:1], grids=grids)

    def layout(arguments: Any) -> Layout:
        y, x = arguments["x"].shape[-2:]
        return Layout((y, x), tuple(Sequence((y // 2**level, x // 2**level), level) for level in range(3)))

    with scalediff.patch_model(model, layout=layout) as handle:
        out = enter("call", model, case.inputs(GRID))
        assert [row.grid_source for row in handle.report.patched] == ["layout="] * 3
    monkeypatch.setattr(F, "scaled_dot_product_attention", Masked(case))
    expected = enter("call", model, case.inputs(GRID))
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
    monkeypatch.setattr(F, "scaled_dot_product_attention", SDPA)
    with scalediff.patch_model(model, levels=3), pytest.warns(UserWarning, match=r"attentions.2 runs full attention"):
        enter("call", model, case.inputs(GRID))


def test_rotary_text_of_a_model_nobody_listed_is_rotated() -> None:
    model, case = made(Flux), CASES["FLUX"]
    rotation = TextRotation(axes=Flux.axes, theta=10000.0)
    with scalediff.patch_model(model, **case.arguments) as handle:
        without = enter("call", model, case.inputs(GRID))
        assert any("is not rotated for each window" in note for note in handle.report.notes)
    with scalediff.patch_model(model, **case.arguments, text_rope=rotation) as handle:
        assert not torch.allclose(enter("call", model, case.inputs(GRID)), without)
        assert not handle.report.notes
