"""Draw a picture, or enlarge one: what users call. The cascade itself is in `scalediff.cascade`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.cascade.generators import Generators, fresh_generator
from scalediff.cascade.memory import pictures_in
from scalediff.cascade.pipeline import Sizes, cascade_of, check_call, named_preset, stage_sizes
from scalediff.cascade.progress import Step
from scalediff.cascade.run import run
from scalediff.cascade.stage import Around, Stage
from scalediff.cascade.workdir import Workdir, digest, fingerprint
from scalediff.methods import METHODS, DemoFusion, MultiDiffusion
from scalediff.patching.networks import denoiser_of, handle_of
from scalediff.settings import Attention, PerStage, Preset, Settings

_DISTORTION = 0.02  # of the aspect ratio, as a logarithm: sizes are multiples of the model's


@dataclass(frozen=True)
class Result:
    """What `generate` returns: the final pictures, every stage, and the settings that were used."""

    images: list[Any]
    stages: list[Stage]
    settings: Settings


def generate(
    pipe: Any,
    prompt: str | list[str] | None,
    *,
    height: int,
    width: int,
    negative_prompt: str | list[str] | None = None,
    call: Mapping[str, Any] | None = None,
    generator: Generators | None = None,
    preset: str | Preset | Settings = "default",
    steps: int | None = None,
    restart: PerStage | None = None,
    guidance_scale: float | None = None,
    attention: Attention | None = None,
    lfm: bool | None = None,
    sg: bool | None = None,
    lfm_cutoff: PerStage | None = None,
    sg_cutoff: PerStage | None = None,
    sizes: Sizes | None = None,
    vae_tiling: bool | None = None,
    vae_attention: Attention = "full",
    split_guidance: bool = False,
    method: str | MultiDiffusion | DemoFusion = "scalediff",
    workdir: str | Path | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
) -> Result:
    """Draw a picture above the model's native size.

    Args:
        pipe: A diffusers pipeline around a known denoiser, patched or not; it is left as it was found.
        prompt: What to draw; a list makes a batch; None where `call` has embeddings.
        height, width: Target in pixels, at least the native area; any aspect ratio.
        negative_prompt: As in the pipeline's own call.
        call: Further arguments of the pipeline's own call, for every stage.
        generator: Makes the whole run reproducible; a fresh one with a random seed when None. The global RNG is not used, but for what
            diffusers itself draws from it: the control latents of Stable Diffusion 3's ControlNet pipeline.
        preset: `"default"`, `"paper"` for what was published for this model, another of the family's (`scalediff models` names them), or
            Settings or a Preset of one's own, which have every switch.
        steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff: As in `Settings`; the preset's where None.
        sizes: (height, width) of every stage, base first and target last; twice the size from stage to stage when None.
        vae_tiling: Encode and decode in tiles, whose seams are blended, or not; None: as the pipeline does, and in tiles where a picture
            in one piece would not fit beside the weights into the device's memory.
        vae_attention: `"npa"` for neighborhood patch attention in the autoencoder too.
        split_guidance: Run the two passes of classifier-free guidance one after the other, where they are one doubled batch: the
            denoiser then works in half the memory.
        method: `"scalediff"`, or what it is compared with: `"multidiffusion"`, `"demofusion"`, or one of these with options
            (`scalediff.methods`). They take prompt, size, steps, guidance scale and generator; what else belongs to ScaleDiff is refused.
        workdir: A folder that keeps every finished stage. A run that was interrupted, called again with the same arguments and a
            generator in the same state, begins after its last finished stage and ends with the same bits.
        on_stage: Called with every stage as it ends, or as it is found in the workdir.
        on_step: Called with every denoising step: where the run is, seconds left, and a preview for the asking.
        progress: Show one bar over all stages, with the time left.

    Returns:
        A Result with `.images`, `.stages` and `.settings`.

    Raises:
        ValueError: a size or setting is out of range, the pipeline is of no known family, or the workdir belongs to another run.
        TypeError: not a text-to-image pipeline.
        NotImplementedError: the pipeline's scheduler cannot be guided.
        torch.OutOfMemoryError: names the stage, and what would fit.

    ScaleDiff, arXiv:2510.25818.
    """
    given = _given(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff)
    check_call(pipe)
    if method != "scalediff":
        others = {"sizes": sizes, "vae_tiling": vae_tiling, "workdir": workdir, "on_step": on_step}
        named = [*(set(given) - {"steps", "guidance_scale"}), *(name for name, value in others.items() if value is not None)]
        named += ["vae_attention"] * (vae_attention != "full") + ["split_guidance"] * split_guidance
        if named:
            raise ValueError(f"method={method!r} has no {', '.join(sorted(named))}")
        chosen = _preset(pipe, preset)
        settings = replace(chosen.settings, **given)
        arguments = _complete(pipe, _arguments(prompt, negative_prompt, generator, call, chosen), settings)
        return _other(pipe, method, arguments, (height, width), settings, on_stage, progress)
    around = Around(on_stage, on_step, progress, None, vae_tiling, vae_attention, split_guidance)
    chosen = _preset(pipe, preset)
    arguments = _arguments(prompt, negative_prompt, generator, call, chosen)
    return _draw(pipe, arguments, stage_sizes(pipe, height, width, sizes), replace(chosen.settings, **given), around, workdir)


def upscale(
    pipe: Any,
    image: Any,
    prompt: str | list[str] | None,
    *,
    height: int,
    width: int,
    negative_prompt: str | list[str] | None = None,
    call: Mapping[str, Any] | None = None,
    generator: Generators | None = None,
    preset: str | Preset | Settings = "default",
    steps: int | None = None,
    restart: PerStage | None = None,
    guidance_scale: float | None = None,
    attention: Attention | None = None,
    lfm: bool | None = None,
    sg: bool | None = None,
    lfm_cutoff: PerStage | None = None,
    sg_cutoff: PerStage | None = None,
    sizes: Sizes | None = None,
    vae_tiling: bool | None = None,
    vae_attention: Attention = "full",
    split_guidance: bool = False,
    workdir: str | Path | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
) -> Result:
    """Enlarge a picture and draw detail into it: the cascade, entered with a picture in place of a base stage.

    Args:
        image: A PIL picture, or a list of pictures of one size, as many as prompts.
        height, width: Target in pixels, above the picture's own area and of its shape.
        sizes: (height, width) of every stage, the first above the picture's own area.
        pipe, prompt, negative_prompt, call, generator, preset: As in `generate`.
        steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff: As in `generate`. The larger `restart`, the more is
            drawn anew.
        vae_tiling, vae_attention, split_guidance, workdir, on_stage, on_step, progress: As in `generate`.

    Returns:
        As `generate`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `generate`; also a target that is no larger than the picture, or of another
            shape.
    """
    given = _given(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff)
    check_call(pipe)
    images = image if isinstance(image, list) else [image]
    if not all(hasattr(picture, "convert") for picture in images):
        raise TypeError(f"image must be a PIL picture, or a list of them, got {', '.join(type(picture).__name__ for picture in images)}")
    if len({picture.size for picture in images}) != 1:
        raise ValueError(f"pictures must be of one size, got {[picture.size for picture in images]}")
    if len(images) != (drawn := pictures_in({"prompt": prompt, **(call or {})})):
        raise ValueError(f"there must be as many pictures as prompts, got {len(images)} for {drawn}")
    own_width, own_height = images[0].size
    if abs(math.log(height * own_width / (width * own_height))) > _DISTORTION:
        raise ValueError(f"a picture of {own_height} x {own_width} would be distorted, got {height=}, {width=}")
    planned = stage_sizes(pipe, height, width)
    above = [size for size in planned if size[0] * size[1] > own_height * own_width]
    if not above:
        raise ValueError(f"the target must exceed the picture's {own_height} x {own_width}, got {height=}, {width=}")
    multiple = pipe.vae_scale_factor * cascade_of(pipe).patch
    near = {"height": max(own_height // multiple, 1) * multiple, "width": max(own_width // multiple, 1) * multiple}
    if sizes is not None:
        above = stage_sizes(pipe, height, width, sizes, picture=(near["height"], near["width"]))
    picture = pipe.image_processor.preprocess([picture.convert("RGB") for picture in images], **near)
    around = Around(on_stage, on_step, progress, None, vae_tiling, vae_attention, split_guidance)
    chosen = _preset(pipe, preset)
    arguments = _arguments(prompt, negative_prompt, generator, call, chosen)
    return _draw(pipe, arguments, above, replace(chosen.settings, **given), around, workdir, picture, planned[0])


def _story(
    pipe: Any, arguments: Mapping[str, Any], sizes: list[tuple[int, int]], settings: Settings, around: Around, picture: Tensor | None
) -> dict[str, Any]:
    """What makes a run what it is: with the same weights, machine and versions it is drawn again to the bit."""
    generator = arguments["generator"]
    denoiser: Any = denoiser_of(pipe)
    handle = handle_of(pipe)
    named = {"generator", "prompt", "negative_prompt", "num_inference_steps"}
    return {
        "prompt": arguments.get("prompt"),
        "negative_prompt": arguments.get("negative_prompt"),
        "sizes": [f"{height}x{width}" for height, width in sizes],
        "settings": asdict(settings),
        "seed": digest([one.get_state() for one in (generator if isinstance(generator, list) else [generator])]),
        "call": digest({name: value for name, value in arguments.items() if name not in named}),
        "picture": None if picture is None else digest(picture),
        "model": f"{type(denoiser).__name__} {digest(dict(denoiser.config))}",
        "weights": fingerprint([part for part in pipe.components.values() if isinstance(part, nn.Module)]),
        "patched": None if handle is None else [list(handle.window), handle.jitter, digest(asdict(handle.options))],
        "versions": [torch.__version__, version("diffusers")],
        "scheduler": f"{type(pipe.scheduler).__name__} {digest(dict(pipe.scheduler.config))}",
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "vae": [around.vae_tiling, around.vae_attention],
        "split_guidance": around.split_guidance,
    }


def _given(
    steps: int | None, restart: PerStage | None, guidance_scale: float | None, attention: Attention | None, lfm: bool | None,
    sg: bool | None, lfm_cutoff: PerStage | None, sg_cutoff: PerStage | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings that a caller has named."""
    given = {
        "steps": steps, "restart": restart, "guidance_scale": guidance_scale, "attention": attention, "lfm": lfm, "sg": sg,
        "lfm_cutoff": lfm_cutoff, "sg_cutoff": sg_cutoff,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _preset(pipe: Any, preset: str | Preset | Settings) -> Preset:
    if isinstance(preset, Settings):
        return Preset(preset, "the caller")
    return preset if isinstance(preset, Preset) else named_preset(pipe, preset)


def _arguments(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    generator: Generators | None,
    call: Mapping[str, Any] | None,
    preset: Preset,
) -> dict[str, Any]:
    """Those of the pipeline's call that are the same in every stage."""
    own = {"prompt", "negative_prompt", "height", "width", "generator", "num_inference_steps", "latents", "output_type", "return_dict"}
    if taken := own & set(call or {}):
        raise ValueError(f"call may not hold what has an argument of its own or belongs to the stages, got {', '.join(sorted(taken))}")
    if preset.suffix and prompt is not None:
        prompt = [one + preset.suffix for one in prompt] if isinstance(prompt, list) else prompt + preset.suffix
    named = {"prompt": prompt, "negative_prompt": negative_prompt}
    given = {name: value for name, value in named.items() if value is not None} | dict(call or {})
    told = "negative_prompt" if any(name.startswith("negative_prompt") for name in given) else ""
    return {**{name: value for name, value in preset.call.items() if name != told}, **given, "generator": generator}


def _complete(pipe: Any, arguments: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Those arguments, with steps, guidance and a generator."""
    cascade = cascade_of(pipe)
    own: dict[str, Any] = {cascade.guidance: settings.guidance_scale, "num_inference_steps": settings.steps}
    if cascade.negative is not None and not any(name.startswith("negative_prompt") for name in arguments):
        own["negative_prompt"] = cascade.negative
    return {**own, **arguments, "generator": arguments["generator"] or fresh_generator()}


def _other(
    pipe: Any,
    method: str | MultiDiffusion | DemoFusion,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    settings: Settings,
    on_stage: Callable[[Stage], None] | None,
    progress: bool,
) -> Result:
    """By another published method."""
    by_name = {name: one.options() for name, one in METHODS.items()}
    options = by_name.get(method) if isinstance(method, str) else method
    run_it = next((one.run for one in METHODS.values() if type(options) is one.options), None)
    if run_it is None:
        raise ValueError(f"method must be one of scalediff, {', '.join(METHODS)}, or the options of one, got {method!r}")
    stages = run_it(pipe, arguments, size, settings, options, on_stage=on_stage, progress=progress)
    return Result(stages[-1].images, stages, settings)


def _draw(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: list[tuple[int, int]],
    settings: Settings,
    around: Around,
    workdir: str | Path | None,
    picture: Tensor | None = None,
    base: tuple[int, int] | None = None,
) -> Result:
    if workdir is not None and arguments["generator"] is None:
        raise ValueError("a workdir needs a generator whose state can be named again, got generator=None")
    arguments = _complete(pipe, arguments, settings)
    stages: list[Stage] = []
    folder = None if workdir is None else Workdir(Path(workdir), _story(pipe, arguments, sizes, settings, around, picture))

    def keep(stage: Stage) -> None:
        stages.append(stage)
        if around.on_stage is not None:
            around.on_stage(stage)

    run(pipe, arguments, sizes, settings, replace(around, on_stage=keep, workdir=folder), picture=picture, base=base)
    return Result(stages[-1].images, stages, settings)
