"""Pictures that continue on the other side: the whole cascade under cyclic shifts, resizing across the border, and what raises an error."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from scalediff.cascade import pipeline
from scalediff.cascade.checks import check_run
from scalediff.cascade.pictures import around, picture_at, pictures_at, upsampled
from scalediff.cascade.pipeline import side_multiples, stage_sizes, wrap_of
from scalediff.cascade.upsampling import upsampled_picture
from scalediff.patching.networks import padding_parts
from scalediff.settings import Settings
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.changing_pipelines import changing
from tests.scalediff.cascade.test_pipelines import built, picture

diffusers = pytest.importorskip("diffusers", reason="whole pictures are drawn by diffusers' pipelines")

X, Y, BOTH, NONE = (False, True), (True, False), (True, True), (False, False)
PANORAMA: dict[str, Any] = {"height": 32, "width": 32, "sizes": [(8, 8), (16, 16), (32, 32)]}
TEXTURE: dict[str, Any] = {"height": 16, "width": 16, "sizes": [(8, 8), (16, 16)]}
_TEXTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
FAST: dict[str, Any] = {"steps": 2, "restart": 0.5, "guidance_scale": 2.0, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}


@pytest.fixture(scope="module")
def _sdxl() -> tuple[Any, dict[str, Any]]:
    """In fp64, so that a shift changes nothing but the last digits. Native 8 x 8 pixels, two pixels a latent."""
    pipe, embeddings = built("SDXL")
    pipe.to(torch.float64)
    return pipe, {name: x.double() for name, x in embeddings.items()}


@pytest.fixture
def sdxl(_sdxl: Any) -> Any:
    yield _sdxl
    scalediff.unpatch_model(_sdxl[0])


def shifted_noise(patched: pytest.MonkeyPatch, share: tuple[float, float]) -> None:
    """Roll all noise of a run, of the base stage and of the later ones, by a share of the picture."""
    from diffusers.utils import torch_utils

    original = torch_utils.randn_tensor

    def rolled(shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        return original(shape, *args, **kwargs).roll((int(shape[-2] * share[0]), int(shape[-1] * share[1])), (-2, -1))

    patched.setattr(torch_utils, "randn_tensor", rolled)
    patched.setattr("diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl.randn_tensor", rolled)


@pytest.mark.composes("pictures that wrap", "cascade")
@pytest.mark.parametrize(
    ("size", "more", "share"),
    [
        (PANORAMA, {"wrap": X}, (0, 0.5)),  # by one patch of the base stage, which is 2 patches of the next one and 4 of the last
        (TEXTURE, {"wrap": BOTH, "preset": Settings(filter="gaussian", jitter="alternate"), "vae_attention": "npa"}, (0.5, 0.5)),
    ],
)
def test_shifted_noise_gives_the_shifted_picture(sdxl: Any, monkeypatch: pytest.MonkeyPatch, size: Any, more: Any, share: Any) -> None:
    pipe, embeddings = sdxl
    result = scalediff.generate(pipe, None, **size, call=embeddings, generator=seeded(), **FAST, **more)
    assert result.settings.wrap == more["wrap"]
    plain = scalediff.generate(pipe, None, **size, call=embeddings, generator=seeded(), **FAST, **{**more, "wrap": NONE})
    shifted_noise(monkeypatch, share)
    moved = scalediff.generate(pipe, None, **size, call=embeddings, generator=seeded(), **FAST, **more)
    moved_plain = scalediff.generate(pipe, None, **size, call=embeddings, generator=seeded(), **FAST, **{**more, "wrap": NONE})
    for before, after in zip(result.stages, moved.stages, strict=True):
        height, width = before.latents.shape[-2:]
        shift = int(height * share[0]), int(width * share[1])
        torch.testing.assert_close(after.latents, before.latents.roll(shift, (-2, -1)), rtol=1e-9, atol=1e-9)
    difference = moved_plain.stages[-1].latents - plain.stages[-1].latents.roll(shift, (-2, -1))
    assert difference.abs().max() > 1e-2, "the border shows without wrap"
    images = [torch.frombuffer(bytearray(one.images[0].tobytes()), dtype=torch.uint8).int() for one in (result, moved)]
    first, second = (image.view(size["height"], size["width"], 3) for image in images)
    assert (second - first.roll((2 * shift[0], 2 * shift[1]), (0, 1))).abs().max() <= 1, "pixels are rounded"


def test_a_run_restores_the_pipeline(sdxl: Any) -> None:
    pipe, embeddings = sdxl
    states = [state_of(part) for part in padding_parts(pipe)]
    seen: list[bool] = []

    def on_stage(stage: Any) -> None:
        seen.append(all(type(module).__dict__.get("_conv_forward") for module in (pipe.unet.conv_in, pipe.vae.encoder.conv_in)))

    arguments = {**TEXTURE, "call": embeddings, **FAST}
    scalediff.generate(pipe, None, **arguments, wrap=X, on_stage=on_stage, generator=seeded())
    assert seen == [True, True]
    assert [state_of(part) for part in padding_parts(pipe)] == states

    def fail(stage: Any) -> None:
        raise ZeroDivisionError

    for attention in ("npa", "full"):
        with pytest.raises(ZeroDivisionError):
            scalediff.generate(pipe, None, **arguments, wrap=X, on_stage=fail, generator=seeded(), attention=attention)  # type: ignore[arg-type]
        assert [state_of(part) for part in padding_parts(pipe)] == states


def test_a_patched_pipeline_wraps_unless_the_run_says_otherwise(sdxl: Any) -> None:
    pipe, embeddings = sdxl
    arguments = {**TEXTURE, "call": embeddings, **FAST}

    def drawn(**more: Any) -> Tensor:
        latents: Tensor = scalediff.generate(pipe, None, **arguments, generator=seeded(), **more).stages[-1].latents
        return latents

    wrapping, plain = drawn(wrap=X), drawn()
    with scalediff.patch_model(pipe, wrap=X) as handle:
        assert wrap_of(pipe, Settings()) == X
        assert torch.equal(drawn(), wrapping)
        assert torch.equal(drawn(wrap=NONE), plain)
        assert scalediff.generate(pipe, None, **arguments).settings.wrap == X, "the run's, whoever chose it"
        assert handle.wrap == X
        call = {**embeddings, "num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "latent"}
        native = pipe(**call, height=8, width=8, generator=seeded()).images
        above = pipe(**call, height=16, width=16, generator=seeded()).images
        with pytest.raises(ValueError, match=r"multiples of 8, got height=18"):
            pipe(**call, height=18, width=16, generator=seeded())
    assert not torch.equal(pipe(**call, height=8, width=8, generator=seeded()).images, native), "convolutions wrap at every size"
    settings = Settings(steps=2, guidance_scale=2.0)
    preset = replace(settings, wrap=X)
    expected = scalediff.generate(pipe, None, height=16, width=16, call=embeddings, generator=seeded(), preset=preset)
    assert torch.equal(above, expected.stages[-1].latents)
    with scalediff.patch_model(pipe.unet, wrap=X):  # the network alone: the run takes care of the autoencoder
        assert torch.equal(drawn(), wrapping)
    with scalediff.patch_model(pipe):
        assert torch.equal(drawn(wrap=X), wrapping)
        assert torch.equal(drawn(), plain)


def test_upscale_wraps(sdxl: Any) -> None:
    pipe, embeddings = sdxl
    image = picture(8, 8)
    arguments: dict[str, Any] = {"height": 16, "width": 16, "call": embeddings, **FAST}
    first = scalediff.upscale(pipe, image, None, **arguments, wrap=X, generator=seeded()).stages[-1].latents
    plain = scalediff.upscale(pipe, image, None, **arguments, generator=seeded()).stages[-1].latents
    assert not torch.allclose(first, plain)
    with pytest.raises(ValueError, match=r"a side that wraps must be a multiple of 2 pixels, got a picture of 8 x 9"):
        scalediff.upscale(pipe, picture(8, 9), None, **{**arguments, "height": 64, "width": 72}, wrap=X)


@pytest.mark.parametrize("attention", ["npa", "full"])
def test_a_changed_picture_wraps_in_every_stage(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, embeddings = changing("StableDiffusionXLImg2ImgPipeline")
    wraps: list[Any] = []

    def at_stage(arguments: Any, size: tuple[int, int], *, wrap: tuple[bool, bool]) -> dict[str, Any]:
        wraps.append(wrap)
        return pictures_at(arguments, size, wrap=wrap)

    monkeypatch.setattr(pipeline, "pictures_at", at_stage)
    arguments: dict[str, Any] = {"height": 16, "width": 16, "call": embeddings, **FAST, "strength": 0.5, "attention": attention}
    scalediff.upscale(pipe, picture(16, 16), None, **arguments, force=True, wrap=X, generator=seeded())
    assert wraps == [X, X]


# resizing


@pytest.mark.parametrize(("before", "after"), [((6, 8), (12, 16)), ((6, 8), (9, 10)), ((5, 7), (8, 11)), ((8, 6), (5, 6))])
@pytest.mark.parametrize("wrap", [X, BOTH])
def test_resizing_is_that_of_the_middle_of_many_copies(before: Any, after: Any, wrap: Any) -> None:
    x = torch.randn(1, 2, *before, dtype=torch.float64, generator=seeded())
    copies = [5 if on else 1 for on in wrap]
    many = x.repeat(1, 1, *copies)
    size = [n * count for n, count in zip(after, copies, strict=True)]
    for antialias in (False, True):
        whole = F.interpolate(many, size=size, mode="bicubic", align_corners=False, antialias=antialias)
        for dim, (n, count) in enumerate(zip(after, copies, strict=True), start=2):
            whole = whole.narrow(dim, count // 2 * n, n)
        torch.testing.assert_close(upsampled(x, after, wrap=wrap, antialias=antialias), whole, rtol=1e-9, atol=1e-10)
    assert torch.equal(upsampled(x, after), F.interpolate(x, size=after, mode="bicubic", align_corners=False))


@pytest.mark.parametrize("wrap", [X, BOTH])
def test_a_smaller_picture_has_seen_the_other_side(wrap: tuple[bool, bool]) -> None:
    """As its middle copy among nine would be; without it the border differs."""
    whole = 2 * torch.rand(1, 3, 24, 18, generator=seeded(), dtype=torch.float64) - 1
    copies = whole.repeat(1, 1, 3 if wrap[0] else 1, 3 if wrap[1] else 1)
    many = picture_at(copies, (30 if wrap[0] else 10, 24 if wrap[1] else 8))
    middle = many[..., 10 * wrap[0] :, 8 * wrap[1] :][..., :10, :8]
    torch.testing.assert_close(picture_at(whole, (10, 8), wrap=wrap), middle)
    assert not torch.allclose(picture_at(whole, (10, 8)), middle, atol=1e-2)


def test_a_patched_call_has_ends_that_meet_at_the_native_size_too() -> None:
    """Also of a pipeline that changes a picture and draws its size."""
    pipe, embeddings = built("SDXL")
    change = diffusers.StableDiffusionXLImg2ImgPipeline(**{name: pipe.components[name] for name in ("vae", "unet", "scheduler", *_TEXTS)})
    channels = pipe.unet.config.block_out_channels
    with scalediff.patch_model(change, wrap=X):
        try:
            pipe.unet.register_to_config(block_out_channels=(32,) * 4)
            with pytest.raises(ValueError, match=r"a side that wraps must be a multiple of 16 pixels in every stage, got 8 x 8"):
                change(image=picture(8, 8), strength=1.0, num_inference_steps=1, **embeddings)
        finally:
            pipe.unet.register_to_config(block_out_channels=channels)


def test_an_upsampler_sees_the_other_side() -> None:
    """A blur of 3 pixels before doubling: by hand on the picture with its other side, 32 pixels of it or all of it again and again."""
    x = torch.rand(1, 3, 6, 8, generator=seeded()) * 2 - 1
    seen: list[tuple[int, ...]] = []

    def blur(one: Tensor) -> Tensor:
        seen.append(tuple(one.shape))
        return F.interpolate(F.avg_pool2d(one, 3, 1, 1, count_include_pad=False), scale_factor=2, mode="nearest")

    out = upsampled_picture(x, (12, 16), blur, wrap=BOTH)
    assert seen == [(1, 3, 6 + 64, 8 + 64)]
    hand = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="circular"), 3, 1)
    torch.testing.assert_close(out, F.interpolate(hand, scale_factor=2, mode="nearest"), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(upsampled_picture(x.roll(3, 3), (12, 16), blur, wrap=X).roll(-6, 3)[..., 2:-2, :], out[..., 2:-2, :])
    assert seen[-1] == (1, 3, 6, 8 + 64)
    with pytest.raises(
        ValueError, match=r"upsampler must enlarge by a whole number along an axis that wraps, got \(1, 3, 9, 108\) of \(1, 3, 6, 72\)"
    ):
        upsampled_picture(x, (9, 12), lambda one: F.interpolate(one, scale_factor=1.5), wrap=X)


def test_around() -> None:
    x = torch.arange(6.0).view(1, 1, 2, 3)
    assert around(x, 1, 2)[0, 0, 0].tolist() == [1, 2, 0, 1, 2, 0, 1]
    assert around(x, 0, 1)[0, 0, :, 0].tolist() == [3, 0, 3, 0]


# what raises an error


def test_models_with_positions_are_refused_before_anything_is_drawn() -> None:
    pipe, embeddings = built("FLUX")
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(
        NotImplementedError, match=r"wrap is for models without positions, .* those of FluxTransformer2DModel end at the border"
    ):
        scalediff.generate(pipe, None, height=512, width=512, call=embeddings, generator=seeded(), wrap=X)
    with pytest.raises(NotImplementedError, match=r"wrap is for models without positions"):
        scalediff.patch_model(pipe, wrap=X)
    assert not calls


@pytest.mark.parametrize("wrap", ["x", True, (1, 0)])
def test_a_bad_wrap_is_named(sdxl: Any, wrap: Any) -> None:
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans \(Y, X\), got wrap="):
        scalediff.generate(sdxl[0], None, **TEXTURE, call=sdxl[1], wrap=wrap)
    with pytest.raises(TypeError, match=r"wrap must be a pair of booleans"):
        Settings(wrap=wrap)


def test_sides_are_whole_tokens_at_every_level(sdxl: Any) -> None:
    """With four levels 8 latents, 16 pixels, along the axes that wrap; the pipeline itself takes 8 pixels."""
    pipe, embeddings = sdxl
    channels = pipe.unet.config.block_out_channels
    assert side_multiples(pipe, X) == side_multiples(pipe, NONE) == (8, 8)
    try:
        pipe.unet.register_to_config(block_out_channels=(32,) * 4)
        assert [side_multiples(pipe, wrap) for wrap in (NONE, X, Y, BOTH)] == [(8, 8), (8, 16), (16, 8), (16, 16)]
        with pytest.raises(ValueError, match=r"height and width must be multiples of 8 and 16, got height=16, width=24"):
            scalediff.generate(pipe, None, height=16, width=24, call=embeddings, wrap=X)
        for sizes in (stage_sizes(pipe, 24, 16, wrap=X), stage_sizes(pipe, 40, 64, wrap=X)):
            assert all(height % 8 == 0 and width % 16 == 0 for height, width in sizes)
        with pytest.raises(ValueError, match=r"sizes must be multiples of 8 and 16, got \(8, 8\)"):
            stage_sizes(pipe, 16, 16, [(8, 8), (16, 16)], wrap=X)
        with pytest.raises(ValueError, match=r"height and width must be multiples of 16, got height=24, width=16"):
            stage_sizes(pipe, 24, 16, wrap=BOTH)
        with pytest.raises(ValueError, match=r"a side that wraps must be a multiple of 16 pixels in every stage, got 16 x 24"):
            check_run(pipe, embeddings, [(8, 16), (16, 24)], Settings(wrap=X), restarts=1)
    finally:
        pipe.unet.register_to_config(block_out_channels=channels)


def test_other_methods_do_not_wrap(sdxl: Any) -> None:
    pipe, embeddings = sdxl
    with pytest.raises(ValueError, match=r"method='direct' does not support wrap"):
        scalediff.generate(pipe, None, height=16, width=16, call=embeddings, method="direct", wrap=X)
    why = r"method='direct' does not support wrap, got wrap=\(False, True\) from the preset or the patched pipeline"
    with pytest.raises(ValueError, match=why):
        scalediff.generate(pipe, None, height=16, width=16, call=embeddings, method="direct", preset=Settings(wrap=X))
    for preset in ("default", Settings(wrap=NONE)):  # a preset cannot stop the patched pipeline, as it can in the cascade
        with scalediff.patch_model(pipe, wrap=X), pytest.raises(ValueError, match=why):
            scalediff.generate(pipe, None, height=16, width=16, call=embeddings, method="direct", preset=preset)


def test_settings_keep_wrap_through_json() -> None:
    assert Settings(wrap=[False, True]).wrap == X  # type: ignore[arg-type]
    assert Settings().wrap is None
