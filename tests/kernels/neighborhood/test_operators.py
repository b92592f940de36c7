"""Torch's operators around the attention kernels: opcheck, compilation, autocast, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from tests.kernels.neighborhood.problems import DEVICE, TARGETS, Problem, assert_right

pytest.importorskip("triton", reason="Triton has no build for this platform")


@pytest.mark.parametrize("with_text", [False, True])
def test_opcheck(with_text: bool) -> None:
    problem = Problem((6, 5), (3, 3), (2, 3), (1, 0), 8, heads=1, groups=1, text=4, rope=True, wrap=(with_text, False))
    q, k, v, text_q, text_k, text_v = problem.inputs()
    cos, sin = problem.tables() or (None, None)
    numbers = ([3, 3], [2, 3], [1, 0], [with_text, False], 0.3)
    arguments = (q, k, v, text_k, text_v, cos, sin, *numbers) if with_text else (q, k, v, None, None, None, None, *numbers)
    torch.library.opcheck(torch.ops.scalediff.image_attention.default, arguments)
    torch.library.opcheck(torch.ops.scalediff.image_attention_lse.default, arguments)
    if with_text:
        torch.library.opcheck(torch.ops.scalediff.text_attention.default, (text_q, k, v, text_k, text_v, cos, sin, *numbers))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_to_one_graph(dynamic: bool) -> None:
    def double(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return 2 * neighborhood_patch_attention(q + 0, k, v, window=(4, 4), patch=(2, 2), offset=(1, 0), impl="triton")

    compiled = torch.compile(double, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for grid in ((6, 6), (5, 7), (8, 4)):
        q, k, v = Problem(grid, (4, 4), (2, 2), (1, 0), 16, heads=1, groups=1).inputs()
        with torch.no_grad():
            assert torch.equal(compiled(q, k, v), double(q, k, v))


def test_joint_attention_compiles_to_one_graph() -> None:
    problem = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8, heads=1, groups=1, text=3, rope=True, rule="window")
    tensors, rope = problem.inputs(), problem.tables()

    def call(*tensors: Tensor) -> Any:
        return joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_rope=rope, impl="triton")

    for ours, plain in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(*tensors), call(*tensors), strict=True):
        assert torch.equal(ours, plain)


def test_inference_mode() -> None:
    q, k, v = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs()
    plain = neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    with torch.inference_mode():
        assert torch.equal(neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton"), plain)


def test_auto_works_on_meta_tensors() -> None:
    q, k, v = (x.to("meta") for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs())
    assert neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).shape == q.shape


def test_only_tensors_whose_rows_begin_anywhere_are_copied() -> None:
    from scalediff_kernels.neighborhood.strides import aligned

    x = torch.randn(1, 4, 4, 2, 40, dtype=torch.float16)
    for taken in (
        x,
        x.expand(3, -1, -1, -1, -1),
        x[:, 1:, :, 1:],
        x.movedim(3, 1).contiguous().movedim(1, 3),
        x.as_strided(x.shape, (7, *x.stride()[1:])),
    ):
        assert aligned(taken) is taken
    for other in (torch.nn.functional.pad(x, (0, 1))[..., :40], torch.cat([x.flatten(), x.flatten()])[4:644].view(1, 4, 2, 2, 40)):
        copy = aligned(other)
        assert copy.is_contiguous()
        assert copy.data_ptr() % 16 == 0
        assert copy.data_ptr() != other.data_ptr()
        assert torch.equal(copy, other)


def test_a_patch_larger_than_the_grid_costs_no_programs() -> None:
    from scalediff_kernels.neighborhood.launch import image_launch

    problem = Problem((6, 5), (4096, 4096), (4096, 4096), (5, 0), 16)
    q, k, v = problem.inputs()
    assert image_launch(torch.empty_like(q), q, k, v, **problem.arguments, device="sm_80").programs <= 16
    assert_right(problem, TARGETS[0])


@pytest.mark.parametrize("impl", ["triton", "sdpa", "reference"])
@pytest.mark.parametrize("rule", ["window", "global"])
def test_joint_attention_under_autocast(impl: Any, rule: Any) -> None:
    """The kernel and SDPA compute and return autocast's dtype, text and image alike; the reference stays what it is."""
    tensors = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8, text=3, rule=rule).inputs()
    with torch.autocast(DEVICE, dtype=torch.float16):  # not bf16, which the interpreter gets wrong
        results = joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_queries=rule, impl=impl)
    plain = joint_neighborhood_patch_attention(*tensors, window=(4, 4), patch=(2, 2), text_queries=rule, impl="reference")
    for result, exact in zip(results, plain, strict=True):
        assert result is not None
        assert exact is not None
        assert result.dtype == (torch.float32 if impl == "reference" else torch.float16)
        torch.testing.assert_close(result.float(), exact, rtol=0.05 * (impl != "reference"), atol=0.05 * (impl != "reference"))


@pytest.mark.parametrize("impl", ["triton", "sdpa"])
def test_autocast_computes_in_its_dtype(impl: Any) -> None:
    q, k, v = Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs()
    with torch.autocast(DEVICE, dtype=torch.float16):
        out = neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl=impl)
    low = neighborhood_patch_attention(q.half(), k.half(), v.half(), window=(4, 4), patch=(2, 2), impl=impl)
    assert out.dtype == torch.float16
    assert torch.equal(out, low)


def test_gradients_take_the_differentiable_path_or_are_refused() -> None:
    q, k, v = (x.requires_grad_() for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 8).inputs())
    neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).sum().backward()
    assert q.grad is not None
    with pytest.raises(NotImplementedError, match=r"does not support gradients.*torch.no_grad\(\) or impl='auto'"):
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    with torch.no_grad():
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.double(), r"supports fp16, bf16 and fp32, got q.dtype=torch.float64"),
        (lambda x: x[..., :12], r"multiples of 8 from 8 to 256, got D=12"),
        (lambda x: x.repeat(1, 1, 1, 1, 20), r"from 8 to 256.*got D=320"),
        (lambda x: x.transpose(1, 4).contiguous().transpose(1, 4), r"contiguous last axis, got strides"),
    ],
)
def test_what_the_kernel_does_not_do_is_refused_in_words(change: Any, message: str) -> None:
    q, k, v = (change(x) for x in Problem((6, 6), (4, 4), (2, 2), (0, 0), 16).inputs())
    with pytest.raises(NotImplementedError, match=message):
        neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2), impl="triton")
    assert neighborhood_patch_attention(q, k, v, window=(4, 4), patch=(2, 2)).shape == q.shape  # auto does it in another way


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x = torch.zeros(1, 4, 4, 1, 8)
    with pytest.raises(NotImplementedError, match=r"needs a CUDA or ROCm device.*device\(type='cpu'\)"):
        neighborhood_patch_attention(x, x, x, window=(2, 2), patch=(1, 1), impl="triton")
