"""What the page's controls say, as a job that can be drawn; and a picture's metadata, as values for the controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from scalediff.cascade.changing import check_strength
from scalediff.cascade.pipeline import named_preset, native_size, stage_sizes, wrap_of
from scalediff.methods import method_names, method_title
from scalediff.settings import TILES, Anchor, Attention, Jitter, PerStage, Settings, SizeConditioning
from scalediff.web.uploads import check_mask
from scalediff_kernels.lowpass.geometry import Kind

TILING = {"if needed": None, "on": True, "off": False}
METHOD_CHOICES = method_names()
AS_PATCHED = "as patched"  # a jitter or wrap of None
_WRAPS = {AS_PATCHED: None, "none": (False, False), **TILES}
CHOICES = {
    "method": METHOD_CHOICES,
    "attention": get_args(Attention),
    "jitter": (AS_PATCHED, *get_args(Jitter)),
    "filter": get_args(Kind),
    "anchor": get_args(Anchor),
    "size_conditioning": get_args(SizeConditioning),
    "wrap": tuple(_WRAPS),
    "vae_tiling": tuple(TILING),
    "vae_attention": get_args(Attention),
}
_PER_STAGE = ("restart", "guidance_until", "lfm_cutoff", "sg_cutoff", "sg_cutoff_start")
SETTINGS = (
    "steps", "guidance_scale", "restart", "guidance_until", "attention", "lfm", "sg", "lfm_cutoff", "sg_cutoff", "sg_cutoff_start",
    "filter", "anchor", "jitter", "size_conditioning", "wrap",
)  # fmt: skip
# The controls, in the order in which the page passes their values.
FIELDS = (
    "prompt", "negative_prompt", "seed", "height", "width", "method", "preset", *SETTINGS, "sizes", "vae_tiling", "vae_attention",
    "split_guidance", "force", "preview", "strength",
)  # fmt: skip


def method_label(name: str) -> str:
    """What the page calls a method."""
    title = method_title(name)
    return f"{title[0].upper()}{title[1:]}"


@dataclass(frozen=True)
class Job:
    """A picture to draw.

    Attributes:
        prompt, seed, method, vae_tiling, vae_attention, split_guidance: As in `generate`.
        negative_prompt: As in `generate`; None if it is empty.
        size: (height, width) in pixels.
        sizes: The size of every stage in pixels; None as in `generate` and `upscale`.
        preset: The name of the preset.
        settings: The settings of the run.
        force: Run even if the memory is too small by estimate.
        preview: Show previews of the unfinished picture.
        picture: A PIL picture to enlarge or change; None draws from the text alone.
        mask, strength: `mask_image` and `strength` of `upscale`.
        compare: Draw by direct inference and with full attention too.
    """

    prompt: str
    negative_prompt: str | None
    seed: int
    size: tuple[int, int]
    sizes: list[tuple[int, int]] | None
    method: str
    preset: str
    settings: Settings
    vae_tiling: bool | None
    vae_attention: Attention
    split_guidance: bool
    force: bool
    preview: bool
    picture: Any = None
    mask: Any = None
    strength: float | None = None
    compare: bool = False


def job_of(pipe: Any, values: Mapping[str, Any], *, picture: Any = None, mask: Any = None, compare: bool = False) -> Job:
    """The job that the controls describe.

    Args:
        pipe: The pipeline.
        values: The values of the controls, by the names in `FIELDS`.
        picture, mask, compare: As in `Job`.

    Raises:
        ValueError: A value is missing or out of range, or the mask does not fit the picture.
        TypeError: The strength is more than one number.
    """
    prompt = str(values["prompt"] or "").strip()
    if not prompt:
        raise ValueError("the prompt must say what to draw, got an empty prompt")
    if compare and (picture is not None or values["method"] != "scalediff"):
        raise ValueError("a comparison needs a picture drawn from text by the method scalediff")
    size = _integer("height", values["height"], least=1), _integer("width", values["width"], least=1)
    strength, sizes = _strength(values, picture, mask), parse_sizes(values["sizes"])
    preset = named_preset(pipe, values["preset"])
    settings = replace(preset.settings, **_settings(values))
    if picture is None:
        stage_sizes(pipe, *size, sizes, wrap=wrap_of(pipe, settings))  # for its checks, before the job waits for its turn
    return Job(
        prompt=prompt,
        negative_prompt=str(values["negative_prompt"] or "").strip() or None,
        seed=_integer("seed", values["seed"], least=0, most=2**63 - 1),
        size=size,
        sizes=sizes,
        method=_chosen("method", values["method"]),
        preset=values["preset"],
        settings=settings,
        vae_tiling=TILING[_chosen("vae_tiling", values["vae_tiling"])],
        vae_attention="npa" if _chosen("vae_attention", values["vae_attention"]) == "npa" else "full",
        split_guidance=bool(values["split_guidance"]),
        force=bool(values["force"]),
        preview=bool(values["preview"]),
        picture=picture,
        mask=mask,
        strength=strength,
        compare=compare,
    )


def default_values(pipe: Any) -> dict[str, Any]:
    """The values of the controls when the page is opened: the default preset at four times the model's native size."""
    height, width = native_size(pipe)
    rest = {
        "sizes": "", "vae_tiling": "if needed", "vae_attention": "full", "split_guidance": False, "force": False, "preview": True,
        "strength": "",
    }  # fmt: skip
    named = {"prompt": "", "negative_prompt": "", "seed": 0, "height": 4 * height, "width": 4 * width, "method": "scalediff"}
    return {**named, "preset": "default", **preset_values(pipe, "default"), **rest}


def preset_values(pipe: Any, name: str) -> dict[str, Any]:
    """The values of the controls in `SETTINGS` that a preset gives; raises as `named_preset`."""
    return values_of_settings(asdict(named_preset(pipe, name).settings))


def values_of_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the controls in `SETTINGS`, from settings as a mapping."""
    values = {name: settings[name] for name in SETTINGS if name in settings}
    values |= {name: format_numbers(values[name]) for name in _PER_STAGE if name in values}
    if "wrap" in values:
        wrap = None if values["wrap"] is None else tuple(values["wrap"])
        values["wrap"] = next(name for name, axes in _WRAPS.items() if axes == wrap)
    return values | ({"jitter": values["jitter"] or AS_PATCHED} if "jitter" in values else {})


def values_of_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the controls that draw a picture again, as far as its metadata has them."""
    values = {name: metadata[name] for name in ("prompt", "seed", "height", "width", "method", "preset") if name in metadata}
    values |= {"negative_prompt": metadata.get("negative_prompt") or "", **values_of_settings(metadata.get("settings", {}))}
    vae = metadata.get("vae", {})
    values["vae_tiling"] = next((name for name, tiled in TILING.items() if tiled == vae.get("tiling")), "if needed")
    values["vae_attention"] = vae.get("attention", "full")
    values["split_guidance"] = bool(metadata.get("split_guidance"))
    values["sizes"] = metadata.get("asked_sizes") or ""
    values["strength"] = format_numbers(metadata.get("strength"))
    return values


def parse_numbers(name: str, text: Any) -> PerStage | None:
    """`"0.4"` or `"0.4, 0.3"`, one number for each stage above the native size; None if empty.

    Raises:
        ValueError: The text is anything else.
    """
    parts = [part.strip() for part in str(text if text is not None else "").split(",")]
    if parts == [""]:
        return None
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        raise ValueError(f"{name} must be a number, or one number for each stage separated by commas, got {str(text)!r}") from None
    return numbers if len(numbers) > 1 else numbers[0]


def format_numbers(value: Any) -> str:
    """The text from which `parse_numbers` reads the same numbers."""
    numbers = value if isinstance(value, list | tuple) else () if value is None else (value,)
    return ", ".join(str(number).removesuffix(".0") for number in numbers)


def parse_sizes(text: Any) -> list[tuple[int, int]] | None:
    """`"64x64, 128x128, 192x192"`, height before width; None if empty.

    Raises:
        ValueError: The text is anything else.
    """
    if not str(text or "").strip():
        return None
    sizes = []
    for part in str(text).split(","):
        height, _, width = part.strip().lower().partition("x")
        if not (height.strip().isdecimal() and width.strip().isdecimal()):
            raise ValueError(f"sizes must be HxW for every stage, separated by commas, got {str(text)!r}")
        sizes.append((int(height), int(width)))
    return sizes


def _settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the controls in `SETTINGS`, as arguments of `Settings`, which checks their ranges."""
    found = {name: values[name] for name in SETTINGS}
    for name in _PER_STAGE:
        found[name] = parse_numbers(name, values[name])
        if found[name] is None and name != "sg_cutoff_start":
            raise ValueError(f"{name} must be a number, or one number for each stage, got an empty field")
    if values["guidance_scale"] is None:
        raise ValueError("guidance_scale must be a number, got an empty field")
    jitter = None if values["jitter"] == AS_PATCHED else values["jitter"]
    return {
        **found,
        "steps": _integer("steps", values["steps"], least=1),
        "guidance_scale": float(values["guidance_scale"]),
        "jitter": jitter,
        "wrap": _WRAPS[_chosen("wrap", values["wrap"])],
    }


def _strength(values: Mapping[str, Any], picture: Any, mask: Any) -> float | None:
    """The strength, after a check of everything that changes a picture."""
    strength = parse_numbers("strength", values["strength"])
    if strength is not None:
        check_strength("strength", strength)
    if picture is not None and values["method"] != "scalediff":
        raise ValueError(f"a picture is enlarged by the method scalediff, got method={values['method']!r}")
    if picture is None and (mask is not None or strength is not None):
        raise ValueError(f"a mask and a strength change an uploaded picture, got {'a mask' if mask is not None else 'a strength'} alone")
    if mask is not None:
        check_mask(mask, picture)
    return strength  # type: ignore[return-value]  # a single number, by its check


def _integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    """A whole number from a control, which has None where the field is empty and may have a float."""
    if value is None or isinstance(value, bool) or not math.isfinite(float(value)) or int(value) != value:
        raise ValueError(f"{name} must be an integer, got {'an empty field' if value is None else repr(value)}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name} must be at least {least}{'' if most is None else f' and at most {most}'}, got {name}={int(value)}")
    return int(value)


def _chosen(name: str, value: Any) -> str:
    if value not in CHOICES[name]:
        raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    return str(value)
