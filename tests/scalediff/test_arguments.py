"""Every public argument is checked before anything is computed: the error names the argument, what it must be, and the value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import scalediff
from scalediff.methods import AccDiffusion, DemoFusion, DiffuseHigh, HiFlow, MultiDiffusion, ScaleCrafter, SuperResolution, method_names
from scalediff.settings import Preset, Settings
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import picture

# Argument, wrong value, error, and how the message begins.
DRAWING: list[tuple[str, Any, type[Exception], str]] = [
    ("prompt", [], ValueError, "prompt must be a string or a list of at least one, got prompt=[]"),
    ("prompt", 3, TypeError, "prompt must be a string or a list of strings, got prompt=3"),
    ("prompt", ["a", 3], TypeError, "prompt must be a string or a list of strings, got prompt=['a', 3]"),
    ("prompt", None, ValueError, "prompt must be given, or its embeddings in call, got prompt=None"),
    ("negative_prompt", 3, TypeError, "negative_prompt must be a string or a list of strings, got negative_prompt=3"),
    ("negative_prompt", [], ValueError, "negative_prompt must be a string or a list of at least one, got negative_prompt=[]"),
    ("height", 128.0, TypeError, "height must be an integer, got height=128.0"),
    ("height", True, TypeError, "height must be an integer, got height=True"),
    ("height", -64, ValueError, "height must be at least 1, got height=-64"),
    ("width", "128", TypeError, "width must be an integer, got width='128'"),
    ("width", None, TypeError, "width must be an integer, got width=None"),
    ("call", [1], TypeError, "call must be a mapping from names to values, got call=[1]"),
    ("call", {3: 1}, TypeError, "call must be a mapping from names to values, got call={3: 1}"),
    ("call", {"colour": 1}, ValueError, "call must hold arguments of the call of StableDiffusionPipeline, got colour=1"),
    ("call", {"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be at least 1, got num_images_per_prompt=0"),
    ("call", {"height": 1}, ValueError, "call must not hold arguments of generate or upscale, or those that each stage sets, got height"),
    ("call", {"negative_prompt": None}, ValueError, "call must not hold arguments of generate or upscale"),
    ("generator", 3, TypeError, "generator must be a torch.Generator or a list of them, got generator=3"),
    ("generator", [], ValueError, "generator must be one generator, or one for each of the 1 pictures, got a list of 0"),
    ("generator", [seeded()] * 2, ValueError, "generator must be one generator, or one for each of the 1 pictures, got a list of 2"),
    ("preset", 3, TypeError, "preset must be the name of a preset, a Preset or a Settings, got preset=3"),
    ("preset", "fast", ValueError, "preset must be one of default"),
    ("steps", 2.5, TypeError, "steps must be an integer, got steps=2.5"),
    ("restart", "0.5", TypeError, "restart must be a number, or one number for each stage, got restart='0.5'"),
    ("guidance_scale", "7", TypeError, "guidance_scale must be a number, got guidance_scale='7'"),
    ("attention", 3, ValueError, "attention must be one of npa, full, got attention=3"),
    ("lfm", "yes", TypeError, "lfm must be True or False, got lfm='yes'"),
    ("sg", 0, TypeError, "sg must be True or False, got sg=0"),
    ("lfm_cutoff", ("a",), TypeError, "lfm_cutoff must be a number, or one number for each stage, got lfm_cutoff=('a',)"),
    ("sg_cutoff", 2, ValueError, "sg_cutoff must lie in (0, 1], got sg_cutoff=2"),
    ("sizes", 128, TypeError, "sizes must be a list of (height, width) in pixels, got sizes=128"),
    ("sizes", [128], TypeError, "sizes must be a list of (height, width) in pixels, got sizes=[128]"),
    ("sizes", [(64.0, 64)], TypeError, "every side in sizes must be an integer, got every side in sizes=64.0"),
    ("sizes", [], ValueError, "the last stage in sizes must be the target"),
    ("vae_tiling", "yes", TypeError, "vae_tiling must be True or False, got vae_tiling='yes'"),
    ("vae_attention", "half", ValueError, "vae_attention must be one of npa, full, got vae_attention='half'"),
    ("upsampler", 3, TypeError, "upsampler must be the path of a network's weights, or a function from pictures to larger ones, got"),
    ("upsampler", "none.pth", ValueError, "upsampler must be an existing file, got none.pth"),
    ("split_guidance", None, TypeError, "split_guidance must be True or False, got split_guidance=None"),
    ("workdir", 3, TypeError, "workdir must be a path, got workdir=3"),
    ("on_stage", 3, TypeError, "on_stage must be a function, got on_stage=3"),
    ("on_step", [], TypeError, "on_step must be a function, got on_step=[]"),
    ("progress", "yes", TypeError, "progress must be True or False, got progress='yes'"),
]
GENERATE: list[tuple[str, Any, type[Exception], str]] = [
    *DRAWING,
    ("pipe", 3, TypeError, "expected an nn.Module or a diffusers pipeline with a unet or transformer, got int"),
    ("pipe", nn.Linear(2, 2), TypeError, "the cascade needs a text-to-image pipeline, got Linear"),
    ("method", "slow", ValueError, f"method must be one of {', '.join(method_names())}, or an options object of one, got 'slow'"),
    ("method", 3, ValueError, "method must be one of scalediff"),
]
UPSCALE: list[tuple[str, Any, type[Exception], str]] = [
    *DRAWING,
    ("image", 3, TypeError, "image must be a PIL picture or a list of them, got int"),
    ("image", [], ValueError, "image must be a PIL picture or a list of at least one, got image=[]"),
    ("image", [picture(64, 64)] * 2, ValueError, "image must hold one picture per prompt, 1 in all, got 2"),
]
PATCHING: list[tuple[str, Any, type[Exception], str]] = [
    ("model", 3, TypeError, "expected an nn.Module or a diffusers pipeline with a unet or transformer, got int"),
    ("grid", 8, TypeError, "grid must be two positive integers (Y, X) in tokens, got grid=8"),
    ("grid", (8.0, 8), TypeError, "grid must be two positive integers (Y, X) in tokens, got grid=(8.0, 8)"),
    ("patch_size", 2.0, TypeError, "patch_size must be an integer, got patch_size=2.0"),
    ("patch_size", 0, ValueError, "patch_size must be at least 1, got patch_size=0"),
    ("text", 5, TypeError, 'text must be ("prefix" or "suffix", a number of tokens or the name of an argument), got text=5'),
    ("window", 8, TypeError, "window must be two positive integers (Y, X) in tokens, got window=8"),
    ("window", (8, 8, 8), ValueError, "window must be two positive integers (Y, X) in tokens, got window=(8, 8, 8)"),
    ("text_queries", "all", ValueError, "text_queries must be one of window, global, got text_queries='all'"),
    ("text_rope", "yes", TypeError, "text_rope must be True, False or a TextRotation, got text_rope='yes'"),
    ("jitter", 1, ValueError, "jitter must be one of none, alternate, random, got jitter=1"),
    ("seed", 0.5, TypeError, "seed must be an integer, got seed=0.5"),
    ("strict", "no", TypeError, "strict must be True or False, got strict='no'"),
    ("impl", None, ValueError, "impl must be one of auto, reference, sdpa, triton, got impl=None"),
]
CALL = [row for row in DRAWING if row[0] in ("prompt", "negative_prompt", "height", "width", "generator") and row[1] is not None]
OBJECTS: list[tuple[Any, str, Any, type[Exception], str]] = [
    (Settings, "steps", True, TypeError, "steps must be an integer, got steps=True"),
    (Settings, "restart", None, TypeError, "restart must be a number, or one number for each stage, got restart=None"),
    (Settings, "guidance_until", True, TypeError, "guidance_until must be a number, or one number for each stage"),
    (Settings, "sg_cutoff_start", "0.5", TypeError, "sg_cutoff_start must be a number, or one number for each stage"),
    (Settings, "filter", [], ValueError, "filter must be one of resize, gaussian, butterworth, got filter=[]"),
    (Preset, "settings", 3, TypeError, "settings must be a Settings object, got settings=3"),
    (Preset, "suffix", None, TypeError, "suffix must be a string, got suffix=None"),
    (Preset, "call", [], TypeError, "call must be a mapping from names to values, got call=[]"),
    (MultiDiffusion, "stride", 2.0, TypeError, "stride must be an integer, got stride=2.0"),
    (MultiDiffusion, "view_batch", 0, ValueError, "view_batch must be at least 1, got view_batch=0"),
    (SuperResolution, "upsampler", 3, TypeError, "upsampler must be a function, got upsampler=3"),
    (DiffuseHigh, "restart", "0.3", TypeError, "restart must be a number, got restart='0.3'"),
    (DiffuseHigh, "guided", None, TypeError, "guided must be a number, got guided=None"),
    (DiffuseHigh, "guidance_scale", "10", TypeError, "guidance_scale must be a number, got guidance_scale='10'"),
    (DiffuseHigh, "guidance_scale", math.inf, ValueError, "guidance_scale must be finite, got guidance_scale=inf"),
    (DiffuseHigh, "sharpness", 10**400, ValueError, "sharpness must be finite, got sharpness=1000"),
    (DiffuseHigh, "sharpness", math.nan, ValueError, "sharpness must be finite, got sharpness=nan"),
    (DiffuseHigh, "upsampler", 3, TypeError, "upsampler must be a function, got upsampler=3"),
    (HiFlow, "alpha", ("1",), TypeError, "alpha must be a number, got alpha='1'"),
    (HiFlow, "proportional", 1, TypeError, "proportional must be True or False, got proportional=1"),
    (HiFlow, "dynamic_shifting", None, TypeError, "dynamic_shifting must be True or False, got dynamic_shifting=None"),
    (HiFlow, "rope_scale", "10", TypeError, "rope_scale must be a number, got rope_scale='10'"),
    (ScaleCrafter, "dilation", math.inf, ValueError, "dilation must be finite, got dilation=inf"),
    (ScaleCrafter, "dilated", "0.6", TypeError, "dilated must be a number, got dilated='0.6'"),
    (ScaleCrafter, "progressive", 1, TypeError, "progressive must be True or False, got progressive=1"),
    (AccDiffusion, "threshold", "0.3", TypeError, "threshold must be a number, got threshold='0.3'"),
    (AccDiffusion, "local_guidance_scale", "7", TypeError, "local_guidance_scale must be a number, got local_guidance_scale='7'"),
    (DemoFusion, "view_batch", "4", TypeError, "view_batch must be an integer, got view_batch='4'"),
    (DemoFusion, "cosine_scale", 3, TypeError, "cosine_scale must be three non-negative exponents, got cosine_scale=3"),
    (DemoFusion, "cosine_scale", (math.nan, 1, 1), ValueError, "cosine_scale must be three non-negative exponents, got cosine_scale=(nan,"),
    (DemoFusion, "blur_std", "1", TypeError, "blur_std must be a number, got blur_std='1'"),
    (DemoFusion, "jitter", None, TypeError, "jitter must be True or False, got jitter=None"),
]


def cases(table: list[tuple[Any, ...]]) -> Any:
    names = ("argument", "value", "error", "message")
    return pytest.mark.parametrize(names, table, ids=[f"{i}-{row[0]}" for i, row in enumerate(table)])


def refused(function: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        function(**arguments)
    assert type(raised.value) is error
    assert str(raised.value).startswith(message)


@cases(GENERATE)
def test_generate(demo: Any, argument: str, value: Any, error: type[Exception], message: str) -> None:
    before = state_of(demo.unet), demo.scheduler
    right = {"pipe": demo, "prompt": "a moon", "height": 128, "width": 128, "generator": seeded(), "steps": 1}
    refused(scalediff.generate, right | {argument: value}, error, message)
    assert (state_of(demo.unet), demo.scheduler) == before


@cases(UPSCALE)
def test_upscale(demo: Any, argument: str, value: Any, error: type[Exception], message: str) -> None:
    right = {"pipe": demo, "image": picture(64, 64), "prompt": "a moon", "height": 128, "width": 128, "generator": seeded(), "steps": 1}
    refused(scalediff.upscale, right | {argument: value}, error, message)


@cases(PATCHING)
def test_patch_model(demo: Any, argument: str, value: Any, error: type[Exception], message: str) -> None:
    refused(scalediff.patch_model, {"model": demo} | {argument: value}, error, message)
    assert type(demo).__module__.startswith("diffusers")


@cases(CALL)
def test_a_patched_pipelines_own_call(demo: Any, argument: str, value: Any, error: type[Exception], message: str) -> None:
    with scalediff.patch_model(demo):
        refused(demo, {"prompt": "a moon", "height": 128, "width": 128, "num_inference_steps": 1} | {argument: value}, error, message)


@pytest.mark.parametrize(("kind", "argument", "value", "error", "message"), OBJECTS)
def test_objects(kind: Any, argument: str, value: Any, error: type[Exception], message: str) -> None:
    right: dict[str, Any] = {"settings": Settings(), "source": "the test"} if kind is Preset else {}
    refused(kind, right | {argument: value}, error, message)


def test_unpatch_model() -> None:
    refused(scalediff.unpatch_model, {"model": 3}, TypeError, "expected an nn.Module or a diffusers pipeline")


def test_lists_of_different_lengths(demo: Any) -> None:
    lists = {"pipe": demo, "prompt": ["a moon"] * 2, "negative_prompt": ["blurry"], "height": 128, "width": 128}
    refused(scalediff.generate, lists, ValueError, "negative_prompt must have one entry for each of the 2 prompts, got 1")


def test_missing_and_unknown_arguments_are_pythons_own_errors(demo: Any) -> None:
    refused(scalediff.generate, {"pipe": demo}, TypeError, "generate() missing 1 required positional argument: 'prompt'")
    refused(scalediff.generate, {"pipe": demo, "colour": 1}, TypeError, "generate() got an unexpected keyword argument 'colour'")


def test_a_long_value_is_cut(demo: Any) -> None:
    with pytest.raises(TypeError, match="prompt must be a string or a list of strings, got prompt=") as raised:
        scalediff.generate(demo, torch.zeros(1000, 3), height=128, width=128)  # type: ignore[arg-type]
    assert len(str(raised.value)) < 200


def test_whole_numbers_of_numpy_are_integers(demo: Any) -> None:
    numpy = pytest.importorskip("numpy")
    run: dict[str, Any] = {"steps": 1, "generator": seeded()}
    assert scalediff.generate(demo, "a moon", height=numpy.int64(64), width=numpy.int64(72), **run).images[0].size == (72, 64)


def test_no_negative_prompt_beside_negative_embeddings(demo: Any) -> None:
    """Some pipelines have a default negative prompt that must be None where embeddings are given."""
    cls = type(demo)
    right = {name: torch.randn(1, 24, 64, generator=seeded(i)) for i, name in enumerate(("prompt_embeds", "negative_prompt_embeds"))}
    run: dict[str, Any] = {"height": 64, "width": 64, "steps": 2}

    class WithDefault(cls):  # type: ignore[misc, valid-type]
        def __call__(self, prompt: Any = None, height: Any = None, width: Any = None, negative_prompt: Any = "", **others: Any) -> Any:
            return super().__call__(prompt, height, width, negative_prompt=negative_prompt, **others)

        __call__.__signature__ = __import__("inspect").signature(cls.__call__)  # type: ignore[attr-defined]

    plain = scalediff.generate(demo, None, call=right, generator=seeded(), **run).stages[-1].latents
    demo.__class__ = WithDefault
    try:
        with pytest.raises(ValueError, match="negative_prompt"):
            scalediff.generate(demo, None, call=right, generator=seeded(), **run)
        given = scalediff.generate(demo, None, call=right | {"negative_prompt": None}, generator=seeded(), **run)
    finally:
        demo.__class__ = cls
    assert torch.equal(given.stages[-1].latents, plain)
