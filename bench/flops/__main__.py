"""The work of drawing large pictures by several methods, exactly, on the meta device and without weights: `python -m bench.flops`.

Models at their true size, one prompt, 2 FLOPs a multiply-add; what is counted, and how: `scalediff/cost/flops.py`.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from bench.flops.models import MODELS, TITLES
from bench.harness.rows import ROOT, difference, package_version, write_text
from scalediff.cost.flops import FACTOR, Forward, attention_work, autoencoder_work, built, layer_work, passes_of_a_step, stages
from scalediff.families import family_of
from scalediff.settings import Attention
from scalediff_kernels.neighborhood.api import TextQueries

SIZES = (2048, 4096, 8192)
RESULTS = ROOT / "bench" / "results" / "flops.csv"
DOC = ROOT / "docs" / "evidence" / "flops.md"


class Method(NamedTuple):
    """How a picture above the native size is drawn.

    Attributes:
        label: For people.
        cascade: From the native size, stage by stage; otherwise all steps are run at the target, from noise.
        attention: Above the native size, of the whole grid, of windows with text queries by either rule, or of each view alone;
            of a phase of DemoFusion each of its views and dilated samples.
    """

    label: str
    cascade: bool
    attention: Literal["full", "window", "global", "views", "phases"]


METHODS = {
    "direct": Method("direct inference", False, "full"),
    "multidiffusion": Method("MultiDiffusion", False, "views"),
    "demofusion": Method("DemoFusion", False, "phases"),
    "cascade-full": Method("cascade, full attention", True, "full"),
    "cascade-multidiffusion": Method("cascade, MultiDiffusion", True, "views"),
    "npa": Method("cascade, NPA", True, "window"),
    "npa-global": Method("cascade, NPA, text queries once", True, "global"),
}


@dataclass(frozen=True)
class Row:
    """TFLOPs of one method.

    Attributes:
        model, size, method: Their names, and pixels per side.
        text: Text tokens.
        text_queries: The rule of windows for queries of text; empty where there are no windows or no such queries.
        passes: Forward passes of a run at the target size, guidance included; of MultiDiffusion each runs all views, of DemoFusion all
            views and dilated samples.
        tflops_forward, tflops_run: One forward pass at the target size without guidance, and a whole run with its autoencoder.
        forward_attention, forward_cross, forward_linear, forward_convolution: The parts of that pass; cross-attention where
            it is a call of its own.
        run_attention, run_cross, run_linear, run_convolution, vae: The parts of the run, all stages together.
    """

    model: str
    size: int
    method: str
    text: int
    text_queries: str
    passes: int
    tflops_forward: float
    tflops_run: float
    forward_attention: float
    forward_cross: float
    forward_linear: float
    forward_convolution: float
    run_attention: float
    run_cross: float
    run_linear: float
    run_convolution: float
    vae: float


class Counter:
    """One model, built once; every size is run once, whatever the methods."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, MODELS[name]
        self.denoiser, self._vae = built(self.model)
        family = family_of(self.denoiser)
        assert family is not None
        native = family.native_grid(self.denoiser)
        assert native is not None
        self.native = native[0] * self.model.tokens
        joint = any(site.role == "joint" for site in family.sites(self.denoiser))
        self._queries = ("window", "global") if joint else ()
        wanting = {"global": joint, "phases": hasattr(self.denoiser, "up_blocks")}  # text in the same softmax; a U-Net
        self.methods = tuple(name for name, method in METHODS.items() if wanting.get(method.attention, True))
        self._layers, self._coded = cache(self._count_layers), cache(self._count_coded)

    def row(self, size: int, method: str) -> Row:
        """One method at a size in pixels per side.

        Raises:
            ValueError: the model cannot draw this size.
        """
        how = METHODS[method]
        settings, sizes = stages(self.model, self.denoiser, (size, size))
        sides = [side for side, _ in (sizes if how.cascade else sizes[-1:])]
        if how.attention == "phases":
            sides = [min(size, phase * self.native) for phase in range(1, math.ceil(size / self.native) + 1)]
        steps = [settings.steps, *[settings.stage_steps if how.cascade else settings.steps] * (len(sides) - 1)]
        passes = [passes_of_a_step(self.model, settings) * n for n in steps]
        works = [self.forward(side, how.attention) for side in sides]
        run = Forward(*(sum(n * part for n, part in zip(passes, parts, strict=True)) for parts in zip(*works, strict=True)))
        encoded: list[int | None] = [None] * (len(sides) - 1)  # every phase is decoded
        if how.cascade:
            encoded = [*sides[1:]]  # and every stage encoded again
        vae = sum(self._coded(side, after) for side, after in zip(sides, [*encoded, None], strict=True))
        rule = how.attention if how.attention in self._queries else ""
        text = self._inputs(size)["encoder_hidden_states"].shape[1]
        return Row(self.name, size, method, text, rule, passes[-1], sum(works[-1]), sum(run) + vae, *works[-1], *run, vae)

    def forward(self, side: int, attention: str) -> Forward:
        """One pass at a size in pixels per side; of views, all of them at the native size, and dilated samples beside them in a phase."""
        if attention in ("views", "phases") and side > self.native:
            native = self.forward(self.native, "full")
            count, phase = views(side, self.native) ** 2, math.ceil(side / self.native)
            dilated = native if attention == "views" else self.forward(FACTOR * math.ceil(side / FACTOR / phase), "full")
            samples = phase**2 if attention == "phases" else 0
            return Forward(*(count * part + samples * other for part, other in zip(native, dilated, strict=True)))
        rule: TextQueries = "global" if attention == "global" else "window"
        kind: Attention = "npa" if attention in ("window", "global") else "full"
        return Forward(*attention_work(self.denoiser, self._inputs(side), attention=kind, text_queries=rule), *self._layers(side))

    def _inputs(self, side: int) -> dict[str, Any]:
        with torch.device("meta"):
            return self.model.inputs(side // FACTOR, side // FACTOR)

    def _count_layers(self, side: int) -> tuple[float, float]:
        return layer_work(self.denoiser, self._inputs(side))

    def _count_coded(self, side: int, after: int | None) -> float:
        return autoencoder_work(self._vae, (side, side), None if after is None else (after, after))


def views(side: int, native: int) -> int:
    """MultiDiffusion's views along an axis: of native size, the last one at the border (arXiv:2302.08113).

    They lie half a view apart, as where ScaleDiff compares with them (arXiv:2510.25818); its authors' own script takes an eighth.
    """
    return 1 + math.ceil((side - native) / (native // 2))


def rows(models: Sequence[str], sizes: Sequence[int], methods: Sequence[str]) -> Iterator[Row]:
    """Every combination that exists.

    Raises:
        ValueError: there is none, or a model cannot draw a size.
    """
    none = True
    for name in models:
        counter = Counter(name)
        for size in sizes:
            for method in methods:
                if method in counter.methods:
                    none = False
                    yield counter.row(size, method)
    if none:
        what = "text queries have a rule only in joint attention, and DemoFusion is for U-Nets"
        raise ValueError(f"{what}, got method {' '.join(methods)} of {' '.join(models)}")


COLUMNS = ("attention", "cross", "linear", "convolution")
HEADINGS = {"attention": "attention", "cross": "cross-attention", "linear": "linear", "convolution": "convolution", "vae": "autoencoder"}


def table(found: Sequence[Row]) -> str:
    """For people, on a terminal."""
    lines = [f"{'':<42}{'TFLOPs of one pass':^65}{'of a run':^26}"]
    lines.append(f"{'model':<13}{'size':>5}  {'method':<22}" + "".join(f"{name:>13}" for name in (*COLUMNS, "all", "vae", "all")))
    for row in found:
        numbers = [*(getattr(row, f"forward_{part}") for part in COLUMNS), row.tflops_forward, row.vae, row.tflops_run]
        lines.append(f"{row.model:<13}{row.size:>5}  {row.method:<22}" + "".join(f"{number:>13,.2f}" for number in numbers))
    return "\n".join(lines)


LEGEND = """Made by `python -m bench.flops --write`, held by `python -m bench.flops --check`. TFLOPs, 2 for a multiply-add, one prompt,
models at their true size on the meta device (`scalediff/cost/flops.py`, `bench/flops/models.py`). A pass is one forward pass of the
denoiser at the target size without guidance; a run has the preset's steps, guidance where it is a second pass, and the autoencoder,
decoding untiled and its attention in full. Text encoders and everything element by element are not counted.

Direct inference and MultiDiffusion run all steps at the target, from noise; MultiDiffusion in views of native size, half a view apart
(9, 49 and 225 of them). DemoFusion runs all steps at the native size and at every whole multiple of it, in these views and as many dilated
samples as the square of the multiple; for U-Nets. Cascades run all steps at the native size and the preset's share at each doubling, whose
attention is the model's own, MultiDiffusion's or NPA. In joint attention NPA has two rules for the queries of text: in every window
(the authors', and the default), or once.

These are counts of work, not recommendations: direct inference does not draw one picture at these sizes, and the published position
tables of Stable Diffusion 3.5 Large end at 3072 pixels, those of Lumina-Next's pipeline at 6144."""


def markdown(found: Sequence[Row]) -> str:
    """docs/evidence/flops.md."""
    lines = ["# The work of a picture", "", LEGEND]
    for name in dict.fromkeys(row.model for row in found):
        mine = [row for row in found if row.model == name]
        apart = any(row.forward_cross for row in mine)
        parts = [part for part in COLUMNS if part != "cross" or apart]
        lines += ["", f"## {TITLES[name]}", "", f"{mine[0].text} text tokens, {'attended to apart' if apart else 'in the same softmax'}."]
        for title, prefix, whole, more in (("One pass", "forward", "tflops_forward", []), ("A run", "run", "tflops_run", ["vae"])):
            headings = [title, "size", *(HEADINGS[part] for part in (*parts, *more)), "all", "x NPA"]
            lines += ["", f"| {' | '.join(headings)} |", "|---|" + "--:|" * (len(headings) - 1)]
            for row in mine:
                if prefix == "forward" and not METHODS[row.method].cascade:
                    continue  # a pass like that of a cascade
                npa = next(other for other in mine if other.size == row.size and other.method == "npa")
                numbers = [*(getattr(row, f"{prefix}_{part}") for part in parts), *(getattr(row, part) for part in more)]
                cells = [f"{number:,.1f}" for number in (*numbers, getattr(row, whole))]
                ratio = f"{getattr(row, whole) / getattr(npa, whole):.2f}"
                label = METHODS[row.method].label
                label = label.removeprefix("cascade, ") if prefix == "forward" else label
                lines.append(f"| {' | '.join([label, str(row.size), *cells, ratio])} |")
    return "\n".join(lines) + "\n"


def comma_separated(found: Sequence[Row]) -> str:
    """bench/results/flops.csv; MFLOPs are the last digit."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(Row)])
    writer.writerows([f"{value:.6f}" if isinstance(value, float) else value for value in astuple(row)] for row in found)
    return file.getvalue()


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    try:
        found = rows(options.model, options.size, options.method)
        if options.write or options.check:
            every = list(found)
            files = {RESULTS: comma_separated(every), DOC: markdown(every)}
            if options.write:
                for path, text in files.items():
                    write_text(path, text)
                return
            wrong = [sentence for path, text in files.items() if (sentence := difference(path, text))]
            raise SystemExit("\n".join(wrong) + "\nrun python -m bench.flops --write" if wrong else 0)
        if options.json:
            for row in found:
                print(json.dumps(asdict(row)), flush=True)
        else:
            print(table(list(found)))
    except ValueError as error:
        raise SystemExit(f"python -m bench.flops: {error}") from error


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.flops", description=__doc__.split("\n")[0])
    parser.add_argument("--model", nargs="+", default=list(MODELS), metavar="NAME", help=f"of {', '.join(MODELS)}")
    parser.add_argument("--size", nargs="+", type=int, default=list(SIZES), metavar="N", help="pixels per side (default: 2048 4096 8192)")
    parser.add_argument("--method", nargs="+", default=list(METHODS), metavar="NAME", help=f"of {', '.join(METHODS)}")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one object per row and line")
    how.add_argument("--write", action="store_true", help="write bench/results/flops.csv and docs/evidence/flops.md")
    how.add_argument("--check", action="store_true", help="fail where these files are not what is counted")
    options = parser.parse_args(arguments)
    if package_version("diffusers") == "absent":
        parser.error('models are built from diffusers, not installed here: pip install "scalediff[diffusers]"')
    for name, known in (("model", MODELS), ("method", METHODS)):
        if unknown := [value for value in getattr(options, name) if value not in known]:
            parser.error(f"--{name} takes {', '.join(known)}, got {', '.join(unknown)}")
    picked = (options.model, options.size, options.method)
    if (options.write or options.check) and picked != (list(MODELS), list(SIZES), list(METHODS)):
        parser.error(f"--write and --check take every row, got {' '.join(map(str, (*options.model, *options.size, *options.method)))}")
    return options


if __name__ == "__main__":
    main()
