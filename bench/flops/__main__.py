"""The work of drawing large pictures by several methods, exactly, on the meta device and without weights: `python -m bench.flops`.

Models at their true size, one prompt, 2 FLOPs a multiply-add. What is counted, and how, is in `scalediff/cost/flops.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from bench.flops.work import Above, Work, plan
from bench.harness.facts import ROOT, package_version
from bench.harness.pages import fill, page_parser, require_pandas, table, write_or_check
from scalediff.cost.flops import passes_of_a_step, stages
from scalediff.cost.models import MODELS as PLANNED
from scalediff.cost.models import Model, built
from scalediff.families import family_of

if TYPE_CHECKING:
    from pandas import DataFrame

SIZES = (2048, 4096, 8192)
RESULTS = ROOT / "bench" / "results" / "flops.csv"
DOC = ROOT / "docs" / "evidence" / "flops.md"
PARTS = {"attention": "attention", "cross": "cross-attention", "linear": "linear", "convolution": "convolution"}
_POSITIONS = 512  # along an axis, for 8192 pixels; the published tables are shorter, and looking up costs nothing that is counted


def _sd3() -> nn.Module:
    """The published transformer with more positions: its own table has 192 along an axis, for 3072 pixels."""
    import diffusers

    config = dict(PLANNED["sd3.5-large"].denoiser().config) | {"pos_embed_max_size": _POSITIONS}  # type: ignore[arg-type]
    return diffusers.SD3Transformer2DModel.from_config(config)  # type: ignore[no-any-return]


def _lumina_inputs(y: int, x: int) -> dict[str, Any]:
    """Those of the pipeline, which rotates 384 positions along an axis, for 6144 pixels, with more of them."""
    rotary = torch.empty(_POSITIONS, _POSITIONS, 36, dtype=torch.complex64)
    return PLANNED["lumina-next"].inputs(y, x) | {"image_rotary_emb": rotary}


MODELS: Mapping[str, Model] = {
    **{name: PLANNED[name] for name in ("sdxl", "flux")},
    "sd3.5-large": replace(PLANNED["sd3.5-large"], denoiser=_sd3),
    "lumina-next": replace(PLANNED["lumina-next"], inputs=_lumina_inputs),
}
TITLES = {"sdxl": "SDXL base 1.0", "flux": "FLUX.1-dev", "sd3.5-large": "Stable Diffusion 3.5 Large", "lumina-next": "Lumina-Next"}


class Method(NamedTuple):
    """How a picture above the native size is drawn: in a cascade from the native size, or with all steps at the target, from noise."""

    label: str  # for people
    cascade: bool
    above: Above


METHODS = {
    "direct": Method("direct inference", False, "full"),
    "multidiffusion": Method("MultiDiffusion", False, "views"),
    "demofusion": Method("DemoFusion", False, "phases"),
    "cascade-full": Method("cascade, full attention", True, "full"),
    "cascade-multidiffusion": Method("cascade, MultiDiffusion", True, "views"),
    "npa": Method("cascade, NPA", True, "window"),
    "npa-global": Method("cascade, NPA, text queries once", True, "global"),
}

Row = dict[str, Any]  # columns as docs/evidence/flops.md explains them; `cross` is attention to text in calls of its own


class Counter:
    """One model, built once; every size is run once, whatever the methods."""

    def __init__(self, name: str) -> None:
        self.name, self.model = name, MODELS[name]
        self.denoiser, vae = built(self.model)
        family = family_of(self.denoiser)
        assert family is not None
        native = family.native_grid(self.denoiser)
        assert native is not None
        self.work = Work(self.denoiser, vae, self.model.inputs, native=native[0] * self.model.tokens, factor=self.model.factor)
        joint = any(site.role == "joint" for site in family.sites(self.denoiser))
        self._queries = ("window", "global") if joint else ()
        possible = {"global": joint, "phases": hasattr(self.denoiser, "up_blocks")}  # text in the same softmax; a U-Net
        self.methods = tuple(name for name, method in METHODS.items() if possible.get(method.above, True))

    def row(self, size: int, method: str) -> Row:
        """One method at a size in pixels per side.

        Raises:
            ValueError: the model cannot draw this size.
        """
        _, cascade, above = METHODS[method]
        settings, sizes = stages(self.model, self.denoiser, (size, size))
        sides, native = [side for side, _ in (sizes if cascade else sizes[-1:])], self.work.native
        if above == "phases":
            sides = [min(size, phase * native) for phase in range(1, math.ceil(size / native) + 1)]
        guided = passes_of_a_step(self.model, settings) == 2
        planned = plan(sides, above, cascade=cascade, settings=settings, guided=guided)
        last = self.work.forward(planned[-1].side, above, planned[-1].phase)
        run, vae = self.work.run(planned)
        row = {"model": self.name, "size": size, "method": method, "text": self.work.inputs(size)["encoder_hidden_states"].shape[1]}
        row |= {"text_queries": above if above in self._queries else "", "passes": planned[-1].passes}
        row |= {"tflops_forward": sum(last), "tflops_run": sum(run) + vae}
        row |= {f"forward_{part}": tflops for part, tflops in last._asdict().items()}
        return row | {f"run_{part}": tflops for part, tflops in run._asdict().items()} | {"vae": vae}


def rows(models: Iterable[str], sizes: Sequence[int]) -> Iterator[Row]:
    """Every model and size by every method that the model has."""
    for counter in map(Counter, models):
        yield from (counter.row(size, method) for size in sizes for method in counter.methods)


def sections(found: DataFrame) -> list[str]:
    """The tables of docs/evidence/flops.md, a section for each model."""
    lines: list[str] = []
    for name, mine in found.groupby("model", sort=False):
        cross = bool(mine["forward_cross"].any())
        where = "in cross-attention" if cross else "in the same softmax"
        lines += [f"## {TITLES[name]}", "", f"{mine['text'].iloc[0]} text tokens, {where}."]
        passes = mine[[METHODS[method].cascade for method in mine["method"]]]  # the others' passes are those of a cascade
        lines += ["", *_table(passes, "One pass", "forward", cross=cross), "", *_table(mine, "A run", "run", cross=cross), ""]
    return lines[:-1]


def _table(rows: DataFrame, title: str, prefix: str, *, cross: bool) -> list[str]:
    from pandas import DataFrame

    labels, whole = rows["method"].map(lambda method: METHODS[method].label), rows[f"tflops_{prefix}"]
    numbers = {heading: rows[f"{prefix}_{part}"] for part, heading in PARTS.items() if part != "cross" or cross}
    numbers |= ({"autoencoder": rows["vae"]} if prefix == "run" else {}) | {"all": whole}
    cells = {title: labels.str.removeprefix("cascade, ") if prefix == "forward" else labels, "size": rows["size"]}
    cells |= {heading: column.map("{:,.1f}".format) for heading, column in numbers.items()}
    npa = rows[rows["method"] == "npa"].set_index("size")[f"tflops_{prefix}"]
    return table(DataFrame(cells | {"x NPA": (whole / rows["size"].map(npa)).map("{:.2f}".format)}), text=[title])


def comma_separated(found: DataFrame) -> str:
    """bench/results/flops.csv; MFLOPs are the last digit."""
    return str(found.to_csv(index=False, float_format="%.6f", lineterminator="\n"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = page_parser("flops", __doc__.split("\n")[0], "bench/results/flops.csv and the tables of docs/evidence/flops.md")
    options = parser.parse_args(arguments)
    if package_version("diffusers") == "absent":
        parser.error('models are built from diffusers, not installed here: pip install "scalediff[diffusers]"')
    require_pandas()
    from pandas import DataFrame

    found = DataFrame(rows(MODELS, SIZES))
    if options.write or options.check:
        files = {RESULTS: comma_separated(found), DOC: fill(DOC.read_text(), {"tables": sections(found)})}
        write_or_check(files, check=options.check, command="python -m bench.flops --write")
    else:
        print(comma_separated(found), end="")


if __name__ == "__main__":
    main()
