"""The patch beside what people do with a diffusers model: compile it, adapt it, offload it, cache it, cast it, save it, share it."""

from __future__ import annotations

import copy
import functools
import gc
import io
import json
import os
import pickle
import subprocess
import sys
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.zoo import WINDOW, ZOO, flat
from bench.zoo_inputs import Draw
from tests.conftest import forward, seeded, state_of

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")
accelerate = pytest.importorskip("accelerate")

from diffusers.hooks import FirstBlockCacheConfig, apply_group_offloading  # noqa: E402
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

SDPA = F.scaled_dot_product_attention
NATIVE, GRID = (4, 4), (8, 6)
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
patch = functools.partial(scalediff.patch_model, window=WINDOW)


@pytest.fixture(autouse=True)
def _places_are_given_back() -> Iterator[None]:
    """Attention and diffusers' backends are the original ones after every test; the chosen backend is put back."""
    backends, active = dict(_AttentionBackendRegistry._backends), _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(active)
    assert F.scaled_dot_product_attention is SDPA
    assert _AttentionBackendRegistry._backends == backends


@functools.cache
def plain_and_patched(name: str) -> tuple[Tensor, Tensor]:
    model = ZOO[name].build()
    plain = ZOO[name].run(model, GRID)
    with patch(model):
        patched = ZOO[name].run(model, GRID)
    assert_differs(patched, plain)
    return plain, patched


def assert_close(out: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def assert_differs(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3 * other.abs().max()


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nested inputs, every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: changed(part, change) for key, part in value.items()}
    return type(value)(changed(part, change) for part in value) if isinstance(value, list | tuple) else value


def in_order(model: nn.Module, feature: Callable[[], Any], patch_first: bool) -> scalediff.Handle:
    if patch_first:
        handle = patch(model)
        feature()
        return handle
    feature()
    return patch(model)


either_order = pytest.mark.parametrize("patch_first", [True, False], ids=["patched first", "patched second"])


# Backends of diffusers' dispatcher


def chosen(model: Any, backend: str, how: str) -> AbstractContextManager[Any]:
    if how == "context":
        return attention_backend(backend)  # type: ignore[no-any-return]
    model.set_attention_backend(backend)
    return nullcontext()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("how", ["model", "context"])
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_a_chosen_backend_is_patched(backend: str, how: str) -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    with chosen(model, backend, how):
        before, native = (ZOO["FLUX.1"].run(model, grid) for grid in (GRID, NATIVE))
        assert_close(before, plain)
        with patch(model):
            assert_close(ZOO["FLUX.1"].run(model, GRID), patched)
            assert torch.equal(ZOO["FLUX.1"].run(model, NATIVE), native)
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), before)


@pytest.mark.parametrize("chosen_first", [True, False])
def test_a_backend_that_never_calls_sdpa_gets_what_is_not_windowed(chosen_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def by_hand(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append(query.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)

    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName.FLEX, by_hand)
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    in_order(model, lambda: model.set_attention_backend("flex"), not chosen_first)
    assert_close(ZOO["FLUX.1"].run(model, GRID), patched)
    assert calls == []
    ZOO["FLUX.1"].run(model, NATIVE)
    assert calls == [6 + 16] * 3
    scalediff.unpatch_model(model)
    assert_close(ZOO["FLUX.1"].run(model, GRID), plain)
    assert calls[3:] == [6 + 48] * 3


# Adapters


def add_lora(model: Any) -> None:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))


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


@pytest.mark.parametrize("several", [False, True])
def test_controlnets_are_patched_with_their_pipeline(demo: Any, several: bool) -> None:
    nets = [small_controlnet(demo.unet, seed) for seed in range(2 if several else 1)]
    parts = demo.components | {"controlnet": nets if several else nets[0]}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    picture = Draw(3)(1, 3, 128, 96).sigmoid()

    def draw() -> Tensor:
        images = [picture] * len(nets) if several else picture
        how = {"height": 128, "width": 96, "num_inference_steps": 1, "output_type": "latent"}
        out: Tensor = pipe("a moon", images, generator=seeded(), **how).images
        return out

    cls, states, plain = type(pipe), [state_of(net) for net in (demo.unet, *nets)], draw()
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


# Offloading and casting

OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "groups of blocks": lambda model: apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": lambda model: apply_group_offloading(model, CPU, CPU, offload_type="leaf_level"),
    "sequential": lambda model: accelerate.cpu_offload(model, CPU),
    "model": lambda model: accelerate.cpu_offload_with_hook(model, CPU),
}


@either_order
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_an_offloaded_model_is_patched(name: str, offload: str, patch_first: bool) -> None:
    model, (plain, patched) = ZOO[name].build(), plain_and_patched(name)
    with in_order(model, lambda: OFFLOADS[offload](model), patch_first):
        assert torch.equal(ZOO[name].run(model, GRID), patched)
        if name == "SD1.5":  # others' hooks must not hide the names of its arguments
            positional = ZOO[name].inputs(Draw(0), GRID, 1).values()
            with torch.no_grad():
                assert torch.equal(model(*positional, return_dict=False)[0].flatten(), patched)
    assert torch.equal(ZOO[name].run(model, GRID), plain)


@either_order
def test_a_pipeline_with_model_offloading_is_patched(demo: Any, patch_first: bool) -> None:
    cls, plain = type(demo), forward(demo.unet, (32, 24))
    with scalediff.patch_model(demo):
        patched = forward(demo.unet, (32, 24))
    try:
        if patch_first:
            scalediff.patch_model(demo)
        demo.enable_model_cpu_offload(device="cpu")
        if not patch_first:
            scalediff.patch_model(demo)
        assert torch.equal(forward(demo.unet, (32, 24)), patched)
        assert demo("a moon", height=96, width=128, num_inference_steps=2, output_type="latent").images.shape[-2:] == (24, 32)
        scalediff.unpatch_model(demo)
        assert torch.equal(forward(demo.unet, (32, 24)), plain)
    finally:
        demo.remove_all_hooks()
    assert type(demo) is cls
    assert torch.equal(forward(demo.unet, (32, 24)), plain)


@either_order
@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_weights_stored_in_few_bits_are_cast_in_a_patched_model(name: str, storage: torch.dtype, patch_first: bool) -> None:
    model, rounded = ZOO[name].build(), ZOO[name].build()
    handle = in_order(model, lambda: model.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32), patch_first)
    out = ZOO[name].run(model, GRID)
    handle.remove()
    rounded.load_state_dict({key: value.float() for key, value in model.state_dict().items()})
    with patch(rounded):
        assert torch.equal(out, ZOO[name].run(rounded, GRID))
    plain = ZOO[name].run(rounded, GRID)
    assert_differs(out, plain)
    assert torch.equal(ZOO[name].run(model, GRID), plain)


@pytest.mark.parametrize(("dtype", "how"), [(torch.bfloat16, "autocast"), (torch.bfloat16, "weights"), (torch.float16, "weights")])
@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX.1"])
def test_low_precision_costs_no_more_than_without_the_patch(name: str, dtype: torch.dtype, how: str) -> None:
    model, (plain, patched) = ZOO[name].build(), plain_and_patched(name)
    lower = model if how == "autocast" else ZOO[name].build().to(dtype)
    inputs = ZOO[name].inputs(Draw(0), GRID, 1)
    if how == "weights":
        inputs = changed(inputs, lambda x: x.to(dtype) if x.is_floating_point() else x)

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype) if how == "autocast" else nullcontext():
            return flat(lower(**inputs, return_dict=False)).float()

    error = (run() - plain).norm()
    with patch(lower):
        out = run()
    assert (out - patched).norm() <= 2 * error + torch.finfo(dtype).eps * patched.norm()
    assert (out - patched).norm() < 0.25 * (plain - patched).norm()
    assert torch.equal((run() - plain).norm(), error)


# Caches, batches, callbacks, threads


@either_order
@pytest.mark.parametrize("jitter", ["none", "alternate"])
def test_first_block_cache_of_a_patched_model(jitter: Any, patch_first: bool) -> None:
    model = ZOO["FLUX.1"].build()

    def steps() -> Tensor:
        outs = []
        for step in range(4):
            with model.cache_context("cond"):
                outs.append(ZOO["FLUX.1"].run(model, GRID, seed=step))
        return torch.stack(outs)

    def cached(threshold: float) -> Tensor:
        if not patch_first:
            model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        with patch(model, jitter=jitter):
            if patch_first:
                model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
            out = steps()
        model.disable_cache()
        return out

    plain = steps()
    with patch(model, jitter=jitter):
        patched = steps()
    assert torch.equal(cached(0.0), patched)
    skipping = cached(1e9)
    assert torch.equal(skipping[0], patched[0])
    assert_differs(skipping[1:], patched[1:])
    assert torch.equal(steps(), plain)


@pytest.mark.parametrize("name", ["SD1.5", "SD3", "FLUX.1", "Qwen-Image", "Lumina 2", "Z-Image"])
def test_a_batch_for_guidance_is_two_single_passes(name: str) -> None:
    """Prompts are of different length in Qwen-Image, Lumina 2 and Z-Image."""
    model = ZOO[name].build()
    both = ZOO[name].inputs(Draw(0), GRID, 2)

    def alone(index: int) -> Any:
        one = changed(both, lambda x: x[index : index + 1] if len(x) == 2 else x)
        return one | {key: value[index : index + 1] for key, value in both.items() if isinstance(value, list)}

    def run(inputs: Any) -> Tensor:
        with torch.no_grad():
            out = model(**inputs, return_dict=False)[0]
        return torch.stack(list(out))

    plain = run(both)
    with patch(model):
        together = run(both)
        for index in range(2):
            assert_close(run(alone(index))[0], together[index])
    assert_differs(together, plain)
    assert torch.equal(run(both), plain)


class Stopped(Exception):
    """Raised by a callback."""


def test_a_callback_may_read_change_and_stop_the_steps_of_a_cascade(demo: Any) -> None:
    size = {"height": 128, "width": 96, "num_inference_steps": 3, "output_type": "latent"}
    seen: list[tuple[int, ...]] = []

    def draw(change: Callable[[Tensor], Tensor]) -> Tensor:
        def callback(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append(tuple(tensors["latents"].shape[-2:]))
            assert F.scaled_dot_product_attention is SDPA
            return {"latents": change(tensors["latents"])}

        out: Tensor = demo("a moon", generator=seeded(), callback_on_step_end=callback, **size).images
        return out

    def stop(latents: Tensor) -> Tensor:
        if latents.shape[-2:] == (32, 24):
            raise Stopped
        return latents

    with scalediff.patch_model(demo) as handle:
        kind, state, scheduler = type(demo), state_of(demo.unet), demo.scheduler
        out = demo("a moon", generator=seeded(), **size).images
        assert torch.equal(draw(lambda latents: latents), out)
        assert len(seen) > 3
        assert seen[0] != seen[-1] == (32, 24)
        assert_differs(draw(lambda latents: latents * 0.5), out)
        with pytest.raises(Stopped):
            draw(stop)
        assert (handle.active, handle.attention, type(demo), demo.scheduler) == (True, "npa", kind, scheduler)
        assert state_of(demo.unet) == state
        assert F.scaled_dot_product_attention is SDPA
        assert torch.equal(demo("a moon", generator=seeded(), **size).images, out)


def test_threads_do_not_meet_in_each_others_attention() -> None:
    """Two patched models and one that is not, at once: each computes what it computes alone."""
    models = {name: ZOO[name].build() for name in ("SD1.5", "FLUX.1", "SD3")}
    expected = {name: plain_and_patched(name)[1] for name in ("SD1.5", "FLUX.1")} | {"SD3": plain_and_patched("SD3")[0]}
    start, right = threading.Barrier(3), Counter[str]()

    def work(name: str) -> None:
        start.wait()
        right[name] = sum(torch.equal(ZOO[name].run(models[name], GRID), expected[name]) for _ in range(8))

    with patch(models["SD1.5"]), patch(models["FLUX.1"]):
        threads = [threading.Thread(target=work, args=(name,)) for name in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert right == dict.fromkeys(models, 8)


@pytest.mark.parametrize("where", ["transformer_blocks.0.attn", "single_transformer_blocks.1", "proj_out"])
def test_an_exception_in_the_middle_of_a_pass_leaves_nothing_behind(where: str) -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    backends = dict(_AttentionBackendRegistry._backends)

    def stop(*_: object) -> None:
        assert F.scaled_dot_product_attention is not SDPA
        raise Stopped

    with patch(model):
        hook = model.get_submodule(where).register_forward_hook(stop)
        with pytest.raises(Stopped):
            ZOO["FLUX.1"].run(model, GRID)
        hook.remove()
        assert F.scaled_dot_product_attention is SDPA
        assert _AttentionBackendRegistry._backends == backends
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
    assert torch.equal(ZOO["FLUX.1"].run(model, GRID), plain)


# Saving, pickling, forgetting


@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_a_patched_model_is_saved_as_its_own_class(name: str, tmp_path: Path) -> None:
    model, (plain, patched) = ZOO[name].build(), plain_and_patched(name)
    cls: Any = type(model)
    model.save_pretrained(tmp_path / "before")
    with patch(model):
        model.save_pretrained(tmp_path / "patched")
        loaded = cls.from_pretrained(tmp_path / "patched")
        assert torch.equal(ZOO[name].run(model, GRID), patched)
    assert type(loaded) is cls
    assert_close(ZOO[name].run(loaded, GRID), plain)  # the weights lie elsewhere in memory, and sums are taken in another order
    files = [{p.name: p.read_bytes() for p in (tmp_path / side).iterdir()} for side in ("before", "patched")]
    assert files[0] == files[1]


def test_a_patched_pipeline_is_saved_as_its_own_class(demo: Any, tmp_path: Path) -> None:
    cls, plain = type(demo), forward(demo.unet, (32, 24))
    demo.save_pretrained(tmp_path / "before")
    with scalediff.patch_model(demo):
        demo.save_pretrained(tmp_path / "patched")
    before, after = (json.loads((tmp_path / side / "model_index.json").read_text()) for side in ("before", "patched"))
    assert before == after
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "patched")
    assert type(loaded) is cls
    assert type(loaded.unet) is type(demo.unet)
    assert torch.equal(forward(loaded.unet, (32, 24)), plain)


def test_a_patched_transformer_goes_through_a_pickle_unpatched() -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    state, file = state_of(model), io.BytesIO()
    with patch(model):
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
        torch.save(model, file)
        twins = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
        assert torch.equal(ZOO["FLUX.1"].run(model, GRID), patched)
    file.seek(0)
    for twin in (torch.load(file, weights_only=False), *twins):
        assert state_of(twin) == state
        assert_close(ZOO["FLUX.1"].run(twin, GRID), plain)


def test_a_model_made_from_the_class_of_a_patched_one_is_a_model_of_its_own() -> None:
    model, (plain, patched) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    with patch(model):
        kind: Any = type(model)
        other = kind.from_config(model.config).eval()
        other.load_state_dict(model.state_dict())
    assert_close(ZOO["FLUX.1"].run(other, GRID), plain)
    with patch(other):
        assert_close(ZOO["FLUX.1"].run(other, GRID), patched)
        assert_close(ZOO["FLUX.1"].run(model, GRID), plain)
    assert_close(ZOO["FLUX.1"].run(other, GRID), plain)


@pytest.mark.parametrize("name", ["SD1.5", "FLUX.1"])
def test_nothing_of_a_forgotten_model_is_alive(name: str) -> None:
    model = ZOO[name].build()
    handle = patch(model)
    ZOO[name].run(model, GRID)
    traces = [weakref.ref(x) for x in (model, handle, next(model.parameters()))]
    del handle, model
    gc.collect()
    assert [trace() for trace in traces] == [None] * 3


# What is refused, and what shares a name


def test_context_parallelism_is_refused_before_and_after_patching() -> None:
    model, (plain, _) = ZOO["FLUX.1"].build(), plain_and_patched("FLUX.1")
    parallel = types.SimpleNamespace(context_parallel_config=object())
    model._parallel_config = parallel
    with pytest.raises(NotImplementedError, match="context parallelism"):
        patch(model)
    model._parallel_config = None
    with patch(model):
        model._parallel_config = parallel
        with pytest.raises(NotImplementedError, match="context parallelism"):
            ZOO["FLUX.1"].run(model, GRID)
        assert F.scaled_dot_product_attention is SDPA
        model._parallel_config = None
    assert torch.equal(ZOO["FLUX.1"].run(model, GRID), plain)


def test_a_package_named_kernels_is_not_hidden(tmp_path: Path) -> None:
    package = tmp_path / "kernels" / "__init__.py"
    package.parent.mkdir()
    package.write_text("def get_kernel(*args, **kwargs): raise RuntimeError('nothing is fetched')\n")
    script = """
import kernels, scalediff, scalediff_kernels
from bench.zoo import ZOO, WINDOW
model = ZOO["FLUX.1"].build()
plain = ZOO["FLUX.1"].run(model, (8, 6))
with scalediff.patch_model(model, window=WINDOW):
    print((ZOO["FLUX.1"].run(model, (8, 6)) - plain).abs().max() > 1e-3 * plain.abs().max())
print(kernels.__file__)
"""
    paths = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["tensor(True)", str(package)]
