"""What people bring to a pipeline, through every stage of the cascade: few-step LoRAs, backends, small weights, further guidance.

ControlNets, LoRAs, IP-Adapters and callbacks are in test_adapted_pipelines.py, feature caches in test_caches.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from tests.conftest import seeded
from tests.scalediff.cascade.prompted_pipelines import draw, drawn, quiet, ready, stable_diffusion
from tests.scalediff.cascade.test_pipelines import built
from tests.scalediff.cascade.test_prompts import BOAT
from tests.scalediff.patching.test_backend import own_backend as own_backend  # a fixture for every test here
from tests.scalediff.patching.test_composition import assert_differs

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")


def latents(result: scalediff.Result) -> list[Tensor]:
    return [stage.latents for stage in result.stages]


def enlarged(pipe: Any, embeddings: dict[str, Any], **more: Any) -> list[Tensor]:
    """Two stages from embeddings."""
    how: dict[str, Any] = {"height": 32, "width": 24, "steps": 3, "generator": seeded(), "call": embeddings} | more
    return latents(scalediff.generate(pipe, None, **how))


@pytest.mark.composes("few-step LoRA", "cascade")
def test_a_few_step_lora_with_its_scheduler() -> None:
    """Latent consistency: four steps without guidance, two of them again. It is heard in every stage, and fused it is the same."""
    peft = pytest.importorskip("peft")
    pipe = ready("SD1.5")
    pipe.scheduler = diffusers.LCMScheduler.from_config(pipe.scheduler.config)
    how: dict[str, Any] = {"guidance_scale": 1.0, "restart": 0.5}

    def run() -> list[Tensor]:
        result = scalediff.generate(pipe, BOAT, height=64, width=64, steps=4, generator=seeded(), **how)
        assert [stage.steps for stage in result.stages] == [4, 2]
        return latents(result)

    plain = run()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
        pipe.unet.add_adapter(config, adapter_name="lcm")
    loaded = run()
    for one, without in zip(loaded, plain, strict=True):
        assert_differs(one, without)
    pipe.unet.fuse_lora()
    torch.testing.assert_close(run()[-1], loaded[-1], rtol=1e-3, atol=1e-3)
    pipe.unet.unfuse_lora()
    pipe.unet.delete_adapters("lcm")
    torch.testing.assert_close(run()[-1], plain[-1], rtol=1e-3, atol=1e-3)


@pytest.mark.composes("attention backends", "cascade")
@pytest.mark.parametrize("backend", ["_native_math", "scalediff"])
def test_a_backend_that_is_chosen_by_name(backend: str) -> None:
    (pipe, embeddings), registered = built("FLUX"), backend == "scalediff"
    with scalediff.patch_model(pipe, window=WINDOW):
        plain = enlarged(pipe, embeddings)
        if registered:
            scalediff.register_backend()
        pipe.transformer.set_attention_backend(backend)
        chosen = enlarged(pipe, embeddings)
    for one, other in zip(chosen, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.composes("attention slicing", "cascade", refused="its processors compute attention themselves")
def test_sliced_attention_is_refused(demo: Any) -> None:
    own = dict(demo.unet.attn_processors)
    demo.enable_attention_slicing(1)
    try:
        with pytest.raises(ValueError, match="SlicedAttnProcessor does not call scaled_dot_product_attention"):
            scalediff.generate(demo, "a moon", height=96, width=96, steps=2, generator=seeded())
    finally:
        demo.unet.set_attn_processor(own)


class Int8Linear(nn.Module):
    """A linear layer with weights of eight bits and a scale for each row, as quantisation libraries put in place of torch's."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("rows", (linear.weight.detach() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantised(), self.bias)

    def dequantised(self) -> Tensor:
        return self.rows.to(self.scale.dtype) * self.scale


def quantise(net: nn.Module, *, rounded: bool = False) -> None:
    """Replace the linear layers of all blocks; `rounded` keeps them, with the same values in fp32."""
    for name, module in list(net.named_modules()):
        if "blocks." in name and isinstance(module, nn.Linear):
            small = Int8Linear(module)
            if rounded:
                module.weight = nn.Parameter(small.dequantised())
            else:
                owner, _, attribute = name.rpartition(".")
                setattr(net.get_submodule(owner), attribute, small)


@pytest.mark.composes("quantised weights", "network")
@pytest.mark.composes("quantised weights", "cascade")
def test_linear_layers_of_eight_bits() -> None:
    """They are those with the same values in fp32, in every stage."""
    runs = []
    for rounded in (False, True):
        pipe, embeddings = built("FLUX")
        quantise(pipe.transformer, rounded=rounded)
        with scalediff.patch_model(pipe, window=WINDOW) as handle:
            runs.append(enlarged(pipe, embeddings))
            assert {row.taken for row in handle.report.rows} == {1}
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)
    pipe, embeddings = built("FLUX")
    with scalediff.patch_model(pipe, window=WINDOW):
        assert_differs(runs[0][-1], enlarged(pipe, embeddings)[-1])


@pytest.mark.composes("layerwise casting", "cascade")
def test_weights_that_are_cast_in_every_layer() -> None:
    """Stored in bfloat16, they are the rounded ones."""
    runs = []
    for cast in (True, False):
        pipe, embeddings = built("FLUX")
        if cast:
            pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
            stored = {key: value.float() for key, value in pipe.transformer.state_dict().items()}
        else:
            pipe.transformer.load_state_dict(stored)
        with scalediff.patch_model(pipe, window=WINDOW):
            runs.append(enlarged(pipe, embeddings))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


@pytest.mark.composes("perturbed-attention guidance", "cascade")
@pytest.mark.composes("perturbed-attention guidance", "network")
def test_perturbed_attention_guidance_is_heard_in_every_stage() -> None:
    """Three parts of a batch, of which the last skips the attention of a block; at scale 0 it is the pipeline without it."""
    pipe = quiet(stable_diffusion("StableDiffusionPAGPipeline"))
    strong, off = (draw(pipe, BOAT, call={"pag_scale": scale}) for scale in (3.0, 0.0))
    plain = drawn("SD1.5", BOAT)
    for one, other, without in zip(latents(strong), latents(off), latents(plain), strict=True):
        assert_differs(one, without)
        torch.testing.assert_close(other, without, rtol=1e-4, atol=1e-4)
    with pytest.raises(
        NotImplementedError, match=r"StableDiffusionPAGPipeline has three parts: .* got split_guidance=True and guidance_until"
    ):
        draw(pipe, BOAT, split_guidance=True)
