"""A picture of which a mask keeps a part, through the stages: ComfyUI's sampler keeps to the mask, whose size is not the latents'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.cascade.pictures import picture_at
from scalediff.comfy.stage import Sampling, as_noise_mask, encoded_at, make_reference
from scalediff.settings import Settings
from tests.conftest import seeded
from tests.scalediff.comfy.host import StandIn
from tests.scalediff.comfy.test_nodes import STAGE, WINDOWS, cond, model_of, node, progress

SETTINGS = Settings(steps=6, restart=0.5, lfm_cutoff=0.5, sg_cutoff=0.5)


def left_kept(size: tuple[int, int] = (100, 100)) -> Tensor:
    """A mask `[1, height, width]` that keeps the left half."""
    mask = torch.zeros(1, *size)
    mask[..., size[1] // 2 :] = 1
    return mask


def picture(size: tuple[int, int]) -> Tensor:
    return torch.rand(1, *size, 3, generator=seeded(4))


def halves(latents: Tensor) -> tuple[Tensor, Tensor]:
    """The kept part of latents and the part that is drawn anew, without the edge of the mask."""
    half = latents.shape[-1] // 2
    return latents[..., : half - 1], latents[..., half + 1 :]


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", ["FLUX", "Qwen-Image"])
def test_a_mask_holds_in_every_stage(host: StandIn, name: str) -> None:
    """Of the latent or of the node; without another picture the enlarged one is kept."""
    frames = host.specimen(name).frames
    model, vae = model_of(host, name), host.vae(frames=frames)
    model.model.latent_format.latent_dimensions = 2 + frames
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    samples = torch.randn(1, 4, *((1,) if frames else ()), 16, 16, generator=seeded(0))
    latent: dict[str, Any] = {"samples": samples, "noise_mask": as_noise_mask(left_kept())}
    (same,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent={"samples": samples}, mask=left_kept(), **STAGE)
    for scale, side in ((2.0, 32), (1.25, 40)):
        reference = make_reference(vae, latent["samples"], (side, side), SETTINGS)
        (latent,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, scale=scale, **STAGE)
        assert side != 32 or torch.equal(latent["samples"], same["samples"])
        kept, drawn = (apart(*parts) for parts in zip(halves(latent["samples"]), halves(reference), strict=True))
        assert kept < 1e-5
        assert drawn > 1e-2


def test_what_is_kept_comes_from_a_picture_at_the_size_of_the_stage(host: StandIn) -> None:
    """Also in a stage of the latent's own size."""
    model, vae = model_of(host, "FLUX"), host.vae()
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    latent, photo = {"samples": torch.randn(1, 4, 24, 24, generator=seeded(0))}, picture((200, 200))
    for scale, side in ((1.0, 24), (1.5, 36)):
        inputs: dict[str, Any] = {"latent": latent, "mask": left_kept(), "scale": scale}
        (out,), (without,) = (
            node("ScaleDiffUpscaleStage", model=windowed, vae=vae, **inputs, **given, **STAGE) for given in ({"picture": photo}, {})
        )
        expected = vae.encode(picture_at(photo.movedim(-1, 1), (8 * side, 8 * side)).clamp(0, 1).movedim(1, -1))
        assert apart(halves(out["samples"])[0], halves(expected)[0]) < 1e-5
        assert apart(halves(without["samples"])[0], halves(expected)[0]) > 1e-2


@pytest.mark.parametrize("name", ["FLUX", "Qwen-Image"])
def test_every_picture_of_a_batch_has_its_mask(host: StandIn, name: str) -> None:
    """One that keeps the left half, and one that keeps all: what is kept of both comes from the picture."""
    frames = host.specimen(name).frames
    model, vae, photo = model_of(host, name), host.vae(frames=frames), picture((64, 64))
    model.model.latent_format.latent_dimensions = 2 + frames
    masks = torch.cat([left_kept(), torch.zeros_like(left_kept())])
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    latent = {"samples": torch.randn(2, 4, *((1,) if frames else ()), 16, 16, generator=seeded(0))}
    (out,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, mask=masks, picture=photo, **STAGE)
    expected = encoded_at(vae, photo, (32, 32), 2)
    left, right = (zip(*parts, strict=True) for parts in zip(halves(out["samples"]), halves(expected), strict=True))
    assert [apart(*one) < 1e-5 for one in left] == [True, True]
    assert [apart(*one) < 1e-5 for one in right] == [False, True]


def test_the_cascade_changes_a_part_of_a_picture(host: StandIn) -> None:
    """As ComfyUI's sampler on the encoded picture and then the stages; a strength of a half runs half of the base stage's steps."""
    model, vae, photo = model_of(host, "FLUX"), host.vae(), picture((180, 180))
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    latent: dict[str, Any] = {"samples": encoded_at(vae, photo, (16, 16), 2), "noise_mask": as_noise_mask(left_kept())}
    sampling = Sampling(6, 3.0, "euler", "simple", cond(1), cond(2), seed=5)
    latent["samples"] = sampling.run(model, latent, start=3, callback=lambda *_: None)
    assert apart(halves(latent["samples"])[0], halves(encoded_at(vae, photo, (16, 16), 2))[0]) < 1e-5
    (latent,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, picture=photo, seed=6, **STAGE)
    host.updates.clear()
    change: dict[str, Any] = {"picture": photo, "mask": left_kept(), "strength": 0.5, "batch_size": 2}
    size = {"width": 256, "height": 256}
    result, _ = node("ScaleDiffCascadeSampler", model=model, vae=vae, seed=5, **size, **change, **STAGE, **WINDOWS)
    assert torch.equal(result["samples"], latent["samples"])
    assert [update[:2] for update in progress(host)] == [(n, 6) for n in range(1, 7)]
    whole, _ = node("ScaleDiffCascadeSampler", model=model, vae=vae, seed=5, **size, **{**change, "mask": None}, **STAGE, **WINDOWS)
    assert "noise_mask" not in whole
    assert apart(halves(whole["samples"])[0], halves(result["samples"])[0]) > 1e-2, "without a mask all of it is drawn anew"


def test_what_does_not_fit_is_an_error(host: StandIn) -> None:
    model, vae = model_of(host, "FLUX"), host.vae()
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    stage: dict[str, Any] = {"model": model, "vae": vae, "latent": latent, **STAGE}
    cascade: dict[str, Any] = {"model": model, "vae": vae, "width": 256, "height": 256, **STAGE, **WINDOWS}
    photo, mask = picture((64, 64)), left_kept()
    for name, inputs, message in [
        ("ScaleDiffUpscaleStage", {**stage, "picture": photo}, "the picture is for what a mask keeps, got no mask"),
        ("ScaleDiffUpscaleStage", {**stage, "mask": left_kept((64, 32))}, "the mask must have the aspect ratio of 16 x 16, got 64 x 32"),
        ("ScaleDiffCascadeSampler", {**cascade, "mask": mask}, "mask and strength change a picture, got no picture beside a mask"),
        ("ScaleDiffCascadeSampler", {**cascade, "strength": 0.5}, "got no picture beside strength=0.5"),
        (
            "ScaleDiffCascadeSampler",
            {**cascade, "mask": mask.expand(3, -1, -1), "picture": photo, "batch_size": 2},
            "the mask must be one, or one for each of the 2 latents, got 3",
        ),
        (
            "ScaleDiffCascadeSampler",
            {**cascade, "picture": picture((64, 32))},
            "the picture must have the aspect ratio of 256 x 256, got 64 x 32",
        ),
        (
            "ScaleDiffCascadeSampler",
            {**cascade, "picture": photo.expand(2, -1, -1, -1), "batch_size": 3},
            "the picture must be one, or one for each of the 3 latents, got 2",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            node(name, **inputs)
