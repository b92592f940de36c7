"""Whole pictures by several methods: every one yields rows or says why not, composed times are what a clock measures, work is that on
record, and nothing is left changed."""

from __future__ import annotations

import csv
import math
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench.cascade import rows as cascade_rows
from bench.cascade.methods import METHODS, Drawn
from bench.cascade.models import SUBJECTS
from bench.cascade.rows import Bench, Unit
from bench.cascade.watch import Clock, Memory, Watch, composed
from bench.harness.device import forget
from bench.harness.facts import ROOT
from scalediff.patching.networks import denoiser_of
from tests.bench.whole_pictures import TINY, rows_of, unit
from tests.conftest import state_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nothing_stays")]

SKIPPED = {
    ("sdxl-small", "authors-jitter"): "the authors jitter FLUX alone",
    ("sdxl-small", "npa-global"): "queries of text have a rule only in joint attention",
    ("flux-small", "demofusion"): "DemoFusion needs a U-Net",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_every_method_yields_rows_or_says_why_not(
    benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str, method: str
) -> None:
    """On a machine of any speed: no run is too long to be run whole, three times."""
    bench = benches[model]
    monkeypatch.setattr(bench, "limit", math.inf)
    monkeypatch.setattr(cascade_rows, "_ENOUGH", math.inf)
    pipe = bench.drawn.pipe
    state, attributes = state_of(denoiser_of(pipe)), sorted(pipe.vae.__dict__)
    rows = rows_of(bench, unit(model, method))
    assert state_of(denoiser_of(pipe)) == state
    assert sorted(pipe.vae.__dict__) == attributes
    run = rows["run"]
    if why := SKIPPED.get((model, method)):
        assert run["status"] == "skipped"
        assert why in run["note"]
        return
    planned = bench.drawn.plan(METHODS[method], TINY[model])
    assert all(row["status"] == "ok" for row in rows.values()), rows
    assert run["rate_of"] == "measured"
    assert float(run["measured_s"]) > 0 < float(run["composed_s"])
    assert run["runs"] == "3"
    assert float(run["p20_ms"]) <= 1000 * float(run["measured_s"]) * (1 + 1e-4)
    assert float(run["useful_tflop"]) > 0 < float(run["matrix_percent"])
    assert run["steps"] == "+".join(str(one.steps) for one in planned)
    for index, one in enumerate(planned, start=1):
        stage = f"{index}-{one.side}"
        for part in ("step", "denoiser", "attention", "decode"):
            assert float(rows[f"{stage}/{part}"]["p50_ms"]) > 0
        restarted = METHODS[method].kind == "cascade" and index > 1
        assert all((f"{stage}/{part}" in rows) == restarted for part in ("encode", "mixing", "guidance"))
        assert (f"{stage}/cross" in rows) == (model == "sdxl-small")
        calls, passes, step = (
            sum(float(rows[f"{stage}/{part}"]["p50_ms"]) for part in parts if f"{stage}/{part}" in rows)
            for parts in (("attention", "cross"), ("denoiser",), ("step",))
        )
        assert calls < passes * (1 + 1e-4)
        assert passes <= step
        assert rows[f"{stage}/attention"]["backend"] not in ("", "triton")  # on a CPU torch answers
    gates = {name for name in rows if name.startswith("gate")}
    windows = set() if method == "authors-jitter" else {"gate-size", "gate-stage"}
    expected = {"gate-definition"} | windows if METHODS[method].attention == "npa" else set()
    assert gates == (expected or {"views": {"gate-quarters"}, "phases": {"gate-native"}}.get(METHODS[method].kind, set()))


class FakeClock(Clock):
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def mark(self) -> float:
        return self.now

    def seconds(self, first: float, last: float) -> float:
        return last - first

    def wait(self) -> None:
        pass


def passing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """A clock by which a pass takes a second for every token of its samples, encoding 1000 seconds and decoding 100."""
    clock = FakeClock()
    pipe = bench.drawn.pipe

    def passed(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        clock.now += sample.shape[0] * (sample.shape[1] if sample.ndim == 3 else sample.shape[2] * sample.shape[3])

    def slowed(function: Any, seconds: float) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            clock.now += seconds
            return function(*args, **kwargs)

        return call

    hook = denoiser_of(pipe).register_forward_hook(passed, with_kwargs=True)
    monkeypatch.setattr(type(pipe.vae), "encode", slowed(type(pipe.vae).encode, 1000.0))
    monkeypatch.setattr(type(pipe.vae), "decode", slowed(type(pipe.vae).decode, 100.0))
    monkeypatch.setattr(bench, "clock", clock)
    monkeypatch.setattr(clock, "remove", hook.remove, raising=False)
    return clock


@pytest.mark.parametrize(
    ("model", "method", "seconds"),
    [
        ("sdxl-small", "direct", 6 * 2 * 64 + 100),  # steps, both passes of guidance, latents; decoded
        ("sdxl-small", "npa", 6 * 2 * 16 + 100 + 2 * 2 * 64 + 1000 + 100),
        ("sdxl-small", "multidiffusion", 6 * 9 * 2 * 16 + 100),
        ("sdxl-small", "demofusion", 6 * 2 * 16 + 100 + 6 * 13 * 2 * 16 + 100),
        ("flux-small", "authors", 4 * 16 + 100 + 2 * 64 + 1000 + 100),
    ],
)
def test_composed_and_measured_agree_on_a_clock_that_does_not_waver(
    benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str, method: str, seconds: float
) -> None:
    bench = benches[model]
    monkeypatch.setattr(bench, "limit", seconds)
    clock = passing(bench, monkeypatch)
    try:
        run = rows_of(bench, unit(model, method))["run"]
        assert (run["measured_s"], run["composed_s"], run["rate_of"]) == (f"{seconds:.5g}", f"{seconds:.5g}", "measured")
        assert run["runs"] == "1", "what takes long is not run again"
        monkeypatch.setattr(cascade_rows, "_ENOUGH", seconds + 1)
        assert rows_of(bench, unit(model, method))["run"]["runs"] == "2", "no further one after that time"
        monkeypatch.setattr(bench, "limit", seconds - 1)
        run = rows_of(bench, unit(model, method))["run"]
    finally:
        clock.remove()  # type: ignore[attr-defined]
    assert "measured_s" not in run, "what was not run whole has no measured time"
    assert (run["composed_s"], run["rate_of"]) == (f"{seconds:.5g}", "composed")
    assert "composed, not measured" in run["note"]
    assert float(run["tflops"]) == pytest.approx(float(run["useful_tflop"]) / seconds, rel=1e-3)


def test_what_would_take_too_long_to_watch_is_skipped_in_a_sentence(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches["flux-small"]
    monkeypatch.setattr(bench, "_matrix_tflops", lambda dtype: 1e-9)
    rows = rows_of(bench, unit("flux-small", "npa"))
    assert list(rows) == ["run"]
    assert rows["run"]["status"] == "skipped"
    assert "s, at 70% of a matrix product's speed, --limit is 100 s" in rows["run"]["note"]


def test_a_size_that_the_model_cannot_draw_is_skipped_in_a_sentence(benches: dict[str, Bench]) -> None:
    rows = list(benches["flux-small"].rows(Unit("flux-small", 33, "npa", "eager")))
    assert [row["status"] for row in rows] == ["skipped"]
    assert "height and width must be multiples of" in rows[0]["note"]


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_models_of_true_size_do_the_work_that_is_on_record(name: str) -> None:
    """Built from their configurations, here on the meta device: published parameters, bf16, and the TFLOPs of bench/results/flops.csv."""
    with (ROOT / "bench" / "results" / "flops.csv").open(newline="") as file:
        record = {(row["model"], row["size"], row["method"]): float(row["tflops_run"]) for row in csv.DictReader(file)}
    drawn = Drawn(SUBJECTS[name], "meta")
    parameters = list(denoiser_of(drawn.pipe).parameters())
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx({"sdxl": 2.567, "flux": 11.9}[name], rel=1e-3)
    assert {p.dtype for p in [*parameters, *drawn.pipe.vae.parameters()]} == {torch.bfloat16}
    assert (drawn.native, drawn.pipe.vae.use_tiling, drawn.pipe.vae.tile_sample_min_size) == (1024, True, 1024)
    work = drawn.work()

    def tflops(method: str) -> float:
        run, coded = work.run(drawn.plan(METHODS[method], 2048))
        return sum(run) + coded

    tiled = tflops("direct")
    work.tiled = False  # the record is of an autoencoder in one piece
    work._coded.cache_clear()
    spared = 4 * 512 * (256 * 256) ** 2 * (1 - 1 / 4) / 1e12  # its attention, 512 wide, in four tiles
    assert tflops("direct") - tiled == pytest.approx(spared, rel=1e-6)
    for method in ("direct", "multidiffusion", "cascade-full", "npa"):
        assert tflops(method) == pytest.approx(record[name, "2048", method], rel=1e-6), method
    planned = drawn.plan(METHODS["demofusion"], 4096)
    assert [(one.side, one.phase) for one in planned] == [(1024, 1), (2048, 2), (3072, 3), (4096, 4)]


def test_small_windows_cost_less_than_the_grid(benches: dict[str, Bench]) -> None:
    """FLUX's family would name the large model's window, which is the whole grid of a small one."""
    work, drawn = benches["flux-small"].work, benches["flux-small"].drawn
    npa, full = (work.step(drawn.plan(METHODS[name], 64)[-1]) for name in ("npa", "cascade-full"))
    assert npa.attention < 0.5 * full.attention
    assert npa.linear == full.linear


def test_blocks_are_compiled_for_a_unit_and_as_they_were_after(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascade_rows, "BACKEND", "eager")
    bench = benches["flux-small"]
    compiled: list[bool] = []
    draw = bench.drawn.draw
    monkeypatch.setattr(bench.drawn, "draw", lambda *a, **k: (compiled.append(_is_compiled(bench)), draw(*a, **k))[1])
    rows = rows_of(bench, unit("flux-small", "npa", "compiled"))
    assert compiled
    assert all(compiled)
    assert not _is_compiled(bench)
    assert rows["run"]["status"] == rows["gate-stage"]["status"] == "ok"
    assert rows["2-32/attention"]["status"] == "skipped"
    assert "inside compiled graphs" in rows["2-32/attention"]["note"]
    assert rows_of(bench, unit("flux-small", "authors-jitter", "compiled"))["run"]["note"].startswith("a new offset in every call")


def _is_compiled(bench: Bench) -> bool:
    return any(module._compiled_call_impl is not None for module in denoiser_of(bench.drawn.pipe).modules())


def test_what_breaks_is_a_row_and_nothing_stays_changed(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches["flux-small"]
    pipe = bench.drawn.pipe
    state, attributes = state_of(denoiser_of(pipe)), sorted(pipe.vae.__dict__)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("there is no more\nmemory")

    with monkeypatch.context() as broke:
        broke.setattr(type(pipe.vae), "decode", broken)
        rows = rows_of(bench, unit("flux-small", "direct"))
    assert rows["run"]["status"] == "error"
    assert rows["run"]["note"].startswith("OutOfMemoryError: stage 1 of 1, 32 x 32, ran out of memory on cpu")
    assert "\n" not in rows["run"]["note"]
    assert state_of(denoiser_of(pipe)) == state
    assert sorted(pipe.vae.__dict__) == attributes
    assert rows_of(bench, unit("flux-small", "direct"))["run"]["status"] == "ok"


def test_a_watch_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"a watched stage needs at least 3 steps, .* got steps=2"):
        Watch(Clock("cpu"), Memory("cpu"), steps=2)
    watch = Watch(Clock("cpu"), Memory("cpu"), steps=3)
    watch.begin()
    watch.on_step(None, 0, None, {})
    with pytest.raises(RuntimeError, match="every stage must run 3 steps, got 1"):
        watch.on_stage(None)
    with pytest.raises(ValueError, match=r"argument 2 is longer"):
        composed([], [3])


def test_memory_has_a_peak_that_begins_again() -> None:
    memory = Memory("cpu")
    memory.reset()
    if memory.peak() is None:
        pytest.skip("this system does not tell")
    before = memory.peak()
    block = torch.ones(2**26)
    assert memory.peak() - before >= 0.9 * 2**28  # type: ignore[operator]
    del block
    forget("cpu")
    memory.reset()
    assert memory.peak() - before < 0.5 * 2**28  # type: ignore[operator]
