"""What a stage changes in the pipeline's own calls: half a guided batch, the grid of the patches, the size that the model is told."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.borrowing import guidance_in_halves
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Settings
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

GUIDED = ["SDXL", "SD3", "Lumina-Next"]


class Stop(Exception):
    """An interruption."""


def settings(**changes: Any) -> Settings:
    """Four steps, then three: a cutoff that the smallest latents have a pixel for."""
    return Settings(**{"steps": 4, "restart": 0.75, "guidance_scale": 3.0, "lfm_cutoff": 0.5, "sg_cutoff": 0.5, **changes})


def two(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline with embeddings for two pictures."""
    pipe, arguments = built(name)
    both = {key: torch.cat([x, x.flip(-1)]) if isinstance(x, Tensor) else x for key, x in arguments.items()}
    return pipe, both


def latents(pipe: Any, arguments: dict[str, Any], chosen: Settings, factor: int = 2) -> Tensor:
    with scalediff.patch_model(pipe, window=WINDOW):
        height, width = (factor * side for side in scalediff.cascade.pipeline.native_size(pipe))
        result = scalediff.generate(pipe, None, height=height, width=width, call=arguments, generator=seeded(), preset=chosen)
    last: Tensor = result.stages[-1].latents
    return last


@functools.cache
def always_guided(name: str) -> Tensor:
    """What a pipeline of its own draws, once."""
    return latents(*two(name), settings())


def rows_with_the_prompt(kwargs: dict[str, Any], arguments: dict[str, Any]) -> list[int]:
    """Which rows of a call's batch have the embeddings of the prompt."""
    wanted = arguments["prompt_embeds"]
    return [i for i, row in enumerate(kwargs["encoder_hidden_states"]) if any(torch.equal(row, one) for one in wanted)]


def sample_of(args: Any, kwargs: dict[str, Any]) -> Tensor:
    sample: Tensor = args[0] if args else kwargs["hidden_states"]
    return sample


# Guidance until


@pytest.mark.draws("text-to-image", GUIDED, switch="guidance until")
@pytest.mark.parametrize("name", GUIDED)
@pytest.mark.parametrize(("until", "guided"), [(0.0, 0), (0.5, 2)])
def test_unguided_steps_are_those_of_the_prompt_alone(name: str, until: float, guided: int) -> None:
    """Against the whole batch, of whose output the half without the prompt is replaced by the other."""
    pipe, arguments = two(name)
    seen: list[list[int]] = []
    hook = denoiser_of(pipe).register_forward_pre_hook(
        lambda _, args, kwargs: seen.append([len(sample_of(args, kwargs)), *rows_with_the_prompt(kwargs, arguments)]), with_kwargs=True
    )
    halved = latents(pipe, arguments, settings(guidance_until=until))
    hook.remove()
    doubled = [4, 0, 1] if name == "Lumina-Next" else [4, 2, 3]
    assert seen[: 4 + guided] == [doubled] * (4 + guided)

    calls: list[int] = []

    def copied(module: Any, args: Any, kwargs: dict[str, Any], output: tuple[Tensor]) -> tuple[Tensor]:
        calls.append(1)
        if len(calls) <= 4 + guided:
            return output
        prompted = output[0][rows_with_the_prompt(kwargs, arguments)]
        return (torch.cat([prompted, prompted]),)

    hook = denoiser_of(pipe).register_forward_hook(copied, with_kwargs=True)
    expected = latents(pipe, arguments, settings())
    hook.remove()
    assert len(calls) == 7
    torch.testing.assert_close(halved, expected, rtol=1e-4, atol=1e-4)
    assert (halved - always_guided(name)).abs().max() > 0.01


@pytest.mark.parametrize("name", GUIDED)
def test_unguided_steps_see_half_the_batch(name: str) -> None:
    """Counted where the denoiser's first layer is, behind all hooks: 2 pictures, guided in 4."""
    pipe, arguments = two(name)
    denoiser: Any = denoiser_of(pipe)
    first = denoiser.conv_in if name == "SDXL" else denoiser.pos_embed if name == "SD3" else denoiser.patch_embedder
    sizes: list[int] = []
    first.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    latents(pipe, arguments, settings(guidance_until=0.5))
    assert sizes == [4] * 4 + [4, 4, 2]
    sizes.clear()
    latents(pipe, arguments, settings(guidance_until=(1.0, 0.0)), factor=4)
    assert sizes == [4] * 4 + [4] * 3 + [2] * 3


@pytest.mark.parametrize("name", GUIDED)
def test_without_guidance_there_is_no_half(name: str) -> None:
    pipe, arguments = two(name)
    how = {"guidance_scale": 1.0}
    assert torch.equal(latents(pipe, arguments, settings(guidance_until=0.0, **how)), latents(pipe, arguments, settings(**how)))


@pytest.mark.parametrize("name", ["FLUX", "Qwen-Image", "Lumina 2", "Z-Image"])
def test_models_that_are_guided_in_another_way_are_refused(name: str) -> None:
    pipe, arguments = built(name)
    denoiser, calls = denoiser_of(pipe), []
    denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    message = f"guidance_until below 1 needs classifier-free guidance in one doubled batch, got {type(denoiser).__name__}"
    for until in (0.5, (0.0,)):
        with pytest.raises(NotImplementedError, match=message):
            latents(pipe, arguments, settings(guidance_until=until))
    assert not calls
    latents(pipe, arguments, settings(guidance_until=(1.0,)))


@pytest.mark.parametrize("name", GUIDED)
def test_no_hook_is_left_after_a_run_or_an_error(name: str) -> None:
    pipe, arguments = two(name)
    denoiser = denoiser_of(pipe)
    before, scheduler = state_of(denoiser), pipe.scheduler
    latents(pipe, arguments, settings(guidance_until=0.0))
    assert state_of(denoiser) == before

    def stop(pipe: Any, step: int, t: Any, values: dict[str, Any]) -> dict[str, Any]:
        if len(values["latents"]) == 2 and values["latents"].shape[-1] == 2 * (4 if name == "SDXL" else 8):
            raise Stop
        return values

    with pytest.raises(Stop):
        latents(pipe, arguments | {"callback_on_step_end": stop}, settings(guidance_until=0.0))
    assert state_of(denoiser) == before
    assert pipe.scheduler is scheduler


def test_half_a_batch_of_whatever_is_handed_over() -> None:
    """Lists and mappings of tensors, an output class, and tensors of another length, which stay as they are."""
    unet = ZOO["SD1.5"].build()
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(calls_done=3), do_classifier_free_guidance=True)
    seen: list[dict[str, Any]] = []
    own = type(unet).forward
    x, text, residual = Draw(1)(6, 4, 8, 8), Draw(2)(6, 5, 32), Draw(3)(6, 64, 4, 4)
    more = {"encoder_hidden_states": text, "mid_block_additional_residual": residual, "cross_attention_kwargs": {}}

    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({"sample": args[0], **kwargs})
        return own(self, *args, **kwargs)

    unet.forward = spy.__get__(unet)
    with torch.no_grad():
        whole = unet(x, 500, **more).sample
        with guidance_in_halves(pipe, unguided_from=4, split=False):
            assert torch.equal(unet(x, 500, **more).sample, whole)
        with guidance_in_halves(pipe, unguided_from=3, split=False):
            halved = unet(x, torch.tensor([500] * 6), **more)
            other = unet(x[:3], 500, encoder_hidden_states=text[:3]).sample
    torch.testing.assert_close(halved.sample[:3], whole[3:], rtol=1e-4, atol=1e-4)
    assert torch.equal(halved.sample[:3], halved.sample[3:])
    assert type(halved).__name__ == "UNet2DConditionOutput"
    assert [len(seen[2][name]) for name in ("sample", "encoder_hidden_states", "mid_block_additional_residual")] == [3, 3, 3]
    assert torch.equal(seen[2]["sample"], x[3:])
    assert len(other) == 3, "a batch that cannot be halved is no guided one"


# Jitter


@pytest.mark.parametrize("jitter", ["alternate", "random"])
def test_jitter_of_the_settings_is_that_of_the_patch(jitter: Any) -> None:
    """On a pipeline that is patched and on one that is not; a patched one has its own back, also after an error."""
    pipe, arguments = built("SD3")
    how: dict[str, Any] = {"height": 32, "width": 32, "call": arguments}

    def drawn(chosen: Settings) -> Tensor:
        last: Tensor = scalediff.generate(pipe, None, generator=seeded(), preset=chosen, **how).stages[-1].latents
        return last

    still, moved = drawn(settings()), drawn(settings(jitter=jitter))
    assert (moved - still).abs().max() > 1e-4
    assert type(pipe.transformer).__name__ == "SD3Transformer2DModel"
    with scalediff.patch_model(pipe, jitter=jitter) as handle:
        assert torch.equal(drawn(settings()), moved)
        assert torch.equal(drawn(settings(jitter="none")), still)
        assert handle.jitter == jitter
    with scalediff.patch_model(pipe) as handle:
        assert torch.equal(drawn(settings(jitter=jitter)), moved)
        assert handle.jitter == "none"
        with pytest.raises(Stop):
            scalediff.generate(pipe, None, preset=settings(jitter=jitter), on_stage=stop_at_once, **how)
        assert handle.jitter == "none"
        assert torch.equal(drawn(settings()), still)
        handle.jitter = jitter
        assert torch.equal(drawn(settings()), moved)
        with pytest.raises(ValueError, match=r"jitter must be one of none, alternate, random, got jitter='wild'"):
            handle.jitter = "wild"  # type: ignore[assignment]
        assert handle.jitter == jitter


def stop_at_once(stage: Any) -> None:
    raise Stop


# The size that Stable Diffusion XL is told


def told(**how: Any) -> list[list[float]]:
    """`time_ids` of every model call of a run from 8 x 8 to 16 x 16 pixels, without its repetitions."""
    pipe, arguments = built("SDXL")
    seen: list[list[float]] = []

    def spy(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["added_cond_kwargs"]["time_ids"]
        assert all(torch.equal(row, ids[0]) for row in ids)
        if not seen or seen[-1] != ids[0].tolist():
            seen.append(ids[0].tolist())

    pipe.unet.register_forward_pre_hook(spy, with_kwargs=True)
    chosen = settings(size_conditioning=how.pop("size_conditioning"))
    scalediff.generate(pipe, None, height=16, width=16, call=arguments | how, preset=chosen)
    return seen


def test_the_size_that_the_model_is_told() -> None:
    assert told(size_conditioning="target") == [[8, 8, 0, 0, 8, 8], [16, 16, 0, 0, 16, 16]]
    assert told(size_conditioning="native") == [[8, 8, 0, 0, 8, 8]]
    given = told(size_conditioning="native", original_size=(5, 7))
    assert given == [[5, 7, 0, 0, 8, 8]], "what the caller says counts"


@pytest.mark.parametrize("name", ["SD3", "FLUX"])
def test_a_size_that_nobody_is_told_is_refused(name: str) -> None:
    pipe, arguments = built(name)
    with pytest.raises(
        ValueError, match=f"size_conditioning needs a pipeline with the arguments original_size and target_size, got {type(pipe).__name__}"
    ):
        latents(pipe, arguments, settings(size_conditioning="native"))


# Halves


@pytest.mark.composes("doubled batch of guidance", "cascade")
@pytest.mark.draws("text-to-image", GUIDED, switch="split guidance")
@pytest.mark.parametrize("name", GUIDED)
def test_split_guidance_is_guidance(name: str) -> None:
    pipe, arguments = two(name)
    denoiser = denoiser_of(pipe)
    before = state_of(denoiser)
    sizes: list[int] = []
    module = next(part for part in denoiser.modules() if isinstance(part, torch.nn.Conv2d | torch.nn.Linear))
    hook = module.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    how: dict[str, Any] = {"height": 32, "width": 32, "call": arguments, "preset": settings()}
    whole = scalediff.generate(pipe, None, generator=seeded(), **how).stages[-1].latents
    together = len(sizes)
    split = scalediff.generate(pipe, None, generator=seeded(), split_guidance=True, **how).stages[-1].latents
    hook.remove()
    torch.testing.assert_close(split, whole, rtol=1e-3, atol=1e-3)
    assert len(sizes) == 3 * together, "two calls for one"
    assert max(sizes[together:]) <= max(sizes[:together]) // 2
    assert state_of(denoiser) == before


@pytest.mark.composes("torch.compile", "cascade")
@pytest.mark.slow
def test_a_compiled_model_is_compiled_once(demo: Any) -> None:
    """Which half is run is decided outside the graph: another picture takes no other graphs."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    demo.unet.compile(backend=counter, fullgraph=True)
    try:
        with scalediff.patch_model(demo):
            seen = []
            for seed in range(3):
                chosen = Settings(steps=4, restart=0.5, guidance_scale=3.0, guidance_until=0.5)
                scalediff.generate(demo, "a moon", height=96, width=96, generator=seeded(seed), preset=chosen)
                seen.append(counter.frame_count)
    finally:
        demo.unet._compiled_call_impl = None
        torch.compiler.reset()
    assert seen[0] == seen[1] == seen[2] > 0
