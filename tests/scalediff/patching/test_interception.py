"""The replaced attribute: whose calls it changes, and that it goes back to what it was whatever happens."""

from __future__ import annotations

import copy
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from tests.conftest import forward, seeded, state_of

SDPA = F.scaled_dot_product_attention


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
        with pytest.warns(UserWarning, match=r"attn1 runs full attention: this attention mask is not supported"):
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
            for _ in range(2):
                with pytest.raises(ValueError, match=r"attn1, .*attn1 run full attention: AttnProcessor does not call"):
                    forward(unet, (32, 32))
            unet.set_attn_processor(dict(own))  # type: ignore[operator]
            forward(unet, (32, 32))
    finally:
        unet.set_attn_processor(dict(own))  # type: ignore[operator]


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
