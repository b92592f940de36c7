"""The autoencoder's part of a run: tiles, bands, windows, what is kept of it; and memory that runs out, told of and survived."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade import autoencoder_memory, borrowing, memory, streaming
from scalediff.cascade.latents import decode, to_pil_images
from scalediff.settings import Settings
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built, picture

diffusers = pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
RUN: dict[str, Any] = {"height": 128, "width": 128, "steps": 2}
FAST = Settings(steps=2, restart=0.5, lfm_cutoff=0.5, sg_cutoff=0.5, guidance_scale=1.0)
GIB = 2**30


class Stop(Exception):
    """An interruption."""


def drawn(pipe: Any, arguments: dict[str, Any], size: int = 32, **how: Any) -> scalediff.Result:
    """SD3 in small: its autoencoder has tiles of 16 x 16 pixels, which is the native size, and attention in its middle."""
    given = {"generator": seeded(), "preset": FAST, **how}
    return scalediff.generate(pipe, None, height=size, width=size, call=arguments, **given)


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """The widths of what a module is called with."""
    widths: list[int] = []
    hook = module.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    try:
        yield widths
    finally:
        hook.remove()


def same(one: scalediff.Result, other: scalediff.Result) -> bool:
    pairs = list(zip(one.stages, other.stages, strict=True))
    return all(torch.equal(a.latents, b.latents) and a.images[0].tobytes() == b.images[0].tobytes() for a, b in pairs)


# Tiles of autoencoders that cannot be streamed


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """No autoencoder can be streamed."""
    for module in (borrowing, autoencoder_memory):
        monkeypatch.setattr(module, "stream_obstacle", lambda vae: "it has other layers")


@pytest.fixture
def bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands of a few rows for small pictures too."""
    monkeypatch.setattr(streaming, "ELEMENTS", 2**10)


@pytest.mark.usefixtures("tiles")
@pytest.mark.composes("VAE tiling", "cascade")
def test_tiling_on_and_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is said, by what is free; the autoencoder's own switch is given back."""
    pipe, arguments = built("SD3")
    with counted(pipe.vae.decoder) as widths:
        whole = drawn(pipe, arguments, vae_tiling=False)
        assert widths == [8, 16]
        widths.clear()
        tiled = drawn(pipe, arguments, vae_tiling=True)
        assert widths[0] == 8
        assert len(widths) > 4
        assert max(widths[1:]) == 8
        assert not pipe.vae.use_tiling
        assert torch.equal(tiled.stages[0].latents, whole.stages[0].latents)
        assert (tiled.stages[1].latents - whole.stages[1].latents).abs().max() > 1e-5
        for free, expected in ((1, tiled), (2**50, whole), (None, whole)):
            monkeypatch.setattr(memory, "total_bytes", lambda device, free=free: free)
            assert same(drawn(pipe, arguments), expected)
            assert not pipe.vae.use_tiling
        monkeypatch.setattr(memory, "total_bytes", lambda device: 1)
        assert same(drawn(pipe, arguments, vae_tiling=False), whole)


@pytest.mark.usefixtures("tiles")
def test_an_autoencoder_that_tiles_already_goes_on_doing_so() -> None:
    pipe, arguments = built("SD3")
    tiled = drawn(pipe, arguments, vae_tiling=True)
    pipe.vae.enable_tiling()
    for tiling in (None, True, False):
        assert same(drawn(pipe, arguments, vae_tiling=tiling), tiled) == (tiling is not False)
        assert pipe.vae.use_tiling


@pytest.mark.usefixtures("tiles")
def test_tiling_is_switched_off_after_an_error() -> None:
    pipe, arguments = built("SD3")

    def stop(stage: Any) -> None:
        assert pipe.vae.use_tiling
        raise Stop

    with pytest.raises(Stop):
        drawn(pipe, arguments, vae_tiling=True, on_stage=stop)
    assert not pipe.vae.use_tiling


@pytest.mark.usefixtures("tiles")
def test_a_resumed_run_decodes_as_the_first_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles where the first had no room, although there is some now."""
    pipe, arguments = built("SD3")

    def stop(stage: Any) -> None:
        if stage.index == 2:
            raise Stop

    monkeypatch.setattr(memory, "total_bytes", lambda device: 1)
    whole = drawn(pipe, arguments, size=64)
    with pytest.raises(Stop):
        drawn(pipe, arguments, size=64, workdir=tmp_path, on_stage=stop)
    monkeypatch.setattr(memory, "total_bytes", lambda device: 2**50)
    with counted(pipe.vae.decoder) as widths:
        again = drawn(pipe, arguments, size=64, workdir=tmp_path)
    assert widths[-1] == 32  # the last stage has room
    assert max(widths[:-1]) == 8
    assert again.stages[1].images[0].tobytes() == whole.stages[1].images[0].tobytes()
    assert not pipe.vae.use_tiling


# Bands


@pytest.mark.usefixtures("bands")
def test_a_run_in_bands_is_that_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is little memory, or where the caller wants it; tiles are far from that. A resumed run goes on in bands."""
    pipe, arguments = built("SD3")
    before = state_of(pipe.vae)
    whole = drawn(pipe, arguments, vae_tiling=False)
    pipe.vae.enable_tiling()
    in_tiles = drawn(pipe, arguments)
    pipe.vae.disable_tiling()
    with counted(pipe.vae.decoder.up_blocks[0].resnets[0]) as calls:
        streamed = drawn(pipe, arguments, vae_tiling=True, workdir=tmp_path)
    assert len(calls) > 4
    assert state_of(pipe.vae) == before
    last = [result.stages[1].latents for result in (whole, streamed, in_tiles)]
    torch.testing.assert_close(last[1], last[0], rtol=1e-4, atol=1e-4)
    assert (last[2] - last[0]).abs().max() > 100 * (last[1] - last[0]).abs().max()
    with counted(pipe.vae.decoder.up_blocks[0].resnets[0]) as calls:
        assert same(drawn(pipe, arguments, vae_tiling=True, workdir=tmp_path), streamed)
    assert len(calls) > 4
    monkeypatch.setattr(memory, "total_bytes", lambda device: 1)
    with counted(pipe.vae.decoder.up_blocks[0].resnets[0]) as calls:
        least = drawn(pipe, arguments).stages[1].latents
    assert len(calls) > 4
    torch.testing.assert_close(least, last[0], rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("bands")
def test_windows_of_the_autoencoder_are_the_same_in_bands() -> None:
    pipe, arguments = built("SD3")
    plain, windows, both = (drawn(pipe, arguments, **how).stages[1].latents for how in (
        {}, {"vae_attention": "npa"}, {"vae_attention": "npa", "vae_tiling": True},
    ))  # fmt: skip
    torch.testing.assert_close(both, windows, rtol=1e-4, atol=1e-4)
    assert (plain - windows).abs().max() > 1e-3


# Windows in the autoencoder


@pytest.mark.parametrize("name", ["SD3", "FLUX"])
def test_windows_in_the_autoencoder_are_those_of_the_native_size(name: str) -> None:
    """Up to the native size the bits are the same; above, those of an autoencoder patched by hand."""
    pipe, arguments = built(name)
    before = state_of(pipe.vae)
    with scalediff.patch_model(pipe, window=WINDOW):
        full, windows = (drawn(pipe, arguments, vae_attention=attention) for attention in ("full", "npa"))
    assert state_of(pipe.vae) == before
    assert same(scalediff.Result([], full.stages[:1], FAST), scalediff.Result([], windows.stages[:1], FAST))
    assert (windows.stages[1].latents - full.stages[1].latents).abs().max() > 1e-5
    last = windows.stages[1]
    with torch.no_grad():
        assert to_pil_images(pipe, decode(pipe, last.latents))[0].tobytes() != last.images[0].tobytes()
        with scalediff.patch_model(pipe.vae.decoder, patch_size=1, window=(8, 8)):
            assert to_pil_images(pipe, decode(pipe, last.latents))[0].tobytes() == last.images[0].tobytes()


def test_windows_are_gone_after_an_error() -> None:
    pipe, arguments = built("SD3")
    before = state_of(pipe.vae), state_of(pipe.transformer)

    def stop(stage: Any) -> None:
        assert state_of(pipe.vae) != before[0]
        raise Stop

    with pytest.raises(Stop):
        drawn(pipe, arguments, vae_attention="npa", on_stage=stop)
    assert (state_of(pipe.vae), state_of(pipe.transformer)) == before


def test_an_autoencoder_without_attention_has_no_windows(demo: Any) -> None:
    before = state_of(demo.unet), demo.scheduler
    demo_run = {**RUN, "on_step": lambda _: pytest.fail("nothing may be drawn")}
    with pytest.raises(NotImplementedError, match="vae_attention='npa' needs an image autoencoder with attention"):
        scalediff.generate(demo, PROMPT, vae_attention="npa", **demo_run)
    assert (state_of(demo.unet), demo.scheduler) == before


def test_another_attention_of_the_autoencoder_is_refused(demo: Any) -> None:
    with pytest.raises(ValueError, match="vae_attention must be one of npa, full, got vae_attention='half'"):
        scalediff.generate(demo, PROMPT, height=64, width=64, steps=1, vae_attention="half")  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"vae_tiling": True}, {"vae_attention": "npa"}])
def test_a_folder_is_of_one_way_to_decode(tmp_path: Path, change: dict[str, Any]) -> None:
    pipe, arguments = built("SD3")
    drawn(pipe, arguments, workdir=tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another run \(vae: \[None, 'full', False\] there\)"):
        drawn(pipe, arguments, workdir=tmp_path, **change)


def test_nothing_of_a_forgotten_pipeline_is_alive() -> None:
    pipe, arguments = built("SD3")
    pipe.vae.register_to_config(scaling_factor=0.41)  # it is not one that was met before
    drawn(pipe, arguments)
    trace = weakref.ref(pipe.vae)
    del pipe
    gc.collect()
    assert trace() is None


# Memory that runs out


@contextmanager
def out_of(module: nn.Module, *, above: int) -> Iterator[None]:
    """No memory for inputs wider than this."""

    def fail(_: Any, args: Any) -> None:
        if args[0].shape[-1] > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    hook = module.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.usefixtures("bands")
@pytest.mark.parametrize(
    ("part", "above", "restart", "patched"),
    [
        ("unet", 16, 0.5, False),
        ("vae.decoder", 16, 0.5, True),
        ("vae.encoder", 64, 0.5, False),
        ("unet", 16, 1.0, True),
        ("vae.decoder", 16, 1.0, False),
    ],
)
def test_it_is_told_where_and_what_would_fit(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str, above: int, restart: float, patched: bool
) -> None:
    """Finished stages stay; with more memory the run goes on, to the same bits."""
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2 * GIB)
    run = {**RUN, "restart": restart}
    if patched:
        scalediff.patch_model(demo)
    before = state_of(demo.unet), state_of(demo.vae), sorted(demo.__dict__), demo.scheduler, dict(demo._progress_bar_config)
    message = r"stage 2/2, 128 x 128, ran out of memory on cpu, which has 2.0 GiB available; with .* split_guidance it needs about 1.\d GiB"
    module = {"unet": demo.unet.conv_in, "vae.encoder": demo.vae.encoder, "vae.decoder": demo.vae.decoder}[part]
    with out_of(module, above=above), pytest.raises(torch.OutOfMemoryError, match=message) as raised:
        scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, **run)
    assert "Tried to allocate 20.00 MiB" in str(raised.value.__cause__)
    assert (state_of(demo.unet), state_of(demo.vae), sorted(demo.__dict__), demo.scheduler, dict(demo._progress_bar_config)) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "stage1-64x64.png", "stage1.pt"]
    with counted(demo.unet) as widths:
        again = scalediff.generate(demo, PROMPT, generator=seeded(), workdir=tmp_path, **run)
    assert set(widths) == {32}
    assert same(again, scalediff.generate(demo, PROMPT, generator=seeded(), **run))


@pytest.mark.usefixtures("bands")
@pytest.mark.parametrize(
    ("available", "told"),
    [
        (
            None,
            r"ran out of memory on cpu; it needs about 1.\d GiB as configured, .* 1.\d GiB with both and .*; otherwise",
        ),
        (
            GIB // 2,
            r"which has 0.5 GiB available; it needs about 1.\d GiB as configured, .* 1.\d GiB with both and .*; "
            r"otherwise use a smaller size",
        ),
    ],
)
def test_advice_for_little_and_for_unknown_room(demo: Any, monkeypatch: pytest.MonkeyPatch, available: int | None, told: str) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: available)
    with out_of(demo.unet.conv_in, above=8), pytest.raises(torch.OutOfMemoryError, match=told):
        scalediff.generate(demo, PROMPT, **RUN)


def test_where_nothing_can_be_told_that_is_said(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def estimate(*_: object) -> None:
        raise NotImplementedError("the memory of Foreign cannot be estimated: no")

    monkeypatch.setattr(memory, "estimate", estimate)
    with (
        out_of(demo.unet.conv_in, above=8),
        pytest.raises(torch.OutOfMemoryError, match="; no estimate of its needs: the memory of Foreign cannot be estimated: no"),
    ):
        scalediff.generate(demo, PROMPT, **RUN)


def test_a_patched_call_and_an_enlargement_explain_it_too(demo: Any) -> None:
    how: dict[str, Any] = {"height": 128, "width": 128}
    image = picture(64, 64)
    with scalediff.patch_model(demo), out_of(demo.unet.conv_in, above=8):
        with pytest.raises(torch.OutOfMemoryError, match="stage 1/2, 64 x 64, ran out of memory on cpu"):
            demo(PROMPT, num_inference_steps=4, **how)
        with pytest.raises(torch.OutOfMemoryError, match="stage 1/1, 128 x 128, ran out of memory on cpu"):
            scalediff.upscale(demo, image, PROMPT, steps=4, restart=0.25, **how)
