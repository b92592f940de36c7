"""Draw a picture, or enlarge one: what users call. The cascade itself is in `scalediff.cascade`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from scalediff.cascade import Generators, Stage, check_call, family_with_cascade, fresh_generator, preset, run, stage_sizes
from scalediff.hooks import denoiser_of
from scalediff.settings import Attention, Settings
from scalediff.workdir import Workdir, digest

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
    steps: int | None = None,
    restart: float | None = None,
    guidance_scale: float | None = None,
    attention: Attention | None = None,
    lfm: bool | None = None,
    sg: bool | None = None,
    lfm_cutoff: float | None = None,
    sg_cutoff: float | None = None,
    workdir: str | Path | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool = False,
) -> Result:
    """Draw a picture above the model's native size.

    Args:
        pipe: A diffusers pipeline around a known denoiser, patched or not; it is left as it was found.
        prompt: What to draw; a list makes a batch; None where `call` has embeddings.
        height, width: Target in pixels, at least the native area; any aspect ratio.
        negative_prompt: As in the pipeline's own call.
        call: Further arguments of the pipeline's own call, for every stage.
        generator: Makes the whole run reproducible; a fresh one with a random seed when None. The global RNG is not used.
        steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff: As in `Settings`; the family's preset
            where None.
        workdir: A folder that keeps every finished stage. A run that was interrupted, called again with the same arguments and a
            generator in the same state, begins after its last finished stage and ends with the same bits.
        on_stage: Called with every stage as it ends, or as it is found in the workdir.
        progress: Show the pipeline's progress bar, labelled by stage.

    Returns:
        A Result with `.images`, `.stages` and `.settings`.

    Raises:
        ValueError: a size or setting is out of range, the pipeline is of no known family, or the workdir belongs to another run.
        TypeError: not a text-to-image pipeline.
        NotImplementedError: the pipeline's scheduler cannot be guided.

    ScaleDiff, arXiv:2510.25818.
    """
    given = _given(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff)
    check_call(pipe)
    return _draw(
        pipe, _arguments(prompt, negative_prompt, generator, call), stage_sizes(pipe, height, width), given, workdir, on_stage, progress
    )


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
    steps: int | None = None,
    restart: float | None = None,
    guidance_scale: float | None = None,
    attention: Attention | None = None,
    lfm: bool | None = None,
    sg: bool | None = None,
    lfm_cutoff: float | None = None,
    sg_cutoff: float | None = None,
    workdir: str | Path | None = None,
    on_stage: Callable[[Stage], None] | None = None,
    progress: bool = False,
) -> Result:
    """Enlarge a picture and draw detail into it: the cascade, entered with a picture in place of a base stage.

    Args:
        image: A PIL picture, or a list of pictures of one size, as many as prompts.
        height, width: Target in pixels, above the picture's own area and of its shape.
        pipe, prompt, negative_prompt, call, generator, steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff,
        workdir, on_stage, progress: As in `generate`. The larger `restart`, the more is drawn anew.

    Returns:
        As `generate`.

    Raises:
        ValueError, TypeError, NotImplementedError: as `generate`; also a target that is no larger than the picture, or of another
            shape.
    """
    given = _given(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff)
    check_call(pipe)
    images = image if isinstance(image, list) else [image]
    if len({picture.size for picture in images}) != 1:
        raise ValueError(f"pictures must be of one size, got {[picture.size for picture in images]}")
    own_width, own_height = images[0].size
    if abs(math.log(height * own_width / (width * own_height))) > _DISTORTION:
        raise ValueError(f"a picture of {own_height} x {own_width} would be distorted, got {height=}, {width=}")
    sizes = stage_sizes(pipe, height, width)
    above = [size for size in sizes if size[0] * size[1] > own_height * own_width]
    if not above:
        raise ValueError(f"the target must exceed the picture's {own_height} x {own_width}, got {height=}, {width=}")
    multiple = pipe.vae_scale_factor * family_with_cascade(denoiser_of(pipe))[1].patch
    near = {"height": max(own_height // multiple, 1) * multiple, "width": max(own_width // multiple, 1) * multiple}
    picture = pipe.image_processor.preprocess([picture.convert("RGB") for picture in images], **near)
    arguments = _arguments(prompt, negative_prompt, generator, call)
    return _draw(pipe, arguments, above, given, workdir, on_stage, progress, picture, sizes[0])


def _story(
    pipe: Any, arguments: Mapping[str, Any], sizes: list[tuple[int, int]], settings: Settings, picture: Tensor | None
) -> dict[str, Any]:
    """What makes a run what it is: with the same weights, machine and versions it is drawn again to the bit."""
    generator = arguments["generator"]
    denoiser: Any = denoiser_of(pipe)
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
        "scheduler": f"{type(pipe.scheduler).__name__} {digest(dict(pipe.scheduler.config))}",
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def _given(
    steps: int | None, restart: float | None, guidance_scale: float | None, attention: Attention | None, lfm: bool | None, sg: bool | None,
    lfm_cutoff: float | None, sg_cutoff: float | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings that a caller has named."""
    given = {
        "steps": steps, "restart": restart, "guidance_scale": guidance_scale, "attention": attention, "lfm": lfm, "sg": sg,
        "lfm_cutoff": lfm_cutoff, "sg_cutoff": sg_cutoff,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _arguments(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    generator: Generators | None,
    call: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Those of the pipeline's call that are the same in every stage."""
    own = {"prompt", "negative_prompt", "height", "width", "generator", "num_inference_steps", "latents", "output_type", "return_dict"}
    if taken := own & set(call or {}):
        raise ValueError(f"call may not hold what has an argument of its own or belongs to the stages, got {', '.join(sorted(taken))}")
    named = {"prompt": prompt, "negative_prompt": negative_prompt}
    given = {name: value for name, value in named.items() if value is not None}
    return {**given, "generator": generator, **(call or {})}


def _draw(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: list[tuple[int, int]],
    given: Mapping[str, Any],
    workdir: str | Path | None,
    on_stage: Callable[[Stage], None] | None,
    progress: bool,
    picture: Tensor | None = None,
    base: tuple[int, int] | None = None,
) -> Result:
    if workdir is not None and arguments["generator"] is None:
        raise ValueError("a workdir needs a generator whose state can be named again, got generator=None")
    settings = replace(preset(pipe), **given)
    cascade = family_with_cascade(denoiser_of(pipe))[1]
    own: dict[str, Any] = {cascade.guidance: settings.guidance_scale, "num_inference_steps": settings.steps}
    if cascade.negative is not None and not any(name.startswith("negative_prompt") for name in arguments):
        own["negative_prompt"] = cascade.negative
    arguments = {**own, **arguments, "generator": arguments["generator"] or fresh_generator()}
    stages: list[Stage] = []
    folder = None if workdir is None else Workdir(Path(workdir), _story(pipe, arguments, sizes, settings, picture))

    def keep(stage: Stage) -> None:
        stages.append(stage)
        if on_stage is not None:
            on_stage(stage)

    run(pipe, arguments, sizes, settings, on_stage=keep, progress=progress, picture=picture, base=base, workdir=folder)
    return Result(stages[-1].images, stages, settings)
