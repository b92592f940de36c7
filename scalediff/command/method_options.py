"""The options `--method` and `--option` of the command: which method, and the options of that method."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import nn

from scalediff.cascade.upsampling import identify_upsampler
from scalediff.cascade.workdir import fingerprint_weights
from scalediff.command.loading import UsageError
from scalediff.methods import METHODS, MethodOptions

# Fields of Settings; each is a command-line option of the same name.
SETTING_OPTIONS = (
    "steps", "restart", "guidance_scale", "guidance_until", "attention", "jitter", "lfm", "sg", "lfm_cutoff", "sg_cutoff",
    "sg_cutoff_start", "filter", "anchor", "size_conditioning", "wrap",
)  # fmt: skip
_OPTIONS = {"wrap": "tile"}  # options that have another name than their setting
# Further options of ScaleDiff alone, with the value that means they were not given.
_RUN_OPTIONS = {"sizes": None, "workdir": None, "preview": None, "vae_tiling": None, "vae_attention": "full", "split_guidance": False,
                "low_memory": False}  # fmt: skip
_SETTINGS_OF_ALL = {"steps", "guidance_scale"}
# Settings that others, with these values, leave without effect.
_WITHOUT_EFFECT: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("lfm_cutoff", {"lfm": False}),
    ("sg_cutoff", {"sg": False}),
    ("sg_cutoff_start", {"sg": False}),
    ("anchor", {"sg": False}),
    ("filter", {"lfm": False, "sg": False}),
    ("jitter", {"attention": "full"}),
)
_WORDS = {"none": None, "true": True, "on": True, "false": False, "off": False}


def chosen_method(options: Namespace) -> str | MethodOptions:
    """The method of --method, with the options of --option; `"scalediff"`, or an options object.

    Raises:
        UsageError: The method lacks an option of the command line.
        ValueError, TypeError: A value is not one of the option's.
    """
    if options.method == "scalediff":
        if options.option:
            raise UsageError(f"--option is for methods other than scalediff, which has options by name, got {options.option[0]}")
        return "scalediff"
    given = options_of_scalediff(options)
    if options.upsampler is not None and not hasattr(METHODS[options.method].options, "upsampler"):
        given.append("--upsampler")
    if given:
        raise UsageError(f"--method {options.method} does not support {', '.join(given)}")
    return method_object(options.method, options.option)


def check_effects(options: Namespace) -> None:
    """Check that every setting of a command line has an effect beside the others.

    Raises:
        UsageError: One has none.
    """
    for name, others in _WITHOUT_EFFECT:
        if getattr(options, name) is not None and all(getattr(options, other) == value for other, value in others.items()):
            named = [_option_of(f"no_{other}") if value is False else f"{_option_of(other)} {value}" for other, value in others.items()]
            raise UsageError(f"{_option_of(name)} has no effect with {' and '.join(named)}: leave it out, got {getattr(options, name)}")


def options_of_scalediff(options: Namespace) -> list[str]:
    """The options of a command line that ScaleDiff alone has."""
    given = [name for name in SETTING_OPTIONS if name not in _SETTINGS_OF_ALL and getattr(options, name) is not None]
    given += [name for name, absent in _RUN_OPTIONS.items() if getattr(options, name) != absent]
    return [_option_of(name) for name in given]


def _option_of(name: str) -> str:
    """The option of a setting."""
    return "--" + _OPTIONS.get(name, name).replace("_", "-")


def method_object(name: str, pairs: Sequence[str]) -> MethodOptions:
    """The options object of a method from texts `NAME=VALUE`; raises as `chosen_method`."""
    known = option_names(name)
    values: dict[str, Any] = {}
    for pair in pairs:
        option, is_pair, text = pair.partition("=")
        option = option.replace("-", "_")
        if not is_pair:
            raise UsageError(f"--option must be NAME=VALUE, got {pair!r}")
        if option == "upsampler" and hasattr(METHODS[name].options, option):
            raise UsageError(f"--method {name} takes its upsampler from --upsampler, got --option {pair}")
        if option not in known:
            has = f"has the options {', '.join(known)}" if known else "has no options"
            raise UsageError(f"--method {name} {has}, got --option {pair}")
        if option in values:
            raise UsageError(f"--option {option} of --method {name} must be given once, got {pair} as well")
        values[option] = _parse(text)
    options: MethodOptions = METHODS[name].options(**values)
    return options


def method_objects(methods: Sequence[str], pairs: Sequence[str]) -> dict[str, MethodOptions | None]:
    """The options object of every method of --methods, from texts `METHOD.NAME=VALUE`; None for ScaleDiff. Raises as `chosen_method`."""
    own: dict[str, list[str]] = {name: [] for name in methods}
    for pair in pairs:
        name, dot, rest = pair.partition(".")
        if not dot or "=" in name:
            raise UsageError(f"--option must be METHOD.NAME=VALUE, got {pair!r}")
        if name not in own or name not in METHODS:
            named = ", ".join(one for one in own if one in METHODS and option_names(one)) or "none"
            raise UsageError(f"--option is for methods of --methods that have options ({named}), got {pair!r}")
        own[name].append(rest)
    return {name: method_object(name, some) if name in METHODS else None for name, some in own.items()}


def check_upsampler_effect(methods: Mapping[str, MethodOptions | None], upsampler: Any) -> None:
    """Check that the upsampler has an effect: of several methods, those that enlarge pictures take it. UsageError where none does."""
    if upsampler is not None and not any(method is None or hasattr(method, "upsampler") for method in methods.values()):
        raise UsageError(f"--upsampler must be with a method that enlarges pictures in --methods, got {','.join(methods)}")


def option_names(method: str) -> list[str]:
    """The names of a method's options for --option; its upsampler has an option of its own, --upsampler."""
    return [one.name for one in fields(METHODS[method].options) if one.name != "upsampler"]


def method_facts(name: str, method: MethodOptions) -> dict[str, Any]:
    """The method and its options for the metadata of a picture."""
    values = {one.name: getattr(method, one.name) for one in fields(method)}
    if "upsampler" in values:
        values["upsampler"] = identify_upsampler(method.upsampler)
    if isinstance(values.get("controlnet"), nn.Module):
        values["controlnet"] = fingerprint_weights([method.controlnet])
    return {"method": name, "options": values}


def _parse(text: str) -> Any:
    """A number, a word for none, true or false, a tuple of these from a comma-separated list, or else the text itself."""
    if "," in text:
        return tuple(_parse(part) for part in text.split(","))
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text
