"""A folder that saves every finished stage, so that an interrupted run can be resumed with the same result bit for bit.

Every file is written under a temporary name and then renamed. A folder belongs to one run: another prompt, seed, size, setting or model
raises an error.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scalediff.cascade.metadata import replacing, save_png


@dataclass(frozen=True)
class SavedStage:
    """The saved state of a finished stage.

    Attributes:
        latents: `[B, C, Y, X]`.
        states: States of the generators after the stage.
        seconds: Wall-clock time of the stage.
        in_tiles: Whether the autoencoder decoded in parts.
        trajectory: For the base stage, if later stages are guided by it: its predictions of the clean latents at its last model calls.
    """

    latents: Tensor
    states: list[Tensor]
    seconds: float
    in_tiles: bool
    trajectory: list[Tensor]


class Workdir:
    """The folder of one run.

    Args:
        path: The folder; created if it is missing.
        fingerprint: Everything that determines the result of the run, as values that JSON can represent.

    Raises:
        ValueError: The folder cannot be written, or belongs to another run.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any]) -> None:
        self._path, self._fingerprint = path, json.loads(json.dumps(fingerprint))
        run = path / "run.json"
        try:
            path.mkdir(parents=True, exist_ok=True)
            before = json.loads(run.read_text()) if run.exists() else None
            if before is None:
                with replacing(run) as part:
                    part.write_text(json.dumps(self._fingerprint, indent=2, ensure_ascii=False))
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"workdir must be a writable folder, new or of this run, got {path}: {error}") from error
        if before is not None and before != self._fingerprint:
            names = sorted(set(before) | set(self._fingerprint))
            other = ", ".join(f"{name}: {before.get(name)!r} there" for name in names if before.get(name) != self._fingerprint.get(name))
            raise ValueError(f"the folder {path} belongs to another run ({other}): use another workdir, or delete it")

    def finished(self) -> list[SavedStage]:
        """The saved stages from the first up to the first missing one."""
        found: list[SavedStage] = []
        while (file := self._file(len(found) + 1)).exists():
            found.append(_read(file))
        return found

    def save(self, index: int, saved: SavedStage, images: Sequence[Any]) -> None:
        """Save a finished stage, and its pictures as PNG files for viewing."""
        for number, image in enumerate(images):
            name = f"stage{index}-{image.height}x{image.width}" + (f"-{number}" if len(images) > 1 else "") + ".png"
            save_png(image, self._path / name, metadata=self._fingerprint | {"stage": index})
        content = {"latents": saved.latents.cpu(), "states": saved.states, "seconds": saved.seconds, "in_tiles": saved.in_tiles}
        content["trajectory"] = [x.cpu() for x in saved.trajectory]
        with replacing(self._file(index)) as part:
            torch.save(content, part)

    def _file(self, index: int) -> Path:
        return self._path / f"stage{index}.pt"


def _read(file: Path) -> SavedStage:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        return SavedStage(**content)
    except (OSError, RuntimeError, KeyError, EOFError, TypeError, pickle.UnpicklingError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} cannot be read as a saved stage: delete it to compute the stage again ({why})") from error


def fingerprint_weights(networks: Sequence[nn.Module]) -> str:
    """A short hash of a sample of every parameter, and of adapters' scales; it changes if the weights or adapters do."""
    parts, scales = [], []
    for network in networks:
        for name, parameter in network.named_parameters():
            if not parameter.is_meta:  # offloaded sequentially: no values here
                flat = parameter.detach().flatten()
                parts.append(flat[:: max(1, flat.numel() // 16)][:16].float())
            scales.append(name)
        for name, module in network.named_modules():
            scales_of_module = module.__dict__.get("scaling"), getattr(module.__dict__.get("processor"), "scale", None)
            scales.append(f"{name} {scales_of_module}" if scales_of_module != (None, None) else "")
    devices: dict[torch.device, list[Tensor]] = {}
    for part in parts:
        devices.setdefault(part.device, []).append(part)
    return digest([[torch.cat(some) for some in devices.values()], scales])


def digest(value: Any) -> str:
    """A short hash of a nested value of tensors, arrays, PIL pictures, functions (by name), and plain values.

    Raises:
        TypeError: The value contains an object whose repr is only a memory address.
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
            raise TypeError(f"arguments of a run with a workdir must have a repr that identifies their value, got {text}")
        else:
            hashed.update(text.encode())

    add(value)
    return hashed.hexdigest()[:16]
