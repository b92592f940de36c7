"""Draw a list of prompts by several methods, and score folders of pictures as the papers do: `python -m bench.evaluate`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.evaluate.drawing import Task, draw_items, fingerprint, items_of, prepared, read_prompts
from bench.evaluate.folders import common_size, comparison_size, open_folder, open_folders, size_of
from bench.evaluate.networks import CLIP_MODEL, Inception, load_clip, load_inception
from bench.evaluate.page import FIELDS, page, records
from bench.evaluate.protocols import PROTOCOLS, described
from bench.evaluate.scoring import INCEPTION_STATISTICS, NETWORK_STATISTICS, Options, check_wanted, score
from bench.harness.command import keep_freed_memory, names_of, positive, shard
from bench.harness.facts import facts
from bench.harness.pages import require_pandas
from bench.harness.rows import RowFile, write_text
from scalediff.cascade.pipeline import named_preset
from scalediff.cascade.upsampling import Upsampler, resolve_upsampler
from scalediff.cascade.workdir import Workdir
from scalediff.command import values
from scalediff.command.cli import parse_seeds, parse_size
from scalediff.command.loading import SCHEDULERS, UsageError, load_model, one_line, parse_device
from scalediff.command.method_options import check_upsampler_effect, method_objects
from scalediff.command.ranks import device_name, place
from scalediff.methods import MethodOptions, method_names, resolve_method


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    options.typed = shlex.join(["python", "-m", "bench.evaluate", *(sys.argv[1:] if arguments is None else arguments)])
    try:
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        raise SystemExit(141) from None
    except (OSError, ValueError, TypeError, NotImplementedError, ImportError, UsageError) as error:
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        parser.error(one_line(error))


def generate(options: argparse.Namespace) -> None:
    """Draw the items of this process, method by method, into OUT/METHOD. Every method and folder is checked before the first picture."""
    i, n = options.shard or place()[:2]
    items = items_of(read_prompts(options.prompts, column=options.column), options.seeds)
    methods = method_objects(options.methods, options.option)
    scales = _by_method("--guidance-scale", options.guidance_scale, methods)
    files = _by_method("--upsampler", options.upsampler, methods)
    for name, file in options.upsampler:
        own = {name} if name else methods.keys() - {other for other, _ in options.upsampler}
        check_upsampler_effect({one: method for one, method in methods.items() if one in own}, file)
    if options.size_conditioning is not None and "scalediff" not in methods:
        raise UsageError(f"--size-conditioning must be with scalediff in --methods, got {','.join(methods)}")
    keep_freed_memory()
    resolved = {file: resolve_upsampler(file) for file in dict.fromkeys(files.values())}
    upsamplers = {name: resolved[file] for name, file in files.items()}
    how = {"dtype": options.dtype, "scheduler": options.scheduler, "low_memory": options.low_memory}
    pipe = load_model(options.model, device=device_name(options), **how)
    pipe.set_progress_bar_config(disable=True)
    tasks = [prepared(pipe, task, items[0]) for task in _tasks(pipe, options, methods, scales, upsamplers)]
    folders = {options.out / task.method: task for task in tasks}
    for folder in sorted(folders, key=lambda folder: not folder.exists()):  # new folders last: one of another run ends the command
        Workdir(folder, fingerprint(pipe, folders[folder], items))
    for folder, task in folders.items():
        drawn = draw_items(pipe, task, items, folder, shard=(i, n))
        print(f"{task.method}: {drawn} pictures drawn, {len(items[i::n]) - drawn} were there", flush=True)


def _by_method(option: str, given: Sequence[tuple[str, Any]], methods: Iterable[str]) -> dict[str, Any]:
    """The value of an option for every method: its own, or that of all, or None. `given` are pairs of a method, or "" for all, and a value.

    Raises:
        UsageError: A method is not one of `methods`, or has two values; or the value of all is that of none.
    """
    found: dict[str, Any] = {}
    for name, value in given:
        if name and name not in methods:
            raise UsageError(f"{option} is for methods of --methods, got {name}={value}")
        if name in found:
            raise UsageError(f"{option} of {name or 'all methods'} must be given once, got {value} as well")
        found[name] = value
    if "" in found and found.keys() >= set(methods):
        raise UsageError(f"{option} {found['']} has no effect: every method of --methods has its own")
    return {name: found.get(name, found.get("")) for name in methods}


def _tasks(
    pipe: Any,
    options: argparse.Namespace,
    methods: Mapping[str, MethodOptions | None],
    scales: Mapping[str, float | None],
    upsamplers: Mapping[str, Upsampler | None],
) -> Iterator[Task]:
    """A task for every method. As in `scalediff compare`, a method leaves out what it does not have."""
    preset = named_preset(pipe, options.preset)
    changes = {} if options.size_conditioning is None else {"size_conditioning": options.size_conditioning}
    for name, method in methods.items():
        named = {"steps": options.steps, "guidance_scale": scales[name], "negative_prompt": options.negative_prompt}
        given = {name: value for name, value in named.items() if value is not None}
        upsampler = upsamplers[name]
        if method is None:
            changed = replace(preset, settings=replace(preset.settings, **changes))
            yield Task(options.model, name, options.size, changed, given | ({"upsampler": upsampler} if upsampler is not None else {}))
        else:
            with_upsampler = resolve_method(method, upsampler if hasattr(method, "upsampler") else None)
            yield Task(options.model, name, options.size, preset, given, with_upsampler)


def score_folders(options: argparse.Namespace) -> None:
    """Score folders, print the page, and write it beside the CSV."""
    require_pandas()
    keep_freed_memory()
    folders = open_folders(options.folders)
    reference = None if options.reference is None else open_folder(options.reference)
    protocol = PROTOCOLS[options.protocol].with_crops(options.crops, options.crop_size) if options.protocol else None
    if protocol is None and (options.crops is not None or options.crop_size is not None):
        raise ValueError("--crops and --crop-size change a protocol: pass --protocol, got none")
    wanted = options.statistics if options.statistics is not None else NETWORK_STATISTICS if protocol else ()
    common_size(folders)  # its errors, and those of the next, come before networks are loaded
    how = {"draws": options.bootstrap, "splits": options.splits, "force": options.force}
    check_wanted(folders[0], reference, Options(wanted, protocol, **how), features=Inception.features)
    device = parse_device(options.device)
    inception = load_inception(options.inception, device) if set(INCEPTION_STATISTICS) & set(wanted) else None
    clip = load_clip(options.clip, device) if "clip" in wanted else None
    csv = options.csv or folders[0].path.parent / "scores.csv"
    file = RowFile(csv, FIELDS, facts())
    scores = score(folders, reference, Options(wanted, protocol, inception, clip, **how, device=device))
    counts = {"pictures": len(folders[0]), "references": len(reference) if reference else 0}
    for record in records(scores, protocol=options.protocol or "", command=options.typed, **counts):
        file.add(record)
    notes = [described(options.protocol, protocol)] if protocol else []
    if protocol and reference and protocol.references not in (None, len(reference)):
        notes.append(f"The protocol has {protocol.references} reference pictures, here are {len(reference)}.")
    if options.force and {"fid", "fid_patch"} & set(wanted):
        notes.append("FID was forced: where it is of fewer pictures than features, it is too large, by more the fewer pictures there are.")
    notes += [f"Network: {network.name}." for network in (inception, clip) if network is not None]
    compared = ""
    if reference is not None:
        y, x = comparison_size(size_of(folders[0].files[0]), reference)
        compared = f"; spectra and SWD at {y} x {x}"
    text = page(scores, compared=compared, notes=notes, **counts)
    write_text(csv.with_suffix(".md"), text)
    print(text)


def _of_method(parse: Callable[[str], Any], what: str) -> Callable[[str], tuple[str, Any]]:
    """A parser of `METHOD=VALUE`, or of `VALUE` for all methods, which gives the method as ""."""

    def parsed(text: str) -> tuple[str, Any]:
        name, _, rest = text.partition("=")
        name, rest = (name, rest) if name in method_names() else ("", text)
        try:
            return name, parse(rest)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {what}, alone or after METHOD=, got {text!r}") from error

    return parsed


def _draws(text: str) -> int:
    if not text.isdecimal() or text == "1":
        raise argparse.ArgumentTypeError(f"must be 0 or at least 2, got {text}")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.evaluate", description=__doc__.split(":")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    drawing = commands.add_parser("generate", help="draw a list of prompts; the same command continues an interrupted run")
    drawing.set_defaults(run=generate)
    drawing.add_argument("--prompts", type=Path, required=True, help="a text file with one prompt a line, a .csv or a .jsonl")
    drawing.add_argument("--column", default="prompt", help="the column of a .csv or .jsonl (default: %(default)s)")
    drawing.add_argument("--methods", type=names_of(method_names()), default=["scalediff"], help=f"of {','.join(method_names())}")
    drawing.add_argument("--seeds", type=parse_seeds, default=[0], help="repetitions of the list, such as 0,1 or 0-3 (default: 0)")
    drawing.add_argument("--size", type=parse_size, required=True, help="pixels per side, or HEIGHTxWIDTH")
    drawing.add_argument("--model", default="demo", help="demo, a pipeline folder, or a Hugging Face id (default: %(default)s)")
    drawing.add_argument("--preset", default="default", help="a preset of the model (default: %(default)s)")
    drawing.add_argument("--steps", type=positive(int), help="denoising steps instead of the preset's")
    drawing.add_argument(
        "--guidance-scale", type=_of_method(float, "a number"), action="append", default=[], metavar="[METHOD=]SCALE",
        help="guidance scale instead of the preset's, of all methods or of one; may be repeated",
    )  # fmt: skip
    drawing.add_argument("--negative-prompt", help="negative prompt instead of the preset's")
    drawing.add_argument(
        "--upsampler", type=_of_method(values.upsampler, "a file"), action="append", default=[], metavar="[METHOD=]FILE",
        help="super-resolution network (.safetensors, .pth, or demo) in place of bicubic, for those of --methods that enlarge pictures, "
        "or for one; may be repeated",
    )  # fmt: skip
    drawing.add_argument("--size-conditioning", choices=["target", "native"], help="what scalediff tells SDXL as the picture's size")
    drawing.add_argument(
        "--option", action="append", default=[], metavar="METHOD.NAME=VALUE", help="an option of a method; docs/guide/methods.md lists them"
    )
    drawing.add_argument("--out", type=Path, required=True, help="folder; every method gets a folder in it")
    drawing.add_argument("--shard", type=shard, help="i/n: the part of this process (default: RANK and WORLD_SIZE)")
    drawing.add_argument("--device", default="auto", help="a torch device (default: a GPU if there is one, under torchrun its own)")
    drawing.add_argument("--dtype", choices=["auto", "fp32", "fp16", "bf16"], default="auto")
    drawing.add_argument("--scheduler", choices=SCHEDULERS, help="scheduler instead of the model's own")
    drawing.add_argument("--low-memory", action="store_true", help="keep a component on the GPU only while it is in use")

    scoring = commands.add_parser("score", help="score folders; the first is the baseline of the paired differences")
    scoring.set_defaults(run=score_folders)
    scoring.add_argument("folders", type=Path, nargs="+", help="folders of pictures")
    scoring.add_argument("--reference", type=Path, help="real pictures, or pictures at the native size")
    scoring.add_argument("--protocol", choices=PROTOCOLS, help="the crops; needs networks (default: statistics without networks)")
    which = f"of {','.join(NETWORK_STATISTICS)} (default: all, with a protocol)"
    scoring.add_argument("--statistics", type=names_of(NETWORK_STATISTICS), help=which)
    scoring.add_argument("--crops", type=positive(int), help="crops of each picture instead of the protocol's")
    scoring.add_argument("--crop-size", type=positive(int), help="pixels per side of a crop instead of the protocol's")
    scoring.add_argument("--bootstrap", type=_draws, default=100, help="draws of the bootstrap, 0 for none (default: %(default)s)")
    scoring.add_argument("--splits", type=positive(int), default=10, help="of the Inception score (default: %(default)s)")
    scoring.add_argument("--force", action="store_true", help="compute FID of fewer pictures than features")
    scoring.add_argument("--inception", type=Path, help="weights of InceptionV3 (default: torch hub's copy)")
    scoring.add_argument("--clip", help=f"folder or id of a CLIP model (default: {CLIP_MODEL} in the Hugging Face cache)")
    scoring.add_argument("--device", default="auto", help="of the networks, and of the computations with features in fp64")
    scoring.add_argument("--csv", type=Path, help="results; the page is beside it (default: scores.csv beside the first folder)")
    every = "\n\n".join(described(name, protocol) for name, protocol in PROTOCOLS.items())
    commands.add_parser("protocols", help="print the protocols").set_defaults(run=lambda _: print(every))
    return parser


if __name__ == "__main__":
    main()
