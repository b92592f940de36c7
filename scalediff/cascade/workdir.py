"""A folder that holds a run as it goes: an interrupted one begins again after its last finished stage, and ends with the same bits.

Every file appears by rename. A folder belongs to one run: another prompt, seed, size, setting or model is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.cascade.metadata import save_png, temporary


@dataclass(frozen=True)
class Saved:
    """What a finished stage left.

    Attributes:
        latents: `[B, C, Y, X]`.
        states: Of the generators after it.
        seconds: That it took.
        in_tiles: The autoencoder decoded it in tiles.
        trajectory: Of the base stage, where a later one is drawn to it: what it took for the clean latents at its last model calls.
    """

    latents: Tensor
    states: list[Tensor]
    seconds: float
    in_tiles: bool
    trajectory: list[Tensor]


class Workdir:
    """The folder of one run.

    Args:
        path: The folder; made if it is missing.
        told: What makes the run what it is, as JSON.

    Raises:
        ValueError: the folder cannot be written, or belongs to another run.
    """

    def __init__(self, path: Path, told: Mapping[str, Any]) -> None:
        self._path, self._told = path, json.loads(json.dumps(told))
        run = path / "run.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            before = json.loads(run.read_text()) if run.exists() else None
            if before is None:
                _write(run, lambda part: part.write_text(json.dumps(self._told, indent=2, ensure_ascii=False)))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"workdir must be a folder of a run, or one that can be written, got {path}: {error}") from error
        if before is not None and before != self._told:
            names = sorted(set(before) | set(self._told))
            other = ", ".join(f"{name}: {before.get(name)!r} there" for name in names if before.get(name) != self._told.get(name))
            raise ValueError(f"the folder {path} belongs to another run ({other}): name another workdir, or delete it")

    def finished(self) -> list[Saved]:
        """The stages that are there, without a gap, first to last."""
        found: list[Saved] = []
        while (file := self._file(len(found) + 1)).exists():
            found.append(_read(file))
        return found

    def save(self, index: int, saved: Saved, images: Sequence[Any]) -> None:
        """Keep a finished stage, and its pictures to look at."""
        for number, image in enumerate(images):
            name = f"stage{index}-{image.height}x{image.width}" + (f"-{number}" if len(images) > 1 else "") + ".png"
            save_png(image, self._path / name, metadata=self._told | {"stage": index})
        content = {"latents": saved.latents.cpu(), "states": saved.states, "seconds": saved.seconds, "in_tiles": saved.in_tiles}
        content["trajectory"] = [x.cpu() for x in saved.trajectory]
        _write(self._file(index), lambda part: torch.save(content, part))

    def _file(self, index: int) -> Path:
        return self._path / f"stage{index}.pt"


def _read(file: Path) -> Saved:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return Saved(**content)
    except (OSError, RuntimeError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} is not what a run saves: delete it to have that stage drawn again ({why})") from error


def _write(path: Path, write: Any) -> None:
    part = temporary(path)
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fingerprint_weights(networks: Sequence[nn.Module]) -> str:
    """A short hash that tells networks with other weights, adapters or scales: of a few numbers of every parameter."""
    parts, scales = [], []
    for network in networks:
        for name, parameter in network.named_parameters():
            if not parameter.is_meta:  # sequentially offloaded
                flat = parameter.detach().flatten()
                parts.append(flat[:: max(1, flat.numel() // 16)][:16].float())
            scales.append(name)
        for name, module in network.named_modules():
            own = module.__dict__.get("scaling"), getattr(module.__dict__.get("processor"), "scale", None)
            scales.append(f"{name} {own}" if own != (None, None) else "")
    devices: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        devices.setdefault(part.device, []).append(part)
    return digest([[torch.cat(some) for some in devices.values()], scales])


def digest(value: Any) -> str:
    """A short hash of tensors, arrays, pictures' pixels, functions' names and whatever JSON can say, nested.

    Raises:
        TypeError: an object that is known by nothing but its place in memory.
    """
    hashed = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, Tensor):
            add([str(part.dtype), list(part.shape)])
            hashed.update(part.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if part.numel() else b"")
        elif isinstance(part, Mapping):
            for key in sorted(part, key=str):
                add(str(key))
                add(part[key])
        elif isinstance(part, list | tuple):
            hashed.update(f"[{len(part)}]".encode())
            for one in part:
                add(one)
        elif hasattr(part, "tobytes"):  # a PIL picture or an array
            add([str(getattr(part, "mode", getattr(part, "dtype", ""))), list(getattr(part, "shape", getattr(part, "size", ())))])
            hashed.update(part.tobytes())
        elif callable(part):
            add(getattr(part, "__qualname__", type(part).__qualname__))
        elif " at 0x" in (text := repr(part)):
            raise TypeError(f"a run with a workdir must be told by values, got {text}")
        else:
            hashed.update(text.encode())

    add(value)
    return hashed.hexdigest()[:16]
