"""Patch Model on every supported network: which calls are computed in windows, and that they compute what is defined, in fp64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.comfy.models import attention_of, patched, unpatched
from scalediff.comfy.networks import NETWORKS, network_of
from tests.scalediff.comfy.host import StandIn
from tests.scalediff.comfy.specimens import GRID, SPECIMENS, WINDOW, Specimen, by_hand, forward
from tests.scalediff.comfy.stand_in import copy_nested

every_network = pytest.mark.parametrize("name", SPECIMENS)


def run(model: Any, spec: Specimen, grid: tuple[int, int] = GRID) -> Tensor:
    return forward(model, *spec.inputs(grid), **spec.extra)


@every_network
def test_windows_are_those_of_the_definition(host: StandIn, name: str) -> None:
    spec = host.specimen(name)
    model = spec.model()
    windowed = patched(model, WINDOW, text_queries="global", text_rope=False)
    out, expected, plain = run(windowed, spec), by_hand(model, spec, GRID), run(model, spec)
    assert (out - expected).abs().max() < spec.tolerance * expected.abs().max()
    assert (plain - expected).abs().max() > 1e-4 * expected.abs().max()
    attention = attention_of(windowed)
    assert attention is not None
    assert attention.blocks == spec.calls
    assert attention.last is not None
    assert (sum(attention.last.taken.values()), attention.last.left) == (spec.calls, {})


@every_network
def test_up_to_the_native_size_the_bits_are_the_same_and_the_model_stays_as_it_was(host: StandIn, name: str) -> None:
    spec = host.specimen(name)
    model = spec.model()
    options, wrappers = copy.deepcopy((model.model_options, model.wrappers))
    plain, native = run(model, spec), run(model, spec, WINDOW)
    windowed = patched(model, WINDOW)
    assert torch.equal(run(windowed, spec, WINDOW), native)
    assert torch.equal(run(windowed, spec, (4, 12)), run(model, spec, (4, 12)))
    assert not torch.equal(run(windowed, spec), plain)
    assert (model.model_options, model.wrappers) == (options, wrappers)
    assert torch.equal(run(model, spec), plain)
    assert torch.equal(run(unpatched(windowed), spec), plain)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy_nested], ids=["0.3.64", "later"])
def test_a_clone_keeps_the_windows(host: StandIn, copied: Any) -> None:
    spec = host.specimen("FLUX")
    model = spec.model()
    model.copy_options = copied  # a checkout copies in its own way, both times
    windowed = patched(model, WINDOW)
    clone = windowed.clone()
    assert attention_of(clone) is attention_of(windowed) is not None
    assert torch.equal(run(clone, spec), run(windowed, spec))
    again = patched(clone, (4, 4))  # a second node replaces the first
    assert attention_of(again) is not attention_of(clone)
    assert attention_of(again).chained is None
    assert torch.equal(run(again, spec), run(patched(model, (4, 4)), spec))


@every_network
def test_text_queries_are_averaged_over_windows_by_default(host: StandIn, name: str) -> None:
    spec = host.specimen(name)
    model = spec.model()
    outs = [run(patched(model, WINDOW, text_queries=rule, text_rope=False), spec) for rule in ("window", "global")]
    assert torch.equal(*outs) == (name == "SDXL")  # where text is in calls of its own


ROTARY = [name for name in SPECIMENS if name not in ("SDXL", "SD3")]


@pytest.mark.parametrize("grid", [(18, 11), (9, 16)])
@pytest.mark.parametrize("name", ROTARY)
def test_text_is_as_far_from_every_window_as_from_a_native_picture(host: StandIn, name: str, grid: tuple[int, int]) -> None:
    """By the network's own position ids: the angle is the window's distance to text less that of the native picture."""
    host.needs_stand_in("ComfyUI's networks make their position ids inside the forward pass and do not return them")
    net: Any = host.specimen(name).model().model.diffusion_model
    network = network_of(net)
    assert network is not None
    rotation = network.rotation(net)
    assert rotation is not None
    cos, sin = rotation.tables(grid, WINDOW, WINDOW, (4, 4), (0, 0))
    embedder = getattr(net, "pe_embedder", None) or net.rope_embedder
    text, native_text = (net.text_ids(size, 1)[0] for size in (grid, WINDOW))
    native = net.image_ids(WINDOW)[0] - native_text
    for y in range(cos.shape[0]):
        for x in range(cos.shape[1]):
            starts = [min(max(4 * i + 2 - 4, 0), n - 8) for i, n in zip((y, x), grid, strict=True)]
            token = net.image_ids(grid)[starts[0] * grid[1] + starts[1]]
            shift = token - text - native
            if len(shift) == 3:  # the first axis is not the picture's
                shift = shift * torch.tensor([0, 1, 1])
            angles = embedder.angles(shift[None])[0]
            assert (cos[y, x] - angles.cos()).abs().max() < 1e-12
            assert (sin[y, x] - angles.sin()).abs().max() < 1e-12


@pytest.mark.parametrize("name", ROTARY)
def test_text_is_rotated_by_default(host: StandIn, name: str) -> None:
    spec = host.specimen(name)
    model = spec.model()
    rotated, plain = (run(patched(model, WINDOW, text_rope=rope), spec) for rope in (True, False))
    assert (rotated - plain).abs().max() > 1e-6 * plain.abs().max()


def test_a_mask_of_padded_text_is_kept(host: StandIn) -> None:
    """ComfyUI makes a score bias of it, `[1, 1, S]`."""
    spec = host.specimen("HunyuanImage 2.1")
    model = spec.model()
    mask = torch.tensor([[1.0, 1, 1, 1, 0, 0, 0]], dtype=torch.float64)
    windowed = patched(model, WINDOW, text_queries="global", text_rope=False)
    out = forward(windowed, *spec.inputs(GRID), **spec.extra, attention_mask=mask)
    expected = by_hand(model, spec, GRID, attention_mask=mask)
    assert (out - expected).abs().max() < 1e-9 * expected.abs().max()
    assert (out - run(windowed, spec)).abs().max() > 1e-4 * expected.abs().max()


@every_network
def test_networks_are_recognised(host: StandIn, name: str) -> None:
    assert network_of(host.specimen(name).build()) is not None


def test_networks_are_recognised_by_name_and_module() -> None:
    assert {network.name for network in NETWORKS} == {network_of(spec.build()).name for spec in SPECIMENS.values()}  # type: ignore[union-attr]
    namesake = type("Flux", (torch.nn.Module,), {"__module__": "black_forest.model"})
    assert network_of(namesake()) is None


def test_a_compiled_network_is_recognised(host: StandIn) -> None:
    """An earlier compile node of ComfyUI puts the compiled network into the model."""
    model = host.specimen("FLUX").model()
    model.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    attention = attention_of(patched(model, WINDOW))
    assert attention is not None
    assert attention.name == "Flux"


@pytest.mark.parametrize(("name", "restart", "cutoff"), [("SDXL", 0.4, 0.125), ("FLUX", 0.6, 0.25), ("HunyuanImage 2.1", 0.6, 0.25)])
def test_presets_are_those_of_the_family(host: StandIn, name: str, restart: float, cutoff: float) -> None:
    net = host.specimen(name).build()
    preset = network_of(net).preset(net)  # type: ignore[union-attr]
    assert (preset.restart, preset.lfm_cutoff, preset.sg_cutoff) == (restart, cutoff, cutoff)


def test_jitter_depends_on_the_noise_level_alone(host: StandIn) -> None:
    spec = host.specimen("FLUX")
    model = spec.model()
    sigmas = torch.tensor([1.0, 0.6, 0.3, 0.0])

    def at(level: float, **options: Any) -> Tensor:
        given = {"sigmas": torch.tensor([level, level]), "sample_sigmas": sigmas}
        return forward(patched(model, WINDOW, **options), *spec.inputs(GRID), options=given, **spec.extra)

    still = at(1.0)
    assert torch.equal(at(1.0, jitter="alternate"), still)
    assert not torch.equal(at(0.6, jitter="alternate"), still)
    assert torch.equal(at(0.3, jitter="alternate"), still)
    moved = at(0.6, jitter="random", seed=3)
    assert torch.equal(at(0.6, jitter="random", seed=3), moved)
    assert not torch.equal(at(0.3, jitter="random", seed=3), moved)
    assert not torch.equal(at(0.6, jitter="random", seed=4), moved)
    message = "jitter='random' needs the noise levels that ComfyUI's samplers pass to the model: sigmas, sample_sigmas missing"
    with pytest.raises(ValueError, match=message):
        run(patched(model, WINDOW, jitter="random"), spec)
