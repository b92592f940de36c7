"""The patch beside what people do with a diffusers model: compile it, adapt it, offload it, cache it, cast it, save it, share it."""

from __future__ import annotations

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.zoo import WINDOW, ZOO, Specimen

diffusers = pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")
peft = pytest.importorskip("peft")

from diffusers.models.attention_dispatch import _AttentionBackendRegistry  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

SDPA = F.scaled_dot_product_attention
NATIVE, GRID = (4, 4), (8, 6)
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
def plain_and_patched(name: str, grid: tuple[int, int] = GRID) -> tuple[Tensor, Tensor]:
    model = ZOO[name].build()
    plain = ZOO[name].run(model, grid)
    with patch(model):
        patched = ZOO[name].run(model, grid)
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


# torch.compile

SMALL: dict[str, dict[str, Any]] = {
    "SD1.5": {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)},
    "FLUX.1": {"num_single_layers": 1},
    "SD3": {"num_layers": 2, "dual_attention_layers": ()},
    "Lumina 2": {"num_layers": 1},
}
COMPILED_GRID = (6, 4)


def small(name: str) -> Specimen:
    """Fewer layers: compiling takes long."""
    return replace(ZOO[name], config=ZOO[name].config | SMALL[name])


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


Compiled = tuple[Any, Any]  # what is called, what is unpatched


def patched_then_compiled(model: Any, how: dict[str, Any]) -> Compiled:
    patch(model)
    wrapper = torch.compile(model, **how)
    return wrapper, wrapper


def compiled_then_patched_by_its_wrapper(model: Any, how: dict[str, Any]) -> Compiled:
    wrapper = torch.compile(model, **how)
    patch(wrapper)
    return wrapper, model


def compiled_then_patched_within(model: Any, how: dict[str, Any]) -> Compiled:
    wrapper = torch.compile(model, **how)
    patch(model)
    return wrapper, wrapper


def patched_then_compiled_in_place(model: Any, how: dict[str, Any]) -> Compiled:
    patch(model)
    model.compile(**how)
    return model, model


def compiled_in_place_then_patched(model: Any, how: dict[str, Any]) -> Compiled:
    model.compile(**how)
    patch(model)
    return model, model


def patched_then_blocks_compiled(model: Any, how: dict[str, Any]) -> Compiled:
    patch(model)
    model.compile_repeated_blocks(**how)
    return model, model


def blocks_compiled_then_patched(model: Any, how: dict[str, Any]) -> Compiled:
    model.compile_repeated_blocks(**how)
    patch(model)
    return model, model


WHOLE = [
    patched_then_compiled, compiled_then_patched_by_its_wrapper, compiled_then_patched_within, patched_then_compiled_in_place,
    compiled_in_place_then_patched,
]  # fmt: skip
BLOCKS = [patched_then_blocks_compiled, blocks_compiled_then_patched]  # SD3 and Lumina 2 name no repeated blocks
ORDERS = {"FLUX.1": WHOLE + BLOCKS, "SD1.5": WHOLE + BLOCKS, "SD3": WHOLE, "Lumina 2": WHOLE[:2]}


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(("name", "order"), [pytest.param(n, o, id=f"{n} {o.__name__}") for n, orders in ORDERS.items() for o in orders])
def test_a_compiled_model_is_patched_and_unpatched(name: str, order: Callable[[Any, dict[str, Any]], Compiled]) -> None:
    spec = small(name)
    model = spec.build()
    plain = spec.run(model, COMPILED_GRID)
    with patch(model):
        patched = spec.run(model, COMPILED_GRID)
    assert_differs(patched, plain)
    # Lumina 2 by itself is no single graph: its forward reads the lengths of the prompts
    called, unpatched = order(model, {"fullgraph": name != "Lumina 2", "backend": "aot_eager", "dynamic": False})
    assert_close(spec.run(called, COMPILED_GRID), patched)
    scalediff.unpatch_model(unpatched)
    assert_close(spec.run(called, COMPILED_GRID), plain)


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raises inside when the time is over: a compiler that solves for sizes may take hours."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("name", ["FLUX.1", "SD3", "SD1.5"])
def test_a_compiled_model_takes_one_size_after_another(name: str) -> None:
    """With sizes left to the compiler: from the second one on they are symbols."""
    spec = small(name)
    model = spec.build()
    with patch(model), at_most(20):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for grid in (NATIVE, COMPILED_GRID, (5, 6)):
            assert_close(spec.run(compiled, grid), spec.run(model, grid))
