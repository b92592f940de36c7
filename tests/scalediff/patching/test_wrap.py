"""Models whose windows and convolutions continue on the other side: cyclic shifts, what is restored, and what raises an error."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import ZOO
from scalediff.families.grid import Layout, Sequence
from scalediff.families.rotation import TextRotation
from scalediff.patching.circular import set_wrap, wrapped
from scalediff.patching.plan import AttentionPlan
from scalediff_kernels import neighborhood_patch_attention
from tests.conftest import state_of
from tests.scalediff.cascade.test_pipelines import autoencoder

X, Y, BOTH = (False, True), (True, False), (True, True)


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    """Two levels, native 4 x 4 tokens, random weights."""
    built: nn.Module = ZOO["SD1.5"].build().double()
    return built


def run(unet: nn.Module, x: Tensor) -> Tensor:
    text = Draw(2)(x.shape[0], 6, 32).double()
    with torch.no_grad():
        out: Tensor = unet(x, 500, encoder_hidden_states=text).sample
    return out


def latents(*size: int) -> Tensor:
    return Draw(1)(1, 4, *size).double()


@pytest.mark.composes("pictures that wrap", "network")
@pytest.mark.parametrize(("wrap", "shift"), [(X, (0, 4)), (Y, (-2, 0)), (BOTH, (2, 6))])
def test_a_shift_by_a_patch_shifts_the_result_of_a_u_net(unet: nn.Module, wrap: Any, shift: tuple[int, int]) -> None:
    """Patches have 2 tokens at the first level, where two of the second level's."""
    x = latents(8, 12)
    with scalediff.patch_model(unet, wrap=wrap) as handle:
        out, moved = run(unet, x), run(unet, x.roll(shift, (2, 3)))
        assert handle.report.patched[0].taken
        small = run(unet, x[..., :4, :4])
        assert torch.allclose(run(unet, x[..., :4, :4].roll(shift, (2, 3))), small.roll(shift, (2, 3)), rtol=1e-9, atol=1e-10), "native too"
    torch.testing.assert_close(moved, out.roll(shift, (2, 3)), rtol=1e-9, atol=1e-10)
    with scalediff.patch_model(unet):
        plain, moved = run(unet, x), run(unet, x.roll(shift, (2, 3)))
    assert (moved - plain.roll(shift, (2, 3))).abs().max() > 1e-3, "windows and zeros at the border show without wrap"
    assert not torch.allclose(plain, out)


def test_a_shift_by_a_patch_with_a_moving_grid(unet: nn.Module) -> None:
    inputs = [latents(4, 8) for _ in range(2)]
    results = []
    for shift in (0, 2):
        with scalediff.patch_model(unet, wrap=X, jitter="alternate"):
            results.append([run(unet, x.roll(shift, 3) if shift else x) for x in inputs])
    for before, after in zip(*results, strict=True):
        torch.testing.assert_close(after, before.roll(2, 3), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(*results[0]), "the grid of patches moved"


def test_only_the_axes_of_wrap_change(unet: nn.Module) -> None:
    """Convolutions alone: padding by hand along X, zeros along Y as before."""
    conv = unet.conv_in
    x = latents(5, 6)
    with wrapped([conv], X):
        out = conv(x)
    expected = F.conv2d(torch.cat([x[..., -1:], x, x[..., :1]], dim=-1), conv.weight, conv.bias, padding=(1, 0))
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert type(conv) is nn.Conv2d


def test_everything_is_restored(unet: nn.Module) -> None:
    state, x = state_of(unet), latents(8, 8)
    before = run(unet, x)
    handle = scalediff.patch_model(unet, wrap=BOTH)
    assert handle.wrap == BOTH
    assert "windows and convolutions continue on the other side along Y and X" in str(handle.report)
    wrapping = run(unet, x)
    handle.wrap = X
    of_one_axis = run(unet, x)
    assert "along X" in str(handle.report)
    handle.wrap = (False, False)
    with scalediff.patch_model(unet) as plain:
        assert not plain.report.notes
        unwrapped = run(unet, x)
    assert not any(torch.equal(a, b) for a, b in ((wrapping, of_one_axis), (wrapping, unwrapped), (of_one_axis, unwrapped)))
    scalediff.patch_model(unet, wrap=BOTH)
    again = scalediff.patch_model(unet)
    handle.remove()
    assert torch.equal(run(unet, x), unwrapped), "the later patch holds"
    again.remove()
    with pytest.raises(ZeroDivisionError), wrapped([unet], X):
        raise ZeroDivisionError
    assert state_of(unet) == state
    assert torch.equal(run(unet, x), before)
    with pytest.raises(ValueError, match=r"wrap can be set while the model is patched, .* got wrap=\(False, True\)"):
        again.wrap = X
    assert state_of(unet) == state


def test_contexts_nest(unet: nn.Module) -> None:
    x = latents(4, 4)

    def conv() -> Tensor:
        with torch.no_grad():
            out: Tensor = unet.conv_in(x)
        return out

    zeros = conv()
    with wrapped([unet], X):
        outer = conv()
        with wrapped([unet], BOTH):
            both = conv()
            set_wrap([unet], (False, False))
            assert torch.equal(conv(), zeros)
        assert torch.equal(conv(), outer)
        with wrapped([unet], (False, False)):
            assert torch.equal(conv(), zeros)
        assert torch.equal(conv(), outer)
    assert not torch.equal(both, outer)
    assert torch.equal(conv(), zeros)


def test_a_run_wraps_in_its_thread_alone(unet: nn.Module) -> None:
    """Pipelines may share an autoencoder: another thread sees zeros at the border, and waits if it wraps too."""
    conv, x = unet.conv_in, latents(4, 4)
    order: list[str] = []

    def plain() -> Tensor:
        with torch.no_grad():
            out: Tensor = conv(x)
        return out

    def wrapping() -> Tensor:
        with wrapped([conv], Y):
            order.append("second")
            return plain()

    zeros = plain()
    with ThreadPoolExecutor(1) as pool:
        with wrapped([conv], X):
            assert torch.equal(pool.submit(plain).result(), zeros)
            second = pool.submit(wrapping)
            with pytest.raises(TimeoutError):
                second.result(timeout=0.05)
            order.append("first")
            mine = plain()
        theirs = second.result(timeout=120)
        set_wrap([conv], X)
        assert torch.equal(pool.submit(plain).result(), mine), "a patched model wraps in all threads"
        with wrapped([conv], X):
            assert torch.equal(pool.submit(plain).result(), mine)
        set_wrap([conv], (False, False))
    assert order == ["first", "second"]
    assert not torch.equal(mine, theirs)
    assert not torch.equal(mine, zeros)
    assert type(conv) is nn.Conv2d


def test_copies_and_pickles_do_not_wrap(unet: nn.Module) -> None:
    x = latents(4, 4)
    before = unet.conv_in(x)
    with scalediff.patch_model(unet, wrap=BOTH):
        for copied in (copy.deepcopy(unet.conv_in), pickle.loads(pickle.dumps(unet.conv_in))):
            assert type(copied) is nn.Conv2d
            assert torch.equal(copied(x), before)
        same_class = copy.copy(unet.conv_in)
        assert torch.equal(same_class(x), before)
        assert not torch.equal(unet.conv_in(x), before)


@pytest.mark.parametrize("stored", ["hook", pytest.param("compiled", marks=pytest.mark.slow)])
def test_a_forward_that_other_code_has_replaced_wraps(unet: nn.Module, stored: str) -> None:
    """Offloading stores the forward in the module, and torch.compile a graph; both see the change, and its end."""
    conv, x = copy.deepcopy(unet.conv_in), latents(4, 4)
    forward = conv.forward
    call: Any = conv
    if stored == "hook":
        conv.forward = lambda *args: forward(*args)
    else:
        call = torch.compile(conv, backend="eager", fullgraph=True)
    before = call(x)
    with wrapped([conv], BOTH):
        inside = call(x)
    expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), conv.weight, conv.bias)
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(call(x), before)


# the autoencoder


@pytest.fixture(scope="module")
def vae() -> Any:
    return autoencoder().double()


@torch.no_grad()
def test_an_autoencoder_shifts_with_its_input(vae: Any) -> None:
    state, picture, z = state_of(vae), Draw(4)(1, 3, 12, 16).double(), latents(6, 8)
    with wrapped([vae], X):
        encoded, decoded = vae.encode(picture).latent_dist.mode(), vae.decode(z).sample
        moved = vae.encode(picture.roll(4, 3)).latent_dist.mode(), vae.decode(z.roll(2, 3)).sample
    assert encoded.shape == (1, 4, 6, 8)
    torch.testing.assert_close(moved[0], encoded.roll(2, 3), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(moved[1], decoded.roll(4, 3), rtol=1e-9, atol=1e-10)
    plain = vae.encode(picture).latent_dist.mode(), vae.encode(picture.roll(4, 3)).latent_dist.mode()
    assert (plain[1] - plain[0].roll(2, 3)).abs().max() > 1e-3
    assert state_of(vae) == state


@torch.no_grad()
@pytest.mark.parametrize("wrap", [X, BOTH])
def test_tiles_go_on_beyond_the_border_and_are_blended(vae: Any, wrap: Any) -> None:
    """Tiles of 4 latents that overlap by one: the picture of a longer row of latents, whose end is blended into its beginning."""
    z, picture = latents(6, 8), Draw(4)(1, 3, 12, 16).double()
    vae.tile_latent_min_size, vae.tile_sample_min_size, vae.tile_overlap_factor = 4, 8, 0.25
    vae.enable_tiling()
    try:
        with wrapped([vae], wrap):
            out, encoded = vae.decode(z).sample, vae.encode(picture).latent_dist.mode()
            as_tuple = vae.decode(z, return_dict=False)[0]
        with wrapped([vae.encoder, vae.decoder], wrap):  # each tile as it is there, and nothing beyond the border
            longer, further = z, picture
            for dim, on in zip((2, 3), wrap, strict=True):
                if on:
                    longer = torch.cat([longer, longer.narrow(dim, 0, 1)], dim)
                    further = torch.cat([further, further.narrow(dim, 0, 2)], dim)
            tiles, latent_tiles = vae.decode(longer).sample, vae.encode(further).latent_dist.mode()
    finally:
        vae.disable_tiling()
    for found, of_tiles, beyond in ((out, tiles, 2), (encoded, latent_tiles, 1)):
        expected = of_tiles
        for dim, on in zip((2, 3), wrap, strict=True):
            if not on:
                continue
            kept = expected.shape[dim] - beyond
            pieces = list(expected.narrow(dim, 0, kept).unbind(dim))
            for i in range(beyond):
                share = (i + 0.5) / beyond
                pieces[i] = share * pieces[i] + (1 - share) * expected.select(dim, kept + i)
            expected = torch.stack(pieces, dim)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(out, as_tuple)


# plans, and what raises an error


@pytest.mark.parametrize("shards", [1, 2])
def test_a_plan_wraps(shards: int) -> None:
    q, k, v = (Draw(i)(1, 32, 2, 8).double() for i in range(3))
    plan = AttentionPlan(Layout((4, 8), (Sequence((4, 8), shards=shards),)), window=(4, 4), wrap=X, offset=(0.0, 0.5))
    grids = [x.unflatten(1, (4, 8)) for x in (q, k, v)]
    expected = neighborhood_patch_attention(*grids, window=(4, 4), patch=(2, 2), offset=(0, 1), wrap=X, impl="reference")
    out = plan(q, k, v)
    assert out is not None
    torch.testing.assert_close(out, expected.flatten(1, 2), rtol=1e-12, atol=1e-12)


def test_positions_of_a_plan_do_not_wrap() -> None:
    layout = Layout((4, 8), (Sequence((4, 8), text=3),))
    with pytest.raises(
        NotImplementedError, match=r"wrap is for models without rotary positions, .* got wrap=\(False, True\) and text_rope="
    ):
        AttentionPlan(layout, window=(4, 4), wrap=X, text_rope=TextRotation((4, 4), 100.0, y=0, x=1))
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans \(Y, X\), got wrap='x'"):
        AttentionPlan(layout, window=(4, 4), wrap="x")  # type: ignore[arg-type]


def test_a_convolution_that_is_circular_already_is_left_alone() -> None:
    conv = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")
    with wrapped([conv], X):
        assert type(conv) is nn.Conv2d


class Unlisted(nn.Module):
    """A research model: a convolution and attention, on a grid that the caller names."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 4, 3, padding=1).double()

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)[:, 0].mT.unflatten(2, x.shape[2:])


@torch.no_grad()
def test_a_module_of_no_known_family_wraps() -> None:
    model, x = Unlisted(), latents(4, 8)
    with scalediff.patch_model(model, patch_size=1, window=(4, 4), wrap=X):
        torch.testing.assert_close(model(x.roll(2, 3)), model(x).roll(2, 3), rtol=1e-10, atol=1e-11)
    rotation = TextRotation((2, 2), 100.0, y=0, x=1)
    with pytest.raises(NotImplementedError, match=r"wrap is for models without positions, .* those of Unlisted end at the border"):
        scalediff.patch_model(model, patch_size=1, window=(4, 4), wrap=X, text=("prefix", 2), text_rope=rotation)
