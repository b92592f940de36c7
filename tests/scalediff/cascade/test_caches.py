"""Feature caches on a pipeline through the stages of the cascade: each stage begins anew, and a cache knows which steps it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size, preset
from scalediff.patching.caches import cache_hooks
from scalediff.patching.networks import denoiser_of
from tests.conftest import seeded
from tests.scalediff.cascade import further_pipelines
from tests.scalediff.cascade.prompted_pipelines import draw as draw_prompt
from tests.scalediff.cascade.prompted_pipelines import picture_of, target_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

STEPS, STAGE = 8, 5  # of the run, and of its second stage
EVERY = {"current_timestep_callback": lambda: 500, "spatial_attention_timestep_skip_range": (-1, 1001)}
Computed = list[list[int]]  # stage by stage, whether the last block was computed in each step


def magcache(**more: Any) -> Any:
    ratios = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0, 1.0, 1.0]  # the sixth step changes more than the threshold allows
    settings = {"threshold": 0.1, "max_skip_steps": 2, "retention_ratio": 0.25, "num_inference_steps": STEPS, "mag_ratios": ratios} | more
    return diffusers.MagCacheConfig(**settings)


# Each cache with the steps that it computes. MagCache: a quarter of the steps of each stage, after two skipped ones, and the sixth of
# the whole schedule. TaylorSeer: the first two of each stage, the second after them and every third, and the last of the schedule.
CACHES: dict[str, tuple[Callable[[], Any], Computed]] = {
    "FirstBlockCache": (lambda: diffusers.FirstBlockCacheConfig(threshold=1e9), [[1] + [0] * 7, [1] + [0] * 4]),
    "MagCache": (magcache, [[1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 0]]),
    "TaylorSeerCache": (
        lambda: diffusers.TaylorSeerCacheConfig(
            cache_interval=3, disable_cache_before_step=2, disable_cache_after_step=7, taylor_factors_dtype=torch.float32
        ),
        [[1, 1, 0, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1]],
    ),
    "PyramidAttentionBroadcast": (
        lambda: diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=3, **EVERY),
        [[1, 0, 0, 1, 0, 0, 1, 0], [1, 0, 0, 1, 0]],
    ),
}


@pytest.fixture(scope="module")
def flux() -> Any:
    """The pipeline and its prompt, as embeddings."""
    pipe, embeddings = built("FLUX")
    scalediff.patch_model(pipe, window=WINDOW)
    return pipe, embeddings


@pytest.fixture
def cached(flux: Any) -> Iterator[Callable[..., Any]]:
    """Enables a cache of the pipeline until the end of the test."""
    pipe, _ = flux
    yield lambda config: pipe.transformer.enable_cache(config)
    if pipe.transformer.is_cache_enabled:
        pipe.transformer.disable_cache()


def draw(flux: Any, **more: Any) -> scalediff.Result:
    pipe, embeddings = flux
    height, width = target_of(pipe)
    how: dict[str, Any] = {"height": height, "width": width, "steps": STEPS, "restart": 0.6, "generator": seeded()} | more
    return scalediff.generate(pipe, None, **how | {"call": embeddings | how.get("call", {})})


@functools.cache
def plain() -> list[Tensor]:
    pipe, embeddings = built("FLUX")
    with scalediff.patch_model(pipe, window=WINDOW):
        return latents(draw((pipe, embeddings)))


def latents(result: scalediff.Result) -> list[Tensor]:
    return [stage.latents for stage in result.stages]


def watched(flux: Any, run: Callable[[], scalediff.Result] | None = None) -> tuple[scalediff.Result, Computed]:
    """A run, and stage by stage the steps in which the last block was computed."""
    net, calls = denoiser_of(flux[0]), list[int]()

    def begin(*_: Any) -> None:
        calls.append(0)

    def count(*_: Any) -> None:
        calls[-1] += 1

    hooks = [net.register_forward_pre_hook(begin), net.single_transformer_blocks[-1].attn.to_q.register_forward_hook(count)]
    try:
        result = draw(flux) if run is None else run()
    finally:
        for hook in hooks:
            hook.remove()
    return result, [[calls.pop(0) for _ in range(stage.steps)] for stage in result.stages]


@pytest.mark.draws("text-to-image", ["FLUX"], switch="feature cache")
@pytest.mark.composes("FirstBlockCache", "cascade")
@pytest.mark.composes("MagCache", "cascade")
@pytest.mark.composes("TaylorSeerCache", "cascade")
@pytest.mark.composes("PyramidAttentionBroadcast", "cascade")
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.filterwarnings("error:scalediff")
def test_every_stage_computes_the_steps_that_the_settings_say(name: str, flux: Any, cached: Any) -> None:
    """Twice the same, and afterwards the picture without a cache."""
    make, expected = CACHES[name]
    cached(make())
    first, computed = watched(flux)
    assert computed == expected
    second, again = watched(flux)
    assert again == expected
    for one, other, without in zip(latents(first), latents(second), plain(), strict=True):
        assert torch.equal(one, other)
        assert (one - without).abs().max() > 1e-3
    flux[0].transformer.disable_cache()
    assert torch.equal(latents(draw(flux))[-1], plain()[-1])


class Stopped(Exception):
    """Raised by a callback."""


@pytest.mark.parametrize("name", CACHES)
def test_an_exception_leaves_nothing_in_a_cache(name: str, flux: Any, cached: Any) -> None:
    """The next run begins as the first one did, and the settings are those of the whole schedule again."""
    pipe, _ = flux
    cached(CACHES[name][0]())
    expected, settings = latents(draw(flux)), hook_settings(pipe.transformer)

    seen = list[int]()

    def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(step)
        if len(seen) == STEPS + 3:
            raise Stopped
        return tensors

    with pytest.raises(Stopped):
        draw(flux, call={"callback_on_step_end": stop})
    assert len(seen) == STEPS + 3
    assert hook_settings(pipe.transformer) == settings
    assert torch.equal(latents(draw(flux))[-1], expected[-1])


def hook_settings(net: nn.Module) -> list[Any]:
    return [(getattr(hook, "config", None), getattr(hook, "disable_cache_after_step", None)) for _, hook in cache_hooks(net)]


@pytest.mark.draws("text-to-image", ["SD3"], switch="feature cache")
def test_a_cache_of_a_model_that_diffusers_never_empties() -> None:
    """SD3's class has no `enable_cache`, so its pipeline leaves a cache that was applied by hand as it is."""
    pipe, embeddings = built("SD3")
    without = latents(draw((pipe, embeddings)))
    diffusers.hooks.apply_pyramid_attention_broadcast(pipe.transformer, CACHES["PyramidAttentionBroadcast"][0]())
    first, second = (latents(draw((pipe, embeddings))) for _ in range(2))
    for one, other, plain in zip(first, second, without, strict=True):
        assert torch.equal(one, other)
        assert (one - plain).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["SD3", "SDXL"])
def test_an_exception_leaves_nothing_in_a_cache_that_diffusers_never_empties(name: str) -> None:
    """Of a transformer without `enable_cache`, and of a U-Net: stopped in either stage, the next run is as the first."""
    pipe, embeddings = built(name)
    diffusers.hooks.apply_pyramid_attention_broadcast(denoiser_of(pipe), CACHES["PyramidAttentionBroadcast"][0]())
    assert list(cache_hooks(denoiser_of(pipe)))
    expected = latents(draw((pipe, embeddings)))[-1]
    for calls in (2, STEPS + 2):
        seen = list[int]()

        def stop(pipe: Any, step: int, time: Any, tensors: dict[str, Tensor], calls: int = calls, seen: list[int] = seen) -> Any:
            seen.append(step)
            if len(seen) == calls:
                raise Stopped
            return tensors

        with pytest.raises(Stopped):
            draw((pipe, embeddings), call={"callback_on_step_end": stop})
        assert torch.equal(latents(draw((pipe, embeddings)))[-1], expected)


@pytest.mark.draws("upscale", ["FLUX"], switch="feature cache")
def test_a_picture_is_enlarged_with_the_last_steps_of_a_cache(flux: Any, cached: Any) -> None:
    """`upscale` has no base stage; here it has two others."""
    height, width = target_of(flux[0])
    how: dict[str, Any] = {"height": height, "width": width, "steps": STEPS, "restart": 0.6, "call": flux[1]}
    cached(magcache())
    run = functools.partial(scalediff.upscale, flux[0], picture_of((height // 2, width // 2)), None, **how)
    result, computed = watched(flux, lambda: run(generator=seeded()))
    assert computed == [[1, 0, 1, 0, 0]] * 2
    assert torch.equal(latents(run(generator=seeded()))[-1], latents(result)[-1])


def test_magcache_calibrates_on_the_steps_of_each_stage(flux: Any, cached: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cached(diffusers.MagCacheConfig(num_inference_steps=STEPS, calibrate=True))
    assert torch.equal(latents(draw(flux))[-1], plain()[-1])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[1.0")]
    assert [len(line.split(",")) for line in lines] == [STEPS, STAGE]


def test_a_workdir_belongs_to_a_cache_with_its_settings(flux: Any, cached: Any, tmp_path: Path) -> None:
    cached(CACHES["FirstBlockCache"][0]())
    expected = draw(flux, workdir=tmp_path)
    assert torch.equal(latents(draw(flux, workdir=tmp_path))[-1], latents(expected)[-1])
    flux[0].transformer.disable_cache()
    cached(diffusers.FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"belongs to another run \(caches: '\w+' there\)"):
        draw(flux, workdir=tmp_path)


@pytest.mark.composes("TextKVCache", "cascade")
def test_cached_text_of_nucleus_is_the_text_of_every_stage() -> None:
    """Split guidance is right too, because nothing of the picture is cached."""
    pipe, call = further_pipelines.ready("NucleusMoE-Image")
    plain = latents(draw_prompt(pipe, "a red boat", call=call))
    projected = list[nn.Module]()
    for name, module in pipe.transformer.named_modules():
        if name.endswith("add_k_proj"):
            module.register_forward_hook(lambda module, *_: projected.append(module))
    pipe.transformer.enable_cache(diffusers.TextKVCacheConfig())
    cached = latents(draw_prompt(pipe, "a red boat", call=call, split_guidance=True))
    assert len(projected) == len(set(projected)) * 2 * len(cached)  # for the prompt and for the negative one, in every stage
    for one, other in zip(cached, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


# What a run cannot do with a cache is an error before anything is drawn


def refused(flux: Any, error: type[Exception], match: str, **more: Any) -> None:
    stages = list[Any]()
    with pytest.raises(error, match=match):
        draw(flux, on_stage=stages.append, **more)
    assert not stages


def test_the_steps_of_magcache_are_those_of_the_run(flux: Any, cached: Any) -> None:
    cached(magcache(num_inference_steps=28, mag_ratios=[1.0] * 28))
    refused(flux, ValueError, "MagCacheConfig must have the 8 model calls of the run, got num_inference_steps=28")


def test_the_jitter_of_the_settings_is_checked(flux: Any, cached: Any) -> None:
    cached(CACHES["TaylorSeerCache"][0]())
    moving = replace(preset(flux[0]), jitter="alternate")
    refused(flux, ValueError, "TaylorSeerCache extrapolates .*, got jitter='alternate'", preset=moving)


@pytest.mark.composes("FasterCache", "cascade", refused="a stage that begins in the middle of a schedule has nothing in the cache yet")
def test_faster_cache_is_refused(flux: Any, cached: Any) -> None:
    always = {"is_guidance_distilled": True, "tensor_format": "BCHW", "attention_weight_callback": lambda _: 0.5}
    cached(diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500, **always))
    why = "FasterCache cannot begin a stage in the middle of a schedule, where it skips attention at once"
    refused(flux, NotImplementedError, why)
    height, width = native_size(flux[0])  # of this size, the only stage is a base stage
    changing = diffusers.FluxImg2ImgPipeline(**flux[0].components)
    how: dict[str, Any] = {"height": height, "width": width, "steps": STEPS, "strength": 0.5, "call": flux[1]}
    with pytest.raises(NotImplementedError, match=why):
        scalediff.upscale(changing, picture_of((height, width)), None, **how)


@pytest.mark.parametrize("method", ["hiflow", "multidiffusion"])
def test_other_methods_than_single_calls_refuse_caches(method: str, flux: Any, cached: Any) -> None:
    cached(CACHES["FirstBlockCache"][0]())
    name = {"hiflow": "HiFlow", "multidiffusion": "MultiDiffusion"}[method]
    refused(flux, NotImplementedError, f"{name} does not support feature caches, got FirstBlockCache", method=method, restart=None)


@pytest.mark.parametrize("how", [{"split_guidance": True}, {"guidance_until": 0.5}])
def test_the_halves_of_a_guided_batch_are_not_mixed(how: dict[str, Any]) -> None:
    pipe, embeddings = built("SD3")
    diffusers.hooks.apply_pyramid_attention_broadcast(pipe.transformer, CACHES["PyramidAttentionBroadcast"][0]())
    settings = replace(preset(pipe), **{name: value for name, value in how.items() if name == "guidance_until"})
    options = {name: value for name, value in how.items() if name == "split_guidance"}
    split, until = how.get("split_guidance", False), how.get("guidance_until", 1.0)
    why = f"needs split_guidance=False and guidance_until=1, got split_guidance={split} and guidance_until={until}"
    refused(
        (pipe, embeddings), NotImplementedError, f"PyramidAttentionBroadcast would mix the halves .*: it {why}", preset=settings, **options
    )


# cache-dit


@pytest.mark.parametrize("on", ["the denoiser", "the patched pipeline"])
def test_cache_dit_that_does_not_see_the_calls_of_stages_is_refused(on: str, flux: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does: it gives both a manager of its state, and replaces the call of the pipeline's class, here the patched one."""
    pipe, own = flux[0], type(flux[0]).__call__
    monkeypatch.setitem(pipe.transformer.__dict__, "_context_manager", object())
    if on == "the patched pipeline":
        monkeypatch.setitem(pipe.__dict__, "_context_manager", object())
        monkeypatch.setattr(type(pipe), "__call__", lambda self, *args, **kwargs: own(self, *args, **kwargs))
    why = "cache-dit would keep its cache from stage to stage: enable it on the pipeline, and before patch_model"
    refused(flux, RuntimeError, why)


@pytest.mark.composes("cache-dit", "cascade")
@pytest.mark.composes("cache-dit", "network")
def test_cache_dit_that_is_enabled_before_patching() -> None:
    """Its state begins anew at every stage, because each is a call of the pipeline. A block that it skips is no error."""
    cache_dit = pytest.importorskip("cache_dit")
    pipe, embeddings = built("FLUX")
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=1e9, max_cached_steps=-1
    )
    cache_dit.enable_cache(pipe, cache_config=config)
    try:
        with scalediff.patch_model(pipe, window=WINDOW) as handle:
            first, computed = watched((pipe, embeddings))
            second, again = watched((pipe, embeddings))
            assert computed == again == [[1, 1] + [0] * 6, [1, 1, 0, 0, 0]]
            assert {(row.module, row.taken) for row in handle.report.patched} == {("transformer_blocks.0.attn", 1)}
            handle.jitter = "alternate"
            refused((pipe, embeddings), ValueError, "cache-dit extrapolates .*, got jitter='alternate'")
            draw((pipe, embeddings), attention="full")  # without patches that could move
    finally:
        cache_dit.disable_cache(pipe)
    for one, other, without in zip(latents(first), latents(second), plain(), strict=True):
        assert torch.equal(one, other)
        assert (one - without).abs().max() > 1e-3
    with scalediff.patch_model(pipe, window=WINDOW):
        assert torch.equal(latents(draw((pipe, embeddings)))[-1], plain()[-1])
