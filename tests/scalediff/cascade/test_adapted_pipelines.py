"""ControlNets, LoRA, IP-Adapter and callbacks of whole pipelines, from a prompt through every stage of the cascade."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.latents import pack
from scalediff.cascade.pipeline import stage_sizes
from tests.conftest import seeded
from tests.scalediff.cascade.prompted_pipelines import (
    PROMPTED,
    autoencoder,
    draw,
    drawn,
    flux,
    picture_of,
    quiet,
    random_weights,
    ready,
    sd3,
    sdxl,
    stable_diffusion,
    target_of,
)
from tests.scalediff.patching.test_adapters import load_ip_adapter
from tests.scalediff.patching.test_composition import assert_differs

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

BOAT = "a red boat"


def last(result: scalediff.Result) -> Tensor:
    return result.stages[-1].latents


# ControlNets


def with_control(build: Callable[..., Any], kind: str, **more: Any) -> Any:
    """A U-Net's pipeline with a ControlNet, whose last layers would start at zero."""
    unet = build().unet
    net = random_weights(lambda: diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8, 8)))
    return quiet(build(kind, controlnet=net, **more))


def sdxl_union() -> Any:
    return quiet(sdxl("StableDiffusionXLControlNetUnionPipeline", controlnet=ZOO["ControlNet Union"].build()))


def flux_control() -> Any:
    return quiet(flux("FluxControlNetPipeline", controlnet=ZOO["FLUX.1 ControlNet"].build()))


def sd3_control() -> Any:
    """Its pipeline encodes the control picture with noise of the global generator: here the posterior has next to no variance."""
    vae = autoencoder(shift_factor=0.1)
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0.0
        vae.quant_conv.bias[4:] = -30.0
    return quiet(sd3("StableDiffusion3ControlNetPipeline", controlnet=ZOO["SD3 ControlNet"].build(), vae=vae))


CONTROLLED: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "SD1.5": (lambda: with_control(stable_diffusion, "StableDiffusionControlNetPipeline"), {"name": "image"}),
    "SDXL": (lambda: with_control(sdxl, "StableDiffusionXLControlNetPipeline"), {"name": "image"}),
    "SDXL Union": (sdxl_union, {"name": "control_image", "control_mode": 0}),
    "FLUX": (flux_control, {"name": "control_image"}),
    "SD3": (sd3_control, {"name": "control_image"}),
}


def control_of(name: str, picture: Any, **more: Any) -> dict[str, Any]:
    given = dict(CONTROLLED[name][1])
    return {given.pop("name"): picture, **given, **more}


def conditions(name: str, seen: list[Any]) -> list[Any]:
    """Sizes that a ControlNet was called with, in pixels or latents; of packed ones the tokens."""
    tensors = [tensor[0] if isinstance(tensor, list) else tensor for tensor in seen]
    return list(dict.fromkeys(tensor.shape[1] if name == "FLUX" else tuple(tensor.shape[-2:]) for tensor in tensors))


@pytest.mark.composes("ControlNet", "cascade")
@pytest.mark.draws("text-to-image", CONTROLLED, switch="ControlNet")
@pytest.mark.parametrize("name", CONTROLLED)
def test_a_controlnet_is_heard_in_every_stage(name: str) -> None:
    """Its picture, of any size, is fitted to each stage; at scale 0 it says nothing."""
    pipe, seen = CONTROLLED[name][0](), list[Any]()
    pictures = [picture_of((40, 40), seed) for seed in range(2)]
    with scalediff.patch_model(pipe, window=WINDOW):
        sizes = stage_sizes(pipe, *target_of(pipe))
        remover = pipe.controlnet.register_forward_pre_hook(
            lambda net, args, named: seen.append(named["controlnet_cond"]), with_kwargs=True
        )
        one = draw(pipe, BOAT, call=control_of(name, pictures[0]))
        remover.remove()
        other = draw(pipe, BOAT, call=control_of(name, pictures[1]))
        silent = [draw(pipe, BOAT, call=control_of(name, picture, controlnet_conditioning_scale=0.0)) for picture in pictures]
    of_latents = 8 if name == "SD3" else 1
    expected = [rows * columns // 16 if name == "FLUX" else (rows // of_latents, columns // of_latents) for rows, columns in sizes]
    assert conditions(name, seen) == expected
    for stage, other_stage, without in zip(one.stages, other.stages, silent[0].stages, strict=True):
        assert (stage.latents - other_stage.latents).abs().max() > 1e-3
        assert (stage.latents - without.latents).abs().max() > 1e-3
    assert torch.equal(last(silent[0]), last(silent[1]))


@pytest.mark.parametrize("name", ["FLUX", "SD3"])
def test_the_patched_call_with_a_controlnet_is_generate(name: str) -> None:
    pipe, control = CONTROLLED[name][0](), control_of(name, picture_of((40, 40)))
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = target_of(pipe)
        result = draw(pipe, BOAT, call=control)
        how = {"height": height, "width": width, "num_inference_steps": 4, "output_type": "latent", **control}
        latents = pipe(BOAT, generator=seeded(), **how).images
    torch.testing.assert_close(latents, pack(last(result)) if name == "FLUX" else last(result), rtol=1e-5, atol=1e-5)


def test_a_controlnet_has_windows_whether_its_pipeline_is_patched_or_not() -> None:
    pipe, call = sd3_control(), {"control_image": picture_of((40, 40))}
    unpatched = draw(pipe, BOAT, call=call)
    with scalediff.patch_model(pipe):
        patched = draw(pipe, BOAT, call=call)
    full = draw(pipe, BOAT, call=call, attention="full")
    torch.testing.assert_close(unpatched.stages[0].latents, patched.stages[0].latents, rtol=1e-5, atol=1e-5)
    assert_differs(last(full), last(patched))
    torch.testing.assert_close(last(unpatched), last(patched), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["FLUX", "SD3"])
def test_a_control_tensor_is_refused(name: str) -> None:
    """Even of the target's size, as the pipeline itself would want it: it would be the base stage's size too."""
    pipe = CONTROLLED[name][0]()
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = target_of(pipe)
        with pytest.raises(ValueError, match="control_image must be a PIL picture, because it is resized for each stage, got a tensor"):
            draw(pipe, BOAT, call={"control_image": Draw(0)(1, 3, height, width).sigmoid()})


# LoRA and IP-Adapter


def lora_of(pipe: Any, folder: Path) -> None:
    """Weights of a LoRA of the denoiser, as a file."""
    peft = pytest.importorskip("peft")
    other = PROMPTED["SDXL" if hasattr(pipe, "unet") else "FLUX"]()
    part = "unet" if hasattr(pipe, "unet") else "transformer"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        getattr(other, part).add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(getattr(other, part))
    type(other).save_lora_weights(folder, **{f"{part}_lora_layers": weights})


@pytest.mark.composes("LoRA", "cascade")
@pytest.mark.draws("text-to-image", ["SDXL", "FLUX"], switch="LoRA")
@pytest.mark.parametrize("name", [pytest.param("SDXL", marks=pytest.mark.slow), "FLUX"])
def test_a_lora_is_loaded_scaled_and_unloaded(name: str, tmp_path: Path) -> None:
    """Every stage hears it; afterwards a run has the bits of one before."""
    pipe = ready(name)
    (pipe.unet if name == "SDXL" else pipe.transformer).requires_grad_(
        False
    )  # as peft leaves it; torch's kernels on some CPUs depend on it
    plain = draw(pipe, BOAT)
    lora_of(pipe, tmp_path)
    pipe.load_lora_weights(tmp_path)
    loaded = draw(pipe, BOAT)
    scale = "cross_attention_kwargs" if name == "SDXL" else "joint_attention_kwargs"
    half, silent = (draw(pipe, BOAT, call={scale: {"scale": value}}) for value in (0.5, 0.0))
    for stage, before in zip(loaded.stages, plain.stages, strict=True):
        assert_differs(stage.latents, before.latents)
    assert_differs(last(half), last(loaded))
    assert_differs(last(half), last(plain))
    torch.testing.assert_close(last(silent), last(plain), rtol=1e-4, atol=1e-4)
    pipe.unload_lora_weights()
    assert torch.equal(last(draw(pipe, BOAT)), last(plain))
    pipe.load_lora_weights(tmp_path)
    assert torch.equal(last(draw(pipe, BOAT)), last(loaded))
    pipe.fuse_lora()
    torch.testing.assert_close(last(draw(pipe, BOAT)), last(loaded), rtol=1e-3, atol=1e-3)
    pipe.unfuse_lora()
    pipe.unload_lora_weights()
    torch.testing.assert_close(last(draw(pipe, BOAT)), last(plain), rtol=1e-3, atol=1e-3)


@pytest.mark.composes("IP-Adapter", "cascade")
@pytest.mark.draws("text-to-image", ["SD1.5"], switch="IP-Adapter")
def test_an_ip_adapter_is_heard_in_every_stage() -> None:
    pipe, plain = ready("SD1.5"), drawn("SD1.5", BOAT)
    load_ip_adapter(pipe.unet)
    one, other = (draw(pipe, BOAT, call={"ip_adapter_image_embeds": [Draw(seed)(2, 1, 8)]}) for seed in range(2))
    for stages in zip(one.stages, other.stages, plain.stages, strict=True):
        assert_differs(stages[0].latents, stages[1].latents)
        assert_differs(stages[0].latents, stages[2].latents)
    pipe.set_ip_adapter_scale(0.0)
    silent = draw(pipe, BOAT, call={"ip_adapter_image_embeds": [Draw(0)(2, 1, 8)]})
    torch.testing.assert_close(last(silent), last(plain), rtol=1e-4, atol=1e-4)
    pipe.unload_ip_adapter()
    assert torch.equal(last(draw(pipe, BOAT)), last(plain))


# Callbacks


@pytest.mark.composes("callbacks", "cascade")
@pytest.mark.draws("text-to-image", PROMPTED, switch="callback")
@pytest.mark.parametrize("name", PROMPTED)
def test_a_callback_sees_every_step_of_every_stage_and_may_change_it(name: str) -> None:
    pipe, seen = ready(name), list[tuple[int, int]]()
    plain = drawn(name, BOAT)

    def changing(change: Callable[[int, Tensor], Tensor]) -> scalediff.Result:
        def callback(pipe: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append((step, values["latents"].numel()))
            return {"latents": change(step, values["latents"])}

        return draw(pipe, BOAT, call={"callback_on_step_end": callback})

    assert torch.equal(last(changing(lambda step, latents: latents)), last(plain))
    assert seen == [(step, stage.latents.numel()) for stage in plain.stages for step in range(stage.steps)]
    changed = changing(lambda step, latents: latents * 0.5 if step == 0 else latents)
    for stage, before in zip(changed.stages, plain.stages, strict=True):
        assert (stage.latents - before.latents).abs().max() > 1e-2
    size = plain.stages[-1].latents.numel()
    only_last = changing(lambda step, latents: latents * 0.5 if latents.numel() == size else latents)
    assert torch.equal(only_last.stages[0].latents, plain.stages[0].latents)
    assert (last(only_last) - last(plain)).abs().max() > 1e-2


def test_a_callback_may_end_a_run() -> None:
    """In its first stage there is no second; in its second both are there."""
    pipe, seen, plain = ready("SDXL"), list[int](), drawn("SDXL", BOAT)

    def stop_after(steps: int) -> scalediff.Result:
        def callback(pipe: Any, step: int, time: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(step)
            pipe._interrupt = len(seen) == steps
            return values

        seen.clear()
        height, width = target_of(pipe)
        how: dict[str, Any] = {
            "height": height,
            "width": width,
            "steps": 4,
            "generator": seeded(),
            "call": {"callback_on_step_end": callback},
        }
        return scalediff.generate(pipe, BOAT, **how)

    first = stop_after(2)
    assert (len(first.stages), first.images[0].size) == (1, plain.stages[0].images[0].size)
    assert not torch.equal(first.stages[0].latents, plain.stages[0].latents)
    assert len(stop_after(5).stages) == 2
    assert torch.equal(last(draw(pipe, BOAT)), last(plain))
