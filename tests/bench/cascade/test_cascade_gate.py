"""The gates of whole pictures: a wrong attention, views in wrong places, what is not finite and a wrong reference do not pass."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
from torch import Tensor

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench.attention.sdpa import Cut
from bench.cascade import gate as cascade_gate
from bench.cascade.gate import Gate, Verdict
from bench.cascade.methods import METHODS, Drawn
from bench.cascade.rows import Bench
from scalediff.patching import call
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from tests.bench.whole_pictures import TINY, rows_of, unit

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_stays")]


@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_a_wrong_form_of_the_authors_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Every window one token further."""
    keys = Cut._keys
    monkeypatch.setattr(Cut, "_keys", lambda cut, axis: (keys(cut, axis) + 1).clamp(max=cut.grid[axis] - 1))
    rows = rows_of(benches[model], unit(model, "authors"))
    assert list(rows) == ["gate-definition", "run"]
    assert {row["status"] for row in rows.values()} == {"FAILED"}
    stage = next(v for v in Gate(benches[model].drawn).check(METHODS["authors"], TINY[model]) if v.name == "stage")
    assert not stage.passed, "the picture must show it, too"


def test_a_wrong_attention_of_ours_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the model alone: its windows half as wide."""

    def narrow(q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], **how: Any) -> Tensor:
        return neighborhood_patch_attention(q, k, v, window=(window[0] // 2, window[1]), **how)

    monkeypatch.setattr(call, "neighborhood_patch_attention", narrow)
    rows = rows_of(benches["sdxl-small"], unit("sdxl-small", "npa"))
    assert [(name, row["status"]) for name, row in rows.items()] == [
        ("gate-definition", "ok"), ("gate-size", "ok"), ("gate-stage", "FAILED"), ("run", "FAILED"),
    ]  # fmt: skip


@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_an_attention_that_is_wrong_on_the_timed_grid_alone_does_not_pass(
    benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    def sized(function: Any) -> Any:
        def call(q: Tensor, *others: Tensor, **how: Any) -> Any:
            found = function(q, *others, **how)
            image = found[0] if isinstance(found, tuple) else found
            if q.shape[1] * q.shape[2] > 16 * 16:
                image[:, -1, -1] += 1e-3
            return found

        return call

    for function in (neighborhood_patch_attention, joint_neighborhood_patch_attention):
        monkeypatch.setattr(cascade_gate, function.__name__, sized(function))
    gate = Gate(benches[model].drawn)
    assert all(verdict.passed for verdict in gate.check(METHODS["npa"], TINY[model]))
    failed = [verdict for verdict in gate.check(METHODS["npa"], 4 * TINY[model]) if not verdict.passed]
    assert [verdict.name for verdict in failed] == ["size"]
    assert f"layer at {4 * TINY[model]} pixels" in failed[0].what


def test_what_ours_is_compared_with_is_not_ours(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever implementation the model is patched with, as the kernel on a GPU."""
    monkeypatch.setattr(Drawn, "impl", "reference")
    used: list[str] = []

    def recorded(*tensors: Tensor, impl: str, **how: Any) -> Tensor:
        used.append(impl)
        return neighborhood_patch_attention(*tensors, **how)

    gate = Gate(benches["sdxl-small"].drawn)
    monkeypatch.setattr(cascade_gate, "neighborhood_patch_attention", recorded)
    gate.prepare(METHODS["npa"])
    assert set(used) == {"sdpa"}


def test_a_result_that_is_not_finite_where_nobody_looks_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """In one element of a large picture, of which a sample is compared."""

    def holed(q: Tensor, *others: Tensor, **how: Any) -> Tensor:
        found = neighborhood_patch_attention(q, *others, **how)
        if q.shape[1] * q.shape[2] > 16 * 16:
            found[0, 1, 1, 0, 0] = float("nan")
        return found

    gate = Gate(benches["sdxl-small"].drawn)
    gate.prepare(METHODS["npa"])
    monkeypatch.setattr(cascade_gate, "neighborhood_patch_attention", holed)
    failed = [verdict for verdict in gate.check(METHODS["npa"], 4 * TINY["sdxl-small"]) if not verdict.passed]
    assert [verdict.name for verdict in failed] == ["size"]


@pytest.mark.parametrize(("error", "allowed"), [(0.0, float("inf")), (float("inf"), float("inf")), (0.0, float("nan"))])
def test_what_is_compared_with_something_not_finite_does_not_pass(error: float, allowed: float) -> None:
    assert not Verdict("stage", error, allowed, "").passed


@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_views_in_the_wrong_places_do_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    multidiffusion, gate = import_module("scalediff.methods.multidiffusion"), Gate(benches[model].drawn)
    assert all(verdict.passed for verdict in gate.check(METHODS["multidiffusion"], TINY[model]))
    average = multidiffusion.average
    monkeypatch.setattr(multidiffusion, "average", lambda parts, where, size: average(parts, where[::-1], size))
    (verdict,) = gate.check(METHODS["multidiffusion"], TINY[model])
    assert not verdict.passed


def test_a_wrong_base_of_demofusion_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = benches["sdxl-small"].drawn
    monkeypatch.setattr(drawn, "arguments", dict(drawn.arguments))
    draw = drawn.draw

    def other_text(method: Any, size: int, **how: Any) -> Any:
        if method.name == "demofusion":
            drawn.arguments["prompt_embeds"] = drawn.arguments["prompt_embeds"] + 1e-3
        return draw(method, size, **how)

    monkeypatch.setattr(drawn, "draw", other_text)
    (verdict,) = Gate(drawn).check(METHODS["demofusion"], 16)
    assert not verdict.passed
