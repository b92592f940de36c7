"""Memory told in advance: estimates against the same tally of real tensors, and what follows from them."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade import autoencoder_memory, memory
from scalediff.cascade.memory import Estimate, estimate, needs_tiling, vae_bytes
from scalediff.cascade.pipeline import native_size
from scalediff.patching.networks import denoiser_of
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import PIPELINES, autoencoder, built
from tests.scalediff.cost.real_peaks import real_peak_of

diffusers = pytest.importorskip("diffusers")

GIB = 2**30


# Networks


@pytest.mark.parametrize("size", [16, 24])
def test_the_embedded_models_denoiser(demo: Any, size: int) -> None:
    told = estimate(demo, {"prompt": "a moon"}, (4 * size, 4 * size))
    x, text = torch.randn(2, 4, size, size, generator=seeded()), torch.randn(2, 24, 64, generator=seeded())
    real = real_peak_of(functools.partial(demo.unet, x, torch.tensor(500), text))
    assert told.denoiser == pytest.approx(real, rel=0.02)
    parameters = [x for name in ("unet", "vae", "text_encoder") for x in getattr(demo, name).parameters()]
    assert sum(told.weights.values()) == pytest.approx(4 * sum(x.numel() for x in parameters), rel=0.001)  # and positions of text


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 96)])
def test_the_embedded_models_autoencoder(demo: Any, height: int, width: int) -> None:
    picture, latents = torch.zeros(2, 3, height, width), torch.zeros(2, 4, height // 4, width // 4)
    real = max(
        real_peak_of(lambda: demo.vae.encode(picture).latent_dist.mode()),
        real_peak_of(lambda: demo.vae.decode(latents).sample),
    )
    assert vae_bytes(demo.vae, (height, width), 2, tiled=False) == pytest.approx(real, rel=0.02)


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No autoencoder can be streamed."""
    monkeypatch.setattr(autoencoder_memory, "stream_obstacle", lambda vae: "it has other layers")


def real_peak_in_tiles(vae: Any, height: int, width: int) -> int:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    picture, latents = torch.zeros(1, 3, height, width), torch.zeros(1, 4, height // factor, width // factor)
    vae.enable_tiling()
    try:
        return max(real_peak_of(lambda: vae.encode(picture).latent_dist.mode()), real_peak_of(lambda: vae.decode(latents).sample))
    finally:
        vae.disable_tiling()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 128), (192, 128)])
def test_the_embedded_models_autoencoder_in_tiles(demo: Any, height: int, width: int) -> None:
    """A tile's activations are most of it."""
    assert vae_bytes(demo.vae, (height, width), 1, tiled=True) == pytest.approx(real_peak_in_tiles(demo.vae, height, width), rel=0.25)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(("height", "width"), [(64, 64), (96, 160)])
def test_an_autoencoder_in_many_tiles(height: int, width: int) -> None:
    """Pictures are most of it, for a tile is 16 x 16."""
    vae = autoencoder()
    assert vae_bytes(vae, (height, width), 1, tiled=True) == pytest.approx(real_peak_in_tiles(vae, height, width), rel=0.25)


def test_an_autoencoder_that_runs_in_fp32_is_counted_in_fp32(demo: Any) -> None:
    whole = vae_bytes(demo.vae, (64, 64), 1, tiled=False)
    half = autoencoder(force_upcast=False)
    single = vae_bytes(half, (32, 32), 1, tiled=False)
    assert vae_bytes(half.half(), (32, 32), 1, tiled=False) == single // 2
    assert demo.vae.config.force_upcast
    demo.vae.half()
    try:
        assert vae_bytes(demo.vae, (64, 64), 1, tiled=False) == whole
    finally:
        demo.vae.float()


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_can_be_told_of(name: str) -> None:
    """Against the real pass; nothing is drawn, and the pipeline and the global randomness stay as they were."""
    pipe, arguments = built(name)
    denoiser = denoiser_of(pipe)
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = native_size(pipe)
    seen: list[tuple[Any, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    hook = denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**arguments, height=2 * height, width=2 * width, num_inference_steps=1, output_type="latent", generator=seeded())
    hook.remove()
    before, attributes, randomness = state_of(denoiser), sorted(pipe.__dict__), torch.get_rng_state()
    small, middle, large = (estimate(pipe, arguments, (factor * height, factor * width)) for factor in (1, 2, 4))
    args, kwargs = seen[0]
    real = real_peak_of(lambda: denoiser(*args, **kwargs))
    assert middle.denoiser == pytest.approx(real, rel=0.05)  # tables of positions weigh much here
    for less, more in ((small, middle), (middle, large)):
        assert less.denoiser < more.denoiser <= 4.5 * less.denoiser
        assert less.vae < more.vae <= 4.5 * less.vae
        assert less.vae_tiled <= more.vae_tiled
        assert less.weights == more.weights
    for told in (small, middle, large):
        ways = (False, False, False), (True, False, False), (True, True, False), (True, True, True)
        assert list(told.peaks().values()) == [told.peak(tiled=tiled, split=split, offloaded=offloaded) for tiled, split, offloaded in ways]
        assert told.halves == (2 if name in ("SD3", "SDXL", "Lumina-Next") else 1)
    assert (state_of(denoiser), sorted(pipe.__dict__)) == (before, attributes)
    assert torch.equal(torch.get_rng_state(), randomness)


def test_a_batch_needs_more(demo: Any) -> None:
    one, two, twice = (
        estimate(demo, arguments, (128, 128))
        for arguments in (
            {"prompt": "a moon"},
            {"prompt": ["a moon", "a sun"], "generator": [seeded(), seeded()]},
            {"prompt": "a moon", "num_images_per_prompt": 2, "callback_on_step_end": lambda *_: pytest.fail("nothing is drawn")},
        )
    )
    assert two == twice
    assert two.vae == 2 * one.vae
    assert two.denoiser > 1.9 * one.denoiser
    del demo._progress_bar_config
    estimate(demo, {"prompt": "a moon"}, (64, 64))
    assert "_progress_bar_config" not in demo.__dict__
    demo.set_progress_bar_config(disable=True)


def test_embeddings_for_two_are_two_pictures() -> None:
    pipe, arguments = built("SD3")
    one, two = (estimate(pipe, {name: torch.cat([x] * count) for name, x in arguments.items()}, (32, 32)) for count in (1, 2))
    assert two.vae == 2 * one.vae


# What follows


def test_peaks_and_advice() -> None:
    """Weights of 15, a tenth of the activations in between, and the margin of 1, in GiB."""
    weights = {"text_encoder": 4 * GIB, "denoiser": 10 * GIB, "vae": GIB}
    told = Estimate(weights, denoiser=4 * GIB, halves=2, vae=20 * GIB, vae_tiled=GIB)
    assert told.peak() / GIB == pytest.approx(15 + 1.1 * 20 + 1)
    assert told.peak(tiled=True) / GIB == pytest.approx(15 + 1.1 * 4 + 1)
    assert told.peak(tiled=True, split=True) / GIB == pytest.approx(15 + 1.1 * 2 + 1)
    assert told.peak(offloaded=True) / GIB == pytest.approx(1 + 1.1 * 20 + 1)
    assert told.peak(tiled=True, split=True, offloaded=True) / GIB == pytest.approx(10 + 1.1 * 2 + 1)
    for available in (38.1, 20.5):
        assert told.advice(int(available * GIB)) == "with vae_tiling it needs about 20.4 GiB", "what is done already is no advice"
    assert told.advice(int(20.3 * GIB)) == "with vae_tiling and split_guidance it needs about 18.2 GiB"
    assert told.advice(14 * GIB) == "with both and enable_model_cpu_offload (--low-memory) it needs about 13.2 GiB"
    for little in (13 * GIB, None):
        assert told.advice(little) == (
            "it needs about 38.0 GiB as configured, 20.4 GiB with vae_tiling, 18.2 GiB with vae_tiling and split_guidance, "
            "13.2 GiB with both and enable_model_cpu_offload (--low-memory); "
            "otherwise use a smaller size, a smaller dtype, or pipe.enable_group_offload"
        )
    alone = replace(told, halves=1, vae=0)
    assert alone.advice(18 * GIB) == "with both and enable_model_cpu_offload (--low-memory) it needs about 15.4 GiB", "nothing to split"


def test_tiling_is_wanted_where_a_picture_does_not_fit(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside all weights; where components are offloaded, beside its own. What is free at the moment has no say."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 0)
    held = 1.1 * vae_bytes(demo.vae, (128, 128), 1, tiled=False)
    every = sum(x.numel() * 4 for part in (demo.unet, demo.vae, demo.text_encoder) for x in part.state_dict().values())
    needed = int(held + every + memory.MARGIN)
    for there, wanted in ((needed + 2**16, False), (needed - 2**16, True), (0, True), (None, False)):
        monkeypatch.setattr(memory, "total_bytes", lambda device, there=there: there)
        assert needs_tiling(demo, (128, 128), 1) == wanted
    monkeypatch.setattr(memory, "total_bytes", lambda device: needed + 2**16)
    assert needs_tiling(demo, (128, 128), 2)
    demo.enable_model_cpu_offload(device="cpu")
    try:
        monkeypatch.setattr(memory, "total_bytes", lambda device: needed - 2**20)
        assert not needs_tiling(demo, (128, 128), 1)
    finally:
        demo.remove_all_hooks()


def test_what_a_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process has there already is part of what is available to a run."""
    cpu = torch.device("cpu")
    now, whole = memory.available_bytes(cpu), memory.total_bytes(cpu)
    assert (now is None and whole is None) or (now is not None and whole is not None and 2**20 < now <= whole)
    assert memory.available_bytes(torch.device("meta")) is None
    assert memory.total_bytes(torch.device("meta")) is None
    for name, value in (("mem_get_info", (5 * GIB, 24 * GIB)), ("memory_reserved", 7 * GIB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert memory.available_bytes(torch.device("cuda")) == (5 + 7) * GIB
    assert memory.total_bytes(torch.device("cuda")) == 24 * GIB
    fields = {"MemAvailable": 5 * GIB, "RssAnon": 7 * GIB}
    monkeypatch.setattr(memory, "_read_kilobytes", lambda file, field: fields.get(field))
    assert memory.available_bytes(cpu) == (5 + 7) * GIB, "weights that are there already are not needed again"


# What cannot be told


def looking(network: Any) -> None:
    """Make it look at the values that it computes."""
    own = type(network)
    name = "decode" if hasattr(own, "decode") else "forward"

    def looks(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = getattr(own, name)(self, *args, **kwargs)
        assert out[0].sum().item() is not None
        return out

    network.__class__ = type(own.__name__, (own,), {name: looks})


def test_a_denoiser_that_looks_at_values_cannot_be_told_of() -> None:
    pipe, arguments = built("SDXL")
    looking(pipe.unet)
    with pytest.raises(NotImplementedError, match=r"the memory of UNet2DConditionModel cannot be estimated: .*meta"):
        estimate(pipe, arguments, (16, 16))


def test_an_autoencoder_that_looks_at_values_cannot_be_told_of() -> None:
    vae = autoencoder()
    looking(vae)
    with pytest.raises(NotImplementedError, match=r"the memory of AutoencoderKL cannot be estimated: .*meta"):
        vae_bytes(vae, (16, 16), 1, tiled=False)


def test_a_run_does_not_depend_on_what_can_be_told() -> None:
    pipe, arguments = built("SDXL")
    looking(pipe.vae)
    how: dict[str, Any] = {"height": 16, "width": 16, "call": arguments, "steps": 2, "lfm_cutoff": 0.5, "sg_cutoff": 0.5}
    assert scalediff.generate(pipe, None, generator=seeded(), vae_tiling=False, **how).images
    assert scalediff.generate(pipe, None, generator=seeded(), **how).images


def test_a_pipeline_that_does_not_call_its_denoiser() -> None:
    pipe, arguments = built("SDXL")
    own = type(pipe)
    pipe.__class__ = type("Silent", (own,), {"__call__": lambda self, **_: None})
    with pytest.raises(NotImplementedError, match="Silent does not call its denoiser"):
        estimate(pipe, arguments, (16, 16))
    assert not pipe.unet._forward_pre_hooks
