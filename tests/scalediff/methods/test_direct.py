"""Direct inference is the pipeline's own picture; super-resolution is the base stage's, enlarged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from scalediff.cascade.latents import decode, to_pil_images
from scalediff.cascade.pipeline import preset
from scalediff.cascade.results import Stage
from scalediff.methods import SuperResolution, method_names, resolve_method
from tests.conftest import seeded

PROMPT = "a full moon over snowy mountains at night"


def generate(pipe: Any, size: tuple[int, int], **more: Any) -> scalediff.Result:
    return scalediff.generate(pipe, PROMPT, height=size[0], width=size[1], generator=seeded(), steps=2, **more)


def own(pipe: Any, size: tuple[int, int]) -> Tensor:
    settings = replace(preset(pipe), steps=2)
    arguments = {"num_inference_steps": 2, "guidance_scale": settings.guidance_scale, "generator": seeded(), "output_type": "latent"}
    latents: Tensor = pipe(PROMPT, height=size[0], width=size[1], **arguments).images
    return latents


def same(first: Any, second: Any) -> bool:
    return bool(first.tobytes() == second.tobytes())


@pytest.mark.parametrize("patched", [False, True])
def test_direct_is_the_pipelines_own_picture(demo: Any, patched: bool) -> None:
    expected = own(demo, (96, 64))
    if patched:
        scalediff.patch_model(demo)
    seen: list[Stage] = []
    result = generate(demo, (96, 64), method="direct", on_stage=seen.append)
    assert torch.equal(result.stages[-1].latents, expected)
    assert [(stage.height, stage.width, stage.index, stage.of, stage.steps) for stage in seen] == [(96, 64, 1, 1, 2)]


def test_super_resolution_is_the_base_picture_enlarged(demo: Any) -> None:
    with torch.no_grad():
        picture = decode(demo, own(demo, (64, 64)))
    result = generate(demo, (160, 160), method="super-resolution")
    assert [(stage.height, stage.steps, stage.of) for stage in result.stages] == [(64, 2, 2), (160, 0, 2)]
    expected = F.interpolate(picture, size=(160, 160), mode="bicubic", align_corners=False)
    assert same(result.images[0], to_pil_images(demo, expected)[0])
    assert same(result.stages[0].images[0], to_pil_images(demo, picture)[0])


def test_super_resolution_by_a_function_of_the_users(demo: Any) -> None:
    """Applied to [0, 1] until the picture is large enough; an options object does the same."""
    given: list[Tensor] = []

    def double(x: Tensor) -> Tensor:
        given.append(x)
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    first = generate(demo, (256, 256), method="super-resolution", upsampler=double)
    assert [tuple(x.shape) for x in given] == [(1, 3, 64, 64), (1, 3, 128, 128)]
    assert all(x.min() >= 0 and x.max() <= 1 for x in given)
    second = generate(demo, (256, 256), method=SuperResolution(upsampler=double))
    assert same(first.images[0], second.images[0])
    small, large = first.stages[0].images[0], first.images[0]
    assert same(large, small.resize((256, 256), 0))  # nearest


def test_super_resolution_at_native_size_is_the_base_picture(demo: Any) -> None:
    (stage,) = generate(demo, (64, 64), method="super-resolution").stages
    assert torch.equal(stage.latents, own(demo, (64, 64)))
    assert stage.of == 1


def test_an_interrupted_super_resolution_stops_after_the_base(demo: Any) -> None:
    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return values

    result = generate(demo, (128, 128), method="super-resolution", call={"callback_on_step_end": stop})
    assert [(stage.height, stage.of) for stage in result.stages] == [(64, 2)]


def test_names_and_options(demo: Any) -> None:
    assert method_names()[0] == "scalediff"
    with pytest.raises(ValueError, match="method='direct' does not support upsampler"):
        resolve_method("direct", lambda x: x)
    with pytest.raises(ValueError, match="method='direct' does not support upsampler"):
        generate(demo, (128, 128), method="direct", upsampler=lambda x: x)
    with pytest.raises(ValueError, match="method='direct' does not support lfm, sizes"):
        generate(demo, (128, 128), method="direct", lfm=True, sizes=[(64, 64), (128, 128)])
