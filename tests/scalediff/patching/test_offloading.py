"""A patch beside offloading, casts of the weights, and low precision."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO, flat
from tests.conftest import forward
from tests.scalediff.patching.test_composition import (
    GRID,
    assert_differs,
    changed,
    either_order,
    in_order,
    patch,
    plain_and_patched,
)
from tests.scalediff.patching.test_composition import _places_are_given_back as _places_are_given_back  # a fixture for every test here

pytest.importorskip("diffusers", reason="what is composed with are diffusers' features")
accelerate = pytest.importorskip("accelerate")

from diffusers.hooks import apply_group_offloading  # noqa: E402

pytestmark = pytest.mark.filterwarnings("error:scalediff")  # no warning of ours in any of these tests

CPU = torch.device("cpu")

OFFLOADS: dict[str, Callable[[Any], Any]] = {
    "groups of blocks": lambda model: apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1),
    "groups of leaves": lambda model: apply_group_offloading(model, CPU, CPU, offload_type="leaf_level"),
    "sequential": lambda model: accelerate.cpu_offload(model, CPU),
    "model": lambda model: accelerate.cpu_offload_with_hook(model, CPU),
}


@pytest.mark.composes("offloading", "network")
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


@pytest.mark.composes("offloading", "cascade")
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


@pytest.mark.composes("layerwise casting", "network")
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


@pytest.mark.composes("half precision", "network")
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


def test_a_hook_that_comes_and_goes_twice_leaves_nothing_of_the_patch() -> None:
    """The first leaves the model's own forward in the model; the second reads and gives back a patched one."""
    unet = ZOO["SD1.5"].build()

    def come_and_go() -> None:
        accelerate.hooks.add_hook_to_module(unet, accelerate.hooks.ModelHook())
        accelerate.hooks.remove_hook_from_module(unet)

    come_and_go()
    own = unet.__dict__["forward"]
    with scalediff.patch_model(unet, window=WINDOW):
        come_and_go()
        assert unet.__dict__["forward"] == own
        pickle.loads(pickle.dumps(unet, 0))
    assert unet.__dict__["forward"] == own
    pickle.loads(pickle.dumps(unet, 0))


def test_a_hook_that_is_removed_after_the_patch_leaves_nothing_in_copies_and_pickles(demo: Any) -> None:
    """It came while the model was patched, and gives back what it read then."""
    unet = copy.deepcopy(demo.unet)
    own = unet.__dict__["forward"] = type(unet).forward.__get__(unet)
    with scalediff.patch_model(unet, window=WINDOW):
        accelerate.hooks.add_hook_to_module(unet, accelerate.hooks.ModelHook())
    accelerate.hooks.remove_hook_from_module(unet)
    assert unet.forward is not own
    for twin in (copy.deepcopy(unet), *(pickle.loads(pickle.dumps(unet, protocol)) for protocol in (0, 2, 5))):
        assert twin.__dict__["forward"] == twin.forward == type(twin).forward.__get__(twin)
        assert torch.equal(forward(twin, (32, 32)), forward(demo.unet, (32, 32)))
