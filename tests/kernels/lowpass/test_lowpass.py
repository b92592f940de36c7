"""Low-pass filters, latent frequency mixing and structure guidance, against matrices written from the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff_kernels import LowPass, guide_structure, low_pass, mix_frequencies, packed_view
from scalediff_kernels.lowpass.geometry import SMALLEST_RESPONSE, coarse_length
from scalediff_kernels.lowpass.operators import band
from scalediff_kernels.testing import assert_within_budget

SHAPES = [(16, 16), (12, 20), (17, 23), (64, 33), (20, 10)]
KINDS = ["resize", "gaussian", "butterworth"]
CPU = torch.device("cpu")


def resize_matrix(n_in: int, n_out: int, *, antialias: bool) -> Tensor:
    """Triangle filter sampled at pixel centres, rows normalised: bilinear, widened by the scale when it reduces."""
    scale = n_in / n_out
    support = max(scale, 1.0) if antialias else 1.0
    rows = torch.zeros(n_out, n_in, dtype=torch.float64)
    for i in range(n_out):
        center = (i + 0.5) * scale - 0.5
        if antialias:
            weights = [max(0.0, 1 - abs(j - center) / support) for j in range(n_in)]
        else:
            center = min(max(center, 0.0), n_in - 1.0)
            weights = [max(0.0, 1 - abs(j - center)) for j in range(n_in)]
        rows[i] = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return rows


def picture(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("length", "cutoff"), [(1, 1.0), (7, 0.15), (16, 0.7), (33, 0.25), (40, 0.99), (512, 0.125)])
def test_resize_factors_are_the_triangles_of_the_definition(length: int, cutoff: float) -> None:
    axis = LowPass(length, cutoff)
    torch.testing.assert_close(axis.down, resize_matrix(length, axis.coarse, antialias=True), rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(axis.up, resize_matrix(axis.coarse, length, antialias=False), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("impl", ["matmul", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.125, 0.25, 0.5, 0.7, 1.0])
def test_resize_is_two_matrices_per_axis(shape: tuple[int, int], cutoff: float, impl: Any) -> None:
    x = picture(shape)
    axes = []
    for n in shape:
        m = int(n * cutoff)
        axes.append(resize_matrix(m, n, antialias=False) @ resize_matrix(n, m, antialias=True))
    torch.testing.assert_close(low_pass(x, cutoff=cutoff, impl=impl), axes[0] @ x @ axes[1].T, rtol=1e-12, atol=1e-12)


def test_a_single_coarse_column_is_right() -> None:
    """One call of `F.interpolate` for both axes is not, on a CPU: docs/postmortems/0003."""
    x = picture((33, 5))
    axes = [resize_matrix(n, m, antialias=True) for n, m in ((33, 8), (5, 1))]
    exact = resize_matrix(8, 33, antialias=False) @ (axes[0] @ x @ axes[1].T).expand(-1, -1, -1, 5)
    for impl in ("matmul", "reference"):
        torch.testing.assert_close(low_pass(x, cutoff=0.25, impl=impl), exact, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.1, 0.125, 0.25, 0.5, 0.9])
def test_dc_gain_is_one(shape: tuple[int, int], cutoff: float, kind: Any) -> None:
    x = torch.full((1, 2, *shape), -3.7, dtype=torch.float64)
    torch.testing.assert_close(low_pass(x, cutoff=cutoff, kind=kind), x, rtol=1e-13, atol=0)


@pytest.mark.parametrize("kind", ["gaussian", "butterworth"])
@pytest.mark.parametrize("cutoff", [0.07, 0.125, 0.25, 0.8])
@pytest.mark.parametrize("place", [31, 5, 0])
def test_the_impulse_response_has_the_frequencies_of_the_definition(kind: Any, cutoff: float, place: int) -> None:
    """One pixel in a row of 63: the response at frequency k / 63 of Nyquist, by a cosine sum written out here."""
    n = 63
    impulse = torch.zeros(1, 1, 1, n, dtype=torch.float64)
    impulse[..., place] = 1
    out = low_pass(impulse, cutoff=cutoff, kind=kind, impl="matmul")[0, 0, 0]
    for k in range(n):
        cosine = torch.cos(math.pi * k * (torch.arange(n, dtype=torch.float64) + 0.5) / n)
        ratio = k / n / cutoff
        gain = 0.5 ** (ratio**2) if kind == "gaussian" else 1 / (1 + ratio**8)
        gain = gain if gain >= SMALLEST_RESPONSE else 0.0
        assert (out @ cosine).item() == pytest.approx(gain * cosine[place].item(), abs=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "butterworth"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("cutoff", [0.05, 0.25, 1.0])
def test_the_matrices_are_the_fourier_filter(kind: Any, shape: tuple[int, int], cutoff: float) -> None:
    x = picture(shape)
    exact = low_pass(x, cutoff=cutoff, kind=kind, impl="reference")
    torch.testing.assert_close(low_pass(x, cutoff=cutoff, kind=kind, impl="matmul"), exact, rtol=1e-12, atol=1e-12)


def test_half_of_the_amplitude_is_left_at_the_cutoff() -> None:
    n = 64
    wave = torch.cos(math.pi * 16 * (torch.arange(n, dtype=torch.float64) + 0.5) / n).expand(1, 1, n, n)
    for kind in ("gaussian", "butterworth"):
        torch.testing.assert_close(low_pass(wave, cutoff=0.25, kind=kind), 0.5 * wave, rtol=1e-12, atol=1e-12)  # type: ignore[arg-type]


@pytest.mark.parametrize("side", ["down", "up"])
@pytest.mark.parametrize("axis", [LowPass(97, 0.13), LowPass(64, 0.25), LowPass(20, 0.3, "gaussian"), LowPass(5, 1.0)])
@pytest.mark.parametrize(("rows", "block", "align"), [(16, 16, 16), (4, 16, 1), (1, 1, 1), (64, 32, 16)])
def test_tiles_hold_the_whole_factor(axis: LowPass, side: Any, rows: int, block: int, align: int) -> None:
    tiled = band(axis, side, CPU, torch.float32, rows=rows, block=block, align=align)
    full = axis.down if side == "down" else axis.up
    assert tiled.span % block == 0
    assert (tiled.starts % align == 0).all()
    assert tiled.weights.dtype == torch.float32
    assert all(start < stop <= full.shape[1] for start, stop in tiled.ranges)
    out = torch.zeros(tiled.weights.shape[0] * rows, full.shape[1] + tiled.span, dtype=torch.float64)
    for i, start in enumerate(tiled.starts.tolist()):
        out[i * rows : (i + 1) * rows, start : start + tiled.span] = tiled.weights[i]
    assert torch.equal(out[: full.shape[0], : full.shape[1]], full.float().double())
    assert not out[full.shape[0] :].any()
    assert not out[:, full.shape[1] :].any()


def test_a_resize_row_reads_a_few_pixels() -> None:
    axis = LowPass(512, 0.125)
    assert band(axis, "down", CPU, torch.float32, rows=1).span == 16
    assert band(axis, "up", CPU, torch.float32, rows=1).span == 2


def test_factors_are_built_once_and_nobody_can_change_them() -> None:
    axis = LowPass(40, 0.25)
    assert band(axis, "down", CPU, torch.float32, rows=16) is band(LowPass(40, 0.25), "down", CPU, torch.float32, rows=16)
    axis.down.zero_()
    x = torch.ones(1, 1, 40, 40)
    torch.testing.assert_close(low_pass(x, cutoff=0.25), x)


@pytest.mark.parametrize("scale", [4, 8])
def test_the_resize_filter_has_the_frequencies_of_its_triangles(scale: int) -> None:
    """Triangles sampled between their knots: `cos(w / 2) (sin(s w / 2) / (s sin(w / 2)))^2` down, s times that up, inside the picture."""
    n = 16 * scale
    axis, pixels = LowPass(n, 1 / scale), torch.arange(n, dtype=torch.float64)
    w = math.pi * torch.arange(1, n, dtype=torch.float64) / n
    expected = torch.cos(w / 2) * (torch.sin(scale * w / 2) / (scale * torch.sin(w / 2))) ** 2
    for i in (4, 7):
        waves = torch.cos(w[:, None] * (pixels - ((i + 0.5) * scale - 0.5)))
        torch.testing.assert_close(waves @ axis.down[i], expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(waves @ axis.up[:, i], scale * expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 200, 512])
def test_dc_gain_is_one_to_fp32_rounding(length: int, kind: Any) -> None:
    x = torch.ones(1, 1, 16, length)
    roundings = 8 if kind == "resize" else 4 * length**0.5  # of four products: short sums, or sums over the whole axis
    assert (low_pass(x, cutoff=0.25, kind=kind) - 1).abs().max() <= roundings * torch.finfo(torch.float32).eps


def by_matrices(x: Tensor, cutoff: float, kind: Any) -> Tensor:
    """The filter by hand, as two dense matrices in the dtype of x."""
    down_y, up_y, down_x, up_x = (m.to(x.dtype) for n in x.shape[2:] for m in (LowPass(n, cutoff, kind).down, LowPass(n, cutoff, kind).up))
    return up_y @ (down_y @ x @ down_x.T) @ up_x.T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cutoff", [0.125, 0.25])
def test_long_sums_keep_the_error_budget(kind: Any, cutoff: float) -> None:
    """At the size of a latent. Dense kinds are judged by the same matrices in fp32: the Fourier transform rounds less."""
    x = picture((512, 512))[:1].float()
    exact = low_pass(x.double(), cutoff=cutoff, kind=kind, impl="reference")
    eager = low_pass(x, cutoff=cutoff, impl="reference") if kind == "resize" else by_matrices(x, cutoff, kind)
    assert_within_budget(low_pass(x, cutoff=cutoff, kind=kind), eager, exact)


@pytest.mark.parametrize("channels", [1, 40])
def test_many_small_pictures(channels: int) -> None:
    x = torch.randn(20, channels, 32, 24, generator=torch.Generator().manual_seed(0))
    for layout in (torch.contiguous_format, torch.channels_last):
        out = low_pass(x.contiguous(memory_format=layout), cutoff=0.25)
        assert_within_budget(out, low_pass(x, cutoff=0.25, impl="reference"), low_pass(x.double(), cutoff=0.25, impl="reference"))


def test_cutoff_one_keeps_everything() -> None:
    x = picture((16, 12))
    torch.testing.assert_close(low_pass(x, cutoff=1.0), x, rtol=1e-13, atol=1e-13)


def test_low_frequencies_pass_and_high_ones_do_not() -> None:
    n = 64
    t = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for cycles, low, high in ((1, 0.95, 1.0), (24, 0.0, 0.05)):
        wave = torch.cos(2 * math.pi * cycles * t).expand(1, 1, n, n)
        gain = (low_pass(wave, cutoff=0.25).std() / wave.std()).item()
        assert low <= gain <= high + 1e-9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_keeps_the_error_budget(dtype: torch.dtype, kind: Any) -> None:
    x = picture((17, 23)).to(dtype)
    exact = low_pass(x.double(), cutoff=0.25, kind=kind, impl="reference")
    assert_within_budget(low_pass(x, cutoff=0.25, kind=kind), low_pass(x, cutoff=0.25, kind=kind, impl="reference"), exact)


@pytest.mark.parametrize("impl", ["matmul", "reference"])
def test_any_layout_keeps_its_values_and_strides(impl: Any) -> None:
    x = picture((16, 12)).float()
    expected = low_pass(x, cutoff=0.25, impl="reference")
    last = x.to(memory_format=torch.channels_last)
    for view in (last, x.transpose(2, 3).contiguous().transpose(2, 3), x[..., :-4].repeat(1, 1, 1, 2)[..., :12]):
        out = low_pass(view, cutoff=0.25, impl=impl)
        torch.testing.assert_close(out, low_pass(view.contiguous(), cutoff=0.25, impl="reference"))
    torch.testing.assert_close(low_pass(last, cutoff=0.25, impl=impl), expected)
    assert low_pass(last, cutoff=0.25, impl=impl).stride() == last.stride()


def test_packed_latents_are_pictures() -> None:
    tokens = torch.randn(2, 8 * 6, 3 * 4, generator=torch.Generator().manual_seed(0))
    view = packed_view(tokens, grid=(8, 6))
    assert view.data_ptr() == tokens.data_ptr()
    flat = tokens.view(2, 8, 6, 3, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 16, 12)
    out = low_pass(view, cutoff=0.25)
    assert out.stride() == view.stride()
    torch.testing.assert_close(out.reshape(2, 3, 16, 12), low_pass(flat, cutoff=0.25))
    with pytest.raises(
        ValueError, match=r"tokens must be \[B, 40, C \* 4\] for grid=\(8, 5\) and patch=2, got tuple\(tokens.shape\)=\(2, 48, 12\)"
    ):
        packed_view(tokens, grid=(8, 5))


def test_gradients_flow_or_are_refused() -> None:
    x = picture((16, 12)).requires_grad_()
    low_pass(x, cutoff=0.25).sum().backward()
    assert x.grad is not None
    with pytest.raises(NotImplementedError, match=r"impl='matmul' does not support gradients"):
        low_pass(x, cutoff=0.25, impl="matmul")
    _, tangent = torch.func.jvp(lambda t: low_pass(t, cutoff=0.25), (x.detach(),), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, torch.ones_like(x), rtol=1e-12, atol=0)  # forward mode too


def test_autocast_changes_nothing() -> None:
    x = picture((16, 12)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = low_pass(x, cutoff=0.25)
    assert torch.equal(inside, low_pass(x, cutoff=0.25))


def test_mixing_takes_the_low_band_of_one_and_the_high_band_of_the_other() -> None:
    high, low = picture((16, 20), 1), picture((16, 20), 2)
    mixed = mix_frequencies(high, low, cutoff=0.25)
    torch.testing.assert_close(mixed, high - low_pass(high, cutoff=0.25) + low_pass(low, cutoff=0.25))
    torch.testing.assert_close(mix_frequencies(high, high, cutoff=0.25), high)
    torch.testing.assert_close(mix_frequencies(high, low, cutoff=1.0), low)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_guidance_is_its_definition(gamma: float) -> None:
    x0, reference = picture((16, 20), 3), picture((16, 20), 4)
    out = guide_structure(x0, reference, gamma=gamma, cutoff=0.25)
    expected = x0 + gamma * (low_pass(reference, cutoff=0.25) - low_pass(x0, cutoff=0.25))
    torch.testing.assert_close(out, expected)
    assert torch.equal(guide_structure(x0, reference, gamma=0.0, cutoff=0.25), x0)


@pytest.mark.parametrize("cutoff", [0.0, -0.1, 1.01, float("nan"), float("inf")])
def test_cutoff_outside_its_range(cutoff: float) -> None:
    with pytest.raises(ValueError, match=r"cutoff must lie in \(0, 1\], got cutoff="):
        low_pass(torch.zeros(1, 1, 8, 8), cutoff=cutoff)


def test_cutoff_that_leaves_no_pixel() -> None:
    with pytest.raises(ValueError, match=r"at least one coarse pixel, got cutoff=0.1 for length=8"):
        low_pass(torch.zeros(1, 1, 16, 8), cutoff=0.1)
    assert coarse_length(8, 0.125) == 1


def test_bad_input_is_named() -> None:
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(TypeError, match=r"floating point .*got x.dtype=torch.int64"):
        low_pass(x.long(), cutoff=0.5)
    with pytest.raises(ValueError, match=r"x must be \[B, C, Y, X\].*\(8, 8\)"):
        low_pass(x[0, 0], cutoff=0.5)
    with pytest.raises(ValueError, match=r"kind must be one of resize, gaussian, butterworth, got kind='box'"):
        low_pass(x, cutoff=0.5, kind="box")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"impl must be one of auto, reference, matmul, triton, got impl='fft'"):
        low_pass(x, cutoff=0.5, impl="fft")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"impl='triton': the kernel supports fp16, bf16 and fp32, got .*float64"):
        low_pass(x.double(), cutoff=0.5, impl="triton")
    with pytest.raises(ValueError, match=r"x must be .*\(1, 1, 4, 2, 2, 4\)"):
        low_pass(torch.zeros(1, 1, 4, 2, 2, 4), cutoff=0.5)
    with pytest.raises(ValueError, match=r"cutoff must leave at least one coarse pixel"):
        LowPass(7, 0.125)
    for length in (0, -3, 16.5):
        with pytest.raises(ValueError, match=rf"length must be a positive integer, got self.length={length}"):
            LowPass(length, 0.25, "gaussian")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"fp16, bf16, fp32 or fp64\), got x.dtype=torch.float8_e4m3fn"):
        low_pass(x.to(torch.float8_e4m3fn), cutoff=0.5)
    with pytest.raises(ValueError, match=r"grid and patch must be positive, got grid=\(2, 2\) and patch=0"):
        packed_view(torch.zeros(1, 4, 4), grid=(2, 2), patch=0)
    with pytest.raises(ValueError, match=r"high and low must agree.*\(1, 1, 8, 8\).*\(1, 1, 8, 9\)"):
        mix_frequencies(x, torch.zeros(1, 1, 8, 9), cutoff=0.5)
    with pytest.raises(ValueError, match=r"x0 and reference must agree.*float64"):
        guide_structure(x, x.double(), gamma=1.0, cutoff=0.5)
    with pytest.raises(ValueError, match=r"gamma must be finite, got gamma=nan"):
        guide_structure(x, x, gamma=float("nan"), cutoff=0.5)
