"""Patching: the same bits at native size, the defined attention above it, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.families.grid import level_grid
from scalediff_kernels import neighborhood_patch_attention
from tests.conftest import forward, seeded, state_of

SDPA = F.scaled_dot_product_attention


def test_native_size_bit_equality(unet: nn.Module) -> None:
    before, smaller = forward(unet, (16, 16)), forward(unet, (8, 12))
    with scalediff.patch_model(unet):
        assert torch.equal(forward(unet, (16, 16)), before)
        assert torch.equal(forward(unet, (8, 12)), smaller)


def test_exact_unpatch(demo: Any) -> None:
    unet, cls = demo.unet, type(demo)
    before, state = forward(unet, (32, 24)), state_of(unet)
    attributes = sorted(demo.__dict__)
    handle = scalediff.patch_model(demo)
    patched = forward(unet, (32, 24))
    assert not torch.equal(patched, before)
    assert type(demo).__name__ == cls.__name__
    assert isinstance(demo, cls)
    handle.remove()
    handle.remove()
    assert type(demo) is cls
    assert sorted(demo.__dict__) == attributes
    assert state_of(unet) == state
    assert F.scaled_dot_product_attention is SDPA
    assert torch.equal(forward(unet, (32, 24)), before)


def test_patching_twice_is_patching_once(demo: Any) -> None:
    cls, state = type(demo), state_of(demo.unet)
    first = scalediff.patch_model(demo)
    once = forward(demo.unet, (32, 32))
    second = scalediff.patch_model(demo, impl="sdpa")
    assert torch.equal(forward(demo.unet, (32, 32)), once)
    first.remove()  # it has been replaced: removing it again must not touch the second
    assert torch.equal(forward(demo.unet, (32, 32)), once)
    assert type(demo) is not cls
    second.remove()
    assert type(demo) is cls
    assert state_of(demo.unet) == state


def test_a_denoiser_has_one_owner(demo: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    cls, state = type(demo), state_of(demo.unet)
    second = diffusers.StableDiffusionPipeline(**demo.components, requires_safety_checker=False)
    scalediff.patch_model(demo)
    for other in (second, demo.unet):
        with pytest.raises(ValueError, match="this UNet2DConditionModel is already patched through a StableDiffusionPipeline"):
            scalediff.patch_model(other)
    assert type(demo) is not cls
    scalediff.unpatch_model(demo)
    scalediff.patch_model(demo.unet)
    scalediff.patch_model(demo)  # from the denoiser alone to its pipeline
    scalediff.unpatch_model(demo)
    assert type(demo) is cls
    assert state_of(demo.unet) == state


def test_a_shallow_copy_shares_the_denoiser_and_nothing_else(demo: Any) -> None:
    cls = type(demo)
    scalediff.patch_model(demo)
    twin = copy.copy(demo)
    assert type(twin) is cls
    assert "_scalediff" not in twin.__dict__
    scalediff.unpatch_model(twin)  # through the denoiser, which the two share
    assert type(demo) is cls
    assert "_scalediff" not in demo.__dict__


def test_copies_and_pickles_are_not_patched(unet: nn.Module) -> None:
    plain, cls, attributes = forward(unet, (32, 32)), type(unet), sorted(unet.__dict__)
    with scalediff.patch_model(unet):
        twins = [copy.deepcopy(unet), *(pickle.loads(pickle.dumps(unet, protocol)) for protocol in (0, 2, 5))]
        assert not torch.equal(forward(unet, (32, 32)), plain)
    for twin in twins:
        assert type(twin) is cls
        assert sorted(twin.__dict__) == attributes
        assert torch.equal(forward(twin, (32, 32)), plain)
    assert torch.equal(forward(unet, (32, 32)), plain)


def test_every_self_attention_gets_its_window(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute every intercepted call by hand: the grid, window and patch of its level."""
    calls: list[tuple[int, int]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        calls.append(arguments["window"])
        assert arguments["patch"] == (arguments["window"][0] // 2, arguments["window"][1] // 2)
        assert q.shape[1:3] == {(16, 16): (40, 24), (8, 8): (20, 12)}[arguments["window"]]
        return neighborhood_patch_attention(q, k, v, **arguments)

    with scalediff.patch_model(unet) as handle:
        monkeypatch.setattr("scalediff.patching.call.neighborhood_patch_attention", recording)
        forward(unet, (40, 24))
    assert sorted(calls) == sorted(row.window for row in handle.report.patched if row.window)


def test_odd_grids_round_up_per_level(unet: nn.Module) -> None:
    assert level_grid((35, 17), 1) == (18, 9)
    with scalediff.patch_model(unet), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forward(unet, (35, 17)).shape[-2:] == (35, 17)


def test_a_class_put_on_top_of_ours_survives_unpatching(unet: nn.Module) -> None:
    plain, cls = forward(unet, (32, 32)), type(unet)
    try:
        with scalediff.patch_model(unet):
            patched = forward(unet, (32, 32))
            on_top = type("OnTop", (type(unet),), {})
            unet.__class__ = on_top
            assert torch.equal(forward(unet, (32, 32)), patched)
        assert type(unet) is on_top
        assert torch.equal(forward(unet, (32, 32)), plain)
    finally:
        unet.__class__ = cls


def test_a_pipeline_made_from_a_patched_one_is_not_patched(demo: Any) -> None:
    size = {"height": 128, "width": 128, "num_inference_steps": 1, "output_type": "latent"}
    plain = demo("a moon", generator=seeded(), **size).images
    with scalediff.patch_model(demo) as handle:
        other = type(demo)(**demo.components, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        handle.attention = "full"
        assert torch.equal(other("a moon", generator=seeded(), **size).images, plain)
        twin = copy.copy(demo)
    assert torch.equal(twin("a moon", generator=seeded(), **size).images, plain)


def test_a_denoiser_does_not_keep_its_pipeline_alive(demo: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline(**demo.components, requires_safety_checker=False)
    unet = pipe.unet
    scalediff.patch_model(pipe)
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    scalediff.patch_model(unet)  # no owner stands in the way any more
    scalediff.unpatch_model(unet)
    assert F.scaled_dot_product_attention is SDPA


def test_a_handle_does_not_keep_its_model_alive() -> None:
    pytest.importorskip("diffusers")
    unet = ZOO["SD1.5"].build()
    handle = scalediff.patch_model(unet)
    gone = weakref.ref(unet)
    del unet
    gc.collect()
    assert gone() is None
    handle.remove()
    assert F.scaled_dot_product_attention is SDPA


def test_a_handle_can_let_calls_through(unet: nn.Module) -> None:
    plain = forward(unet, (32, 32))
    with scalediff.patch_model(unet) as handle:
        handle.attention = "full"
        assert torch.equal(forward(unet, (32, 32)), plain)
        with pytest.raises(ValueError, match="attention must be one of npa, full, got attention='half'"):
            handle.attention = "half"  # type: ignore[assignment]


@pytest.mark.composes("gradients", "network")
def test_gradients_flow_and_gradient_checkpointing_is_refused() -> None:
    """Blocks that are computed again in the backward pass would be so outside the pass."""
    pytest.importorskip("diffusers")
    spec = ZOO["SD1.5"]
    model: Any = spec.build()
    with scalediff.patch_model(model):
        inputs = spec.inputs(Draw(), (8, 8), 1)
        inputs["sample"].requires_grad_()
        model(**inputs).sample.sum().backward()
        assert inputs["sample"].grad.abs().max() > 0
        model.enable_gradient_checkpointing()
        with pytest.raises(NotImplementedError, match="gradient checkpointing is not supported: it computes blocks again"):
            model(**inputs)
        spec.run(model, (8, 8))


def test_text_among_the_keys_of_an_image_is_an_obstacle() -> None:
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1, attention_head_dim=4, cross_attention_dim=8,
        down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"), up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
    )  # fmt: skip
    with pytest.raises(ValueError, match="AttnAddedKVProcessor2_0 adds text to the keys of image self-attention"):
        scalediff.patch_model(unet)


def test_sample_as_keyword(unet: nn.Module) -> None:
    rng = seeded()
    x, text = torch.randn(1, 4, 32, 32, generator=rng), torch.randn(1, 24, 64, generator=rng)
    with scalediff.patch_model(unet), torch.no_grad():
        positional = unet(x, 10, text).sample
        keyword = unet(sample=x, timestep=10, encoder_hidden_states=text).sample
    assert torch.equal(positional, keyword)


def test_the_global_generator_is_not_touched(unet: nn.Module) -> None:
    state = torch.get_rng_state()
    with scalediff.patch_model(unet):
        forward(unet, (32, 32))
    assert torch.equal(torch.get_rng_state(), state)


def test_report_names_every_attention_module(demo: Any) -> None:
    with scalediff.patch_model(demo) as handle:
        rows = {row.module: row for row in handle.report.rows}
        attentions = [name for name, module in demo.unet.named_modules() if type(module).__name__ == "Attention"]
        assert sorted(rows) == sorted(attentions)
        assert all((row.status == "patched") == row.module.endswith("attn1") for row in rows.values())
        text = str(handle.report)
    assert text.startswith(f"UNet2DConditionModel: {len(attentions) // 2} of {len(attentions)} attention modules patched")
    assert "text cross-attention" in text
    assert "16 x 16" in text


def test_unknown_models_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"Linear belongs to no known family: pass its token grid"):
        scalediff.patch_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"nn.Module or a diffusers pipeline with a unet or transformer, got dict"):
        scalediff.patch_model({})


def test_a_model_with_nothing_to_patch_is_an_error() -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    bare = diffusers.UNet2DConditionModel(sample_size=16, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match=r"no self-attention to patch in UNet2DConditionModel: the model has no attention modules"):
        scalediff.patch_model(bare)
    assert "_scalediff" not in bare.__dict__
    nameless = diffusers.UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match=r"must have its native latent size, got sample_size=None"):
        scalediff.patch_model(nameless)


def test_an_implementation_is_checked_when_it_is_named(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, reference, sdpa, triton, got impl='fast'"):
        scalediff.patch_model(unet, impl="fast")  # type: ignore[arg-type]
    assert "_scalediff" not in unet.__dict__


def test_the_kernel_is_used_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    few = {"block_out_channels": (32, 32), "mid_block_type": None, "up_block_types": ("UpBlock2D", "UpBlock2D")}
    spec, grid = replace(ZOO["SD1.5"], config=ZOO["SD1.5"].config | few), (8, 4)  # the interpreter is slow
    unet = spec.build()
    with scalediff.patch_model(unet, impl="sdpa", window=WINDOW):
        expected = spec.run(unet, grid)
    with scalediff.patch_model(unet, impl="triton", window=WINDOW):
        if not torch.cuda.is_available():  # then the interpreter runs it
            torch.testing.assert_close(spec.run(unet, grid), expected, rtol=1e-3, atol=1e-4)
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(NotImplementedError, match=r"impl='triton': the kernel needs a CUDA or ROCm device"):
            spec.run(unet, grid)
        monkeypatch.undo()
