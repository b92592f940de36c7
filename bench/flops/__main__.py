"""The work of drawing large pictures by several methods, exactly, on the meta device and without weights: `python -m bench.flops`.

Models at their true size, one prompt, 2 FLOPs a multiply-add. What is counted, and how, is in `scalediff/cost/flops.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.flops.count import METHODS, MODELS, TITLES, rows
from bench.harness.facts import ROOT, package_version
from bench.harness.pages import fill, page_parser, require_pandas, table, write_or_check

if TYPE_CHECKING:
    from pandas import DataFrame

SIZES = (2048, 4096, 8192)
RESULTS = ROOT / "bench" / "results" / "flops.csv"
DOC = ROOT / "docs" / "evidence" / "flops.md"
PARTS = {"attention": "attention", "cross": "cross-attention", "linear": "linear", "convolution": "convolution"}


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

    labels = rows["method"].map(lambda method: METHODS[method].label)
    cells = {title: labels.str.removeprefix("cascade, ") if prefix == "forward" else labels, "size": rows["size"]}
    cells |= {heading: rows[f"{prefix}_{part}"] for part, heading in PARTS.items() if part != "cross" or cross}
    cells |= {"autoencoder": rows["vae"]} if prefix == "run" else {}
    whole = rows[f"tflops_{prefix}"]
    frame = DataFrame(cells | {"all": whole})
    frame = frame.assign(**{heading: frame[heading].map("{:,.1f}".format) for heading in frame.columns[2:]})
    npa = rows["size"].map(whole[rows["method"] == "npa"].set_axis(rows["size"][rows["method"] == "npa"]))
    return table(frame.assign(**{"x NPA": (whole / npa).map("{:.2f}".format)}), text=[title])


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
