"""LoRA, IP-Adapter and ControlNets beside a patch, put in before it or after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import ZOO
from tests.conftest import seeded, state_of
from tests.scalediff.patching.test_composition import (
    GRID,
    NATIVE,
    assert_close,
    assert_differs,
    either_order,
    in_order,
    patch,
    plain_and_patched,
)
from tests.scalediff.patching.test_composition import _places_are_given_back as _places_are_given_back  # a fixture for every test here

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests


def add_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


@pytest.mark.composes("LoRA", "network")
@either_order
@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_lora_is_switched_fused_and_deleted_in_a_patched_model(name: str, patch_first: bool) -> None:
    model, fused, (plain, patched) = ZOO[name].build(), ZOO[name].build(), plain_and_patched(name)
    add_lora(fused)
    fused.fuse_lora()
    fused.unload_lora()
    adapted = ZOO[name].run(fused, GRID)
    with patch(fused):
        expected = ZOO[name].run(fused, GRID)
    assert_differs(expected, patched)
    assert_differs(expected, adapted)

    handle = in_order(model, lambda: add_lora(model), patch_first)
    assert_close(ZOO[name].run(model, GRID), expected)
    for change, then in (
        (model.disable_adapters, patched), (model.enable_adapters, expected), (model.fuse_lora, expected), (model.unfuse_lora, expected),
    ):  # fmt: skip
        change()
        assert_close(ZOO[name].run(model, GRID), then)
    handle.remove()
    assert_close(ZOO[name].run(model, GRID), adapted)
    with patch(model):
        model.delete_adapters("default")
        assert_close(ZOO[name].run(model, GRID), patched)
        model.unload_lora()
        assert_close(ZOO[name].run(model, GRID), patched)
    assert_close(ZOO[name].run(model, GRID), plain)


def test_lora_saved_from_a_patched_model_is_loaded_into_another(tmp_path: Path) -> None:
    one, other = ZOO["FLUX.1"].build(), ZOO["FLUX.1"].build()
    with patch(one), patch(other):
        add_lora(one)
        one.save_lora_adapter(tmp_path)
        other.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
        out = ZOO["FLUX.1"].run(other, GRID)
        assert torch.equal(out, ZOO["FLUX.1"].run(one, GRID))
    assert_differs(out, plain_and_patched("FLUX.1")[1])


def load_ip_adapter(model: Any, scale: float = 1.0) -> None:
    draw = Draw(5)
    flux = type(model).__name__ == "FluxTransformer2DModel"
    names = [name for name in model.attn_processors if "attn2" in name or (flux and not name.startswith("single"))]
    widths = [model.inner_dim if flux else model.get_submodule(name.removesuffix(".processor")).inner_dim for name in names]
    weights = {}
    for index, width in enumerate(widths):
        key = index if flux else 2 * index + 1
        weights |= {f"{key}.to_{part}_ip.weight": draw(width, 32) for part in "kv"}
        weights |= {f"{key}.to_{part}_ip.bias": draw(width) for part in "kv"} if flux else {}
    norm = {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    projection = {"proj.weight": draw(4 * 32, 8), "proj.bias": draw(4 * 32), **norm}
    model._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    for processor in model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [scale]


def run_with_picture(name: str, model: nn.Module, grid: tuple[int, int]) -> Tensor:
    picture = [Draw(7)(1, 1, 8)]
    if name == "FLUX.1":
        return ZOO[name].run(model, grid, joint_attention_kwargs={"ip_adapter_image_embeds": picture})
    return ZOO[name].run(model, grid, added_cond_kwargs={"image_embeds": picture})


@pytest.mark.composes("IP-Adapter", "network")
@either_order
@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_an_ip_adapter_is_loaded_before_or_after_patching(name: str, patch_first: bool) -> None:
    """At scale 0 it says nothing: then the patched model is that without an adapter, up to the order of sums."""
    reference, silent, model = (ZOO[name].build() for _ in range(3))
    load_ip_adapter(reference)
    adapted, native = (run_with_picture(name, reference, grid) for grid in (GRID, NATIVE))
    plain, patched = plain_and_patched(name)
    assert_differs(adapted, plain)
    with in_order(silent, lambda: load_ip_adapter(silent, scale=0.0), patch_first):
        assert_close(run_with_picture(name, silent, GRID), patched)
    with in_order(model, lambda: load_ip_adapter(model), patch_first):
        out = run_with_picture(name, model, GRID)
        assert torch.equal(run_with_picture(name, model, NATIVE), native)
    assert_differs(out, adapted)
    assert_differs(out, patched)
    with patch(reference):
        assert torch.equal(run_with_picture(name, reference, GRID), out)
    assert torch.equal(run_with_picture(name, model, GRID), adapted)


# ControlNets


def small_controlnet(unet: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net: nn.Module = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 8)).eval()
        with torch.no_grad():
            for name, parameter in net.named_parameters():
                if name.startswith(("controlnet_", "mid_block.", "down_blocks.")):  # the first ones start at zero
                    parameter.add_(0.05 * torch.randn(parameter.shape))
    return net


@pytest.mark.composes("ControlNet", "network")
@pytest.mark.parametrize("several", [False, True])
def test_controlnets_are_patched_with_their_pipeline(demo: Any, several: bool) -> None:
    nets = [small_controlnet(demo.unet, seed) for seed in range(2 if several else 1)]
    parts = demo.components | {"controlnet": nets if several else nets[0]}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Draw(3)(1, 3, 128, 96).sigmoid()

    cls = type(pipe)

    def draw() -> Tensor:
        images = [picture] * len(nets) if several else picture
        how = {"height": 128, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
        out: Tensor = cls.__call__(pipe, "a moon", images, generator=seeded(), **how).images  # a patched pipeline's own runs the cascade
        return out

    states, plain = [state_of(net) for net in (demo.unet, *nets)], draw()
    with scalediff.patch_model(demo.unet):
        denoiser_only = draw()
    with scalediff.patch_model(pipe) as handle:
        patched = draw()
        rows = {row.module for row in handle.report.patched}
    prefixes = [f"controlnet.nets.{i}." for i in range(2)] if several else ["controlnet."]
    for prefix, net in zip(prefixes, nets, strict=True):
        names = {prefix + name for name, _ in net.named_modules() if name.endswith("attn1")}
        assert names
        assert names <= rows
    assert_differs(patched, plain)
    assert_differs(patched, denoiser_only)
    for net in nets:
        scalediff.patch_model(net, window=(16, 16))  # a ControlNet does not say what it was trained at
    with scalediff.patch_model(demo.unet):
        assert torch.equal(draw(), patched)
    for net in nets:
        scalediff.unpatch_model(net)
    assert torch.equal(draw(), plain)
    assert type(pipe) is cls
    assert [state_of(net) for net in (demo.unet, *nets)] == states
