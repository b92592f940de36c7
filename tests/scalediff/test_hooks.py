"""Patching: the same bits at native size, the defined attention above it, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff.grid import from_grid, level_grid, to_grid
from scalediff_kernels import neighborhood_patch_attention
from tests.conftest import seeded

SDPA = F.scaled_dot_product_attention


@pytest.fixture
def unet(demo: Any) -> Iterator[nn.Module]:
    yield demo.unet
    scalediff.unpatch_model(demo.unet)


def forward(unet: nn.Module, size: tuple[int, int], *, batch: int = 2, seed: int = 0) -> Tensor:
    rng = seeded(seed)
    x, text = torch.randn(batch, 4, *size, generator=rng), torch.randn(batch, 24, 64, generator=rng)
    with torch.no_grad():
        out: Tensor = unet(x, 500, encoder_hidden_states=text).sample
    return out


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind, in comparable form."""
    hooks = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_forward_hooks_with_kwargs",
        "_forward_pre_hooks_with_kwargs",
        "_forward_hooks_always_called",
    )
    return {name: (type(m), sorted(m.__dict__), {h: dict(m.__dict__[h]) for h in hooks}) for name, m in module.named_modules()}


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


def test_a_shallow_copy_can_be_unpatched(demo: Any) -> None:
    cls = type(demo)
    scalediff.patch_model(demo)
    twin = copy.copy(demo)
    scalediff.unpatch_model(twin)
    scalediff.unpatch_model(demo)
    assert type(twin) is type(demo) is cls
    assert "_scalediff_handle" not in twin.__dict__


def test_a_deep_copy_stays_patched_by_itself(unet: nn.Module) -> None:
    plain = forward(unet, (32, 32))
    with scalediff.patch_model(unet):
        patched = forward(unet, (32, 32))
        twin = copy.deepcopy(unet)
    assert torch.equal(forward(unet, (32, 32)), plain)
    assert torch.equal(forward(twin, (32, 32)), patched)
    scalediff.unpatch_model(twin)
    assert torch.equal(forward(twin, (32, 32)), plain)


def test_every_self_attention_gets_its_window(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute every intercepted call by hand: the grid, window and patch of its level."""
    calls: list[tuple[int, int]] = []

    def recording(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        calls.append(arguments["window"])
        assert arguments["patch"] == (arguments["window"][0] // 2, arguments["window"][1] // 2)
        assert q.shape[1:3] == {(16, 16): (40, 24), (8, 8): (20, 12)}[arguments["window"]]
        return neighborhood_patch_attention(q, k, v, **arguments)

    with scalediff.patch_model(unet) as handle:
        monkeypatch.setattr("scalediff.hooks.neighborhood_patch_attention", recording)
        forward(unet, (40, 24))
    assert sorted(calls) == sorted(row.window for row in handle.report.patched if row.window)


def test_odd_grids_round_up_per_level(unet: nn.Module) -> None:
    assert level_grid((35, 17), 1) == (18, 9)
    with scalediff.patch_model(unet), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forward(unet, (35, 17)).shape[-2:] == (35, 17)


def test_grid_views_are_inverse() -> None:
    x = torch.randn(2, 3, 20, 5)
    grid = to_grid(x, (4, 5))
    assert grid.shape == (2, 4, 5, 3, 5)
    assert grid.data_ptr() == x.data_ptr()
    assert torch.equal(from_grid(grid), x)


def test_masked_causal_and_unexpected_calls_pass_through(unet: nn.Module) -> None:
    """Inside a patched forward, what is not plain image self-attention reaches the original."""
    seen: dict[str, bool] = {}
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1  # type: ignore[index, union-attr]

    def probe(module: nn.Module, args: Any, output: Tensor) -> None:
        q = torch.randn(1, 2, 32 * 32, 4, generator=seeded())
        mask = torch.ones(32 * 32, 32 * 32, dtype=torch.bool).tril()
        seen["masked"] = torch.equal(F.scaled_dot_product_attention(q, q, q, mask), SDPA(q, q, q, mask))
        seen["causal"] = torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), SDPA(q, q, q, is_causal=True))
        seen["plain"] = torch.equal(F.scaled_dot_product_attention(q, q, q), SDPA(q, q, q))

    with scalediff.patch_model(unet):
        remover = attention.to_q.register_forward_hook(probe)
        forward(unet, (32, 32))
        remover.remove()
    assert seen == {"masked": True, "causal": True, "plain": False}


def test_unexpected_shape_warns_once_by_name_and_runs_full_attention(unet: nn.Module) -> None:
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1  # type: ignore[index, union-attr]
    equal = []

    def probe(module: nn.Module, args: Any, output: Tensor) -> None:
        q = torch.randn(1, 2, 77, 4)
        equal.append(torch.equal(F.scaled_dot_product_attention(q, q, q), SDPA(q, q, q)))

    with scalediff.patch_model(unet):
        remover = attention.to_q.register_forward_hook(probe)
        with pytest.warns(UserWarning, match=r"down_blocks.0.attentions.0.*attn1 runs full attention.*32 x 32"):
            forward(unet, (32, 32))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forward(unet, (32, 32))
        remover.remove()
    assert equal == [True, True]


def test_outside_the_denoiser_nothing_is_replaced(demo: Any) -> None:
    seen = []
    remover = demo.text_encoder.register_forward_hook(lambda *_: seen.append(F.scaled_dot_product_attention is SDPA))
    with scalediff.patch_model(demo):
        demo("a moon", height=128, width=128, num_inference_steps=2, generator=seeded(), output_type="latent")
        assert F.scaled_dot_product_attention is SDPA
    remover.remove()
    assert seen
    assert all(seen)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_whatever_is_raised_in_the_forward_the_attribute_is_restored(unet: nn.Module, error: type[BaseException]) -> None:
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1  # type: ignore[index, union-attr]

    def explode(*_: object) -> None:
        raise error

    with scalediff.patch_model(unet):
        expected = forward(unet, (32, 32))
        remover = attention.to_v.register_forward_hook(explode)
        with pytest.raises(error):
            forward(unet, (32, 32))
        remover.remove()
        assert F.scaled_dot_product_attention is SDPA
        assert torch.equal(forward(unet, (32, 32)), expected)


def test_unpatching_during_a_forward_restores_the_attribute(unet: nn.Module) -> None:
    state = state_of(unet)
    handle = scalediff.patch_model(unet)
    remover = unet.mid_block.register_forward_pre_hook(lambda *_: handle.remove())  # type: ignore[union-attr]
    forward(unet, (32, 32))
    remover.remove()
    assert F.scaled_dot_product_attention is SDPA
    assert state_of(unet) == state


def test_another_library_may_save_and_restore_the_attribute(unet: nn.Module) -> None:
    saved = []
    with scalediff.patch_model(unet):
        remover = unet.mid_block.register_forward_pre_hook(lambda *_: saved.append(F.scaled_dot_product_attention))  # type: ignore[union-attr]
        expected = forward(unet, (32, 32))
        remover.remove()
        F.scaled_dot_product_attention = saved[0]  # put back after the pass: ours, out of its time
        assert torch.equal(forward(unet, (32, 32)), expected)
    q = torch.randn(1, 1, 4, 4)
    assert torch.equal(F.scaled_dot_product_attention(q, q, q), SDPA(q, q, q))
    F.scaled_dot_product_attention = SDPA


def test_another_library_may_wrap_the_attribute_during_a_pass_and_stay(unet: nn.Module) -> None:
    def wrap(*_: object) -> None:
        inner = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = lambda *args, **kwargs: inner(*args, **kwargs)

    q = torch.randn(1, 1, 4, 4)
    try:
        with scalediff.patch_model(unet):
            remover = unet.mid_block.register_forward_pre_hook(wrap)  # type: ignore[union-attr]
            expected = forward(unet, (32, 32))
            remover.remove()
            for _ in range(2):
                assert torch.equal(forward(unet, (32, 32)), expected)
                assert torch.equal(F.scaled_dot_product_attention(q, q, q), SDPA(q, q, q))
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), SDPA(q, q, q))
    finally:
        F.scaled_dot_product_attention = SDPA


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


def test_a_denoiser_neither_keeps_nor_copies_its_pipeline(demo: Any) -> None:
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.StableDiffusionPipeline(**demo.components, requires_safety_checker=False)
    unet = pipe.unet
    scalediff.patch_model(pipe)
    twin = copy.deepcopy(unet)
    assert twin.__dict__["_scalediff_handle"]._owner() is pipe
    gone = weakref.ref(pipe)
    del pipe
    gc.collect()
    assert gone() is None
    scalediff.patch_model(twin)  # its own copy: no owner stands in the way
    scalediff.unpatch_model(unet)
    assert F.scaled_dot_product_attention is SDPA


def test_a_processor_that_never_calls_sdpa_is_reported(unet: nn.Module) -> None:
    diffusers = pytest.importorskip("diffusers")
    own = unet.attn_processors
    try:
        unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"no self-attention to patch.*AttnProcessor does not call scaled_dot_product_attention"):
            scalediff.patch_model(unet)
        unet.set_attn_processor(dict(own))  # type: ignore[operator]
        with scalediff.patch_model(unet):
            unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())  # type: ignore[operator]
            with pytest.warns(UserWarning, match=r"attn1 runs full attention: its processor does not call"):
                forward(unet, (32, 32))
    finally:
        unet.set_attn_processor(dict(own))  # type: ignore[operator]


def test_a_handle_can_let_calls_through(unet: nn.Module) -> None:
    plain = forward(unet, (32, 32))
    with scalediff.patch_model(unet) as handle:
        handle.attention = "full"
        assert torch.equal(forward(unet, (32, 32)), plain)
        with pytest.raises(ValueError, match="attention must be one of npa, full, got 'half'"):
            handle.attention = "half"  # type: ignore[assignment]


def test_two_models_in_two_threads_do_not_meet(unet: nn.Module) -> None:
    other = copy.deepcopy(unet)
    plain = forward(other, (32, 32), seed=1)
    results: dict[str, list[Tensor]] = {"patched": [], "plain": []}
    with scalediff.patch_model(unet):
        expected = forward(unet, (32, 32), seed=1)
        threads = [
            threading.Thread(target=lambda: results["patched"].extend(forward(unet, (32, 32), seed=1) for _ in range(4))),
            threading.Thread(target=lambda: results["plain"].extend(forward(other, (32, 32), seed=1) for _ in range(4))),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert F.scaled_dot_product_attention is SDPA
    assert all(torch.equal(out, expected) for out in results["patched"])
    assert all(torch.equal(out, plain) for out in results["plain"])
    assert len(results["patched"]) == len(results["plain"]) == 4


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
    with pytest.raises(ValueError, match=r"knows the denoisers UNet2DConditionModel.*got Linear"):
        scalediff.patch_model(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"pipeline or an nn.Module, got dict"):
        scalediff.patch_model({})


def test_a_model_with_nothing_to_patch_is_an_error() -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    bare = diffusers.UNet2DConditionModel(sample_size=16, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match=r"no self-attention to patch in UNet2DConditionModel: it has no attention modules"):
        scalediff.patch_model(bare)
    assert "_scalediff_handle" not in bare.__dict__
    nameless = diffusers.UNet2DConditionModel(block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, **blocks)
    with pytest.raises(ValueError, match=r"must name its native latent size, got sample_size=None"):
        scalediff.patch_model(nameless)


def test_an_implementation_is_checked_when_it_is_named(unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, reference, sdpa, triton, got impl='fast'"):
        scalediff.patch_model(unet, impl="fast")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="impl='triton'"):
        scalediff.patch_model(unet, impl="triton")
    assert "_scalediff_handle" not in unet.__dict__
