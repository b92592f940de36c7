"""Autoencoders in bands: the result of one piece, in less memory, whatever their depth; what cannot be streamed."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.cascade import streaming
from scalediff.cascade.autoencoder_memory import join_sizes, vae_bytes
from scalediff.cascade.streaming import is_streamed, stream_obstacle, streamed
from scalediff.cost.models import MODELS, built
from scalediff.patching.circular import wrapped
from tests.conftest import seeded, state_of
from tests.scalediff.cost.real_peaks import real_peak_of

diffusers = pytest.importorskip("diffusers")

FEW = 2**11  # elements of a band: a few rows
EXACT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def autoencoder(channels: tuple[int, ...] = (8, 8, 16), layers: int = 1, **more: Any) -> Any:
    """Random weights, and norms that are not the identity."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * len(channels), "up_block_types": ("UpDecoderBlock2D",) * len(channels)}
    sizes: dict[str, Any] = {"block_out_channels": channels, "layers_per_block": layers, "norm_num_groups": 4, "sample_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKL(**{"latent_channels": 4, **sizes, **blocks, **more}).double().eval()
        with torch.no_grad():
            for x in vae.parameters():
                x.add_(0.1 * torch.randn_like(x))
    return vae


def inputs(vae: Any, height: int, width: int, batch: int = 1) -> tuple[Tensor, Tensor]:
    """Latents and a picture; a bright corner makes tiles with statistics of their own."""
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    rng = seeded()
    latents = torch.randn(batch, 4, height // factor, width // factor, generator=rng, dtype=torch.float64)
    picture = torch.randn(batch, 3, height, width, generator=rng, dtype=torch.float64)
    for x in (latents, picture):
        x[:, :, : x.shape[2] // 3, : x.shape[3] // 3] += 3
    return latents.to(vae.dtype), picture.to(vae.dtype)


@torch.no_grad()
def both(vae: Any, latents: Tensor, picture: Tensor) -> tuple[Tensor, Tensor]:
    return vae.decode(latents).sample, vae.encode(picture).latent_dist.mode()


@pytest.mark.parametrize(
    ("channels", "layers", "more", "size"),
    [
        ((8, 8, 16), 1, {}, (36, 20)),
        ((8, 16), 2, {"mid_block_add_attention": False, "use_quant_conv": False, "use_post_quant_conv": False}, (22, 12)),
        ((8,), 1, {}, (19, 11)),
        pytest.param((4, 8, 8, 16), 2, {}, (128, 64), marks=pytest.mark.slow),
    ],
)
def test_bands_give_the_result_of_one_piece(channels: tuple[int, ...], layers: int, more: dict[str, Any], size: tuple[int, int]) -> None:
    vae = autoencoder(channels, layers, **more)
    given = inputs(vae, *size, batch=2)
    whole, before = both(vae, *given), state_of(vae)
    for elements, joined in ((1, 1), (FEW, len(channels))):
        with streamed(vae, elements=elements, joined=joined):
            assert is_streamed(vae)
            for part, expected in zip(both(vae, *given), whole, strict=True):
                torch.testing.assert_close(part, expected, **EXACT)
    assert state_of(vae) == before
    assert not is_streamed(vae)


def test_what_fits_into_one_band_has_the_same_bits() -> None:
    vae = autoencoder().float()
    given = inputs(vae, 32, 32)
    whole = both(vae, *given)
    with streamed(vae):
        assert all(map(torch.equal, both(vae, *given), whole))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_rounding_is_that_of_one_piece(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    """Twice the error of one piece in the same precision, and a rounding."""
    exact = autoencoder()
    vae = copy.deepcopy(exact).to(dtype)
    exact.load_state_dict(vae.state_dict())
    vae = vae.to(memory_format=memory_format)
    given = inputs(vae, 48, 32)
    truth = both(exact, *(x.double() for x in given))
    plain = both(vae, *given)
    with streamed(vae, elements=FEW):
        bands = both(vae, *given)
    for band, piece, true in zip(bands, plain, truth, strict=True):
        ours, theirs = ((x.double() - true).abs().max() for x in (band, piece))
        assert ours <= 2 * theirs + torch.finfo(dtype).eps * true.abs().max()


def test_tiles_are_far_from_it() -> None:
    """What bands are for: every tile of diffusers has statistics of its own."""
    vae = autoencoder()
    given = inputs(vae, 64, 64)
    whole = both(vae, *given)
    vae.enable_tiling()
    for tile, expected in zip(both(vae, *given), whole, strict=True):
        assert (tile - expected).abs().mean() > 1e-2


def test_an_interrupted_pass_leaves_no_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same autoencoder, still in bands, after it ran out of memory with another picture."""
    vae = autoencoder()
    latents, picture = inputs(vae, 48, 32)
    whole = both(vae, latents, picture)

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with streamed(vae, elements=FEW):
        hook = vae.decoder.up_blocks[-1].resnets[-1].conv2.register_forward_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            vae.decode(latents + 1)
        hook.remove()
        torch.testing.assert_close(both(vae, latents, picture), whole, **EXACT)


def test_the_input_is_not_changed() -> None:
    vae = autoencoder((8, 8))
    given = inputs(vae, 32, 32)
    before = [x.clone() for x in given]
    with streamed(vae, elements=FEW):
        both(vae, *given)
    assert all(map(torch.equal, given, before))


def test_memory_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate is what real tensors take, a fraction of one piece; larger bands take more."""
    vae = autoencoder((8, 8, 16)).float()
    latents, picture = inputs(vae, 128, 64)
    told = functools.partial(vae_bytes, vae, (128, 64), 1)
    peaks = []
    for elements in (2**12, 2**14):
        monkeypatch.setattr(streaming, "ELEMENTS", elements)
        with streamed(vae):
            real = max(real_peak_of(lambda: vae.encode(picture).latent_dist.mode()), real_peak_of(lambda: vae.decode(latents).sample))
        peaks.append(told(tiled=True))
        assert peaks[-1] == pytest.approx(real, rel=0.05)
    assert peaks[0] < peaks[1] < told(tiled=False)
    assert peaks[0] < told(tiled=False) / 3


def test_columns_may_wrap_in_bands_and_rows_may_not() -> None:
    """A band has whole rows; the first band lacks the last row, which would be its padding."""
    vae = autoencoder()
    latents, picture = inputs(vae, 36, 16)
    with wrapped([vae], (False, True)):
        expected = both(vae, latents, picture)
        with streamed(vae, elements=FEW):
            for found, one in zip(both(vae, latents, picture), expected, strict=True):
                torch.testing.assert_close(found, one, **EXACT)
    assert not torch.allclose(expected[0], both(vae, latents, picture)[0])
    with wrapped([vae], (True, False)), pytest.raises(NotImplementedError, match="the first rows of AutoencoderKL need the last ones"):
        streamed(vae).__enter__()


def test_more_sizes_are_joined_where_they_do_not_fit() -> None:
    """The autoencoder of SDXL at 8192 pixels: as few as fit, and no more than help."""
    vae = built(MODELS["sdxl"])[1].bfloat16()
    one, two, three = (vae_bytes(vae, (8192, 8192), 1, tiled=True, joined=joined) for joined in (1, 2, 3))
    assert two < 0.6 * one
    assert three >= two, "the middle block, which is one piece, needs as much"
    for room, expected in ((2 * one, 1), (1.2 * two, 2), (0, 2)):
        assert join_sizes(vae, (8192, 8192), 1, int(room)) == expected


def test_what_cannot_be_streamed() -> None:
    assert stream_obstacle(autoencoder()) == ""
    tiny = diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                                     num_decoder_blocks=(1, 1))  # fmt: skip
    assert stream_obstacle(tiny) == "AutoencoderTiny has no encoder and decoder of AutoencoderKL"
    attends = autoencoder((8, 8), up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D"))
    message = "AutoencoderKL has layers that may see the whole picture: AttnUpDecoderBlock2D"
    assert stream_obstacle(attends) == message
    with pytest.raises(NotImplementedError, match=f"an autoencoder in bands must have layers that see a few rows: {message}"):
        streamed(attends).__enter__()
    offloaded = autoencoder((8,))
    offloaded.encoder.conv_in._hf_hook = object()
    assert stream_obstacle(offloaded) == "the layers of AutoencoderKL have hooks, such as those of offloading"
    enlarges = autoencoder((8, 8))
    enlarges.decoder.up_blocks[0].upsamplers[0].conv = torch.nn.ConvTranspose2d(8, 8, 4, stride=2)
    assert stream_obstacle(enlarges) == "AutoencoderKL has layers that may see the whole picture: ConvTranspose2d"


def test_the_autoencoder_of_flux2_is_streamed_too() -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKLFlux2(block_out_channels=(8, 8), latent_channels=4, norm_num_groups=4, **blocks).double().eval()
    given = inputs(vae, 24, 16)
    whole = both(vae, *given)
    with streamed(vae, elements=FEW):
        torch.testing.assert_close(both(vae, *given), whole, **EXACT)
