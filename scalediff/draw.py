"""`generate` and `upscale`, the public functions. The cascade itself is in `scalediff.cascade`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from scalediff.arguments import checked
from scalediff.cascade.caches import check_no_caches
from scalediff.cascade.changing import change_to_upscale
from scalediff.cascade.checks import DRAWING_CHECKS, check_inputs, check_workdir
from scalediff.cascade.fingerprint import fingerprint_run
from scalediff.cascade.fitting import Switches, check_fit, check_possible
from scalediff.cascade.generators import Generators, fresh_generator
from scalediff.cascade.holding import holds_pipeline
from scalediff.cascade.keeping import Given
from scalediff.cascade.pipeline import Sizes, cascade_of, guidance_argument, named_preset, stage_sizes, wrap_of
from scalediff.cascade.progress import Step
from scalediff.cascade.results import RunOptions, Stage
from scalediff.cascade.run import run
from scalediff.cascade.schedule import schedule_length
from scalediff.cascade.upsampling import Upsampler, resolve_upsampler
from scalediff.cascade.workdir import Workdir
from scalediff.methods import METHODS, Direct, MethodOptions, SuperResolution, resolve_method
from scalediff.patching.networks import handle_of
from scalediff.settings import Attention, PerStage, Preset, Settings


@dataclass(frozen=True)
class Result:
    """What `generate` and `upscale` return.

    Attributes:
        images: The final PIL pictures, one per prompt.
        stages: Every stage, first to last.
        settings: The settings of the run.
    """

    images: list[Any]
    stages: list[Stage]
    settings: Settings


@checked(DRAWING_CHECKS)
@holds_pipeline
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
    wrap: tuple[bool, bool] | None = None,
    sizes: Sizes | None = None,
    vae_tiling: bool | None = None,
    vae_attention: Attention = "full",
    split_guidance: bool = False,
    upsampler: str | PathLike[str] | Upsampler | None = None,
    method: str | MethodOptions = "scalediff",
    workdir: str | Path | None = None,
    mesh: Any = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
    force: bool = False,
) -> Result:
    """Generate a picture above the model's native size.

    A run changes the pipeline until it ends. A second call for the same pipeline from another thread waits until then, and so do
    `upscale`, `patch_model` and a patched pipeline's own call; the call of a pipeline that is not patched cannot wait.

    Args:
        pipe: A diffusers pipeline with a known denoiser, patched or not. Its state is restored after the run.
        prompt: The prompt, or a list of prompts for a batch; None if `call` holds prompt embeddings.
        height, width: Target size in pixels. Its area must be at least the native one; any aspect ratio.
        negative_prompt: The negative prompt, or a list of them, passed to the pipeline.
        call: Further arguments of the pipeline's call, used in every stage. Beside `negative_prompt_embeds` it may also hold
            `"negative_prompt": None`, for pipelines with a default negative prompt.
        generator: Random generator, or one per picture. It makes the whole run reproducible; a generator with a random seed when None.
            The global RNG is not used, with one exception in diffusers: Stable Diffusion 3's ControlNet pipeline samples its control
            latents from it.
        preset: `"default"`; `"paper"`, the values published for this model; another preset of the family (`scalediff models` lists
            them); or a `Settings` or `Preset` object.
        steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff: Override the preset, as in `Settings`.
        wrap: Whether the picture continues on the other side, per axis `(Y, X)`: `(False, True)` for a panorama of 360 degrees, `(True,
            True)` for a texture. Nothing in the picture then tells where it begins. For U-Nets; sides that wrap must be whole tokens at
            every level of the U-Net. When None, that of the patched pipeline.
        sizes: (height, width) of every stage in pixels, base first and target last. When None, each stage doubles the size.
        vae_tiling: Encode and decode in parts, in a fraction of the memory: in bands of rows that give the result of one piece up to
            rounding for `AutoencoderKL` and those with its layers; in diffusers' tiles with blended seams for others, for pictures that
            wrap along Y, and where the pipeline's tiling is on. When None, the pipeline's setting holds, and parts are used if the
            autoencoder would not fit into the device's memory beside the weights.
        vae_attention: `"npa"` uses neighborhood patch attention in the autoencoder too.
        split_guidance: Run the two passes of classifier-free guidance one after the other instead of as one doubled batch, which halves
            the memory of the denoiser's activations.
        upsampler: How a stage's picture is enlarged for the next, in place of bicubic interpolation: the path of a single-image
            super-resolution network (`.safetensors` or `.pth`, any architecture that spandrel loads), `"demo"` for that of the
            embedded model, or a function from pictures `[B, 3, y, x]` in [0, 1] to larger ones, as in `scalediff.cascade.upsampling`.
        method: `"scalediff"`, another published method by its name in `scalediff.methods.METHODS`, or an options object of one. These
            accept prompt, size, steps, guidance scale and generator, some also `upsampler`; any option of ScaleDiff alone raises an error.
        workdir: Folder in which every finished stage is saved. If a run was interrupted, the same call with a generator in the same state
            resumes after the last finished stage and gives the same result bit for bit.
        mesh: Process group or `DeviceMesh` over which the picture is split for this run, as in `patch_model`, whose errors it raises.
            All ranks must make the same call, with generators in the same state. Not with `workdir`, nor for a patched pipeline.
        on_stage: Called with every stage when it is finished, or when it is loaded from the workdir.
        on_step: Called after every denoising step with a `Step`: position in the run, seconds left, and a function that makes a preview.
        progress: Show one progress bar over all stages, with the remaining time; where stderr is no terminal or notebook, a line for
            each stage.
        force: Run even if too little memory is available by estimate. Where nothing can be estimated, the run is not refused.

    Returns:
        A Result with `.images`, `.stages` and `.settings`.

    Raises:
        ValueError: A size or setting is out of range, the run does not fit into the available memory by estimate and is not forced, the
            picture alone is larger than the device's memory, the pipeline belongs to no known family, the workdir belongs to another
            run, a feature cache was made for another number of steps, or the latents of a stage are not finite.
        TypeError: The pipeline is not a text-to-image pipeline, or an argument is of the wrong type.
        NotImplementedError: The pipeline's scheduler is not supported, or the method does not support the model; a feature cache or
            perturbed-attention guidance does not allow these settings, as in docs/guide/composition.md.
        ImportError: The upsampler is a path, and spandrel is not installed.
        RuntimeError: The call comes from a callback of a run of the same pipeline, or cache-dit was not enabled on the
            pipeline before `patch_model`.
        torch.OutOfMemoryError: The device ran out of memory. The message names the stage and what would fit.

    ScaleDiff, arXiv:2510.25818.
    """
    given = _explicit_settings(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff, wrap)
    check_inputs(pipe, prompt, negative_prompt, generator, call)
    if method != "scalediff":
        options = resolve_method(method, resolve_upsampler(upsampler))
        others = {"sizes": sizes, "vae_tiling": vae_tiling, "workdir": workdir, "on_step": on_step, "mesh": mesh}
        named = [*(set(given) - {"steps", "guidance_scale"}), *(name for name, value in others.items() if value is not None)]
        named += ["vae_attention"] * (vae_attention != "full") + ["split_guidance"] * split_guidance
        if named:
            raise ValueError(f"method={method!r} does not support {', '.join(sorted(named))}")
        chosen = _resolve_preset(pipe, preset)
        patched = handle_of(pipe)
        around = [wrap for wrap in (chosen.settings.wrap, patched and patched.wrap) if wrap and any(wrap)]
        if around:
            raise ValueError(f"method={method!r} does not support wrap, got wrap={around[0]} from the preset or the patched pipeline")
        arguments = _call_arguments(prompt, negative_prompt, generator, call, chosen)
        settings = _settings_of(chosen, given, arguments)
        return _run_other_method(pipe, options, arguments, (height, width), settings, on_stage, progress=progress, force=force)
    enlarge = resolve_upsampler(upsampler)
    run_options = RunOptions(on_stage, on_step, progress, None, vae_tiling, vae_attention, split_guidance, enlarge, mesh)
    chosen = _resolve_preset(pipe, preset)
    arguments = _call_arguments(prompt, negative_prompt, generator, call, chosen)
    settings = _settings_of(chosen, given, arguments)
    planned = stage_sizes(pipe, height, width, sizes, wrap=wrap_of(pipe, settings))
    return _run_cascade(pipe, arguments, planned, settings, run_options, workdir, force=force)


@checked(DRAWING_CHECKS)
@holds_pipeline
def upscale(
    pipe: Any,
    image: Any,
    prompt: str | list[str] | None,
    *,
    height: int,
    width: int,
    mask_image: Any = None,
    strength: float | None = None,
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
    wrap: tuple[bool, bool] | None = None,
    sizes: Sizes | None = None,
    vae_tiling: bool | None = None,
    vae_attention: Attention = "full",
    split_guidance: bool = False,
    upsampler: str | PathLike[str] | Upsampler | None = None,
    workdir: str | Path | None = None,
    mesh: Any = None,
    on_stage: Callable[[Stage], None] | None = None,
    on_step: Callable[[Step], None] | None = None,
    progress: bool = False,
    force: bool = False,
) -> Result:
    """Upscale a picture and add detail, or change it: the cascade starts from this picture instead of noise.

    Args:
        pipe: A diffusers pipeline as in `generate`, or an image-to-image or inpainting pipeline of the same families.
        image: A PIL picture, or a list of pictures of the same size, one per prompt. What is transparent becomes white. A rotation in
            EXIF data is not applied: diffusers' `load_image` and Pillow's `ImageOps.exif_transpose` do that.
        prompt: What the picture shows: a prompt, or a list of them; None if `call` holds prompt embeddings.
        height, width: Target size in pixels, with the picture's aspect ratio. It must be larger than the picture; with a mask or a
            strength it may have the same size.
        mask_image: White where the picture may change and black where it is kept, as in diffusers: a PIL picture, an array or a tensor,
            or a list of them, one per prompt; any size with the picture's aspect ratio. What is kept comes from the picture at the size
            of every stage. What is transparent is kept. Any pipeline can have a mask; None changes the whole picture.
        strength: Share of the schedule that is run on the picture, in (0, 1], as in diffusers, for image-to-image and inpainting
            pipelines. If it is above `restart`, or the picture has at most the native area, a base stage redraws the picture at the
            native size with this strength, and every other stage runs its share `restart`. Otherwise the picture is larger than native
            and keeps its detail: the stages above its size, or the last one, run the share `strength`. When None, the picture stands
            in place of the base stage, and every stage above it runs its share `restart`.
        sizes: (height, width) of every stage in pixels; the first must be larger than the picture, or is the base stage where one
            redraws the picture. When None, those of the stages of `generate` that are larger than the picture.
        restart: Share of the steps that every stage runs. The larger it is, the more the picture changes.
        negative_prompt, call, generator, preset, steps, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff: As in `generate`.
        wrap: As in `generate`. The picture should already continue on the other side.
        vae_tiling, vae_attention, split_guidance, upsampler, workdir, mesh, on_stage, on_step, progress, force: As in `generate`.

    Returns:
        A Result, as `generate`.

    Raises:
        ValueError: As `generate`; also if the target is smaller than the picture, or as large without a mask or a strength; if target or
            mask has another aspect ratio than the picture; if the strength is out of range, less than one step, or given to a
            text-to-image pipeline; or if a base stage must keep a mask and the pipeline is not for inpainting.
        TypeError: As `generate`; also if `image` is not a PIL picture or a list of them, or `mask_image` is no mask.
        NotImplementedError: As `generate`; also if the pipeline changes pictures in a way that the cascade does not support.
        RuntimeError: As `generate`.
        torch.OutOfMemoryError: As `generate`.

    ScaleDiff, arXiv:2510.25818.
    """
    named = _explicit_settings(steps, restart, guidance_scale, attention, lfm, sg, lfm_cutoff, sg_cutoff, wrap)
    check_inputs(pipe, prompt, negative_prompt, generator, call, has_picture=True)
    enlarge = resolve_upsampler(upsampler)
    run_options = RunOptions(on_stage, on_step, progress, None, vae_tiling, vae_attention, split_guidance, enlarge, mesh)
    chosen = _resolve_preset(pipe, preset)
    arguments = _call_arguments(prompt, negative_prompt, generator, call, chosen)
    settings, target = _settings_of(chosen, named, arguments), (height, width)
    changed, stages, settings, given = change_to_upscale(
        pipe, arguments, image, target, settings, sizes=sizes, mask_image=mask_image, strength=strength
    )
    return _run_cascade(pipe, changed, stages, settings, run_options, workdir, given, force=force)


def _explicit_settings(
    steps: int | None, restart: PerStage | None, guidance_scale: float | None, attention: Attention | None, lfm: bool | None,
    sg: bool | None, lfm_cutoff: PerStage | None, sg_cutoff: PerStage | None, wrap: tuple[bool, bool] | None,
) -> dict[str, Any]:  # fmt: skip
    """The settings that the caller passed."""
    given = {
        "steps": steps, "restart": restart, "guidance_scale": guidance_scale, "attention": attention, "lfm": lfm, "sg": sg,
        "lfm_cutoff": lfm_cutoff, "sg_cutoff": sg_cutoff, "wrap": wrap,
    }  # fmt: skip
    return {name: value for name, value in given.items() if value is not None}


def _resolve_preset(pipe: Any, preset: str | Preset | Settings) -> Preset:
    if isinstance(preset, Settings):
        return Preset(preset, "the caller")
    return preset if isinstance(preset, Preset) else named_preset(pipe, preset)


def _call_arguments(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    generator: Generators | None,
    call: Mapping[str, Any] | None,
    preset: Preset,
) -> dict[str, Any]:
    """The arguments of the pipeline's call that are the same in every stage."""
    if preset.suffix and prompt is not None:
        prompt = [one + preset.suffix for one in prompt] if isinstance(prompt, list) else prompt + preset.suffix
    given = {k: v for k, v in (("prompt", prompt), ("negative_prompt", negative_prompt)) if v is not None} | dict(call or {})
    overridden = "negative_prompt" if any(name.startswith("negative_prompt") for name in given) else ""
    return {**{name: value for name, value in preset.call.items() if name != overridden}, **given, "generator": generator}


def _settings_of(preset: Preset, given: Mapping[str, Any], arguments: Mapping[str, Any]) -> Settings:
    """The settings of a run; a custom schedule among the arguments of the call says the number of steps, unless the caller does."""
    return replace(preset.settings, **{"steps": schedule_length(arguments) or preset.settings.steps, **given})


def _complete_arguments(pipe: Any, arguments: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Add steps, guidance, the family's negative prompt and a generator to the arguments that lack them."""
    cascade = cascade_of(pipe)
    own: dict[str, Any] = {**guidance_argument(pipe, settings.guidance_scale), "num_inference_steps": settings.steps}
    if cascade.negative is not None and not any(name.startswith("negative_prompt") for name in arguments):
        own["negative_prompt"] = cascade.negative
    return {**own, **arguments, "generator": arguments["generator"] or fresh_generator()}


def _run_other_method(
    pipe: Any,
    options: MethodOptions,
    arguments: Mapping[str, Any],
    size: tuple[int, int],
    settings: Settings,
    on_stage: Callable[[Stage], None] | None,
    *,
    progress: bool,
    force: bool,
) -> Result:
    """Run another published method through the same pipeline call."""
    method = next(one for one in METHODS.values() if type(options) is one.options)
    if not isinstance(options, Direct | SuperResolution):  # these call the pipeline once and change nothing in it
        check_no_caches(pipe, type(options).__name__)
    arguments = _complete_arguments(pipe, arguments, settings)
    check_possible(pipe, arguments, size)
    if not force and not method.in_parts:
        check_fit(pipe, arguments, size)
    stages = method.run(pipe, arguments, size, settings, options, on_stage=on_stage, progress=progress)
    return Result(stages[-1].images, stages, settings)


def _run_cascade(
    pipe: Any,
    arguments: Mapping[str, Any],
    sizes: list[tuple[int, int]],
    settings: Settings,
    run_options: RunOptions,
    workdir: str | Path | None,
    given: Given | None = None,
    *,
    force: bool,
) -> Result:
    check_workdir(pipe, workdir, arguments["generator"], run_options.mesh)
    arguments = _complete_arguments(pipe, arguments, settings)
    switches = Switches(run_options.vae_tiling, run_options.split_guidance, wrap_of(pipe, settings))
    how = {"mesh": run_options.mesh, "attention": settings.attention, "vae_attention": run_options.vae_attention}
    check_fit(pipe, arguments, sizes[-1], switches, **how, force=force)
    stages: list[Stage] = []
    folder = None if workdir is None else Workdir(Path(workdir), fingerprint_run(pipe, arguments, sizes, settings, run_options, given))

    def collect(stage: Stage) -> None:
        stages.append(stage)
        if run_options.on_stage is not None:
            run_options.on_stage(stage)

    run(pipe, arguments, sizes, settings, replace(run_options, on_stage=collect, workdir=folder), given=given)
    return Result(stages[-1].images, stages, stages[-1].settings)
