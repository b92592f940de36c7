"""The pictures of the rows of `bench.quality`: drawn once, kept in folders, and read again.

A picture is the scene that its caption is of, drawn with the scene's number as seed. Its PNG file holds its own record, so that one rename
finishes both. Several processes may draw into the same folders, each its own share of the scenes, and a run that was interrupted goes on
where it stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import scalediff
from bench.quality.tables import DRAWINGS, Table, label_of
from scalediff.cascade.fingerprint import fingerprint_pipeline
from scalediff.cascade.metadata import read_metadata, save_png
from scalediff.cascade.pipeline import native_size, preset
from scalediff.cascade.upsampling import identify_upsampler, resolve_upsampler
from scalediff.cascade.workdir import Workdir
from scalediff.cost.recorded import recorded_work
from scalediff.demo.scenes import HELD_OUT_SEED, caption, describe, render
from scalediff.families.grid import patch_of

OTHER_SCENES = HELD_OUT_SEED + 1_000_000  # share nothing with the captions
_BASE = "-base"


class Pictures(NamedTuple):
    images: Tensor  # [N, 3, Y, X] in [0, 1]
    bases: Tensor | None = None  # [N, 3, y, x], the picture of the native stage that each began with; None for methods without one
    seconds: Sequence[float] = ()  # CPU seconds of each; empty where nothing was drawn
    gflops: tuple[float, float] | None = None  # of attention and of everything, in one picture; None where nothing was drawn


class Gallery:
    """The folders in `root` of all rows of one size, in pixels per side, drawn by the embedded model.

    With `bf16` the products in the denoiser are computed in bfloat16, as mixed precision does; all the rest stays in fp32.
    """

    def __init__(self, root: Path, pipe: Any, size: int, *, bf16: bool = False) -> None:
        self.pipe, self.size, self._bf16, self._root = pipe, size, bf16, root / f"{size}{'-bf16' * bf16}"
        self._shared = {**fingerprint_pipeline(pipe), "size": size}

    def draw_missing(self, table: Table, share: tuple[int, int]) -> None:
        """Draw the pictures of a table that are not there, scene by scene and all rows in turn; of the share `(i, n)` every n-th scene."""
        for scene in table.scenes:
            for row in table.rows:
                if scene % share[1] == share[0] and DRAWINGS[row].method and not self._file(row, scene).exists():
                    self.draw(row, scene)

    def draw(self, row: str, scene: int) -> None:
        """Draw one picture and save it, after the base picture of its run; ValueError where the folder's pictures are of another run."""
        drawing, path = DRAWINGS[row], self._file(row, scene)
        settings = replace(preset(self.pipe), **drawing.changes)
        used = repr(settings) if drawing.method == "scalediff" else f"{settings.steps} steps, guidance {settings.guidance_scale}"
        upsampler = resolve_upsampler(drawing.upsampler)
        used += f", upsampler {identify_upsampler(upsampler)}" if upsampler else ""
        Workdir(path.parent, {**self._shared, "method": drawing.method, "settings": used})
        since, first = time.process_time(), not any(path.parent.glob("*[0-9].png"))
        mixed = _mixed_precision(self.pipe.unet) if self._bf16 else nullcontext()
        with mixed, recorded_work(self.pipe) if first else nullcontext() as recorded:
            result = scalediff.generate(
                self.pipe, caption(describe(HELD_OUT_SEED + scene)), height=self.size, width=self.size, preset=settings,
                method=drawing.method, upsampler=upsampler, generator=torch.Generator().manual_seed(scene),
            )  # fmt: skip
        record: dict[str, Any] = {"seconds": round(time.process_time() - since, 3)}
        if recorded is not None:
            record["gflops"] = [1e3 * tflops for tflops in recorded.count()]
        if len(result.stages) > 1:
            save_png(result.stages[0].images[0], path.with_stem(path.stem + _BASE), metadata={})
        save_png(result.images[0], path, metadata=record)
        print(f"{row}: scene {scene}, {record['seconds']:.1f} CPU s", file=sys.stderr, flush=True)

    def read(self, row: str, scenes: Sequence[int]) -> Pictures:
        """All pictures of a row, which have been drawn."""
        if not DRAWINGS[row].method:
            images = quantised(render(OTHER_SCENES, len(scenes), self.size))
            return Pictures(_autoencoded(self.pipe, images) if row == "autoencoded" else images)
        files = [self._file(row, scene) for scene in scenes]
        records = [read_metadata(file) for file in files]
        bases = [file.with_stem(file.stem + _BASE) for file in files]
        counted = [record["gflops"] for record in map(read_metadata, sorted(files[0].parent.glob("*[0-9].png"))) if "gflops" in record]
        return Pictures(
            _as_floats(map(_read, files)),
            _as_floats(map(_read, bases)) if bases[0].exists() else None,
            [record["seconds"] for record in records],
            tuple(counted[0]) if counted else None,
        )

    def _file(self, row: str, scene: int) -> Path:
        return self._root / row / f"{scene:06d}.png"


@contextmanager
def _mixed_precision(denoiser: nn.Module) -> Iterator[None]:
    """Products inside the denoiser in bfloat16; it returns fp32."""
    autocast = torch.autocast("cpu", torch.bfloat16)

    def leave(module: nn.Module, arguments: Any, output: Any) -> Any:
        autocast.__exit__(None, None, None)
        return tree_map_only(Tensor, Tensor.float, output)

    with ExitStack() as undo:
        undo.callback(denoiser.register_forward_pre_hook(lambda *_: autocast.__enter__() and None).remove)
        undo.callback(denoiser.register_forward_hook(leave, always_call=True).remove)
        yield


def native_pictures(pipe: Any, prompts: Sequence[str]) -> Tensor:
    """`[N, 3, y, x]` pictures of native size, drawn four at a time; picture i has the seed i."""
    settings, side = preset(pipe), native_size(pipe)[0]
    options = {"num_inference_steps": settings.steps, "guidance_scale": settings.guidance_scale, "height": side, "width": side}
    found: list[Image.Image] = []
    for i in range(0, len(prompts), 4):
        generators = [torch.Generator().manual_seed(seed) for seed in range(i, min(i + 4, len(prompts)))]
        found += pipe(list(prompts[i : i + 4]), generator=generators, **options).images
    return _as_floats(found)


def border(pipe: Any) -> int:
    """Pixels between borders of the query patches."""
    native = native_size(pipe)[0] // pipe.vae_scale_factor
    return patch_of((native, native), 0)[0] * int(pipe.vae_scale_factor)


def quantised(images: Tensor) -> Tensor:
    """As in a picture file: what the pipeline draws is rounded too, and spectra of dark skies show that."""
    return (images * 255).round() / 255


@torch.no_grad()
def _autoencoded(pipe: Any, images: Tensor) -> Tensor:
    restored = [pipe.vae.decode(pipe.vae.encode(part * 2 - 1).latent_dist.mode()).sample for part in images.split(4)]
    return quantised((torch.cat(restored) / 2 + 0.5).clamp(0, 1))


def _read(file: Path) -> Image.Image:
    with Image.open(file) as picture:
        return picture.copy()


def batch_of(*pictures: Image.Image) -> Tensor:
    """`[B, 3, Y, X]` uint8."""
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)


def _as_floats(pictures: Iterable[Image.Image]) -> Tensor:
    return batch_of(*pictures).contiguous() / 255


def write_sheet(path: Path, rows: Mapping[str, Tensor]) -> None:
    """A contact sheet: one labelled row of at most six pictures per method."""
    size, header = next(iter(rows.values())).shape[-1], 14
    count = min(6, max(len(images) for images in rows.values()))
    sheet = Image.new("RGB", (count * (size + 2) - 2, len(rows) * (size + header)), "white")
    pen = ImageDraw.Draw(sheet)
    for top, (name, images) in zip(range(0, sheet.height, size + header), rows.items(), strict=True):
        pen.text((2, top + 1), label_of(name), fill="black")
        for column, image in enumerate(images[:count]):
            pixels = (image * 255).round().to(torch.uint8).permute(1, 2, 0)
            sheet.paste(Image.fromarray(pixels.numpy()), (column * (size + 2), top + header))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
