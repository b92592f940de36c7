"""Draw a list of prompts by one method into a folder: every item once, over any number of processes, and again after an interruption.

A picture is one item: a prompt and a seed. Its PNG file holds its own record, so that one rename finishes both, and what is there after a
`kill -9` is complete. The manifest repeats the records of all files, one JSON object a line.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import scalediff
from bench.quality.pictures import border
from scalediff.cascade.fingerprint import fingerprint_pipeline
from scalediff.cascade.metadata import read_metadata, replacing, save_png
from scalediff.cascade.upsampling import identify_upsampler
from scalediff.cascade.workdir import Workdir, digest
from scalediff.command.method_options import method_facts
from scalediff.draw import Result
from scalediff.methods import MethodOptions
from scalediff.methods.edges import resolve_controlnet
from scalediff.patching.networks import denoiser_of
from scalediff.settings import Preset

_SEEDS_APART = 1_000_000  # between the first seeds of two repetitions of a list


@dataclass(frozen=True)
class Item:
    """One picture: the place of its prompt in the list, the prompt, and the seed of its generator."""

    index: int
    prompt: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.index:06d}-{self.seed}.png"


@dataclass(frozen=True)
class Task:
    """What all items of a folder share."""

    model: str  # its name, as the caller gave it
    method: str
    size: tuple[int, int]  # (height, width) in pixels
    preset: Preset
    given: Mapping[str, Any]  # further arguments of `scalediff.generate`
    options: MethodOptions = None  # of the method; None for ScaleDiff


def read_prompts(path: Path, *, column: str = "prompt") -> list[str]:
    """The prompts of a file, in its order; surrounding blanks and empty lines are left out.

    `.csv` and `.jsonl` files have the prompts in `column`; any other file has one prompt a line. ValueError where the file is missing, has
    no prompts, or a record has no text in the column.
    """
    try:
        lines = list(io.StringIO(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the prompts must be a readable text file in UTF-8, got {path}: {error}") from error
    if path.suffix.lower() not in (".csv", ".jsonl"):
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        prompts = []
        try:
            for record in csv.DictReader(lines) if path.suffix.lower() == ".csv" else map(json.loads, filter(str.strip, lines)):
                prompts.append(record[column].strip())
        except (AttributeError, KeyError, TypeError, csv.Error, json.JSONDecodeError) as error:
            where = f"record {len(prompts) + 1} of {path}"
            raise ValueError(f"{where} must have a text in {column!r}, the column of --column, got {error!r}") from error
    if not all(prompts) or not prompts:
        got = f"{len(prompts)} prompts in {path}, {prompts.count('')} of them empty"
        raise ValueError(f"the file must hold at least one prompt and no empty ones, got {got}")
    return prompts


def items_of(prompts: Sequence[str], seeds: Sequence[int]) -> list[Item]:
    """All items of a list: for every seed S the prompts in order, where prompt number i is drawn with the seed S * 1000000 + i."""
    return [Item(i, prompt, seed * _SEEDS_APART + i) for seed in dict.fromkeys(seeds) for i, prompt in enumerate(prompts)]


class _FirstPassError(Exception):
    """The denoiser was called."""


def prepared(pipe: Any, task: Task, item: Item) -> Task:
    """Check a task by a run up to the denoiser's first pass, without its ControlNet; returns it with its ControlNet loaded and checked.

    Raises:
        ValueError, TypeError, NotImplementedError, ImportError: As `scalediff.generate`, before anything is drawn.
    """

    def stop(*_: Any) -> None:
        raise _FirstPassError

    controlnet = getattr(task.options, "controlnet", None)
    plain = task if controlnet is None else replace(task, options=replace(task.options, controlnet=None))
    hook = denoiser_of(pipe).register_forward_pre_hook(stop)
    try:
        with suppress(_FirstPassError):
            _generate(pipe, plain, item)
    finally:
        hook.remove()
    return task if controlnet is None else replace(task, options=replace(task.options, controlnet=resolve_controlnet(pipe, controlnet)))


def _generate(pipe: Any, task: Task, item: Item) -> Result:
    return scalediff.generate(
        pipe, item.prompt, height=task.size[0], width=task.size[1], preset=task.preset, method=task.options or "scalediff",
        generator=torch.Generator().manual_seed(item.seed), **task.given,
    )  # fmt: skip


def draw_items(pipe: Any, task: Task, items: Sequence[Item], folder: Path, *, shard: tuple[int, int] = (0, 1)) -> int:
    """Draw the items of a shard that are not in the folder yet, and write the manifest; returns how many were drawn.

    ValueError where the folder belongs to another run: other prompts, seeds, size, settings or model.
    """
    shared = fingerprint(pipe, task, items)
    Workdir(folder, shared)
    mine = items[shard[0] :: shard[1]]
    missing = [item for item in mine if not (folder / item.file).exists()]
    known = {name: shared[name] for name in ("method", "size", "model", "weights", "options", "given", "scheduler", "dtype")}
    for number, item in enumerate(missing, len(mine) - len(missing) + 1):
        since = time.perf_counter()
        result = _generate(pipe, task, item)
        seconds = time.perf_counter() - since
        record = {"file": item.file} | asdict(item) | known | {"settings": asdict(result.settings), "seconds": round(seconds, 3)}
        save_png(result.images[0], folder / item.file, metadata=record)
        print(f"{task.method}: {number} of {len(mine)}, {seconds:.2f} s", flush=True)
    write_manifest(folder, items)
    return len(missing)


def fingerprint(pipe: Any, task: Task, items: Sequence[Item]) -> dict[str, Any]:
    """Everything that determines the pictures of a folder, on one machine."""
    return {
        **fingerprint_pipeline(pipe),
        "pictures": len(items),
        "prompts": digest([item.prompt for item in items]),
        "seeds": digest([item.seed for item in items]),
        "model": task.model,
        "method": task.method,
        "options": {} if task.options is None else method_facts(task.method, task.options)["options"],
        "size": list(task.size),
        "preset": repr(task.preset),
        "given": {name: identify_upsampler(value) if name == "upsampler" else value for name, value in task.given.items()},
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "patch_border": border(pipe),
    }


def write_manifest(folder: Path, items: Sequence[Item]) -> None:
    """Write the records of all items that are in the folder, in order.

    Several processes may do so at once. Each writes again until the manifest holds what the folder holds, so whichever is the last to
    write has seen every picture that was finished before.
    """
    written: list[str] = []
    while (there := [item.file for item in items if (folder / item.file).exists()]) != written:
        lines = [json.dumps(read_metadata(folder / file), ensure_ascii=False) + "\n" for file in there]
        with replacing(folder / "manifest.jsonl") as part:
            part.write_text("".join(lines), encoding="utf-8")
        written = there
