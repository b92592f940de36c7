"""What computes attention where scaled_dot_product_attention is not called by its name: errors and warnings say it."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import flex_attention

import scalediff
from scalediff.patching.causes import other_attention
from tests.conftest import seeded
from tests.scalediff.patching.research_models import WIDTH
from tests.scalediff.patching.test_account import Changing

SDPA = F.scaled_dot_product_attention


def imported_by_name(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return SDPA(q, k, v)


def by_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def by_xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sys.modules["xformers"].ops.memory_efficient_attention(q, k, v)  # type: ignore[no-any-return]


def by_flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return flex_attention.flex_attention(q, k, v)  # type: ignore[return-value]


def by_flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sys.modules["flash_attn"].flash_attn_func(q, k, v)  # type: ignore[no-any-return]


class Functions(Changing):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.attention(q, k, v)

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError


class ByName(Functions):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return imported_by_name(q, k, v)


class BySoftmax(Functions):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_softmax(q, k, v)


class ByXformers(Functions):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_xformers(q, k, v)


class ByFlash(Functions):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_flash(q, k, v)


class ByFlex(Functions):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return by_flex(q, k, v)


class ByTorchModule(nn.Module):
    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x.flatten(2).mT)
        return out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (ByName, r"was not called. The model also uses SDPA, imported by name: call it as F.scaled_dot_product_attention"),
        (BySoftmax, r"a softmax of its own: switch the model to F.scaled_dot_product_attention \(BySoftmax\)"),
        (ByXformers, r"xformers' memory_efficient_attention: switch the model to F.scaled_dot_product_attention"),
        (ByFlash, r"flash_attn's flash_attn_func: switch the model to F.scaled_dot_product_attention"),
        (ByFlex, r"flex_attention: switch the model to F.scaled_dot_product_attention"),
        (ByTorchModule, r"the fast path of nn.TransformerEncoderLayer: torch.backends.mha.set_fastpath_enabled\(False\)"),
    ],
)
def test_the_error_names_what_computes_attention(kind: Callable[[], nn.Module], cause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = types.SimpleNamespace(memory_efficient_attention=lambda q, k, v: v)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=ops))  # type: ignore[misc]
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_func=lambda q, k, v: v))  # type: ignore[misc]
    model, x = kind(), torch.randn(1, 4, 9, 6, generator=seeded())
    with torch.no_grad(), scalediff.patch_model(model, window=(4, 4)), pytest.raises(ValueError, match=cause):
        model(x)


def test_of_diffusers_attention_the_processor_is_named() -> None:
    """The class has a method that tries xformers before it switches to it; whether a call uses xformers, its processor says."""
    diffusers = pytest.importorskip("diffusers", reason="the module is diffusers' Attention")
    from diffusers.models import attention_processor

    module = attention_processor.Attention(8, heads=2, dim_head=4)
    sdpa = F.scaled_dot_product_attention
    assert other_attention(module, sdpa, certain=True) == [], diffusers.__version__
    module.processor = attention_processor.XFormersAttnProcessor()
    (cause,) = other_attention(module, sdpa, certain=True)
    assert cause == "xformers' memory_efficient_attention: switch the model to F.scaled_dot_product_attention (XFormersAttnProcessor)"


def test_the_error_names_the_lengths_that_were_seen() -> None:
    """Registers that the caller did not mention: 54 queries, 58 keys."""

    class Registers(Changing):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            k, v = (torch.cat([y[:, :, :4], y], dim=2) for y in (k, v))
            return F.scaled_dot_product_attention(q, k, v)

    model, message = Registers(), r"had the tokens of 9 x 6, .*was called with 54 queries and 58 keys by Registers"
    with scalediff.patch_model(model, window=(4, 4)), pytest.raises(ValueError, match=message):
        model(torch.randn(1, 4, 9, 6, generator=seeded()))


class PartlyByName(nn.Module):
    """Two attention modules, of which one imported the function by name."""

    patch_size = 1

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Calls(), CallsByName()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Calls(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(q, q, q)[:, 0].mT.unflatten(-1, x.shape[-2:])


class CallsByName(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x.flatten(2).mT[:, None]
        return SDPA(q, q, q)[:, 0].mT.unflatten(-1, x.shape[-2:])


def test_a_module_that_is_never_seen_is_said_once() -> None:
    model, x = PartlyByName(), torch.randn(1, WIDTH, 9, 6, generator=seeded())
    with scalediff.patch_model(model, window=(4, 4)):
        with pytest.warns(UserWarning, match=r"a part of PartlyByName runs full attention: it uses SDPA, imported by name"):
            model(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(x)


class Twice(nn.Module):
    """Two calls in one module, of which one is causal."""

    patch_size = 1

    def forward(self, x: Tensor) -> Tensor:
        q = x.flatten(2).mT[:, None]
        out = F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, q, q, is_causal=True)
        return out[:, 0].mT.unflatten(-1, x.shape[-2:])


def test_a_module_that_is_windowed_in_part_has_the_reason_in_its_row() -> None:
    model = Twice()
    with scalediff.patch_model(model, window=(4, 4)) as handle, pytest.warns(UserWarning, match="causal attention is not supported"):
        model(torch.randn(1, WIDTH, 9, 6, generator=seeded()))
    (row,) = handle.report.rows
    assert (row.status, row.taken, row.left, row.why) == ("patched", 1, 1, "in part, causal attention is not supported")
