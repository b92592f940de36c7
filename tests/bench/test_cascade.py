"""Whole pictures by several methods: every one yields rows or says why not, gates catch a wrong attention, composed times are what a
clock measures, runs go on where they were, and nothing is left changed."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("diffusers", reason="whole pictures need diffusers")

from bench import cascade, cascade_authors, cascade_gate, cascade_rows, harness
from bench.cascade_authors import Authors
from bench.cascade_clock import HostClock, Memory
from bench.cascade_gate import Gate, Verdict
from bench.cascade_methods import METHODS, Drawn, Work
from bench.cascade_models import SUBJECTS
from bench.cascade_rows import Bench, Limits, Row, Unit
from bench.cascade_watch import Watch, composed
from bench.roofline import Ceilings
from bench.zoo import ZOO
from scalediff import cascade as library_cascade
from scalediff import plan, schedule
from scalediff.families import family_of
from scalediff.hooks import denoiser_of
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood import windowed_sdpa
from tests.conftest import state_of

pytestmark = pytest.mark.slow  # a minute in all

REPLACED = {
    (F, "scaled_dot_product_attention"), (plan, "neighborhood_patch_attention"), (plan, "joint_neighborhood_patch_attention"),
    (plan.Call, "attend"), (library_cascade, "mix_frequencies"), (schedule, "_guided"), (windowed_sdpa, "_sdpa"),
    (cascade_authors, "_sdpa"),
}  # fmt: skip
LIMITS = Limits(100.0, 2)
TINY = {"sdxl-small": 16, "flux-small": 32, "demo": 128}


def ceiling(dtype: torch.dtype) -> Ceilings:
    return Ceilings(1.0, 1.0)


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    before = {(owner, name): getattr(owner, name) for owner, name in REPLACED}
    default = torch.get_default_dtype()
    yield
    assert {(owner, name): getattr(owner, name) for owner, name in REPLACED} == before
    assert torch.get_default_dtype() == default


@pytest.fixture(scope="module")
def benches() -> dict[str, Bench]:
    """Each has drawn once: diffusers leaves something of its own in a model that it has run."""
    found = {name: Bench(name, "cpu", ceiling, LIMITS, view_batch=4) for name in ("sdxl-small", "flux-small")}
    for bench in found.values():
        bench.drawn.pipe(**bench.drawn.arguments, height=16, width=16, num_inference_steps=1, output_type="latent")
    return found


def unit(model: str, method: str, how: str = "eager") -> Unit:
    return Unit(model, TINY[model], method, how)


def rows_of(bench: Bench, one: Unit) -> dict[str, Row]:
    found = list(bench.rows(one, METHODS[one.method]))
    named = {row["row"].removeprefix(f"{one.name}/"): row for row in found}
    assert len(named) == len(found), "rows must be named once"
    assert all(set(row) <= set(cascade.FIELDS) for row in found)
    return named


SKIPPED = {
    ("sdxl-small", "authors-jitter"): "the authors jitter FLUX alone",
    ("sdxl-small", "npa-global"): "queries of text have a rule only in joint attention",
    ("flux-small", "demofusion"): "DemoFusion is a method for U-Nets",
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_every_method_yields_rows_or_says_why_not(benches: dict[str, Bench], model: str, method: str) -> None:
    bench = benches[model]
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
    assert run["runs"] == "3", "what takes a blink is run three times"
    assert float(run["p20_ms"]) <= 1000 * float(run["measured_s"]) * (1 + 1e-4)
    assert float(run["useful_tflop"]) > 0 < float(run["matrix_percent"])
    assert run["steps"] == "+".join(str(one.steps) for one in planned)
    for index, one in enumerate(planned, start=1):
        stage = f"{index}-{one.size[0]}"
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


class FakeClock:
    """Its time passes where it is told to."""

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
        ("sdxl-small", "direct", 30 * 2 * 64 + 100),  # steps, both passes of guidance, latents; decoded
        ("sdxl-small", "npa", 30 * 2 * 16 + 100 + 9 * 2 * 64 + 1000 + 100),
        ("sdxl-small", "multidiffusion", 30 * 9 * 2 * 16 + 100),
        ("sdxl-small", "demofusion", 30 * 2 * 16 + 100 + 30 * 13 * 2 * 16 + 100),
        ("flux-small", "authors", 4 * 16 + 100 + 2 * 64 + 1000 + 100),
    ],
)
def test_composed_and_measured_agree_on_a_clock_that_does_not_waver(
    benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str, method: str, seconds: float
) -> None:
    bench = benches[model]
    monkeypatch.setattr(bench, "_limits", Limits(seconds, 2))
    clock = passing(bench, monkeypatch)
    try:
        run = rows_of(bench, unit(model, method))["run"]
        assert (run["measured_s"], run["composed_s"], run["rate_of"]) == (f"{seconds:.5g}", f"{seconds:.5g}", "measured")
        monkeypatch.setattr(bench, "_limits", Limits(seconds - 1, 2))
        run = rows_of(bench, unit(model, method))["run"]
    finally:
        clock.remove()  # type: ignore[attr-defined]
    assert "measured_s" not in run, "what was not run whole has no measured time"
    assert (run["composed_s"], run["rate_of"]) == (f"{seconds:.5g}", "composed")
    assert "composed, not measured" in run["note"]
    assert float(run["tflops"]) == pytest.approx(float(run["useful_tflop"]) / seconds, rel=1e-3)


def test_what_would_take_too_long_to_watch_is_skipped_in_a_sentence(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    bench = benches["flux-small"]
    monkeypatch.setattr(bench, "_ceiling", lambda dtype: Ceilings(1.0, 1e-9))
    rows = rows_of(bench, unit("flux-small", "npa"))
    assert list(rows) == ["run"]
    assert rows["run"]["status"] == "skipped"
    assert "s, at 70% of a matrix product's speed, --limit is 100 s" in rows["run"]["note"]


def test_a_size_that_the_model_cannot_draw_is_skipped_in_a_sentence(benches: dict[str, Bench]) -> None:
    rows = list(benches["flux-small"].rows(Unit("flux-small", 33, "npa", "eager"), METHODS["npa"]))
    assert [row["status"] for row in rows] == ["skipped"]
    assert "height and width must be multiples of" in rows[0]["note"]


@pytest.mark.parametrize("model", ["sdxl-small", "flux-small"])
def test_a_wrong_form_of_the_authors_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Every window one token further."""
    keys = cascade_authors._Cut._keys
    monkeypatch.setattr(cascade_authors._Cut, "_keys", lambda cut, axis, count: (keys(cut, axis, count) + 1).clamp(max=cut.grid[axis] - 1))
    rows = rows_of(benches[model], unit(model, "authors"))
    assert list(rows) == ["gate-definition", "run"]
    assert {row["status"] for row in rows.values()} == {"FAILED"}
    stage = next(v for v in Gate(benches[model].drawn).check(METHODS["authors"], TINY[model]) if v.name == "stage")
    assert not stage.passed, "the picture must show it, too"


def test_a_wrong_attention_of_ours_does_not_pass(benches: dict[str, Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside the model alone: its windows half as wide."""

    def narrow(q: Tensor, k: Tensor, v: Tensor, *, window: tuple[int, int], **how: Any) -> Tensor:
        return neighborhood_patch_attention(q, k, v, window=(window[0] // 2, window[1]), **how)

    monkeypatch.setattr(plan, "neighborhood_patch_attention", narrow)
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
    asked: list[str] = []

    def recorded(*tensors: Tensor, impl: str, **how: Any) -> Tensor:
        asked.append(impl)
        return neighborhood_patch_attention(*tensors, **how)

    gate = Gate(benches["sdxl-small"].drawn)
    monkeypatch.setattr(cascade_gate, "neighborhood_patch_attention", recorded)
    gate.prepare(METHODS["npa"])
    assert set(asked) == {"sdpa"}


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


@pytest.mark.parametrize("offset", [(0, 0), (3, 1)])
@pytest.mark.parametrize(("grid", "window", "patch"), [((16, 8), (8, 8), (4, 4)), ((7, 11), (6, 4), (3, 2)), ((3, 12), (8, 8), (4, 4))])
def test_the_authors_form_is_ours(
    grid: tuple[int, int], window: tuple[int, int], patch: tuple[int, int], offset: tuple[int, int]
) -> None:  # fmt: skip
    """Ragged grids, windows over the grid; one patch to spare where there is an offset, and text turned for every window."""
    offset = (offset[0] % patch[0], offset[1] % patch[1])
    denoiser = ZOO["FLUX.1"].build()
    family = family_of(denoiser)
    assert family is not None
    rotation = family.rotation(denoiser)
    assert rotation is not None
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, *grid, 2, rotation.channels, generator=rng, dtype=torch.float64) for _ in range(3))
    texts = [torch.randn(2, 5, 2, rotation.channels, generator=rng, dtype=torch.float64) for _ in range(3)]
    how: dict[str, Any] = {"window": window, "patch": patch}
    ours = {**how, "offset": offset, "impl": "reference"}
    authors = Authors(denoiser, offset=offset if any(offset) else None)
    torch.testing.assert_close(authors.image(q, k, v, **how), neighborhood_patch_attention(q, k, v, **ours))
    rope = rotation.tables(grid, window, window, patch, offset)
    image, text = authors.joint(q, k, v, *texts, **how, text_rope=rope)
    expected_image, expected_text = joint_neighborhood_patch_attention(q, k, v, *texts, **ours, text_rope=rope)
    torch.testing.assert_close(image, expected_image, rtol=1e-5, atol=1e-5)  # their tables are fp32 where offsets change
    if any(offset) and any(-(-(n + o) // p) <= -(-n // p) for n, p, o in zip(grid, patch, offset, strict=True)):
        return  # a spare patch of nothing but padding is averaged into the text, which is theirs alone
    assert text is not None
    torch.testing.assert_close(text, expected_text, rtol=1e-5, atol=1e-5)


def test_padded_jitter_computes_a_patch_more_along_each_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """1.56 times the windows at 2048 pixels, as published, and another offset in every call."""
    seen: list[int] = []
    sdpa = cascade_authors._sdpa

    def counted(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
        seen.append(len(q))
        return sdpa(q, k, v, **how)

    q, k, v = (torch.randn(1, 8, 8, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    how: dict[str, Any] = {"window": (4, 4), "patch": (2, 2)}
    monkeypatch.setattr(cascade_authors, "_sdpa", counted)
    jittered = Authors(ZOO["FLUX.1"].build(), jitter=True)
    results = [jittered.image(q, k, v, **how) for _ in range(8)]
    monkeypatch.undo()
    assert set(seen) == {25}
    assert len({float(x.sum()) for x in results}) > 1
    every = [neighborhood_patch_attention(q, k, v, **how, offset=(y, x)) for y in range(2) for x in range(2)]
    assert all(any(torch.allclose(x, one, atol=1e-6) for one in every) for x in results)


def test_other_rules_for_text_are_refused_by_the_authors_form() -> None:
    q = torch.zeros(1, 4, 4, 1, 16)
    text = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="text_queries must be 'window', the authors' rule, got text_queries='global'"):
        Authors(ZOO["FLUX.1"].build()).joint(q, q, q, text, text, text, window=(2, 2), patch=(1, 1), text_queries="global")


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_models_of_true_size_do_the_work_that_is_on_record(name: str) -> None:
    """Built from their configurations, here on the meta device: published parameters, bf16, and the TFLOPs of bench/results/flops.csv."""
    with (harness.ROOT / "bench" / "results" / "flops.csv").open(newline="") as file:
        record = {(row["model"], row["size"], row["method"]): float(row["tflops_run"]) for row in csv.DictReader(file)}
    drawn = Drawn(SUBJECTS[name], "meta")
    parameters = list(denoiser_of(drawn.pipe).parameters())
    assert sum(p.numel() for p in parameters) / 1e9 == pytest.approx({"sdxl": 2.567, "flux": 11.9}[name], rel=1e-3)
    assert {p.dtype for p in [*parameters, *drawn.pipe.vae.parameters()]} == {torch.bfloat16}
    assert (drawn.native, drawn.pipe.vae.use_tiling, drawn.pipe.vae.tile_sample_min_size) == ((1024, 1024), True, 1024)
    direct, in_tiles = METHODS["direct"], Work(drawn)
    tiled = in_tiles.run(direct, drawn.plan(direct, 2048))
    drawn.pipe.vae.disable_tiling()  # the record is of an autoencoder in one piece
    work = Work(drawn)
    spared = 4 * 512 * (256 * 256) ** 2 * (1 - 1 / 4) / 1e12  # its attention, 512 wide, in four tiles
    assert work.run(direct, drawn.plan(direct, 2048)) - tiled == pytest.approx(spared, rel=1e-6)
    for method in ("direct", "multidiffusion", "cascade-full", "npa"):
        told = work.run(METHODS[method], drawn.plan(METHODS[method], 2048))
        assert told == pytest.approx(record[name, "2048", method], rel=1e-6), method
    planned = drawn.plan(METHODS["demofusion"], 4096)
    assert [(one.size[0], one.views) for one in planned] == [(1024, 0), (2048, 9 + 4), (3072, 25 + 9), (4096, 49 + 16)]


def test_small_windows_cost_less_than_the_grid(benches: dict[str, Bench]) -> None:
    """FLUX's family would name the large model's window, which is the whole grid of a small one."""
    work, drawn = benches["flux-small"].work, benches["flux-small"].drawn
    npa, full = (work.step(METHODS[name], drawn.plan(METHODS[name], 64)[-1]) for name in ("npa", "cascade-full"))
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
        Watch(HostClock(), Memory("cpu"), steps=2)
    watch = Watch(HostClock(), Memory("cpu"), steps=3)
    watch.begin()
    watch.on_step(None, 0, None, {})
    watch.on_stage(None)
    with pytest.raises(RuntimeError, match="every stage must run 3 steps, got 1"):
        watch.stages()
    with pytest.raises(ValueError, match="every stage needs a number of steps, got 0 stages"):
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
    memory.give_back()
    memory.reset()
    assert memory.peak() - before < 0.5 * 2**28  # type: ignore[operator]
