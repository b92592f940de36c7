"""Patch Model beside other nodes: what keeps working, and that whatever takes the windows away is said."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalediff.comfy.models import attention_of, patched
from tests.scalediff.comfy.host import StandIn
from tests.scalediff.comfy.networks import HEADS, Flux
from tests.scalediff.comfy.specimens import GRID, WINDOW, Specimen, by_hand, forward
from tests.scalediff.comfy.stand_in import options_of

Arguments = Callable[[], dict[str, Any]]  # of a pass, anew for every pass

GLOBAL: dict[str, Any] = {"text_queries": "global", "text_rope": False}


def run(model: Any, spec: Specimen, **extra: Any) -> Tensor:
    return forward(model, *spec.inputs(GRID), **{**spec.extra, **extra})


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """ComfyUI's attention, as other nodes call it."""
    out: Tensor = importlib.import_module("comfy.ldm.modules.attention").optimized_attention(*args, **kwargs)
    return out


class Override:
    """Another node's attention, which computes the same and counts its calls."""

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Override:
        return self  # clones of a model share it

    def __call__(self, func: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        self.lengths.append(k.shape[-2])
        return func(q, k, *args, **kwargs)


def test_an_earlier_override_keeps_the_calls_that_are_not_windowed(host: StandIn) -> None:
    spec = host.specimen("SDXL")
    model = spec.model()
    expected = run(patched(model, WINDOW), spec)
    earlier = model.model_options["transformer_options"]["optimized_attention_override"] = Override()
    windowed = patched(model, WINDOW)
    assert torch.equal(run(windowed, spec), expected)
    assert earlier.lengths == [7] * spec.calls  # the text's
    earlier.lengths.clear()
    run(patched(windowed, WINDOW), spec)
    assert earlier.lengths == [7] * spec.calls
    native = forward(windowed, *spec.inputs(WINDOW))
    assert torch.equal(native, forward(model, *spec.inputs(WINDOW)))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own messages: ComfyUI logs others."""
    return [record.message for record in caplog.records if record.message.startswith("ScaleDiff")]


@pytest.mark.parametrize(("slot", "by"), [(Override(), "replaced it by Override"), (None, "removed it")])
def test_a_later_override_is_an_error(host: StandIn, slot: Any, by: str, caplog: pytest.LogCaptureFixture) -> None:
    spec = host.specimen("FLUX")
    model = spec.model()
    plain = run(model, spec)
    strict, lenient = patched(model, WINDOW), patched(model, WINDOW, strict=False)
    for one in (strict, lenient):
        options = one.model_options["transformer_options"]
        if slot is None:
            del options["optimized_attention_override"]
        else:
            options["optimized_attention_override"] = slot
    message = f"Flux ran with full attention above its native size: the attention override is missing, a later node {by}: put ScaleDiff: "
    with pytest.raises(RuntimeError, match=message):
        run(strict, spec)
    assert torch.equal(run(lenient, spec), plain)
    assert torch.equal(run(lenient, spec), plain)
    assert [by in message for message in warnings(caplog)] == [True]  # once
    assert f"full attention: the attention override is missing, a later node {by}" in attention_of(lenient).report()  # type: ignore[union-attr]


def replaced(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """An attention replacement that does not pass `transformer_options` on, as many do."""
    return optimized_attention(q, k, v, options["n_heads"])


def test_a_block_without_the_override_is_said(host: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    spec = host.specimen("SDXL")
    windowed = patched(spec.model(), WINDOW)
    windowed.set_model_attn1_replace(replaced, *spec.blocks[1])
    run(windowed, spec)
    message = (
        f"ScaleDiff: UNetModel: 1 of {spec.calls} attention blocks did not use the attention override: another node replaces or skips them"
    )
    assert warnings(caplog) == [message]
    assert f"{spec.calls - 1} of {spec.calls} attention blocks in windows" in attention_of(windowed).report()  # type: ignore[union-attr]
    for block in spec.blocks:
        windowed.set_model_attn1_replace(replaced, *block)
        windowed.set_model_attn2_replace(replaced, *block)
    with pytest.raises(RuntimeError, match="no attention call used the attention override"):
        run(windowed, spec)


def ip_adapter(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Cross-attention with three more tokens, computed by the adapter's node itself."""
    more = torch.ones(len(k), 3, k.shape[-1], dtype=k.dtype)
    return optimized_attention(q, torch.cat([k, more], dim=1), torch.cat([v, more], dim=1), options["n_heads"], transformer_options=options)


def with_ip_adapter(host: StandIn, model: Any, spec: Specimen) -> Arguments:
    for block in spec.blocks:
        model.set_model_attn2_replace(ip_adapter, *block)
    return dict


def with_controlnet(host: StandIn, model: Any, spec: Specimen) -> Arguments:
    """A ControlNet runs before the network and adds to its activations. The network takes the tensors out of the lists."""
    return lambda: {"control": {"middle": [torch.linspace(0, 1, spec.middle, dtype=spec.dtype)[:, None, None]]}}


def with_lora(host: StandIn, model: Any, spec: Specimen) -> Arguments:
    """LoRA changes weights, when ComfyUI loads the model."""
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, nn.Linear):
            layer.weight += 0.1 * torch.outer(torch.ones(layer.out_features), torch.linspace(-1, 1, layer.in_features))
    return dict


def with_fp8(host: StandIn, model: Any, spec: Specimen) -> Arguments:
    for layer in model.model.diffusion_model.modules():
        if isinstance(layer, nn.Linear):
            host.cast_weights(layer)
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn)
    return dict


@pytest.mark.parametrize("node", [with_ip_adapter, with_controlnet, with_lora, with_fp8])
def test_windows_are_right_beside_another_node(host: StandIn, node: Callable[[StandIn, Any, Specimen], Arguments]) -> None:
    spec = host.specimen("SDXL")
    model = spec.model()
    before = run(model, spec)
    extra = node(host, model, spec)
    out, expected = run(patched(model, WINDOW, **GLOBAL), spec, **extra()), by_hand(model, spec, GRID, **extra())
    assert (out - expected).abs().max() < spec.tolerance * expected.abs().max()
    assert not torch.equal(run(model, spec, **extra()), before)


@pytest.mark.parametrize("name", ["FLUX", pytest.param("SDXL", marks=pytest.mark.slow)])
def test_a_compiled_network_computes_windows(host: StandIn, name: str) -> None:
    """Contract (comfy_api/torch_helpers): an APPLY_MODEL wrapper puts the compiled network in the place of the network during a call."""
    from comfy.patcher_extension import WrappersMP

    spec = host.specimen(name)
    if spec.build is Flux:  # a block is enough
        spec = replace(spec, build=lambda: Flux(double=1, single=0))
    model = patched(spec.model(), WINDOW)
    compiled = model.clone()
    network = torch.compile(model.model.diffusion_model, backend="eager")

    def swap(executor: Any, *args: Any, **kwargs: Any) -> Any:
        original = executor.class_obj.diffusion_model
        executor.class_obj.diffusion_model = network
        try:
            return executor(*args, **kwargs)
        finally:
            executor.class_obj.diffusion_model = original

    compiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "torch.compile", swap)
    x, context = spec.inputs(GRID)
    sigma = torch.full((2,), 0.5, dtype=x.dtype)
    expected = model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options_of(model))
    torch.compiler.reset()
    for again in (False, True):
        with torch._dynamo.config.patch(error_on_recompile=again):
            out = model.model.apply_model(x, sigma, c_crossattn=context, transformer_options=options_of(compiled))
        assert (out - expected).abs().max() < 1e-3 * spec.tolerance * expected.abs().max()
        assert "calls in windows inside compiled graphs" in attention_of(compiled).report()  # type: ignore[union-attr]


def test_a_second_picture_is_an_error_above_the_native_size(host: StandIn) -> None:
    spec = host.specimen("FLUX")
    model = patched(spec.model(), WINDOW)
    forward(model, *spec.inputs(WINDOW), ref_latents=[spec.inputs(WINDOW)[0]], **spec.extra)
    with pytest.raises(RuntimeError, match=r"Flux ran with full .*: tokens of a second picture \(ref_latents\) are not supported"):
        run(model, spec, ref_latents=[spec.inputs(WINDOW)[0]])


def test_several_frames_are_an_error(host: StandIn) -> None:
    spec = host.specimen("Qwen-Image")
    model = patched(spec.model(), WINDOW)
    x, context = spec.inputs(GRID)
    with pytest.raises(RuntimeError, match=r"windows over several frames are not supported, got latents of \(2, 4, 2, 36, 22\)"):
        forward(model, torch.cat([x, x], dim=2), context)


def test_a_video_model_of_the_same_class_is_an_error(host: StandIn) -> None:
    spec = host.specimen("HunyuanImage 2.1")
    model = spec.model()
    model.model.diffusion_model.patch_size = (1, 2, 2)
    with pytest.raises(RuntimeError, match="windows over the frames of a video model are not supported"):
        run(patched(model, WINDOW), spec)


def test_rescaled_positions_are_an_error_where_text_is_rotated(host: StandIn) -> None:
    spec = host.specimen("FLUX")
    model = spec.model()
    scaled = {"rope_options": {"scale_y": 0.5, "scale_x": 0.5}}
    with pytest.raises(RuntimeError, match="another node rescales rotary positions, and text is rotated for unscaled ones: turn text_rope"):
        forward(patched(model, WINDOW), *spec.inputs(GRID), options=scaled, **spec.extra)
    forward(patched(model, WINDOW, text_rope=False), *spec.inputs(GRID), options=scaled, **spec.extra)


def test_a_mask_that_windows_cannot_keep_is_said(host: StandIn) -> None:
    spec = host.specimen("FLUX")
    model = spec.model()
    tokens = 7 + GRID[0] * GRID[1]
    mask = torch.rand(1, tokens, tokens, dtype=spec.dtype)
    with pytest.raises(RuntimeError, match="this attention mask is not supported, got"):
        run(patched(model, WINDOW), spec, attention_mask=mask)
    lenient = patched(model, WINDOW, strict=False)
    assert torch.equal(run(lenient, spec, attention_mask=mask), run(model, spec, attention_mask=mask))
    said = f"calls with full attention: {spec.calls}, this attention mask is not supported"
    assert said in attention_of(lenient).report()  # type: ignore[union-attr]


def test_a_single_call_with_full_attention_is_said(host: StandIn, caplog: pytest.LogCaptureFixture) -> None:
    """A replacement that passes `transformer_options` on, with a mask of its own."""

    def masked(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        mask = torch.rand(q.shape[1], k.shape[1], dtype=q.dtype)
        return optimized_attention(q, k, v, options["n_heads"], mask=mask, transformer_options=options)

    spec = host.specimen("SDXL")
    windowed = patched(spec.model(), WINDOW)
    windowed.set_model_attn1_replace(masked, *spec.blocks[0])
    for _ in range(2):
        run(windowed, spec)
    (message,) = warnings(caplog)
    assert message.startswith("ScaleDiff: UNetModel: some attention calls ran in full: this attention mask is not supported, got (1, 1")
    assert f"{spec.calls - 1} of {spec.calls} attention blocks in windows" in attention_of(windowed).report()  # type: ignore[union-attr]


def test_other_numbers_of_tokens_are_named(host: StandIn) -> None:
    """A node that appends tokens to the text inside the network."""
    host.needs_stand_in("ComfyUI's FLUX network makes the positions of text from its input, so they do not fit what a hook appends later")
    spec = host.specimen("FLUX")
    model = spec.model()
    net = model.model.diffusion_model
    net.txt_in.register_forward_hook(lambda module, args, out: torch.cat([out, out], dim=1))
    with pytest.raises(
        RuntimeError, match=r"212 queries and 212 keys are not the tokens of 18 x 11|must have the tokens of 18 x 11, got 212"
    ):
        run(patched(model, WINDOW), spec)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_a_call_may_have_any_form_that_comfyui_uses(host: StandIn, joined: bool, grouped: bool) -> None:
    from comfy.patcher_extension import WrappersMP

    spec = host.specimen("SDXL")
    model = patched(spec.model(), (4, 4), **GLOBAL)
    tokens, dim, rng = 12 * 8, 8, torch.Generator().manual_seed(0)
    heads_of_keys = 1 if grouped else HEADS
    q, k, v = (torch.randn(2, n, tokens, dim, generator=rng, dtype=spec.dtype) for n in (HEADS, heads_of_keys, heads_of_keys))
    outs = []
    for skip in (True, False):
        parts = (q, k, v) if skip else tuple(x.transpose(1, 2).flatten(2) for x in (q, k, v))
        seen: list[Tensor] = []

        def call(executor: Any, *args: Any, parts: Any = parts, skip: bool = skip, seen: Any = seen) -> Tensor:
            options = args[5]
            kwargs = {
                "skip_reshape": skip,
                "skip_output_reshape": joined,
                "scale": 0.3,
                "enable_gqa": grouped,
                "transformer_options": options,
            }
            seen.append(optimized_attention(*parts, HEADS, None, **kwargs, low_precision_attention=False, preferred_attention=None))
            return executor(*args)

        one = model.clone()
        one.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", call)
        x, context = spec.inputs((12, 8))
        forward(one, x, context)
        outs.append(seen[0] if not joined else seen[0].transpose(1, 2).flatten(2))
    plain = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=grouped).transpose(1, 2).flatten(2)
    assert torch.equal(*outs)
    assert outs[0].shape == plain.shape
    assert (outs[0] - plain).abs().max() > 1e-3
