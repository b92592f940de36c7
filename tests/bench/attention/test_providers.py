"""The providers of the attention benchmark: each computes what it says, and the gate finds what does not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench.attention import compiled as providers_compiled
from bench.attention.compiled import PROVIDERS
from bench.attention.gate import GateFailed, Outputs, truth
from bench.attention.sdpa import one_window
from bench.attention.shapes import Inputs, Shape, Task
from bench.harness.facts import ROOT
from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention

EVEN = Shape((12, 16), (8, 8), (4, 4), 2, 16, batch=2, dtype=torch.float32)
ODD = Shape((9, 10), (8, 6), (4, 3), 4, 16, text=9, groups=2, dtype=torch.float32)
COVERED = Shape((6, 5), (8, 8), (4, 4), 2, 16, text=3, dtype=torch.float32)
SMALL = [("even", EVEN, ""), ("odd", ODD, "window"), ("odd", ODD, "global"), ("covered", COVERED, "window"), ("covered", COVERED, "global")]
TASKS = [Task(name, shape, torch.float32, "cpu", rule) for name, shape, rule in SMALL]
HERE = [name for name in PROVIDERS if not name.endswith(("cudnn", "efficient"))]
KERNELS = ("triton", "triton-plain")

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without:UserWarning", "ignore:return_lse is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


def outputs(task: Task, name: str) -> tuple[Inputs, Outputs]:
    inputs, ready = task.inputs(3), PROVIDERS[name].prepare(task)
    return inputs, ready.unlay(ready.run(ready.lay(inputs)))


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.name}-{t.rule}")
def test_a_provider_computes_what_it_says(task: Task, name: str) -> None:
    """The whole result against the library's reference in fp64, not through the gate; views one by one."""
    if name == "natten":
        pytest.importorskip("natten", reason="pip install --no-build-isolation --no-deps natten (needs cmake)")
    if name in KERNELS and torch.cuda.is_available():
        pytest.skip("the interpreter stands for the kernel only where there is no GPU")
    if name == "triton-plain" and task is not TASKS[0]:
        pytest.skip("in the interpreter it has the launches of triton, to the last argument")
    provider = PROVIDERS[name]
    if name not in KERNELS and (refusal := provider.refusal(task)):
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
            if not PROVIDERS[name].refusal(task):
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


@pytest.mark.slow
def test_the_gate_stands_where_python_drops_asserts() -> None:
    code = (
        "import torch\n"
        "from bench.attention.gate import GateFailed, Outputs, Sample, Truth\n"
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
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / part) for part in (".", "kernels"))}
    ran = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    assert ran.stdout.splitlines() == [
        "image: error 1.000e+00 exceeds the budget 1.192e-07",
        "image: the result has NaN or infinite values",
        "text is missing from the result",
        "image: actual and eager must have the same dtype, got actual.dtype=torch.float64, eager.dtype=torch.float32",
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
    inputs = Task("many", Shape((40, 40), (2, 2), (2, 2), 1, 8), torch.float32, "cpu").inputs(0)
    many, every = (truth(inputs, "window", whole=whole).image.tokens for whole in (False, True))
    assert every.sort().values.tolist() == list(range(1600))
    assert len(many) == 256 * 4
    assert {0, 1599} <= set(many.tolist())


def test_full_attention_that_stands_for_windows_fails_its_gate() -> None:
    inputs, found = outputs(TASKS[0], "full")
    with pytest.raises(GateFailed, match="exceeds the budget"):
        truth(inputs, "window").check(found)
    truth(inputs, "full").check(found)


@pytest.mark.parametrize(
    "task",
    [
        Task("x", Shape((37, 45), (16, 20), (8, 5), 1, 8, text=130), torch.float32, "cpu", "global"),
        Task("x", Shape((32, 64), (16, 32), (8, 16), 1, 8), torch.float32, "cpu"),
        *(TASKS[n] for n in (0, 2, 4)),
    ],
    ids=lambda t: f"{t.shape.grid}",
)
def test_a_mask_of_blocks_is_that_of_its_tokens(task: Task) -> None:
    """Every row has a key, padded ones among them, as FlexAttention gets them; the blocks that are counted are those that it computes."""
    tiles = providers_compiled.tiling(task)
    i = torch.arange(tiles.tokens)
    dense = tiles.attends(i[:, None], i[None]).expand(tiles.tokens, tiles.tokens)
    assert dense.any(1).all()
    assert int(dense.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1).sum()) == tiles.blocks
    s, real = task.shape, torch.cat([i[: task.shape.text], i[tiles.text :]])
    y, x = tiles.place(real)
    inside = (real < s.text) | ((y < s.grid[0]) & (x < s.grid[1]))
    expected = torch.zeros(s.tokens, s.tokens, dtype=torch.bool)
    expected[: s.text], expected[:, : s.text] = True, True
    number = torch.arange(s.text, s.tokens).view(s.grid)
    for y0, y1, key_y0, key_y1 in task.spans[0]:
        for x0, x1, key_x0, key_x1 in task.spans[1]:
            queries, keys = number[y0:y1, x0:x1].flatten(), number[key_y0:key_y1, key_x0:key_x1].flatten()
            expected[queries[:, None], keys] = True
    order = torch.where(real < s.text, real, s.text + y * s.grid[1] + x)[inside]
    assert torch.equal(dense[real[inside]][:, real[inside]], expected[order][:, order]), "the windows of the geometry"
    assert not dense[:, real[~inside]].any(), "padding is no key"
    tokens = torch.arange(float(s.tokens)).view(1, -1, 1, 1)
    image, text = tokens[:, s.text :].unflatten(1, s.grid), tokens[:, : s.text]
    back, back_text = tiles.untiled(tiles.tiled(image, text))
    assert torch.equal(back, image)
    assert back_text is None or torch.equal(back_text, text)


def test_one_window_is_attended_as_often_as_there_are_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three by four patches of 4 x 4, windows of 8 x 8, 3 tokens of text in each."""
    seen: list[tuple[torch.Size, torch.Size]] = []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **how: seen.append((q.shape, k.shape)))
    shape = Shape((12, 16), (8, 8), (4, 4), 4, 16, groups=2, text=3, batch=2, dtype=torch.float32)
    for rule, queries in (("global", 16), ("window", 16 + 3)):
        call, flops = one_window(Task("made-up", shape, torch.float32, "cpu", rule))
        call()
        assert flops == 12 * 4 * 2 * 4 * 16 * queries * (64 + 3)
        assert seen == 12 * [((2, 4, queries, 16), (2, 2, 64 + 3, 16))]
        seen.clear()
