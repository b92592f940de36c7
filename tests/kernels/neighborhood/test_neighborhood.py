"""Neighborhood patch attention: the reference against a second formulation, every implementation against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from scalediff_kernels import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.neighborhood.geometry import windows
from scalediff_kernels.testing import assert_within_budget, attention_inputs, poisoned_memory

Pair = tuple[int, int]

GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"))

# grid, window, patch, offset
PROBLEMS: list[tuple[Pair, Pair, Pair, Pair]] = [
    ((16, 16), (8, 8), (4, 4), (0, 0)),
    ((4, 8), (2, 4), (1, 2), (0, 1)),
    ((8, 4), (4, 2), (2, 1), (1, 0)),
    ((13, 7), (5, 3), (3, 2), (2, 1)),
    ((11, 17), (7, 6), (4, 5), (3, 4)),
    ((9, 9), (9, 9), (4, 4), (1, 2)),
    ((6, 10), (64, 64), (32, 32), (31, 7)),
    ((5, 12), (64, 4), (2, 2), (1, 1)),
    ((1, 23), (1, 7), (1, 3), (0, 2)),
]
IDS = ["-".join(f"{a}x{b}" for a, b in problem) for problem in PROBLEMS]


def masked_dense(q: Tensor, k: Tensor, v: Tensor, window: Pair, patch: Pair, offset: Pair, scale: float) -> Tensor:
    """The same attention said differently: every token attends to every other, and a mask built token by token forbids."""
    batch, height, width, heads, dim = q.shape
    allowed = torch.ones(height * width, height * width, dtype=torch.bool).view(height, width, height, width)
    for axis, length in enumerate((height, width)):
        own = torch.zeros(length, length, dtype=torch.bool)
        for t in range(length):
            i = (t + offset[axis]) // patch[axis]
            start = i * patch[axis] - offset[axis] + patch[axis] // 2 - window[axis] // 2
            start = max(0, min(start, length - window[axis]))
            own[t, start : start + window[axis]] = True
        allowed &= own.view(length, 1, length, 1) if axis == 0 else own.view(1, length, 1, length)
    q, k, v = (x.permute(0, 3, 1, 2, 4).reshape(batch, heads, -1, dim) for x in (q, k, v))
    scores = (q @ k.mT * scale).masked_fill(~allowed.view(height * width, -1), float("-inf"))
    return (scores.softmax(-1) @ v).view(batch, heads, height, width, dim).permute(0, 2, 3, 1, 4)


@pytest.mark.parametrize(("grid", "window", "patch", "offset"), PROBLEMS, ids=IDS)
@pytest.mark.parametrize("scale", [None, 0.0, 0.7])
def test_reference_is_masked_dense_attention(grid: Pair, window: Pair, patch: Pair, offset: Pair, scale: float | None) -> None:
    q, k, v = attention_inputs((2, *grid, 3, 5), dtype=torch.float64)
    with poisoned_memory():
        out = neighborhood_patch_attention(q, k, v, window=window, patch=patch, offset=offset, scale=scale, impl="reference")
    expected = masked_dense(q, k, v, window, patch, offset, 5**-0.5 if scale is None else scale)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize(("grid", "window", "patch", "offset"), PROBLEMS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("impl", ["sdpa", "auto", "reference"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_implementations_keep_the_error_budget(
    grid: Pair, window: Pair, patch: Pair, offset: Pair, dtype: torch.dtype, impl: str, device: str
) -> None:
    q, k, v = attention_inputs((2, *grid, 3, 12), dtype=dtype)
    arguments = {"window": window, "patch": patch, "offset": offset}
    exact = neighborhood_patch_attention(q.double(), k.double(), v.double(), **arguments, impl="reference")  # type: ignore[arg-type]
    eager = masked_dense(q, k, v, window, patch, offset, 12**-0.5)
    with poisoned_memory():
        out = neighborhood_patch_attention(*(x.to(device) for x in (q, k, v)), **arguments, impl=impl)  # type: ignore[arg-type]
    assert out.shape == q.shape
    assert_within_budget(out.cpu(), eager, exact)


@pytest.mark.parametrize("grid", [(8, 8), (5, 7)])
@pytest.mark.parametrize("window", [(8, 8), (9, 64)])
def test_window_over_the_grid_is_sdpa_to_the_bit(grid: Pair, window: Pair) -> None:
    q, k, v = attention_inputs((2, *grid, 3, 16), dtype=torch.float32)
    out = neighborhood_patch_attention(q, k, v, window=window, patch=(4, 4), offset=(1, 2), impl="sdpa")
    expected = F.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(out.flatten(1, 2).transpose(1, 2), expected)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_a_query_sees_its_window_and_nothing_else(impl: str) -> None:
    """NaN in every key outside a patch's window must not reach the patch."""
    q, k, v = attention_inputs((1, 12, 10, 2, 4), dtype=torch.float32)
    clean = neighborhood_patch_attention(q, k, v, window=(6, 4), patch=(3, 2), offset=(1, 1), impl=impl)  # type: ignore[arg-type]
    for y0, y1, key_y0, key_y1 in windows(12, 6, 3, 1):
        for x0, x1, key_x0, key_x1 in windows(10, 4, 2, 1):
            outside = torch.ones(12, 10, dtype=torch.bool)
            outside[key_y0:key_y1, key_x0:key_x1] = False
            poisoned = [x.masked_fill(outside[None, :, :, None, None], float("nan")) for x in (k, v)]
            out = neighborhood_patch_attention(q, *poisoned, window=(6, 4), patch=(3, 2), offset=(1, 1), impl=impl)  # type: ignore[arg-type]
            assert torch.equal(out[:, y0:y1, x0:x1], clean[:, y0:y1, x0:x1])


def test_keys_are_copied_once_per_row_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows along a row are few calls, on keys that overlap in memory: 0, 1, 3, 5, 6 start the windows of the columns."""
    calls = []

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        calls.append((tuple(q.shape), tuple(k.shape), k.untyped_storage().nbytes() // k.itemsize))
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("scalediff_kernels.neighborhood.windowed_sdpa._sdpa", counting)
    q, k, v = attention_inputs((2, 12, 10, 3, 4), dtype=torch.float32)
    neighborhood_patch_attention(q, k, v, window=(6, 4), patch=(3, 2), impl="sdpa")
    row = [((6, 2, 6, 4), (6, 2, 24, 4)), ((6, 2, 6, 4), (6, 2, 24, 4)), ((6, 1, 6, 4), (6, 1, 24, 4))]
    assert [start for _, _, start, _ in windows(10, 4, 2)] == [0, 1, 3, 5, 6]
    assert [call[:2] for call in calls] == 4 * row
    assert {elements for _, _, elements in calls} == {2 * 3 * 10 * 6 * 4}


def test_patches_that_share_a_window_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    queries = []

    def counting(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        queries.append(q.shape[1] * q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("scalediff_kernels.neighborhood.windowed_sdpa._sdpa", counting)
    q, k, v = attention_inputs((1, 8, 9, 2, 4), dtype=torch.float64)
    out = neighborhood_patch_attention(q, k, v, window=(8, 8), patch=(2, 2), impl="sdpa")
    assert queries == [8 * 4, 8 * 5]  # windows start in columns 0, 0, 1, 1 and 1
    expected = neighborhood_patch_attention(q, k, v, window=(8, 8), patch=(2, 2), impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_any_strides(impl: str) -> None:
    """Views of `[B, H, S, D]` and of a packed qkv, as models hand them over, give what contiguous tensors give."""
    packed = torch.randn(2, 35, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    views = [packed[:, :, i].view(2, 5, 7, 4, 8) for i in range(3)]
    heads_first = [x.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4) for x in views]
    results = [
        neighborhood_patch_attention(*qkv, window=(4, 4), patch=(2, 2), impl=impl)  # type: ignore[arg-type]
        for qkv in (views, heads_first, [x.contiguous() for x in views])
    ]
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_gradients_flow_through_auto() -> None:
    q, k, v = (x.requires_grad_() for x in attention_inputs((1, 4, 5, 2, 3), dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: neighborhood_patch_attention(*qkv, window=(3, 4), patch=(2, 2), offset=(1, 0)), (q, k, v))


def call(q: Tensor | None = None, k: Tensor | None = None, **changes: object) -> Tensor:
    x = torch.zeros(1, 8, 8, 2, 4)
    arguments = {"window": (4, 4), "patch": (2, 2)} | changes
    return neighborhood_patch_attention(x if q is None else q, x if k is None else k, x if q is None else q, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.zeros(1, 64, 2, 4)}, ValueError, r"must be \[B, Y, X, H, D\].*\(1, 64, 2, 4\)"),
        ({"q": torch.zeros(1, 0, 8, 2, 4)}, ValueError, r"no empty axis"),
        ({"k": torch.zeros(1, 8, 9, 2, 4)}, ValueError, r"the same shape except for the heads.*\(1, 8, 9, 2, 4\)"),
        ({"k": torch.zeros(1, 8, 8, 2, 4, dtype=torch.float16)}, ValueError, r"the same dtype.*k.dtype=torch.float16"),
        ({"k": torch.zeros(1, 8, 8, 2, 4, device="meta")}, ValueError, r"the same device.*meta"),
        ({"q": torch.zeros(1, 8, 8, 2, 4, dtype=torch.int32), "k": torch.zeros(1, 8, 8, 2, 4, dtype=torch.int32)}, TypeError, r"int32"),
        ({"patch": (5, 2)}, ValueError, r"patch must not exceed window, got patch=5, window=4"),
        ({"offset": (0, 2)}, ValueError, r"offset must lie in"),
        ({"window": 4}, TypeError, r"window must be a pair of integers \(Y, X\), got window=4"),
        ({"patch": (2.0, 2)}, TypeError, r"patch must be a pair"),
        ({"scale": float("nan")}, ValueError, r"scale must be finite, got scale=nan"),
        ({"scale": float("inf")}, ValueError, r"scale must be finite"),
        ({"impl": "triton"}, NotImplementedError, r"impl='triton'.*multiples of 8 from 8 to 256, got D=4|impl='triton'.*needs a CUDA"),
        ({"impl": "cuda"}, ValueError, r"impl must be one of auto, reference, sdpa, triton, got impl='cuda'"),
    ],
)
def test_bad_input_is_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)  # type: ignore[arg-type]


def joint_inputs(
    grid: Pair, heads: int, groups: int, dim: int, text: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    shapes = [(2, *tokens, n, dim) for tokens in (grid, (text,)) for n in (heads, groups, groups)]
    q, k, v, text_q, text_k, text_v = (torch.randn(shape, generator=rng).to(dtype) for shape in shapes)
    return q, k, v, text_q, text_k, text_v


@pytest.mark.parametrize("impl", ["reference", "sdpa"])
def test_grouped_heads_are_repeated_heads(impl: str) -> None:
    q, k, v, *_ = joint_inputs((7, 6), 6, 2, 8, 1)
    arguments = {"window": (4, 3), "patch": (2, 2), "offset": (1, 0), "impl": impl}
    grouped = neighborhood_patch_attention(q, k, v, **arguments)  # type: ignore[arg-type]
    repeated = neighborhood_patch_attention(q, *(x.repeat_interleave(3, dim=3) for x in (k, v)), **arguments)  # type: ignore[arg-type]
    torch.testing.assert_close(grouped, repeated, rtol=1e-12, atol=1e-13)


def masked_joint(
    q: Tensor, k: Tensor, v: Tensor, text_q: Tensor, text_k: Tensor, text_v: Tensor, rope: tuple[Tensor, Tensor] | None, rule: str | None
) -> tuple[Tensor, Tensor | None]:
    """The same said differently: every query over the whole sequence, one dense masked softmax per window; window 4, patch 2."""
    _, height, width, _, dim = q.shape

    def turn(x: Tensor, i: int, j: int) -> Tensor:
        if rope is None:
            return x
        turned = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.complex(rope[0][i, j], rope[1][i, j])
        return torch.view_as_real(turned).flatten(-2)

    def dense(queries: Tensor, text_keys: Tensor, allowed: Tensor) -> Tensor:
        keys, values = torch.cat([text_keys, k.flatten(1, 2)], 1), torch.cat([text_v, v.flatten(1, 2)], 1)
        mask = torch.cat([torch.ones(text_k.shape[1], dtype=torch.bool), allowed.flatten()])
        scores = torch.einsum("bqhd,bkhd->bhqk", queries, keys) * dim**-0.5
        return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~mask, float("-inf")).softmax(-1), values)

    out, texts = torch.zeros_like(q), []
    for i in range(-(-height // 2)):
        for j in range(-(-width // 2)):
            y, x = (max(0, min(2 * n + 1 - 2, length - 4)) for n, length in ((i, height), (j, width)))
            allowed = torch.zeros(height, width, dtype=torch.bool)
            allowed[y : y + 4, x : x + 4] = True
            piece = q[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            out[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = dense(piece.flatten(1, 2), turn(text_k, i, j), allowed).view(piece.shape)
            texts.append(dense(turn(text_q, i, j), turn(text_k, i, j), allowed))
    if rule == "global":
        return out, dense(text_q, text_k, torch.ones(height, width, dtype=torch.bool))
    return out, torch.stack(texts).mean(0) if rule == "window" else None


@pytest.mark.parametrize("impl", ["reference", "sdpa", "auto"])
@pytest.mark.parametrize("rule", ["window", "global", None])
@pytest.mark.parametrize("rotated", [False, True])
def test_joint_attention_is_masked_dense_attention(impl: str, rule: str | None, rotated: bool) -> None:
    tensors = joint_inputs((7, 6), 3, 3, 8, 5)
    angles = torch.rand(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6.3
    rope = (angles.cos(), angles.sin()) if rotated else None
    with poisoned_memory():
        results = joint_neighborhood_patch_attention(
            *tensors,
            window=(4, 4),
            patch=(2, 2),
            text_rope=rope,
            text_queries=rule,
            impl=impl,  # type: ignore[arg-type]
        )
    for result, expected in zip(results, masked_joint(*tensors, rope, rule), strict=True):
        assert (result is None) == (expected is None)
        if result is not None and expected is not None:
            torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-13)


def test_gradients_flow_through_joint_attention() -> None:
    tensors = tuple(x.requires_grad_() for x in joint_inputs((4, 3), 2, 1, 4, 2))
    angles = torch.rand(2, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        out, text = joint_neighborhood_patch_attention(*tensors, window=(3, 2), patch=(2, 2), text_rope=(angles.cos(), angles.sin()))
        assert text is not None
        return out, text

    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"text_q": torch.zeros(2, 5, 3, 8)}, ValueError, r"text_q must be \[B, T, H, D\].*got \(2, 5, 3, 8\), \(2, 4, 2, 8\)"),
        ({"text_k": torch.zeros(2, 4, 4, 8)}, ValueError, r"B, H, G, D = 2, 4, 2, 8.*\(2, 4, 4, 8\)"),
        ({"text_v": torch.zeros(2, 4, 2, 8, dtype=torch.float16)}, ValueError, r"the same dtype.*text_v.dtype=torch.float16"),
        ({"k": torch.zeros(2, 6, 6, 3, 8), "v": torch.zeros(2, 6, 6, 3, 8)}, ValueError, r"heads of q must be a multiple.*=4, .*=3"),
        ({"text_queries": "mean"}, ValueError, r"must be 'window', 'global' or None, got text_queries='mean'"),
        ({"text_rope": torch.zeros(3, 3, 4)}, TypeError, r"pair of tensors \(cos, sin\)"),
        ({"text_rope": (torch.zeros(2, 3, 4), torch.zeros(3, 3, 4))}, ValueError, r"= \(3, 3, 4\) with an even D, got \(2, 3, 4\)"),
        ({"text_rope": (torch.zeros(3, 3, 4).long(), torch.zeros(3, 3, 4))}, ValueError, r"fp32 or fp64 on cpu, got .*int64"),
    ],
)
def test_bad_text_is_named(changes: dict[str, object], error: type[Exception], message: str) -> None:
    names = ("q", "k", "v", "text_q", "text_k", "text_v")
    arguments = (
        dict(zip(names, joint_inputs((6, 6), 4, 2, 8, 4, torch.float32), strict=True)) | {"window": (4, 4), "patch": (2, 2)} | changes
    )
    with pytest.raises(error, match=message):
        joint_neighborhood_patch_attention(**arguments)  # type: ignore[arg-type]
