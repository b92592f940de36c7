"""Every way into a denoiser's forward opens a pass."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import scalediff
from tests.conftest import seeded
from tests.scalediff.patching.test_unlisted import SDPA, made
from tests.scalediff.research_models import DiT, PixArt, SiT

pytestmark = pytest.mark.filterwarnings("error:scalediff")


def conditions(name: str) -> tuple[Tensor, Tensor]:
    t = torch.full((2,), 0.5, dtype=torch.float64)
    return t, torch.tensor([3, 10]) if name != "PixArt" else torch.randn(2, 5, 8, generator=seeded(), dtype=torch.float64)


def latents(grid: tuple[int, int]) -> Tensor:
    return torch.randn(1, 4, 2 * grid[0], 2 * grid[1], generator=seeded(), dtype=torch.float64).expand(2, -1, -1, -1)


MODELS: dict[str, Callable[[], nn.Module]] = {"DiT": DiT, "SiT": SiT, "PixArt": PixArt}
ENTRIES: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "call": lambda model, x, t, y: model(x, t, y),
    "forward": lambda model, x, t, y: model.forward(x, t, y),
    "keywords": lambda model, x, t, y: model.forward(x, y=y, **{"timestep" if isinstance(model, PixArt) else "t": t}),
    "forward_with_cfg": lambda model, x, t, y: model.forward_with_cfg(x, t, y, 4.0),
    "call_impl": lambda model, x, t, y: model._call_impl(x, t, y),
    "functional": lambda model, x, t, y: functional_call(model, dict(model.named_parameters()), (x, t, y)),
}
CALLS = [(name, entry) for name in MODELS for entry in ENTRIES]


@pytest.mark.parametrize(("name", "entry"), CALLS)
def test_a_pass_opens_however_the_forward_is_entered(name: str, entry: str) -> None:
    """Windows above the native size, the same bits at it and after unpatching."""
    model, enter = made(MODELS[name]), ENTRIES[entry]
    with torch.no_grad():
        plain, native = (enter(model, latents(grid), *conditions(name)) for grid in ((9, 6), (4, 4)))
        with scalediff.patch_model(model) as handle:
            assert torch.equal(enter(model, latents((4, 4)), *conditions(name)), native)
            out = enter(model, latents((9, 6)), *conditions(name))
            assert [row.module for row in handle.report.patched] == ["blocks.0.attn", "blocks.1.attn"]
            if entry == "forward":
                assert torch.equal(out, model(latents((9, 6)), *conditions(name)))
        assert (out - plain).abs().max() > 1e-5 * plain.abs().max()
        assert torch.equal(enter(model, latents((9, 6)), *conditions(name)), plain)
    assert F.scaled_dot_product_attention is SDPA


def store_forward(model: Any, seen: list[int]) -> None:
    """Replace the forward in the model itself, as offloading hooks do."""
    own = model.forward

    def hooked(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(1)
        out: Tensor = own(*args, **kwargs)
        return out

    model.forward = functools.update_wrapper(hooked, own)


@pytest.mark.parametrize("patch_first", [True, False])
@pytest.mark.parametrize("entry", ["call", "forward", "forward_with_cfg"])
def test_a_forward_stored_in_the_model_opens_a_pass(entry: str, patch_first: bool) -> None:
    model, inputs, seen = made(DiT), (latents((9, 6)), *conditions("DiT")), list[int]()
    plain = ENTRIES[entry](model, *inputs)
    with scalediff.patch_model(model):
        patched = ENTRIES[entry](model, *inputs)
    handle = scalediff.patch_model(model) if patch_first else None
    store_forward(model, seen)
    handle = handle or scalediff.patch_model(model)
    assert torch.equal(ENTRIES[entry](model, *inputs), patched)
    handle.remove()
    assert torch.equal(ENTRIES[entry](model, *inputs), plain)
    assert len(seen) == 2
    del model.forward  # type: ignore[misc]
    assert torch.equal(ENTRIES[entry](model, *inputs), plain)


def test_a_stored_forward_is_deleted_and_copied_as_without_the_patch() -> None:
    model, inputs = made(DiT), (latents((9, 6)), *conditions("DiT"))
    plain = model(*inputs)
    with scalediff.patch_model(model):
        patched = model(*inputs)
        with pytest.raises(AttributeError, match="forward"):
            del model.forward  # type: ignore[misc]
        model.forward = model.forward
        assert torch.equal(model.forward(*inputs), patched)
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        del model.forward  # type: ignore[misc]
        assert "forward" not in model.__dict__
    for twin in twins:
        assert torch.equal(twin.forward(*inputs), plain)
        assert torch.equal(twin(*inputs), plain)


@pytest.mark.parametrize("entry", ["forward", "forward_with_cfg"])
def test_an_exception_ends_the_pass(entry: str) -> None:
    model = made(DiT)
    with scalediff.patch_model(model), pytest.raises(RuntimeError):
        ENTRIES[entry](model, latents((9, 6)), torch.zeros(7, dtype=torch.float64), torch.tensor([1, 2]))
    assert F.scaled_dot_product_attention is SDPA


@pytest.mark.parametrize("patch_first", [True, False])
def test_a_compiled_forward(patch_first: bool) -> None:
    """`torch.compile` of the bound method, and a compiled model whose forward is called."""
    model, inputs = made(DiT), (latents((9, 6)), *conditions("DiT"))
    with torch.no_grad():
        plain = model(*inputs)
        with scalediff.patch_model(model):
            patched = model(*inputs)
        torch._dynamo.reset()
        handle = scalediff.patch_model(model) if patch_first else None
        wrapper = torch.compile(model, backend="eager", dynamic=False)
        handle = handle or scalediff.patch_model(model)
        compiled: Any = torch.compile(model.forward, backend="eager", dynamic=False)
        for function in (wrapper, wrapper.forward, compiled):
            torch.testing.assert_close(function(*inputs), patched)
        handle.remove()
        torch.testing.assert_close(wrapper(*inputs), plain)
        torch._dynamo.reset()


def test_a_stored_forward_does_not_break_a_graph() -> None:
    model, inputs = made(DiT), (latents((9, 6)), *conditions("DiT"))
    store_forward(model, [])
    with torch.no_grad(), scalediff.patch_model(model):
        patched = model(*inputs)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
        torch.testing.assert_close(compiled(*inputs), patched)
    torch._dynamo.reset()


def test_patching_inside_a_running_forward_is_an_error() -> None:
    """The functions of that forward are already bound, so its attention could not be replaced."""
    model, inputs = made(DiT), (latents((9, 6)), *conditions("DiT"))
    plain = model(*inputs)
    said: list[str] = []

    def patch_now(*_: Any) -> None:
        with pytest.raises(ValueError, match=r"patch_model was called while a forward of this DiT was running") as caught:
            scalediff.patch_model(model)
        said.append(str(caught.value))
        with pytest.warns(UserWarning, match=r"while a forward of this DiT was running, which keeps full attention"):
            scalediff.patch_model(model, strict=False)

    remover = model.blocks[0].register_forward_pre_hook(patch_now)  # type: ignore[index, union-attr]
    try:
        assert torch.equal(model(*inputs), plain)
    finally:
        remover.remove()
        scalediff.unpatch_model(model)
    assert len(said) == 1
