"""The attention benchmark: every provider computes what it says, a wrong one is not timed, work is counted by hand, runs resume."""

from __future__ import annotations

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import attention, command, harness, providers, providers_compiled, roofline
from bench.flops import views
from bench.gate import GateFailed, Outputs, truth
from bench.providers import Ready
from bench.providers_compiled import PROVIDERS
from bench.shapes import CPU_SHAPES, QUICK, SHAPES, Inputs, Shape, Task, tasks, view_starts
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.geometry import attention_bytes

EVEN = Shape((16, 24), (8, 8), (4, 4), 2, 16, batch=2, dtype=torch.float32)
ODD = Shape((13, 18), (8, 6), (4, 3), 4, 16, text=9, groups=2, dtype=torch.float32)
COVERED = Shape((6, 5), (8, 8), (4, 4), 2, 16, text=3, dtype=torch.float32)
SMALL = [("even", EVEN, ""), ("odd", ODD, "window"), ("odd", ODD, "global"), ("covered", COVERED, "window"), ("covered", COVERED, "global")]
TASKS = [Task(name, shape, torch.float32, "cpu", rule) for name, shape, rule in SMALL]
HERE = [name for name in PROVIDERS if not name.endswith(("cudnn", "efficient"))]

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore:return_lse is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A benchmark of two small shapes on a checkout without changes; the path of its CSV."""
    monkeypatch.setattr(attention, "SHAPES", {"even": EVEN, "odd": ODD})
    monkeypatch.setattr("bench.shapes.SHAPES", {"even": EVEN, "odd": ODD})
    monkeypatch.setattr(attention, "ceilings", lambda *_, **__: roofline.Ceilings(10.0, 0.1))
    monkeypatch.setattr("bench.harness._commit", lambda: "0123abc")
    monkeypatch.setattr("scalediff.allocator.keep_freed_memory", lambda: True)  # for the whole process, and this one goes on
    monkeypatch.setattr(attention, "CPU_CACHE", 2**16)
    return tmp_path / "rows.csv"


def outputs(task: Task, name: str) -> tuple[Inputs, Outputs]:
    inputs, ready = task.inputs(3), PROVIDERS[name].prepare(task)
    return inputs, ready.unlay(ready.run(ready.lay(inputs)))


def run(path: Path, *arguments: str) -> tuple[list[dict[str, str]], Any]:
    """Rows of the CSV, and the exit status or message."""
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", "--seconds", "0.001", "--csv", str(path), *arguments])
    with path.open(newline="") as file:
        return list(csv.DictReader(file)), stop.value.code


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.rule}")
def test_a_provider_computes_what_it_says(task: Task, name: str) -> None:
    """The whole result against the library's reference in fp64, not through the gate; views one by one."""
    if name == "natten":
        pytest.importorskip("natten", reason="pip install --no-build-isolation --no-deps natten (needs cmake)")
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("the interpreter stands for the kernel only where there is no GPU")
    provider = PROVIDERS[name]
    if name != "triton" and (refusal := provider.refusal(task)):
        assert refusal.endswith(("'window'", "'global'")), "what small shapes are refused for is the rule, and the other one is named"
        return
    inputs, (image, text) = outputs(task, name)
    q, k, v = (x.double() for x in inputs.image)
    texts = [x.double() for x in inputs.text]
    if provider.function == "views":
        height, width = task.window
        found = image.unflatten(1, (len(task.views), height, width))
        for n, (y, x) in enumerate(task.views):
            seen = [t[:, y : y + height, x : x + width] for t in (q, k, v)]
            torch.testing.assert_close(found[:, n].double(), _full(seen, texts, task)[0], atol=2e-6, rtol=0)
        return
    exact, exact_text = _full([q, k, v], texts, task) if provider.function == "full" else _windows([q, k, v], texts, inputs)
    torch.testing.assert_close(image.double(), exact.flatten(1, 2), atol=2e-6, rtol=0)
    assert (text is None) == (exact_text is None)
    if text is not None and exact_text is not None:
        torch.testing.assert_close(text.double(), exact_text, atol=2e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device")
@pytest.mark.parametrize("name", PROVIDERS)
def test_a_provider_passes_its_gate_on_a_gpu(name: str) -> None:
    """In bf16, uncompiled where it is compiled; a backend that a card lacks says so in an error."""
    for shape in (Shape((64, 64), (32, 32), (16, 16), 4, 64, batch=2), Shape((40, 56), (32, 32), (16, 16), 4, 128, text=77)):
        for rule in shape.rules:
            task = Task("gpu", shape, torch.bfloat16, "cuda", rule)
            if PROVIDERS[name].refusal(task) is None:
                try:
                    inputs, found = outputs(task, name)
                except RuntimeError as error:
                    assert "No available kernel" in str(error)  # noqa: PT017
                    continue
                truth(inputs, PROVIDERS[name].function).check(found)


def _windows(image: list[Tensor], text: list[Tensor], inputs: Inputs) -> tuple[Tensor, Tensor | None]:
    s = inputs.task.shape
    if not s.text:
        return neighborhood_patch_attention(*image, window=s.window, patch=s.patch, impl="reference"), None
    rope = None if inputs.rope is None else (inputs.rope[0].double(), inputs.rope[1].double())
    how: dict[str, Any] = {"window": s.window, "patch": s.patch, "text_rope": rope, "text_queries": inputs.task.rule}
    return joint_neighborhood_patch_attention(*image, *text, **how, impl="reference")  # type: ignore[misc]


def _full(image: list[Tensor], text: list[Tensor], task: Task) -> tuple[Tensor, Tensor | None]:
    """One window over the whole grid."""
    grid = (image[0].shape[1], image[0].shape[2])
    if not task.shape.text:
        return neighborhood_patch_attention(*image, window=grid, patch=grid, impl="reference"), None
    return joint_neighborhood_patch_attention(*image, *text, window=grid, patch=grid, text_queries="global", impl="reference")  # type: ignore[misc]


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.rule}")
def test_the_gate_finds_one_wrong_patch_one_wrong_text_and_one_value_nobody_wrote(task: Task) -> None:
    inputs, (image, text) = outputs(task, "sdpa")
    right = truth(inputs, "window")
    assert all(error < 1e-5 for error in right.check(Outputs(image, text)))
    (y0, y1, _, _), (x0, x1, _, _) = task.spans[0][-1], task.spans[1][0]
    wrong = image.unflatten(1, task.shape.grid).clone()
    wrong[:, y0:y1, x0:x1, -1] += 1e-3
    with pytest.raises(GateFailed, match="exceeds the budget"):
        right.check(Outputs(wrong.flatten(1, 2), text))
    unwritten = image.clone()
    unwritten[-1, 17, 0, 3] = float("nan")
    with pytest.raises(GateFailed, match="image: the result has NaN"):
        right.check(Outputs(unwritten, text))
    if text is not None:
        with pytest.raises(GateFailed, match="exceeds the budget"):
            right.check(Outputs(image, text * 1.01))
        with pytest.raises(GateFailed, match="text is missing"):
            right.check(Outputs(image, None))


def test_the_gate_stands_where_python_drops_asserts() -> None:
    code = (
        "import torch\n"
        "from bench.gate import GateFailed, Outputs, Sample, Truth\n"
        "from scalediff_kernels.testing import assert_within_budget\n"
        "tokens, right = torch.arange(2), torch.ones(1, 2, 1, 1)\n"
        "nan, zero, double = right * torch.nan, torch.zeros(1, 2, 1, 1), right.double()\n"
        "truth = Truth(Sample(tokens, double, right), Sample(tokens, double, right))\n"
        "for image, text in ((zero, right), (nan, right), (right, None), (double, right)):\n"
        "    try: truth.check(Outputs(image, text))\n"
        "    except GateFailed as failed: print(failed)\n"
        "for result, exact in ((right, double * torch.nan), (nan, double)):\n"
        "    try: assert_within_budget(result, right, exact)\n"
        "    except AssertionError as failed: print(failed)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(harness.ROOT / part) for part in (".", "kernels"))}
    told = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True, cwd=harness.ROOT, env=environment)
    assert told.stdout.splitlines() == [
        "image: error 1.000e+00 exceeds the budget 1.192e-07",
        "image: the result has NaN or infinite values",
        "text is missing from the result",
        "image: compared in different dtypes, got actual.dtype=torch.float64, eager.dtype=torch.float32",
        "error nan exceeds the budget nan",
        "the result has NaN or infinite values",
    ]


def test_the_gate_looks_at_every_patch() -> None:
    """Of few patches all, 32 queries in each and its corners; of many 256, the first and the last among them."""
    task = Task("few", Shape((48, 48), (16, 16), (12, 12), 1, 8), torch.float32, "cpu")
    tokens = truth(task.inputs(0), "window").image.tokens
    y, x = tokens // 48, tokens % 48
    for i in range(4):
        for j in range(4):
            inside = (y // 12 == i) & (x // 12 == j)
            whole = (i, j) in ((0, 0), (3, 3))
            assert int(inside.sum()) == 144 if whole else 32 <= int(inside.sum()) <= 36
            assert {(int(a) % 12, int(b) % 12) for a, b in zip(y[inside], x[inside], strict=True)} >= {(0, 0), (0, 11), (11, 0), (11, 11)}
    many = truth(Task("many", Shape((40, 40), (2, 2), (2, 2), 1, 8), torch.float32, "cpu").inputs(0), "window").image.tokens
    assert len(many) == 256 * 4
    assert {0, 1599} <= set(many.tolist())


def test_full_attention_that_stands_for_windows_fails_its_gate() -> None:
    inputs, found = outputs(TASKS[0], "full")
    with pytest.raises(GateFailed, match="exceeds the budget"):
        truth(inputs, "window").check(found)
    truth(inputs, "full").check(found)


def _peak(call: Callable[[], Any]) -> int:
    """Bytes that a call allocates on the host at once."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        kept = call()
    events = sorted((e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns())
    assert kept is not None
    held = most = 0
    for event in events:
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("rule", ["", "window", "global"])
@pytest.mark.parametrize("name", ["sdpa", "reference", "gather", "loop", "full", "multidiffusion"])
def test_memory_is_estimated_from_above(name: str, rule: str) -> None:
    """What eager torch allocates for the CPU's shapes; compiled providers are another matter."""
    shape = CPU_SHAPES["cpu-64-text" if rule else "cpu-64"]
    provider, task = PROVIDERS[name], Task("x", shape, torch.float32, "cpu", rule)
    if provider.refusal(task):
        return
    ready = provider.prepare(task)
    laid = ready.lay(task.inputs(0))
    assert 0 < _peak(lambda: ready.run(laid)) <= provider.memory(task)


def test_flex_attention_is_told_what_is_true_of_its_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row is without a key, padded ones among them; an option that torch does not know is not named."""
    from torch.nn.attention import flex_attention

    assert providers_compiled._kernel_options() == {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True, "USE_TMA": True}
    for known in (type("Options", (), {"__annotations__": {"PRESCALE_QK": bool}}), None):
        monkeypatch.setattr(flex_attention, "FlexKernelOptions", known)
        assert providers_compiled._kernel_options() == {"ROWS_GUARANTEED_SAFE": True, "PRESCALE_QK": True}
    for task in (
        TASKS[0],
        TASKS[2],
        TASKS[4],
        Task("x", Shape((37, 45), (16, 20), (8, 5), 1, 8, text=130), torch.float32, "cpu", "global"),
    ):
        tiles = providers_compiled.tiling(task)
        i = torch.arange(tiles.tokens)
        assert providers_compiled.mask_of(task, tiles)(i[:1], i[:1], i[:, None], i[None]).any(1).all()


def test_a_mask_of_blocks_is_that_of_its_tokens() -> None:
    """FlexAttention computes what is listed: blocks that hold no pair are absent, full ones hold nothing else."""
    shape = Shape((37, 45), (16, 20), (8, 5), 1, 8, text=130)
    for task in (
        Task("x", shape, torch.float32, "cpu", "global"),
        Task("x", Shape((32, 64), (16, 32), (8, 16), 1, 8), torch.float32, "cpu"),
    ):
        tiles = providers_compiled.tiling(task)
        found = providers_compiled.blocks(task, tiles)
        i = torch.arange(tiles.tokens)
        dense = providers_compiled.mask_of(task, tiles)(i[:1], i[:1], i[:, None], i[None])
        cut = dense.expand(tiles.tokens, tiles.tokens).unflatten(1, (-1, 128)).unflatten(0, (-1, 128))
        assert torch.equal(found.some, cut.any(3).any(1))
        assert torch.equal(found.all, cut.all(3).all(1))
        assert found.all.any(), "no block is full: the test shows nothing"
        assert (~found.some).any(), "no block is empty: the test shows nothing"
        listed = providers_compiled.block_mask(task, tiles)
        assert torch.equal(listed.to_dense()[0, 0].bool(), found.some)
        x = torch.arange(float(task.shape.tokens)).view(1, -1, 1, 1)
        image, text = x[:, task.shape.text :].unflatten(1, shape.grid if task.rule else (32, 64)), x[:, : task.shape.text]
        back, back_text = tiles.untiled(tiles.tiled(image, text), task)
        assert torch.equal(back, image)
        assert back_text is None or torch.equal(back_text, text)


def test_work_by_hand() -> None:
    sdxl, flux = (
        Task(name, SHAPES[name], SHAPES[name].dtype, "cpu", rule) for name, rule in (("sdxl-64-4096", ""), ("flux-4096", "window"))
    )
    assert sdxl.flops("window") == 2 * 4 * 64 * 10 * 65536 * 4096
    assert sdxl.flops("full") == 2 * 4 * 64 * 10 * 65536**2
    assert sdxl.flops("views") == 49 * 2 * 4 * 64 * 10 * 4096**2
    assert flux.flops("window") == 4 * 128 * 24 * (65536 * 4608 + 64 * 512 * 4608)
    assert flux.flops("full") == 4 * 128 * 24 * 66048**2
    assert Task("flux-4096", SHAPES["flux-4096"], torch.bfloat16, "cpu", "global").flops("window") == 4 * 128 * 24 * (
        65536 * 4608 + 512 * 66048
    )
    s = SHAPES["sdxl-64-4096"]
    assert sdxl.bytes("full") == attention_bytes(grid=s.grid, heads=s.heads, head_dim=s.head_dim, itemsize=2, batch=2)
    assert sdxl.bytes("views") == 49 * 4 * 2 * 2 * 64 * 10 * 4096
    assert Task("x", ODD, torch.float32, "cpu", "global").bytes("full") == 4 * 16 * (13 * 18 + 9) * (4 + 2 + 2 + 4)


def test_executed_work_by_hand() -> None:
    """Padding is executed and not useful: of the canvas, of blocks, of the kernel's boxes and of the head dim in registers."""
    uhd = Task("flux-uhd", SHAPES["flux-uhd"], torch.bfloat16, "cpu", "global")
    text = 4 * 128 * 24 * 512 * (512 + 135 * 240)
    assert PROVIDERS["gather"].executed(uhd) == 4 * 128 * 24 * (160 * 256) * (4096 + 512) + text
    assert PROVIDERS["loop"].executed(uhd) == uhd.flops("window")
    plain = Task("flux-image-4096", SHAPES["flux-image-4096"], torch.bfloat16, "cpu")
    assert PROVIDERS["flex"].executed(plain) == plain.flops("window"), "tiles divide windows and patches here: nothing is wasted"
    assert providers._tiled_flops(plain, "sm_90") == plain.flops("window")
    small = Task("sd15", SHAPES["sd15-64-2048"], torch.float16, "cpu")
    assert providers._tiled_flops(small, "sm_90") == small.flops("window") * 64 // 40
    ragged = Task("x", Shape((256, 256), (64, 64), (32, 32), 10, 64, text=77), torch.bfloat16, "cpu", "global")  # blocks of 64
    assert providers._tiled_flops(ragged, "sm_90") == 4 * 64 * 10 * (65536 * (4096 + 128) + 128 * (65536 + 128))
    assert PROVIDERS["natten"].executed(plain) is None


def test_views_are_those_that_are_counted_elsewhere() -> None:
    for length, native in ((128, 64), (512, 64), (135, 64), (64, 64), (65, 64)):
        starts = view_starts(length, native)
        assert len(starts) == views(16 * length, 16 * native)
        assert (starts[0], starts[-1]) == (0, length - native)


def test_shapes_are_those_of_the_models() -> None:
    grids = {name: (s.grid, s.window, s.patch, s.heads, s.head_dim, s.text) for name, s in SHAPES.items()}
    assert grids["flux-8192"] == ((512, 512), (64, 64), (32, 32), 24, 128, 512)
    assert grids["sdxl-32-2048"] == ((64, 64), (32, 32), (16, 16), 20, 64, 0)
    assert grids["sd15-32-4096"] == ((256, 256), (32, 32), (16, 16), 8, 80, 0)
    assert SHAPES["lumina-next-4096"].key_heads == 8
    assert {name for name, shape in CPU_SHAPES.items() if shape.text} == {"cpu-64-text"}
    assert all(shape.dtype == torch.float32 for shape in CPU_SHAPES.values())
    assert set(QUICK) <= set(SHAPES)
    assert [t.rule for t in tasks(["flux-4096"], None, "cpu")] == ["window", "global"]
    assert [t.dtype for t in tasks(["sdxl-64-2048"], None, "cpu")] == [torch.float16]


def test_a_run_names_every_row_and_times_what_passed(small: Path) -> None:
    names = ["sdpa", "gather", "full", "full-cudnn", "triton", "multidiffusion"]
    rows, status = run(small, "--shape", "even", "odd", "--provider", *names)
    assert status == 0
    assert [r["row"] for r in rows] == [f"{task}/{name}" for task in ("even/fp32", "odd/fp32/window", "odd/fp32/global") for name in names]
    by_name = {r["row"]: r for r in rows}
    for row in rows:
        assert (row["p50_ms"] != "") == (row["status"] == "ok")
        assert (row["note"] != "") == (row["status"] == "skipped")
        assert (row["commit"], row["torch"], row["python"]) == ("0123abc", torch.__version__, platform.python_version())
    timed = by_name["odd/fp32/global/gather"]
    assert float(timed["p20_ms"]) <= float(timed["p50_ms"]) <= float(timed["p80_ms"])
    assert float(timed["executed_gflop"]) > float(timed["useful_gflop"])
    assert float(timed["matrix_percent"]) == pytest.approx(100 * float(timed["tflops"]) / 0.1, rel=1e-2)
    assert timed["backend"] == "flash"
    assert int(timed["sets"]) > 1
    assert by_name["even/fp32/full-cudnn"]["note"] == "torch has no cudnn attention on CPUs"
    assert "CUDA" in by_name["even/fp32/triton"]["note"]
    assert "see the rule 'global'" in by_name["odd/fp32/window/full"]["note"]


def _shifted(monkeypatch: pytest.MonkeyPatch, name: str, by: float) -> None:
    own = PROVIDERS[name].prepare

    def prepare(task: Task) -> Ready:
        ready = own(task)
        return ready._replace(unlay=lambda out: Outputs(ready.unlay(out).image + by, ready.unlay(out).text))

    monkeypatch.setattr(PROVIDERS[name], "prepare", prepare)


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    for name in ("sdpa", "gather"):
        _shifted(monkeypatch, name, 1e-3)
    rows, status = run(small, "--shape", "even", "--provider", "sdpa", "gather", "loop")
    assert status == "ours did not run as it should: even/fp32/sdpa"
    assert [r["status"] for r in rows] == ["FAILED", "FAILED", "ok"]
    assert all("exceeds the budget" in r["note"] and r["p50_ms"] == "" for r in rows[:2])


def test_what_cannot_run_says_so(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    def broken(task: Task) -> Ready:
        raise RuntimeError("no kernel\nfor this")

    def asserting(task: Task) -> Ready:
        raise AssertionError("of a compiler")

    monkeypatch.setattr(PROVIDERS["loop"], "prepare", broken)
    monkeypatch.setattr(PROVIDERS["flex"], "prepare", asserting)
    monkeypatch.setattr(attention, "free_memory", lambda device: 4_000_000)
    monkeypatch.setattr(providers_compiled, "find_spec", lambda name: None)
    rows, status = run(small, "--shape", "even", "--provider", "loop", "flex", "full-math", "natten")
    assert status == 0
    assert [(r["status"], r["note"]) for r in rows] == [
        ("error", "RuntimeError: no kernel"),
        ("error", "AssertionError: of a compiler"),
        ("skipped", "needs about 0.0 GB, 0.0 GB are free"),
        ("skipped", "the natten package is not installed"),
    ]


def test_estimates_refuse_what_no_machine_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of math attention over 8192 px; what gathers FLUX's windows fits a large GPU."""
    flux = Task("flux-8192", SHAPES["flux-8192"], torch.bfloat16, "cpu", "global")
    assert PROVIDERS["full-math"].memory(flux) > 1e13
    assert 12.9e9 < PROVIDERS["gather"].memory(flux) < 60e9
    assert PROVIDERS["triton"].memory(flux) == 2 * 24 * 128 * (512 * 512 + 512)
    assert "the reference is run up to 20 GFLOPs" in (PROVIDERS["reference"].refusal(flux) or "")


def test_what_loses_the_device_ends_the_run_and_is_not_tried_again(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    lost = []

    def illegal(task: Task) -> Ready:
        lost.append(task.name)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(PROVIDERS["gather"], "prepare", illegal)
    monkeypatch.setattr("bench.harness.device_lost", lambda device: bool(lost))
    arguments = ("--shape", "even", "--provider", "gather", "full")
    (row,), status = run(small, *arguments)
    assert status == "the device was lost in even/fp32/gather: the same command goes on after it"
    assert (row["status"], row["note"]) == ("FAILED", "RuntimeError: an illegal memory access was encountered")
    lost.clear()
    rows, status = run(small, *arguments)
    assert [r["status"] for r in rows] == ["FAILED", "ok"]
    assert (status, lost) == (0, [])


def test_what_is_counted_after_the_clock_leaves_the_time(
    monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(call: Any, device: str) -> Any:
        raise RuntimeError("CUPTI is busy\nwith another")

    found: dict[str, Any] = {
        "peak_memory": lambda call, device: 2_500_000,
        "kernels": lambda call, device: [("small", 1.0), ("large", 2.0)],
    }
    notes = []
    for replaced in ({}, {"kernels": lambda call, device: []}, {"peak_memory": broken}, {"peak_memory": broken, "kernels": broken}):
        for name, function in (found | replaced).items():
            monkeypatch.setattr(attention, name, function)
        (row,), status = run(small, "--shape", "even", "--provider", "gather", "--again")
        assert (status, row["status"], row["p50_ms"] != "") == (0, "ok", True)
        assert row["peak_megabytes"] == ("" if "peak_memory" in replaced else "2.5")
        assert (row["launches"], row["kernel"]) == (("", "") if "kernels" in replaced else ("2", "large"))
        assert row["note"] in capsys.readouterr().out
        notes.append(row["note"])
    memory, kernels = (f"{what} not told: RuntimeError: CUPTI is busy" for what in ("peak memory", "kernels"))
    assert notes == ["", "kernels not told: the profiler saw none", memory, f"{memory}; {kernels}"]


def test_what_loses_the_device_after_the_clock_ends_the_run_too(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    monkeypatch.setattr("bench.harness.device_lost", lambda device: True)
    (row,), status = run(small, "--shape", "even", "--provider", "gather", "full")
    assert (row["status"], status) == ("ok", "the device was lost in even/fp32/gather: the same command goes on after it")


def test_freed_memory_is_kept_where_the_host_measures(monkeypatch: pytest.MonkeyPatch, small: Path) -> None:
    kept: list[int] = []
    monkeypatch.setattr("scalediff.allocator.keep_freed_memory", lambda: kept.append(1))
    run(small, "--shape", "even", "--provider", "gather")
    run(small, "--shape", "even", "--provider", "gather", "--no-measure")
    assert kept == [1]


def test_what_is_named_twice_is_measured_once(small: Path) -> None:
    rows, _ = run(small, "--shape", "even", "even", "--provider", "gather", "gather", "--dtype", "fp32", "fp32", "--again")
    assert [r["row"] for r in rows] == ["even/fp32/gather"]


def test_rows_are_taken_as_they_are(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that are wanted, as sentences or JSON; those that are not there are named."""
    run(small, "--shape", "even", "--provider", "gather", "full-cudnn")
    before = small.read_text()
    capsys.readouterr()
    wanted = ("--shape", "even", "--provider", "gather", "loop", "full-cudnn", "--no-measure")
    rows, status = run(small, *wanted)
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith(f"even/fp32/gather: {rows[0]['p50_ms']} ms")
    assert told[1:] == ["even/fp32/loop: not in rows.csv", "even/fp32/full-cudnn: skipped, torch has no cudnn attention on CPUs"]
    run(small, *wanted, "--json")
    out, err = capsys.readouterr()
    assert [json.loads(line) for line in out.splitlines()] == rows
    assert err == "even/fp32/loop: not in rows.csv\n"
    assert (status, small.read_text()) == (0, before)


def test_a_second_run_goes_on(monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, _ = run(small, "--shape", "even", "--provider", "sdpa", "full-cudnn")
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa", "loop", "full-cudnn")
    assert [r["row"] for r in rows] == ["even/fp32/sdpa", "even/fp32/full-cudnn", "even/fp32/loop"]
    assert rows[0] == first[0], "it stands"
    assert rows[1]["command"] != first[1]["command"], "what was skipped is tried again"
    assert "even/fp32/sdpa: as measured before" in capsys.readouterr().out
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa", "--again")
    assert rows[0]["command"] != first[0]["command"]
    monkeypatch.setattr("bench.harness._commit", lambda: "4567def")
    rows, _ = run(small, "--shape", "even", "--provider", "sdpa")
    assert [(r["provider"], r["commit"]) for r in rows] == [("sdpa", "4567def"), ("full-cudnn", "0123abc"), ("loop", "0123abc")]


def test_json_lines_and_a_comparison(monkeypatch: pytest.MonkeyPatch, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(small, "--shape", "even", "--provider", "sdpa", "loop")
    other = small.with_name("other.csv")
    other.write_text(small.read_text())
    capsys.readouterr()
    for standing in ((), ("--again",)):
        rows, _ = run(small, "--shape", "even", "--provider", "sdpa", "--json", "--compare", str(other), *standing)
        told = capsys.readouterr()
        assert [json.loads(row) for row in told.out.splitlines()] == rows[:1]
        assert "even/fp32/sdpa: " in told.err
    other.write_text(small.read_text().replace(f",{rows[0]['p50_ms']},", ",fast,"))
    run(small, "--shape", "even", "--provider", "sdpa", "--no-measure", "--compare", str(other))
    assert "even/fp32/sdpa: p50_ms must be a positive number, got 'fast' there" in capsys.readouterr().out
    other.write_text(small.read_text())
    monkeypatch.setattr("bench.harness._commit", lambda: "4567def")
    run(small, "--shape", "even", "--provider", "sdpa", "--compare", str(other))
    assert "not the same commit: here 4567def, there 0123abc; the ratios below hold that too" in capsys.readouterr().out
    run(small, "--shape", "even", "--provider", "sdpa", "loop", "--compare", str(other), "--no-measure")
    assert "not the same commit: here 0123abc and 4567def, there 0123abc" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--shape", "flux-9000"], f"--shape takes {', '.join([*SHAPES, *CPU_SHAPES])}, got flux-9000"),
        (["--provider", "triton", "fa4"], f"--provider takes {', '.join(PROVIDERS)}, got fa4"),
        (["--dtype", "fp8"], "--dtype takes bf16, fp16, fp32, got fp8"),
        (["--seconds", "0"], "--seconds must be positive and finite, got 0.0"),
        (["--seconds", "inf"], "--seconds must be positive and finite, got inf"),
        (["--seconds", "nan"], "--seconds must be positive and finite, got nan"),
        (["--compare", "nowhere.csv"], "--compare takes a CSV of this benchmark, got nowhere.csv, which is no file"),
        (["--compare", "/"], "--compare takes a CSV of this benchmark, got /, which is no file"),
        (["--compare", __file__], "must have a column 'row'"),
        (["--no-measure", "--again"], "rows are taken as they are or measured anew, got --no-measure and --again"),
        (["--no-measure", "--csv", "nowhere.csv"], "--csv takes a file, with --no-measure one that is there, got nowhere.csv"),
        (["--csv", "/"], "--csv takes a file, got /"),
        (["--commit", "4567def"], "--commit is for a copy of the tree that git knows nothing of: git has '0123abc' here, got '4567def'"),
        (["--device", "cuda"], "--device cuda needs a GPU that torch sees, got none"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("bench.harness._commit", lambda: "0123abc")
    with pytest.raises(SystemExit) as stop:
        attention.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert sentence in " ".join(capsys.readouterr().err.split())
