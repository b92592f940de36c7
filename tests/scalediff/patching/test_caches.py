"""Feature caches on a patched network: what they skip is no error, what they compute has windows, and the report tells which."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import ZOO
from scalediff.patching.caches import cache_names, check_ranks, reset_caches
from scalediff.patching.target import Target
from tests.scalediff.patching.test_composition import GRID, NATIVE, assert_differs, either_order, patch

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

ALWAYS = {"current_timestep_callback": lambda: 500, "spatial_attention_timestep_skip_range": (-1, 1001)}
# Each cache with settings that skip nothing, and with settings by which the last of three steps computes less.
CACHES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "FirstBlockCache": (
        lambda: diffusers.FirstBlockCacheConfig(threshold=0.0),
        lambda: diffusers.FirstBlockCacheConfig(threshold=1e9),
    ),
    "MagCache": (
        lambda: diffusers.MagCacheConfig(num_inference_steps=3, mag_ratios=[1.0] * 3, retention_ratio=1.0),
        lambda: diffusers.MagCacheConfig(num_inference_steps=9, mag_ratios=[1.0] * 9, retention_ratio=0.0),
    ),
    "TaylorSeerCache": (
        lambda: diffusers.TaylorSeerCacheConfig(disable_cache_before_step=3),
        lambda: diffusers.TaylorSeerCacheConfig(disable_cache_before_step=2, taylor_factors_dtype=torch.float32),
    ),
    "PyramidAttentionBroadcast": (
        lambda: diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=1, **ALWAYS),
        lambda: diffusers.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=4, **ALWAYS),
    ),
    "SeaCache": (
        lambda: diffusers.SeaCacheConfig(threshold=0.0, raw_vision_callback=picture),
        lambda: diffusers.SeaCacheConfig(threshold=1e9, cache_end_steps=0, raw_vision_callback=picture),
    ),
    "FasterCache": (
        lambda: faster(spatial_attention_timestep_skip_range=(-1, 1)),
        lambda: faster(spatial_attention_timestep_skip_range=(-1, 600)),
    ),
}  # fmt: skip
COMPUTED = {"SeaCache": 0, "FirstBlockCache": 1, "MagCache": 0, "TaylorSeerCache": 0, "PyramidAttentionBroadcast": 0, "FasterCache": 0}


class Time:
    """The timestep that the steps of these tests are at."""

    now = 0


def faster(**more: Any) -> Any:
    more |= {"is_guidance_distilled": True, "tensor_format": "BCHW", "current_timestep_callback": lambda: Time.now}
    return diffusers.FasterCacheConfig(spatial_attention_block_skip_range=9, attention_weight_callback=lambda _: 0.5, **more)


def picture(model: nn.Module, args: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """The latents of a pass as SeaCache wants them, `[C, T, Y, X]`."""
    return [arguments["hidden_states"][0].T.unflatten(1, (1, *GRID))]


def steps(model: Any, grid: tuple[int, int] = GRID) -> Tensor:
    """The outputs of three steps."""
    outs = []
    for step, Time.now in enumerate((900, 700, 500)):
        with model.cache_context("cond", step_index=step, num_inference_steps=3, sigma=Time.now / 1000):
            outs.append(ZOO["FLUX.1"].run(model, grid, seed=step))
    return torch.stack(outs)


@pytest.mark.composes("FirstBlockCache", "network")
@pytest.mark.composes("MagCache", "network")
@pytest.mark.composes("TaylorSeerCache", "network")
@pytest.mark.composes("PyramidAttentionBroadcast", "network")
@pytest.mark.composes("FasterCache", "network")
@pytest.mark.composes("SeaCache", "network")
@either_order
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_a_patched_model(name: str, patch_first: bool) -> None:
    """One that skips nothing changes nothing. One that skips changes only the steps in which it does, and none of them is an error."""
    model, (nothing, much) = ZOO["FLUX.1"].build(), CACHES[name]
    plain = steps(model)
    with patch(model):
        patched = steps(model)

    def cached(config: Any) -> tuple[Tensor, scalediff.Report]:
        if not patch_first:
            model.enable_cache(config)
        with patch(model) as handle:
            if patch_first:
                model.enable_cache(config)
            out = steps(model)
            report = handle.report
        model.disable_cache()
        return out, report

    out, report = cached(nothing())
    assert torch.equal(out, patched)
    assert {row.taken for row in report.rows} == {1}
    out, report = cached(much())
    assert torch.equal(out[0], patched[0])
    assert_differs(out[2], patched[2])
    skipped = [row for row in report.rows if row.taken == 0]
    assert len(report.rows) - len(skipped) == COMPUTED[name]
    assert {(row.status, row.why) for row in skipped} == {("untouched", "a cache or guidance skipped it in the last pass")}
    assert f"{COMPUTED[name]} self-attention calls in windows, 0 left to full attention, {len(skipped)} modules" in str(report.last_pass)
    assert torch.equal(steps(model), plain)


def test_at_native_size_a_cache_is_the_models_own() -> None:
    model = ZOO["FLUX.1"].build()
    model.enable_cache(CACHES["TaylorSeerCache"][1]())
    plain = steps(model, NATIVE)
    reset_caches(model)
    with patch(model):
        assert torch.equal(steps(model, NATIVE), plain)


def test_what_was_cached_before_the_patch_is_an_error_and_not_a_pass_in_windows() -> None:
    model = ZOO["FLUX.1"].build()
    model.enable_cache(CACHES["MagCache"][1]())
    steps(model)
    why = "MagCache reused what was computed before the model was patched: disable and enable the cache again"
    with patch(model), pytest.raises(ValueError, match=why):
        steps(model)


@pytest.mark.parametrize("name", ["FirstBlockCache", "SeaCache"])
@pytest.mark.parametrize("attention", ["npa", "full"])
@pytest.mark.parametrize("split_by", ["mesh", "diffusers"])
def test_ranks_do_not_decide_by_their_own_tokens(name: str, attention: Any, split_by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ZOO["FLUX.1"].build()
    model.enable_cache(CACHES[name][1]())
    with patch(model) as handle:
        handle.attention = attention
        if split_by == "mesh":
            monkeypatch.setattr(Target, "groups", ("a group",))  # mesh= needs accelerators for this model
        else:
            monkeypatch.setattr(model, "_parallel_config", SimpleNamespace(context_parallel_config=object()))
        with pytest.raises(
            NotImplementedError, match=f"context parallelism do not support caches that look at .* own tokens .*, got {name}"
        ):
            steps(model)
    monkeypatch.undo()
    model.disable_cache()
    model.enable_cache(CACHES["MagCache"][1]())
    check_ranks(model)  # decides by the step


def test_a_cache_of_an_unlisted_model_is_no_warning() -> None:
    model = ZOO["FLUX.1"].build()
    model.enable_cache(CACHES["MagCache"][1]())
    with patch(model, grid=GRID, text=("prefix", 6)) as handle:
        out = steps(model)
    assert handle.report.last_pass.startswith("8 x 6 tokens; 0 self-attention calls in windows")
    assert_differs(out[1], out[0])


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("jitter", ["alternate", "random"])
def test_patches_that_move_are_refused_where_a_cache_would_mix_them(name: str, jitter: Any) -> None:
    """A cache that extrapolates takes differences of steps; one that reuses is right with either of two grids."""
    model = ZOO["FLUX.1"].build()
    model.enable_cache(CACHES[name][1]())
    extrapolates = name in ("TaylorSeerCache", "SeaCache", "FasterCache")
    with patch(model, jitter=jitter) as handle:
        if jitter == "alternate" and not extrapolates:
            steps(model)
            return
        expected = f"jitter must be {'.none.' if extrapolates else '.none. or .alternate.'}, got jitter='{jitter}'"
        with pytest.raises(ValueError, match=f"{name} .*: {expected}"):
            steps(model)
        handle.jitter = "none"
        steps(model)


def test_a_dry_run_sees_every_call_and_leaves_the_cache_empty() -> None:
    model = ZOO["FLUX.1"].build()
    with patch(model) as handle:
        patched = steps(model)
        model.enable_cache(CACHES["FirstBlockCache"][1]())
        steps(model)
        report = handle.check(**ZOO["FLUX.1"].inputs(Draw(0), NATIVE, 1))
        assert {row.taken for row in report.rows} == {1}
        assert torch.equal(steps(model)[0], patched[0])


@pytest.mark.composes("TextKVCache", "network")
def test_cached_text_of_nucleus_is_the_text() -> None:
    """Its keys and values are computed in the first step alone, and rotated for every window as before; the patches may move."""
    specimen = ZOO["NucleusMoE-Image"]
    model, projected = specimen.build(), list[nn.Module]()
    inputs = specimen.inputs(Draw(0), GRID, 1)
    for name, module in model.named_modules():
        if name.endswith("add_k_proj"):
            module.register_forward_hook(lambda module, *_: projected.append(module))

    def two_steps(handle: scalediff.Handle) -> list[Tensor]:
        handle.restart_jitter()
        projected.clear()
        with torch.no_grad():
            return [model(**inputs | {"hidden_states": inputs["hidden_states"] * scale}, return_dict=False)[0] for scale in (1.0, 0.5)]

    with patch(model, jitter="random") as handle:
        plain = two_steps(handle)
        assert len(projected) == 2 * len(set(projected))
        model.enable_cache(diffusers.TextKVCacheConfig())
        cached = two_steps(handle)
        assert len(projected) == len(set(projected)) > 0
        assert cache_names(model) == ["TextKVCache"]
    for one, other in zip(cached, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


class Wrapped(nn.Module):
    """All blocks of a list as one, as cache-dit wraps them."""

    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.blocks[0](*args, **kwargs)


def test_blocks_that_other_code_wraps_in_a_pass_keep_their_names() -> None:
    model = ZOO["FLUX.1"].build()
    own, wrapped = model.transformer_blocks, nn.ModuleList([Wrapped(model.transformer_blocks)])
    forward = model.forward

    def wrapping(*args: Any, **kwargs: Any) -> Any:
        model.transformer_blocks = wrapped
        try:
            return forward(*args, **kwargs)
        finally:
            model.transformer_blocks = own

    model.forward = wrapping
    with patch(model) as handle:
        ZOO["FLUX.1"].run(model, GRID)
        assert {row.taken for row in handle.report.rows} == {1}
        assert {row.module for row in handle.report.patched} == {row.module for row in handle.report.rows}


def test_a_stored_forward_is_bound_once() -> None:
    """cache-dit binds the forward that it gives back."""
    model = ZOO["FLUX.1"].build()
    with patch(model):
        model.forward = lambda **arguments: nn.Module.forward(model)
        stored = model.forward
        assert stored.__get__(model) is stored
        del model.forward


def test_a_method_that_was_replaced_is_ours_again_in_the_next_patch(demo: Any) -> None:
    scalediff.patch_model(demo)
    shared = type(demo)
    own = shared.__call__
    shared.__call__ = lambda self, *args, **kwargs: None  # type: ignore[method-assign]
    scalediff.unpatch_model(demo)
    scalediff.patch_model(demo)
    assert type(demo) is shared
    assert shared.__call__ is own
