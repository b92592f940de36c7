"""The low-pass kernel against the fp64 definition, in the interpreter or on a GPU; torch's operators around it."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import LowPass, guide_structure, low_pass, mix_frequencies, packed_view
from scalediff_kernels.lowpass.config import Problem, launch_config
from scalediff_kernels.lowpass.geometry import Kind
from scalediff_kernels.lowpass.operators import band
from scalediff_kernels.testing import assert_within_budget, poisoned_memory
from tests.kernels.sanitizer import assert_clean

pytest.importorskip("triton", reason="Triton has no build for this platform")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@dataclass(frozen=True)
class Case:
    shape: tuple[int, int, int, int]
    cutoff: float
    kind: Kind = "resize"
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"

    @property
    def tiles(self) -> int:
        """Of 16 x 16 pixels, with four channels of a channels-last picture in one."""
        batch, channels, height, width = self.shape
        return batch * -(-channels // (4 if self.layout == "channels last" else 1)) * -(-height // 16) * -(-width // 16)

    def pictures(self) -> list[Tensor]:
        return [self._laid_out(torch.Generator().manual_seed(seed)) for seed in range(2)]

    def _laid_out(self, rng: torch.Generator) -> Tensor:
        batch, channels, height, width = self.shape
        if self.layout == "packed":
            tokens = torch.randn(batch, height * width // 4, 4 * channels, generator=rng).to(DEVICE, self.dtype)
            return packed_view(tokens, grid=(height // 2, width // 2))
        x = torch.randn(self.shape, generator=rng).to(DEVICE, self.dtype)
        if self.layout == "channels last":
            return x.to(memory_format=torch.channels_last)
        if self.layout == "transposed":
            return x.transpose(2, 3).contiguous().transpose(2, 3)
        if self.layout == "cut out":  # of a larger picture, NaN around it
            return torch.nn.functional.pad(x, (3, 2, 1, 1), value=float("nan"))[..., 1:-1, 3:-2]
        if self.layout == "expanded":
            return x[:, :1].expand(self.shape)
        return x


def draw(seed: int, *, most_tiles: float = math.inf) -> Case:
    """With at most so many tiles for the interpreter, which runs one program after another."""
    rng = random.Random(seed)
    return next(case for case in iter(lambda: _draw(rng), None) if case.tiles <= most_tiles)


def _draw(rng: random.Random) -> Case:
    layout = rng.choice(["contiguous", "contiguous", "channels last", "packed", "transposed", "cut out", "expanded"])
    sides = [rng.randint(2, 70) * (2 if layout == "packed" else 1) for _ in range(2)]
    channels = rng.choice([1, 2, 3, 4, 9, 16]) if layout == "channels last" else rng.choice([1, 3])
    kind: Kind = rng.choice(["resize", "resize", "resize", "gaussian", "butterworth"])
    cutoff = rng.choice([1 / min(sides), 0.125, 0.25, rng.uniform(0.05, 1), 1.0])
    cutoff = max(cutoff, 1.01 / min(sides)) if kind == "resize" else cutoff
    return Case((rng.choice([1, 2]), channels, *sides), min(cutoff, 1.0), kind, rng.choice([torch.float32, torch.float16]), layout)  # type: ignore[arg-type]


CALLS: dict[str, Any] = {
    "low_pass": lambda a, b, **how: low_pass(a, **how),
    "mix_frequencies": mix_frequencies,
    "guide_structure": lambda a, b, **how: guide_structure(a, b, gamma=0.7, **how),
}


def assert_right(case: Case, name: str, impl: str = "triton") -> None:
    a, b = case.pictures()
    how: dict[str, Any] = {"cutoff": case.cutoff, "kind": case.kind}
    with poisoned_memory():
        result = CALLS[name](a, b, **how, impl=impl)
    eager = CALLS[name](a, b, **how, impl="reference")
    exact = CALLS[name](a.double(), b.double(), **how, impl="reference")
    assert result.shape == a.shape
    if case.layout in ("contiguous", "channels last", "packed", "transposed"):
        assert result.stride() == a.stride()
    assert_within_budget(result, eager, exact)


CHOSEN = [
    Case((1, 2, 64, 64), 0.125),
    Case((2, 2, 40, 33), 0.25, dtype=torch.float16),
    Case((1, 4, 32, 48), 0.25, layout="packed", dtype=torch.float16),
    Case((2, 20, 37, 24), 0.125, layout="channels last", dtype=torch.float16),
    Case((1, 5, 24, 90), 0.3, layout="channels last"),
    Case((1, 1, 7, 300), 0.15),
    Case((1, 2, 1, 1), 1.0),
    Case((1, 2, 30, 50), 1.0),
    Case((1, 1, 90, 70), 0.2, "gaussian", torch.float16),
    Case((1, 2, 70, 31), 0.9, "butterworth"),
    Case((1, 20, 16, 20), 0.1, "gaussian", layout="channels last"),
]
LATENTS = [Case((1, 4, 512, 512), cutoff) for cutoff in (0.125, 0.25)]  # sums at their real lengths


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("case", CHOSEN, ids=lambda c: f"{c.shape[2]}x{c.shape[3]}-{c.kind}-{c.layout}")
def test_chosen_problems_keep_the_error_budget(case: Case, name: str) -> None:
    assert_right(case, name)


@pytest.mark.parametrize("seed", range(40))
def test_drawn_problems_keep_the_error_budget(seed: int) -> None:
    assert_right(draw(seed, most_tiles=12), list(CALLS)[seed % 3])


@pytest.mark.parametrize("seed", range(60))
def test_matrix_products_keep_the_error_budget(seed: int) -> None:
    assert_right(draw(seed), list(CALLS)[seed % 3], "matmul")


@pytest.mark.slow
@pytest.mark.parametrize("block", range(6))
def test_many_drawn_problems_keep_the_error_budget(block: int) -> None:
    for seed in range(1000 + 50 * block, 1050 + 50 * block):
        assert_right(draw(seed, most_tiles=40), list(CALLS)[seed % 3])


@pytest.mark.slow
def test_many_planes_take_wide_tiles() -> None:
    assert_right(Case((40, 26, 16, 24), 0.5), "low_pass")


DOWN, UP = {"rows": (64, 64), "columns": (512, 512)}, {"rows": (512, 512), "columns": (64, 64)}


@pytest.mark.parametrize(
    ("problem", "device", "tile", "channels", "warps"),
    [
        (Problem(**DOWN, itemsize=4, planes=4, channels=4), "sm_90", (16, 16), 1, 4),
        (Problem(**DOWN, itemsize=2, planes=320, channels=320), "sm_90", (16, 64), 1, 8),
        (Problem(**DOWN, itemsize=2, planes=320, channels=320, channels_last=True), "sm_90", (16, 16), 16, 16),
        (Problem(**DOWN, itemsize=4, planes=320, channels=320, channels_last=True), "sm_80", (16, 16), 8, 8),
        (Problem(**DOWN, itemsize=4, planes=3, channels=3, channels_last=True), "sm_80", (16, 16), 4, 8),
        (Problem(**UP, itemsize=4, planes=4, channels=4), "sm_90", (32, 64), 1, 8),
        (Problem(**UP, itemsize=4, planes=4, channels=4, dense=True), "sm_90", (32, 64), 1, 8),
        (Problem(**DOWN, itemsize=4, planes=4, channels=4, dense=True), "gfx942", (32, 32), 1, 4),
        (Problem(**UP, itemsize=2, planes=16, channels=16, scattered=True), "sm_90", (16, 32), 1, 4),
    ],
)
def test_choices_are_pinned(problem: Problem, device: str, tile: tuple[int, int], channels: int, warps: int) -> None:
    config = launch_config(problem, device)
    assert (config.tile, config.channels, config.num_warps) == (tile, channels, warps)
    assert config.precision == ("ieee" if device == "gfx942" else "tf32x3")
    assert all(n & (n - 1) == 0 and n >= 16 for n in (*config.tile, *config.steps)), "the sides of matrix products in Triton"


def test_offsets_beyond_32_bits() -> None:
    """Rows more than 2^31 / 16 elements apart: the storage between them is never touched, so it costs address space and no memory."""
    if GPU and torch.cuda.mem_get_info()[0] < 10 * 2**30:
        pytest.skip("needs 10 GB of GPU memory")
    x = Case((1, 2, 17, 20), 0.3, dtype=torch.float16).pictures()[0]
    far = torch.empty(17 * 2**27 + 4096, dtype=x.dtype, device=DEVICE).as_strided(x.shape, (0, 20, 2**27 + 8, 1))
    far.copy_(x)
    assert torch.equal(low_pass(far, cutoff=0.3, impl="triton"), low_pass(x, cutoff=0.3, impl="triton"))


@pytest.mark.parametrize("triton", [False, True])
def test_opcheck(triton: bool) -> None:
    a, b = Case((2, 3, 12, 10), 0.25).pictures()
    ops = torch.ops.scalediff
    coarse = ops.low_pass_coarse([a, b], [1.0, -0.5], None, 0.25, "resize", [False, triton], triton)
    torch.library.opcheck(ops.low_pass_coarse.default, ([a, b], [1.0, -0.5], coarse, 0.25, "resize", [False, triton], triton))
    torch.library.opcheck(ops.low_pass_expand.default, (a, coarse, 0.5, [a, b], [1.0, 2.0], 0.25, "resize", [False, triton], triton))
    torch.library.opcheck(ops.low_pass_expand_.default, (a.clone(), 1.0, coarse, 0.5, [b], [2.0], 0.25, "resize", [False, triton], triton))


def one_graph_cases() -> Iterator[Any]:
    """Among the slow tests: dense factors by matrix products, and the graph's functional form.

    The kernel and the matrix products are one operator in a graph; `test_opcheck` compiles the functional form operator by operator.
    """
    for dynamic, kind, impl in itertools.product((False, True), ("resize", "gaussian"), ("matmul", "triton", "reference")):
        quick = kind == "resize"
        yield pytest.param(dynamic, kind, impl, "eager", marks=() if quick else pytest.mark.slow)
        yield pytest.param(dynamic, kind, impl, "aot_eager", marks=pytest.mark.slow)


@pytest.mark.parametrize(("dynamic", "kind", "impl", "backend"), one_graph_cases())
def test_compiles_to_one_graph(dynamic: bool, kind: Any, impl: Any, backend: str) -> None:

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return 2 * mix_frequencies(a + 0, b, cutoff=0.25, kind=kind, impl=impl)

    torch._dynamo.reset()  # every parametrization recompiles the same code
    compiled = torch.compile(mixed, fullgraph=True, dynamic=dynamic, backend=backend)
    for size in ((16, 12), (20, 8), (13, 19)):
        a, b = Case((1, 2, *size), 0.25).pictures()
        torch.testing.assert_close(compiled(a, b), mixed(a, b))


def test_works_on_meta_tensors() -> None:
    x = torch.empty(1, 4, 32, 32, device="meta")
    for kind in ("resize", "gaussian"):
        assert low_pass(x, cutoff=0.25, kind=kind).shape == x.shape  # type: ignore[arg-type]


def test_inference_mode_leaves_no_inference_tensors_behind() -> None:
    x = Case((1, 1, 22, 26), 0.25).pictures()[0]
    with torch.inference_mode():
        inside = low_pass(x, cutoff=0.25, impl="triton")
        assert not band(LowPass(22, 0.25), "down", x.device, torch.float32, rows=16).weights.is_inference()
    assert torch.equal(inside, low_pass(x, cutoff=0.25, impl="triton"))


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(NotImplementedError, match=r"needs a CUDA or ROCm device.*device\(type='cpu'\)"):
        low_pass(torch.zeros(1, 1, 8, 8), cutoff=0.5, impl="triton")


SANITIZED = """
import torch
from scalediff_kernels import low_pass, mix_frequencies
for shape, kind, last in (((1, 3, 70, 45), "resize", False), ((2, 20, 33, 40), "resize", True), ((1, 2, 50, 64), "gaussian", False)):
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(shape, device="cuda", dtype=dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        mix_frequencies(x, low_pass(x, cutoff=0.3, kind=kind), cutoff=0.2, kind=kind)
torch.cuda.synchronize()
"""


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="no CUDA or ROCm device")
class TestOnTheGpu:
    """What only a device can show."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("case", CHOSEN, ids=lambda c: f"{c.shape[2]}x{c.shape[3]}-{c.kind}-{c.layout}")
    def test_every_dtype(self, case: Case, dtype: torch.dtype) -> None:
        for name in CALLS:
            assert_right(Case(**(vars(case) | {"dtype": dtype})), name)

    @pytest.mark.parametrize("case", LATENTS, ids=lambda c: str(c.cutoff))
    def test_latents(self, case: Case) -> None:
        """In fp32, which three TF32 products must reach; the interpreter has no TF32."""
        for name in CALLS:
            assert_right(case, name)

    @pytest.mark.parametrize("layout", ["contiguous", "channels last"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_feature_maps(self, dtype: torch.dtype, layout: str) -> None:
        assert_right(Case((1, 320, 256, 256), 0.25, dtype=dtype, layout=layout), "mix_frequencies")

    def test_the_same_bits_every_run(self) -> None:
        x = Case((1, 16, 512, 512), 0.125, dtype=torch.bfloat16).pictures()[0]
        first = low_pass(x, cutoff=0.125, impl="triton")
        assert all(torch.equal(first, low_pass(x, cutoff=0.125, impl="triton")) for _ in range(5))

    def test_cuda_graphs_capture_it(self) -> None:
        a, b = Case((1, 4, 128, 128), 0.125).pictures()
        expected = mix_frequencies(a, b, cutoff=0.125)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = mix_frequencies(a, b, cutoff=0.125)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, expected)

    def test_inductor(self) -> None:
        def mixed(a: Tensor, b: Tensor) -> Tensor:
            return 2 * mix_frequencies(a + 0, b, cutoff=0.25)

        torch._dynamo.reset()
        a, b = Case((1, 4, 64, 48), 0.25, dtype=torch.float16).pictures()
        torch.testing.assert_close(torch.compile(mixed, fullgraph=True)(a, b), mixed(a, b))

    def test_no_memory_beyond_the_result_and_the_coarse_grid(self) -> None:
        x = Case((1, 64, 256, 256), 0.125, dtype=torch.float16).pictures()[0]
        low_pass(x, cutoff=0.125)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = low_pass(x, cutoff=0.125)
        assert torch.cuda.max_memory_allocated() - before <= out.nbytes + 64 * 32 * 32 * 4

    @pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
    def test_compute_sanitizer(self, tool: str) -> None:
        assert_clean(tool, SANITIZED)
