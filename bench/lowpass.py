"""Low-pass filters and guided steps against what else does the job: `python -m bench.lowpass`.

Every row of the paper's filter is first compared with the definition in fp64, at that very shape; ours and the compiled ones are timed only
within the error budget that eager torch sets. A row goes to the CSV as soon as it is
measured, and what stands there is not measured again; `--doc docs/filters-measured.md` writes the page from the committed CSVs.

Legend: B batch, C channels, Y x X pixels; bytes are those that an operation must move, every picture read or written once per pass.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import harness
from bench.timing import launches, measure
from scalediff_kernels import GuidedStep, NoiseLevel, low_pass, mix_frequencies
from scalediff_kernels.lowpass.reference import low_pass_reference
from scalediff_kernels.steps.reference import guided_step_reference
from scalediff_kernels.testing import assert_within_budget

CUTOFF, GAMMA, LEVEL = 0.125, 0.7, NoiseLevel.of_alpha_bar(0.4)
RESULTS = harness.ROOT / "bench" / "results"

LEGEND = """Milliseconds are p50 (p20 - p80) of single calls; MB are those that the operation must move; "of copy" is the time of
`dst.copy_(src)` for as many bytes in the same run over the time of the row; "x" is the time of eager torch, with one filter per operation,
over the time of the row. Rows of scalediff and torch.compile passed the [error budget](numerics.md) that "eager" sets at that shape before
they were timed; "line by line" is shown with its error, which may exceed it. FFT and Gaussian blurs are other filters for the same
purpose. Cutoff 1/8, epsilon prediction. Made by `python -m bench.lowpass` (the options used stand above each table) and
`python -m bench.lowpass --doc docs/filters-measured.md`."""


@dataclass(frozen=True)
class Case:
    """Pictures of one shape."""

    name: str
    shape: tuple[int, int, int, int]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def pictures(self, device: str) -> list[Tensor]:
        """x, model output, reference."""
        rng = torch.Generator().manual_seed(0)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return [torch.randn(self.shape, generator=rng).to(device, self.dtype).contiguous(memory_format=layout) for _ in range(3)]


LATENTS = [
    Case(f"latent {b} x {c} x 512 x 512", (b, c, 512, 512), dtype)
    for dtype in (torch.float32, torch.float16)
    for b, c in ((1, 4), (4, 4), (1, 16), (4, 16))
]
FEATURES = [
    Case(f"features 1 x {c} x 512 x 512", (1, c, 512, 512), dtype, last)
    for dtype, c in ((torch.float32, 256), (torch.bfloat16, 512))
    for last in (False, True)
]


def eager_low_pass(x: Tensor) -> Tensor:
    """As it is written by hand: antialiased bilinear down, bilinear up."""
    size = [int(n * CUTOFF) for n in x.shape[-2:]]
    down = F.interpolate(x, size=size, mode="bilinear", antialias=True, align_corners=False)
    return F.interpolate(down, size=x.shape[-2:], mode="bilinear", align_corners=False)


def eager_mix(high: Tensor, low: Tensor) -> Tensor:
    return high + eager_low_pass(low - high)


def eager_step(x: Tensor, output: Tensor, reference: Tensor) -> Tensor:
    """One filter a step, its result moved into epsilon: the best that can be written by hand."""
    x0 = (x - LEVEL.noise * output) / LEVEL.signal
    return output - (GAMMA * LEVEL.signal / LEVEL.noise) * eager_low_pass(reference - x0)


def published_step(x: Tensor, output: Tensor, reference: Tensor) -> Tensor:
    """The definition line by line, with two filters a step, then back to epsilon."""
    x0 = (x - LEVEL.noise * output) / LEVEL.signal
    x0 = x0 + GAMMA * (eager_low_pass(reference) - eager_low_pass(x0))
    return (x - LEVEL.signal * x0) / LEVEL.noise


def fft_low_pass(x: Tensor) -> Tensor:
    """A radial Butterworth filter of order 4 through the Fourier transform, with the mask made beforehand as users do."""
    mask = _fft_mask(x.shape[-2], x.shape[-1], x.device)
    filtered: Tensor = torch.fft.irfft2(torch.fft.rfft2(x.float()) * mask, s=x.shape[-2:])
    return filtered.to(x.dtype)


_masks: dict[Any, Tensor] = {}


def _fft_mask(height: int, width: int, device: torch.device) -> Tensor:
    key = (height, width, device)
    if key not in _masks:
        squared = torch.fft.fftfreq(height, 0.5, device=device)[:, None] ** 2 + torch.fft.rfftfreq(width, 0.5, device=device) ** 2
        _masks[key] = 1 / (1 + (squared / CUTOFF**2) ** 4)
    return _masks[key]


STD = math.sqrt(2 * math.log(2)) / (math.pi * CUTOFF)  # of a Gaussian with half of the amplitude at the cutoff
TAPS = 2 * math.ceil(4 * STD) + 1


def torchvision_blur(x: Tensor) -> Tensor:
    from torchvision.transforms.functional import gaussian_blur

    blurred: Tensor = gaussian_blur(x, [TAPS, TAPS], [STD, STD])
    return blurred


def kornia_blur(x: Tensor) -> Tensor:
    from kornia.filters import gaussian_blur2d

    blurred: Tensor = gaussian_blur2d(x, (TAPS, TAPS), (STD, STD))
    return blurred


@dataclass(frozen=True)
class Row:
    """One implementation of one operation; `exact` is the definition in fp64, None for another filter."""

    operation: str
    implementation: str
    call: Callable[[], Tensor]
    passes: int  # pictures read or written
    exact: Callable[[], Tensor] | None
    eager: Callable[[], Tensor]


def rows(case: Case, device: str) -> Iterator[Row]:
    x, output, reference = case.pictures(device)
    step = GuidedStep(reference, cutoff=CUTOFF, prediction="epsilon")
    how: dict[str, Any] = {"level": LEVEL, "prediction": "epsilon", "gamma": GAMMA, "cutoff": CUTOFF, "kind": "resize"}

    def doubled(function: Callable[..., Tensor], *tensors: Tensor, **more: Any) -> Callable[[], Tensor]:
        return lambda: function(*(t.double() for t in tensors), **more)

    def mixed(high: Tensor, low: Tensor) -> Tensor:
        return high + low_pass_reference(low - high, cutoff=CUTOFF, kind="resize")

    operations: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...], int, Callable[[], Tensor], dict[str, Callable[[], Tensor]]]] = {
        "guided step": (
            eager_step, (x, output, reference), 4, doubled(guided_step_reference, x, output, reference, **how),
            {
                "scalediff": lambda: step(x, output, level=LEVEL, gamma=GAMMA),
                "eager, line by line": lambda: published_step(x, output, reference),
            },
        ),
        "mix frequencies": (
            eager_mix, (x, reference), 4, doubled(mixed, x, reference),
            {"scalediff": lambda: mix_frequencies(x, reference, cutoff=CUTOFF)},
        ),
        "low pass": (
            eager_low_pass, (x,), 2, doubled(low_pass_reference, x, cutoff=CUTOFF, kind="resize"),
            {"scalediff": lambda: low_pass(x, cutoff=CUTOFF)},
        ),
    }  # fmt: skip
    for name, (eager, tensors, passes, exact, ours) in operations.items():
        torch._dynamo.reset()  # or later shapes get one graph for all
        compiled = torch.compile(eager, fullgraph=True, dynamic=False)
        calls = {"eager": lambda e=eager, t=tensors: e(*t), **ours, "torch.compile": lambda c=compiled, t=tensors: c(*t)}  # type: ignore[misc]
        for implementation, call in calls.items():
            yield Row(name, implementation, call, passes, exact, calls["eager"])
    others = {"FFT, Butterworth": fft_low_pass, "torchvision gaussian_blur": torchvision_blur, "kornia gaussian_blur2d": kornia_blur}
    for implementation, blur in others.items():
        yield Row("low pass", implementation, lambda b=blur: b(x), 2, None, lambda: eager_low_pass(x))  # type: ignore[misc]


FIELDS = (
    "case", "dtype", "layout", "operation", "implementation", "p20_ms", "p50_ms", "p80_ms", "megabytes", "copy_ms", "launches", "error",
    "note", "command", "triton", *harness.FACTS,
)  # fmt: skip


KEY = FIELDS[:5]  # no two rows of a device have all of these in common
Records = dict[tuple[str, ...], dict[str, str]]


def identity(case: Case) -> tuple[str, str, str]:
    """Case, dtype and layout, as rows have them."""
    return case.name, str(case.dtype).removeprefix("torch."), "channels last" if case.channels_last else "planes"


def measured(case: Case, row: Row, device: str, copy_ms: float, *, seconds: float) -> dict[str, str]:
    """Gate, then time; what fails says so in `note` and has no time."""
    facts = dict(zip(KEY, (*identity(case), row.operation, row.implementation), strict=True)) | {
        "megabytes": f"{row.passes * math.prod(case.shape) * case.dtype.itemsize / 1e6:.1f}",
    }  # fmt: skip
    try:
        result = row.call()
        if row.exact is not None:
            exact = row.exact()
            facts["error"] = f"{(result.double() - exact).abs().max().item():.2e}"
            if not row.implementation.startswith("eager"):  # one filter sets the budget, line by line is shown as it is
                assert_within_budget(result, row.eager(), exact)
            del exact
        del result
        timing = measure(row.call, device, seconds=seconds)
    except Exception as problem:  # a baseline that cannot run is a result; ours is reported by the exit status
        return facts | {"note": f"{type(problem).__name__}: {str(problem).splitlines()[0][:100]}"}
    count = launches(row.call, device)
    return facts | {
        "p20_ms": f"{timing.p20:.4g}", "p50_ms": f"{timing.p50:.4g}", "p80_ms": f"{timing.p80:.4g}", "copy_ms": f"{copy_ms:.4g}",
        "launches": "" if count is None else str(count),
    }  # fmt: skip


def copy_time(case: Case, passes: int, *, device: str, seconds: float) -> float:
    """Milliseconds of a copy that moves as many bytes: half of them read, half written."""
    source = torch.zeros(passes // 2 * math.prod(case.shape), dtype=case.dtype, device=device)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), device, seconds=seconds).p50


def markdown(tables: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """docs/filters-measured.md from the rows of every device."""
    lines = ["# Low-pass filters and guided steps: times", "", LEGEND]
    for records in tables.values():
        first = records[0]
        lines += ["", f"## {first['machine']}", "", f"`{first['command']}`: torch {first['torch']}, triton {first['triton']},"]
        lines += [f"{first['threads']} threads, commit {first['commit']}.", ""]
        lines.append("| case | operation | implementation | ms | MB | of copy | launches | x | error |")
        lines.append("|---|---|---|--:|--:|--:|--:|--:|--:|")
        for r in records:
            eager = next(e for e in records if _same(e, r) and e["implementation"] == "eager")
            case = f"{r['case']}, {r['dtype']}" + (", channels last" if r["layout"] == "channels last" else "")
            if r["p50_ms"]:
                spread = f"{r['p50_ms']} ({r['p20_ms']} - {r['p80_ms']})"
                cells = [spread, r["megabytes"], f"{100 * float(r['copy_ms']) / float(r['p50_ms']):.0f}%", r["launches"] or "-",
                         f"{float(eager['p50_ms']) / float(r['p50_ms']):.2f}", r["error"] or "-"]  # fmt: skip
            else:
                cells = [r["note"], "", "", "", "", ""]
            lines.append("| " + " | ".join([case, r["operation"], r["implementation"], *cells]) + " |")
    return "\n".join(lines) + "\n"


def _same(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    return all(a[key] == b[key] for key in ("case", "dtype", "layout", "operation"))


def committed() -> dict[str, list[dict[str, str]]]:
    """Rows by device."""
    tables = {}
    for path in sorted(RESULTS.glob("lowpass-*.csv")):
        tables[path.stem] = harness.read_records(path)
    return tables


def standing(rows: Records, facts: Mapping[str, str]) -> set[tuple[str, ...]]:
    """Rows of an earlier run that were timed with the same facts at a commit that is one."""
    kept = harness.standing({str(key): row for key, row in rows.items()}, facts)
    return {key for key, row in rows.items() if str(key) in kept and row["p50_ms"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.doc:
        harness.write_text(options.doc, markdown(committed()))
        return
    facts = harness.facts(options.device, commit=options.commit) | {
        "command": _command(options),
        "triton": harness.package_version("triton"),
    }
    path = options.csv or RESULTS / f"lowpass-{harness.slug(facts['machine'])}.csv"
    # A CPU's fp16 is nobody's choice; a GPU's fp32 latents are.
    cases = [c for c in LATENTS + FEATURES if (options.device == "cuda" or c.dtype is torch.float32) and options.cases in c.name]
    if not cases:
        parser.error(f"--cases names none of {', '.join(c.name for c in LATENTS + FEATURES)}, got {options.cases!r}")
    records: Records = {tuple(row[key] for key in KEY): row for row in harness.read_records(path)}
    stands, failed = set() if options.again else standing(records, facts), False
    for case in cases:
        copied = cache(partial(copy_time, case, device=options.device, seconds=options.seconds))
        for row in rows(case, options.device):
            key = (*identity(case), row.operation, row.implementation)
            if key in stands:
                continue
            record = measured(case, row, options.device, copied(row.passes), seconds=options.seconds)
            records[key] = dict.fromkeys(FIELDS, "") | record | facts
            failed |= row.implementation == "scalediff" and "p50_ms" not in record
            print(", ".join(f"{key} {record[key]}" for key in FIELDS if record.get(key) and key != "command"), flush=True)
            harness.write_rows(path, FIELDS, records.values())
        gc.collect()
    raise SystemExit(failed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.lowpass", description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="per row (default: %(default)s)")
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--doc", type=Path, help="measure nothing, write this page from the committed rows")
    parser.add_argument("--csv", type=Path, help="results (default: bench/results/lowpass-DEVICE.csv)")
    parser.add_argument("--again", action="store_true", help="measure what stands, too")
    parser.add_argument("--commit", help="of a copy of the tree that git knows nothing of")
    return parser


def _command(options: argparse.Namespace) -> str:
    parts = ["python -m bench.lowpass", f"--cases {options.cases!r}" if options.cases else ""]
    parts.append(f"--seconds {options.seconds:g}" if options.seconds != 1 else "")
    return " ".join(part for part in parts if part)


if __name__ == "__main__":
    main()
