"""The nodes as ComfyUI runs them: their inputs, whole graphs, and the sentences that they show."""

from __future__ import annotations

import inspect
import math
import re
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalediff.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from scalediff.comfy.models import attention_of
from tests.conftest import seeded
from tests.scalediff.comfy.host import StandIn


def cond(seed: int) -> Any:
    return [[torch.randn(1, 7, 5, generator=seeded(seed)), {}]]


def defaults(name: str) -> dict[str, Any]:
    """The inputs of a node as its widgets first show them."""
    values = {}
    for key, (kind, *options) in NODE_CLASS_MAPPINGS[name].INPUT_TYPES()["required"].items():
        if isinstance(kind, list | tuple):
            values[key] = kind[0]
        elif options and "default" in options[0]:
            values[key] = options[0]["default"]
    return values


def node(name: str, **inputs: Any) -> Any:
    """Run a node with the given inputs, and what its widgets first show for the others."""
    cls = NODE_CLASS_MAPPINGS[name]
    required, optional = cls.INPUT_TYPES()["required"], cls.INPUT_TYPES().get("optional", {})
    sampling = {"sampler_name": "euler", "scheduler": "simple", "positive": cond(1), "negative": cond(2)}
    given = {**defaults(name), **sampling, **inputs}
    return getattr(cls(), cls.FUNCTION)(**{key: given[key] for key in required}, **{key: given[key] for key in optional if key in given})


def model_of(host: StandIn, name: str) -> Any:
    return host.specimen(name).model(dtype=torch.float32)


def sample_node(
    model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any, negative: Any,
    latent_image: dict[str, Any], denoise: float,
) -> tuple[dict[str, Any]]:  # fmt: skip
    """ComfyUI's own KSampler node: noise from the seed, the whole schedule."""
    import comfy.sample

    empty = latent_image["samples"]
    noise = comfy.sample.prepare_noise(empty, seed)
    samples = comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, empty, denoise=denoise, start_step=0,
        force_full_denoise=True, noise_mask=None, disable_pbar=True, callback=lambda *_: None, seed=seed,
    )  # fmt: skip
    return ({"samples": samples},)


def base_picture(model: Any, size: tuple[int, int], *, frames: bool = False) -> Tensor:
    empty = {"samples": torch.zeros(1, 4, *((1,) if frames else ()), *size)}
    (latent,) = sample_node(model, 5, 6, 3.0, "euler", "simple", cond(1), cond(2), empty, 1.0)
    return latent["samples"]  # type: ignore[no-any-return]


def progress(host: StandIn) -> list[tuple[int, int, str, int]]:
    """Value and total of every update of a progress bar, and the format and height of its preview, a pixel for a latent."""
    return [(value, total, preview[0], preview[1].height) for value, total, preview in host.updates]


WINDOWS = {"window_height": 8, "window_width": 8}
STAGE: dict[str, Any] = {"steps": 6, "cfg": 3.0, "preset": "custom", "restart": 0.5, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}


@pytest.mark.parametrize("name", ["SDXL", "Qwen-Image"])
def test_a_graph_of_stages_is_the_cascade(host: StandIn, name: str) -> None:
    """Patch -> KSampler -> Upscale -> Upscale; the Cascade Sampler draws the same bits from the same seeds."""
    spec = host.specimen(name)
    model, frames = model_of(host, name), spec.frames
    side, vae = 8 * spec.patch, host.vae(frames=frames)
    model.model.latent_format.latent_dimensions = 2 + frames
    before = base_picture(model, (side, side), frames=frames)
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    latents = base_picture(windowed, (side, side), frames=frames)
    assert torch.equal(latents, before)  # at the native size
    latent: dict[str, Any] = {"samples": latents}
    for number in (1, 2):
        (latent,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, seed=5 + number, **STAGE)
    assert latent["samples"].shape[-2:] == (4 * side, 4 * side)
    assert progress(host) == [(n, 3, "JPEG", height) for height in (2 * side, 4 * side) for n in (1, 2, 3)]
    attention = attention_of(windowed)
    assert attention is not None
    assert attention.last is not None
    assert attention.last.plan.grid == (32, 32)
    assert sum(attention.last.taken.values()) == attention.blocks

    host.updates.clear()
    size = {"width": 4 * side * 8, "height": 4 * side * 8}
    result, drawn = node("ScaleDiffCascadeSampler", model=model, vae=vae, seed=5, **size, **STAGE, **WINDOWS)
    assert torch.equal(result["samples"], latent["samples"])
    heights = [side] * 6 + [2 * side] * 3 + [4 * side] * 3
    assert progress(host) == [(n, 12, "JPEG", height) for n, height in enumerate(heights, 1)]
    assert attention_of(drawn) is not None
    assert attention_of(model) is None
    assert torch.equal(base_picture(model, (side, side), frames=frames), before)


def test_the_base_picture_of_a_cascade_has_full_attention(host: StandIn) -> None:
    """Also where rounding makes it a little larger than native: 13 x 5 tokens for a window of 8 x 8."""
    model, vae = model_of(host, "FLUX"), host.vae()
    size: dict[str, Any] = {"width": 7 * 16, "height": 19 * 16}
    result, windowed = node("ScaleDiffCascadeSampler", model=model, vae=vae, seed=5, **size, **STAGE, **WINDOWS)
    attention = attention_of(windowed)
    assert attention is not None
    assert [key[0].grid for key in attention._plans] == [(19, 7)]
    assert result["samples"].shape == (1, 4, 38, 14)
    assert progress(host)[0][2:] == ("JPEG", 26)


def test_a_stage_of_a_model_that_is_not_patched_is_said(host: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    latent = {"samples": torch.randn(1, 4, 128, 128, generator=seeded(0))}
    model = model_of(host, "SDXL")
    with pytest.raises(ValueError, match="scale must be larger than 1 without a mask"):
        node("ScaleDiffUpscaleStage", model=model, vae=host.vae(), latent=latent, scale=1.0)
    expected = ["ScaleDiff: Upscale Stage: the model is not patched, so this stage runs full attention"]
    assert [record.message for record in caplog.records if record.message.startswith("ScaleDiff")] == expected


def test_the_line_of_the_documentation_installs_the_nodes(tmp_path: Path) -> None:
    """Contract (nodes.py): ComfyUI executes `custom_nodes/NAME/__init__.py` by its path and takes two names from it."""
    page = (Path(__file__).parents[3] / "docs" / "guide" / "comfyui.md").read_text()
    (line,) = re.findall(r'^echo "(.*)" > .*custom_nodes/scalediff/__init__.py"$', page, flags=re.MULTILINE)
    (tmp_path / "__init__.py").write_text(line + "\n")
    installed = runpy.run_path(str(tmp_path / "__init__.py"))
    assert installed["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    assert installed["NODE_DISPLAY_NAME_MAPPINGS"] is NODE_DISPLAY_NAME_MAPPINGS


def test_presets_are_the_models_own(host: StandIn) -> None:
    """The default preset runs 0.6 of FLUX's schedule, whatever the widget for custom settings says."""
    model, vae = model_of(host, "FLUX"), host.vae()
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    latent = {"samples": torch.randn(1, 4, 16, 16, generator=seeded(0)), "batch_index": [3]}
    (out,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, **{**STAGE, "preset": "model", "steps": 10})
    assert len(host.updates) == 6
    assert out["batch_index"] == [3]


def test_the_report_says_what_happened(host: StandIn) -> None:
    model, vae, levels = model_of(host, "SDXL"), host.vae(), host.specimen("SDXL").per_level
    (windowed,) = node("ScaleDiffPatchModel", model=model)
    latent = {"samples": torch.zeros(1)}
    text = node("ScaleDiffReport", model=windowed, latent=latent)
    assert text["ui"]["text"] == ["UNetModel: windows of 128 x 128 tokens\nno pass above the native size yet"]
    (windowed,) = node("ScaleDiffPatchModel", model=model, **WINDOWS)
    small = {"samples": torch.randn(1, 4, 8, 8, generator=seeded(0))}
    (larger,) = node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=small, scale=1.5, **STAGE)
    shown = node("ScaleDiffReport", model=windowed, latent=larger)
    assert shown["result"][0] is larger
    assert shown["ui"]["text"] == [shown["result"][1]]
    assert shown["result"][1].splitlines() == [
        "UNetModel: windows of 8 x 8 tokens",
        "last pass: 12 x 12 tokens",
        f"{sum(levels)} of {sum(levels)} attention blocks in windows",
        *(f"  calls of {tokens} tokens: {count}" for tokens, count in zip((144, 36, 9), levels, strict=True)),
        *(f"  other calls of {tokens} queries and 7 keys: {count}" for tokens, count in zip((144, 36, 9), levels, strict=True)),
    ]
    assert math.isnan(NODE_CLASS_MAPPINGS["ScaleDiffReport"].IS_CHANGED(windowed, larger))
    (flux,) = node("ScaleDiffPatchModel", model=model_of(host, "FLUX"))
    assert "windows of 64 x 64 tokens, text rotated for each window" in node("ScaleDiffReport", model=flux, latent=larger)["result"][1]


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_inputs_are_the_arguments_of_the_function(host: StandIn, name: str) -> None:
    cls = NODE_CLASS_MAPPINGS[name]
    inputs = cls.INPUT_TYPES()
    taken = {**inputs["required"], **inputs.get("optional", {})}
    parameters = inspect.signature(getattr(cls(), cls.FUNCTION)).parameters
    assert list(parameters) == list(taken)
    assert [name for name, one in parameters.items() if one.default is not one.empty] == list(inputs.get("optional", {}))
    for kind, *options in taken.values():
        assert isinstance(kind, list | tuple | str)
        if kind in ("INT", "FLOAT"):
            limits = options[0]
            assert limits["min"] <= limits["default"] <= limits["max"]
    assert cls.CATEGORY == "scalediff"
    assert cls.DESCRIPTION
    assert NODE_DISPLAY_NAME_MAPPINGS[name].startswith("ScaleDiff: ")


def test_every_node_has_a_name(host: StandIn) -> None:
    import comfy.samplers

    assert list(NODE_CLASS_MAPPINGS) == list(NODE_DISPLAY_NAME_MAPPINGS)
    assert set(comfy.samplers.KSampler.SAMPLERS) == set(
        NODE_CLASS_MAPPINGS["ScaleDiffUpscaleStage"].INPUT_TYPES()["required"]["sampler_name"][0]
    )


class Unknown(nn.Module):
    """A network of another node."""


def test_errors_are_sentences(host: StandIn) -> None:
    flux, vae, unknown = model_of(host, "FLUX"), host.vae(), replace(host.specimen("SDXL"), build=Unknown).model()
    latent = {"samples": torch.zeros(1, 4, 16, 16)}
    (windowed,) = node("ScaleDiffPatchModel", model=flux, **WINDOWS)
    with pytest.raises(NotImplementedError, match=r"does not know where the tokens of this model are: it knows Stable Diffusion 1.*, got "):
        node("ScaleDiffPatchModel", model=unknown)
    with pytest.raises(NotImplementedError, match=r"got tests\.scalediff\.comfy\.test_nodes\.Unknown"):
        node("ScaleDiffUpscaleStage", model=unknown, vae=vae, latent=latent)
    with pytest.raises(NotImplementedError, match=r"got tests\.scalediff\.comfy\.test_nodes\.Unknown"):
        node("ScaleDiffCascadeSampler", model=unknown, vae=vae)
    for name in ("ScaleDiffUpscaleStage", "ScaleDiffCascadeSampler"):
        with pytest.raises(ValueError, match="ScaleDiff needs a VAE to enlarge the picture: this checkpoint has none, add a Load VAE node"):
            node(name, model=windowed, vae=None, latent=latent)
    small = {"samples": torch.zeros(1, 4, 12, 14)}
    message = "smaller than the model's native size of 16 x 16 latents: draw a picture of the native size first, got 12 x 14"
    with pytest.raises(ValueError, match=message):
        node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=small)
    with pytest.raises(ValueError, match=r"scale must make both sides of the latent multiples of 2, got scale=1\.3 for 16 x 16 latents"):
        node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, scale=1.3)
    with pytest.raises(ValueError, match=r"scale must be larger than 1 without a mask, got scale=1\.0"):
        node("ScaleDiffUpscaleStage", model=windowed, vae=vae, latent=latent, scale=1.0)
    with pytest.raises(ValueError, match="height and width must be multiples of 16, got height=512, width=520"):
        node("ScaleDiffCascadeSampler", model=flux, vae=vae, width=520, height=512, **WINDOWS)
    with pytest.raises(ValueError, match="height x width must be at least the model's native 1024 x 1024, got height=512, width=512"):
        node("ScaleDiffCascadeSampler", model=flux, vae=vae, width=512, height=512)
    with pytest.raises(ValueError, match="ScaleDiff: Report needs the model of ScaleDiff: Patch Model or ScaleDiff: Cascade Sampler"):
        node("ScaleDiffReport", model=flux, latent=latent)
    with pytest.raises(ValueError, match=r"window_height and window_width must both be positive, or both 0 .*, got \(8, 0\)"):
        node("ScaleDiffPatchModel", model=flux, window_height=8)
    sd2 = replace(host.specimen("SDXL"), unet_config={"context_dim": 1024}).model()
    with pytest.raises(ValueError, match=r"this model does not tell its native size: set window_height and window_width, such as 64 or 96"):
        node("ScaleDiffPatchModel", model=sd2)
    assert node("ScaleDiffPatchModel", model=sd2, window_height=64, window_width=64)
