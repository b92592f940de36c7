"""The backend's name in diffusers: selectable, the patched result, and an error where nothing is patched."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import scalediff
from bench.models.zoo import WINDOW, ZOO
from scalediff.patching import target

dispatch = pytest.importorskip("diffusers.models.attention_dispatch", reason="it is a backend of diffusers")


@pytest.fixture(autouse=True)
def own_backend() -> Iterator[None]:
    before = dispatch._AttentionBackendRegistry._active_backend
    yield
    dispatch._AttentionBackendRegistry._active_backend = before


def test_the_name_can_be_selected_and_reaches_the_windows() -> None:
    scalediff.register_backend()
    scalediff.register_backend()
    assert [str(name.value) for name in dispatch.AttentionBackendName].count("scalediff") == 1
    spec = ZOO["FLUX.1"]
    model: Any = spec.build()
    native = spec.run(model, WINDOW)
    with scalediff.patch_model(model, window=WINDOW):
        expected = spec.run(model, (8, 6))
        model.set_attention_backend("scalediff")
        assert torch.equal(spec.run(model, (8, 6)), expected)
        assert torch.equal(spec.run(model, WINDOW), native)
        model.reset_attention_backend()
        with dispatch.attention_backend("scalediff"):
            assert torch.equal(spec.run(model, (8, 6)), expected)


def test_in_a_compiled_graph() -> None:
    scalediff.register_backend()
    spec = ZOO["FLUX.1"]
    model: Any = spec.build()
    torch._dynamo.reset()
    with scalediff.patch_model(model, window=WINDOW):
        expected = spec.run(model, (8, 6))
        model.set_attention_backend("scalediff")
        assert torch.equal(spec.run(torch.compile(model, fullgraph=True, backend="eager"), (8, 6)), expected)
    torch._dynamo.reset()


def test_context_parallelism_needs_another_name() -> None:
    scalediff.register_backend()
    x = torch.zeros(1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match='"scalediff" does not support context parallelism: choose "native"'):
        dispatch.dispatch_attention_fn(x, x, x, backend="scalediff", parallel_config=object())


def test_the_name_alone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "_active", weakref.WeakSet())  # patched models of other tests may not be collected yet
    scalediff.register_backend()
    model: Any = ZOO["FLUX.1"].build()
    model.set_attention_backend("scalediff")
    with pytest.raises(RuntimeError, match=r'"scalediff" needs a patched model, which provides the token grid'):
        ZOO["FLUX.1"].run(model, (8, 6))


def test_padded_text_reaches_torch_as_a_mask() -> None:
    """Up to the native size the backend is torch's own, two-dimensional masks included."""
    scalediff.register_backend()
    spec = ZOO["Qwen-Image"]
    model: Any = spec.build()
    expected = spec.run(model, WINDOW, batch=2)
    model.set_attention_backend("scalediff")
    with scalediff.patch_model(model, window=WINDOW):
        assert torch.equal(spec.run(model, WINDOW, batch=2), expected)
