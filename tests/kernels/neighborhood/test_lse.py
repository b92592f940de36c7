"""The log-sum-exp that attention returns on request: of every implementation, and what it is for, merging results over different keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.lse import window_log_sum_exp
from scalediff_kernels.neighborhood.reference import attend
from tests.kernels.neighborhood.problems import TARGETS, Problem, run

PLAIN = Problem((6, 5), (5, 4), (4, 3), (1, 1), 16, heads=2, groups=1, dtype=torch.float64)
JOINT = replace(PLAIN, text=5, rope=True, rule="window")
RIGHT = [PLAIN, replace(PLAIN, scale=-0.3), replace(PLAIN, window=(64, 64), patch=(5, 5))]


def full(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`[B, Y, X, H]` over the whole grid."""
    scores = torch.einsum("byxhd,bkhd->byxhk", q, k.flatten(1, 2).repeat_interleave(q.shape[3] // k.shape[3], dim=2)) * scale
    return scores.logsumexp(-1)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_window_over_the_grid(impl: str) -> None:
    problem = replace(PLAIN, window=(64, 64), patch=(5, 5))
    q, k, v = problem.inputs()
    out, lse = neighborhood_patch_attention(q, k, v, **problem.arguments, return_lse=True, impl=impl)  # type: ignore[call-overload]
    torch.testing.assert_close(lse, full(q, k, 0.25))
    assert torch.equal(out, neighborhood_patch_attention(q, k, v, **problem.arguments, impl=impl))  # type: ignore[call-overload]


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_results_over_different_keys_merge(impl: str) -> None:
    """Attention to text and window is the mean of both, weighted by the exponentials of their log-sum-exps."""
    problem = replace(JOINT, rope=False)
    q, k, v, text_q, text_k, text_v = problem.inputs()
    both, text, lse = joint_neighborhood_patch_attention(q, k, v, text_q, text_k, text_v, **problem.arguments, return_lse=True, impl=impl)  # type: ignore[call-overload]
    out, window_lse = neighborhood_patch_attention(q, k, v, **problem.arguments, return_lse=True, impl=impl)  # type: ignore[call-overload]
    of_text = attend(q.flatten(1, 2), text_k, text_v, 0.25).unflatten(1, problem.grid)
    text_lse = full(q, text_k[:, None], 0.25)
    torch.testing.assert_close(lse, torch.logaddexp(window_lse, text_lse))
    merged = (window_lse - lse).exp()[..., None] * out + (text_lse - lse).exp()[..., None] * of_text
    torch.testing.assert_close(both, merged)
    assert text is not None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("problem", [*RIGHT, JOINT], ids=["plain", "negative", "whole", "joint"])
def test_the_kernel_agrees(problem: Problem, target: str | None) -> None:
    problem = replace(problem, dtype=torch.float16)
    q, k, _, *text = problem.inputs()
    plain = run(problem, target)
    out, *text_out, lse = run(problem, target, return_lse=True)
    assert torch.equal(out, plain[0]), "the result has the same bits"
    assert not problem.text or torch.equal(text_out[0], plain[1])  # type: ignore[arg-type]
    tables = problem.tables()
    rope = None if tables is None else (tables[0].double(), tables[1].double())
    exact = window_log_sum_exp(q.double(), k.double(), text[1].double() if text else None, **problem.arguments, text_rope=rope)
    # Rotated queries are rounded to fp16: an error of at most 2^-11 of each product.
    rounded = 2**-11 * abs(problem.arguments["scale"]) * float(q.norm(dim=-1).max() * text[1].norm(dim=-1).max()) if problem.rope else 0.0
    torch.testing.assert_close(lse, exact.float(), rtol=1.3e-6, atol=1e-5 + rounded)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_autocast_does_not_round_it(impl: str) -> None:
    """It is that of the tensors as the implementation sees them: rounded to bf16 once, or not at all."""
    q, k, v = (x.float() for x in PLAIN.inputs())
    with torch.autocast("cpu", torch.bfloat16):
        _, lse = neighborhood_patch_attention(q, k, v, **PLAIN.arguments, return_lse=True, impl=impl)  # type: ignore[call-overload]
    seen = (q, k) if impl == "reference" else (q.bfloat16(), k.bfloat16())
    exact = window_log_sum_exp(*(x.double() for x in seen), **PLAIN.arguments)
    assert lse.dtype is torch.float32
    torch.testing.assert_close(lse, exact.float())


def test_fakes_have_its_shape() -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(2, 8, 8, 3, 16, dtype=torch.float16) for _ in range(3))
        out, lse = torch.ops.scalediff.image_attention_lse(q, k, v, None, None, None, None, (4, 4), (2, 2), (0, 0), (False, False), 0.25)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert (lse.shape, lse.dtype) == (q.shape[:-1], torch.float32)
