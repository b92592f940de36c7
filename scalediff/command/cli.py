"""The `scalediff` command: argument parsing, and dispatch to the functions that run it."""

from __future__ import annotations

import argparse
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch

from scalediff.cascade.describing import package_version
from scalediff.command import commands, comparing, drawing, ray_workers, values
from scalediff.command.comparing import COMPARABLE
from scalediff.command.loading import SCHEDULERS, UsageError, one_line
from scalediff.command.workers import PicturesFailedError
from scalediff.cost.models import MODELS
from scalediff.methods import method_names
from scalediff.settings import TILES
from scalediff_kernels.distributed.losses import LostRankError

_MOST_SEEDS = 1_000_000  # of one command
_DOUBLING = "from the native area on, each twice the one before"


def parse_size(text: str) -> tuple[int, int]:
    """Parse (height, width) in pixels: `N` or `HxW`."""
    match = re.fullmatch(r"(\d+)(?:[xX](\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size must be N or HxW in pixels, got {text!r}")
    height = int(match[1])
    return height, int(match[2] or height)


def _sizes(text: str) -> list[tuple[int, int]]:
    return [parse_size(one) for one in text.split(",")]


def _methods(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in COMPARABLE]:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(COMPARABLE)}, got {', '.join(unknown)}")
    return names


def parse_seeds(text: str) -> list[int]:
    """Parse seeds: `7`, `0,1,2`, `0-3`, and combinations."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None or int(match[2] or match[1]) < int(match[1]) or int(match[2] or match[1]) >= 2**63:
            raise argparse.ArgumentTypeError(f"seeds must be N, N-M, or a comma-separated list of these, in [0, 2^63), got {text!r}")
        more = range(int(match[1]), int(match[2] or match[1]) + 1)
        if more.stop - more.start > _MOST_SEEDS - len(seeds):
            raise argparse.ArgumentTypeError(f"seeds must be at most {_MOST_SEEDS} numbers, got {text!r}")
        seeds += more
    return seeds


class _Help(argparse.HelpFormatter):
    """Help whose lines do not break within a name such as `super-resolution`."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)


def command_parser() -> argparse.ArgumentParser:
    """The parser of the command and its subcommands."""
    parser = argparse.ArgumentParser(
        prog="scalediff", description="Generate and upscale pictures far above a diffusion model's native size."
    )
    versions = ", ".join(f"{name} {package_version(name)}" for name in ("scalediff", "torch", "triton", "diffusers"))
    parser.add_argument("--version", action="version", version=versions, help="print the versions of scalediff and what it runs on")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = subparsers.add_parser(
        "generate", help="generate pictures", description="Generate a picture for every prompt and seed. Every finished stage is saved."
    )
    generate.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to show in the picture; several prompts give several pictures")
    generate.add_argument("--prompts", type=values.path, metavar="FILE", help="text file with further prompts, one per line")
    generate.add_argument(
        "--size", type=parse_size, metavar="N|HxW", help="size in pixels (default: the last of --sizes, or 4x the model's native size)"
    )
    generate.add_argument(
        "--compare", action="store_true", help="also generate by direct inference and with full attention, and save all side by side"
    )
    generate.add_argument(
        "--method",
        choices=method_names(),
        default="scalediff",
        metavar="NAME",
        help=f"a published method to compare ScaleDiff with: {', '.join(method_names())} (default: scalediff)",
    )
    generate.add_argument("--skip-existing", action="store_true", help="leave out pictures whose file is there, as after an interruption")
    generate.add_argument(
        "--split-picture",
        action="store_true",
        help="under torchrun: the processes draw every picture together, each a band of rows (default: they share the pictures out)",
    )
    generate.add_argument(
        "--ray",
        action="store_true",
        help="workers on the GPUs of all machines that Ray has joined draw the pictures, every picture by one worker",
    )
    generate.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of --method; docs/guide/methods.md lists them",
    )
    _add_run_options(generate, sizes=_DOUBLING)

    compare = subparsers.add_parser(
        "compare",
        help="draw by several methods",
        description="Draw every prompt and seed by several methods, and a sheet of all with their seconds and TFLOPs. The options of "
        "ScaleDiff apply to scalediff and full-attention; steps and guidance scale to all.",
    )
    compare.add_argument("prompt", metavar="PROMPT", nargs="*", help="what to show in the picture; several prompts give several sheets")
    compare.add_argument("--prompts", type=values.path, metavar="FILE", help="text file with further prompts, one per line")
    compare.add_argument(
        "--size", type=parse_size, metavar="N|HxW", help="size in pixels (default: the last of --sizes, or 4x the model's native size)"
    )
    compare.add_argument(
        "--methods", type=_methods, default=["direct", "scalediff"], metavar="NAME,...",
        help=f"of {', '.join(COMPARABLE)} (default: direct,scalediff)",
    )  # fmt: skip
    compare.add_argument(
        "--option", action="append", default=[], metavar="METHOD.NAME=VALUE", help="an option of a method; docs/guide/methods.md lists them"
    )
    _add_run_options(compare, sizes=_DOUBLING)

    upscale = subparsers.add_parser(
        "upscale", help="upscale a picture", description="Upscale a picture and add detail. Every finished stage is saved."
    )
    upscale.add_argument("file", type=values.path, metavar="FILE", help="a picture in any format that Pillow reads")
    upscale.add_argument("prompt", metavar="PROMPT", help="what the picture shows")
    upscale.add_argument(
        "--size",
        type=parse_size,
        metavar="N|HxW",
        help="size in pixels, with the picture's aspect ratio (default: the last of --sizes, or about twice the picture's)",
    )
    upscale.add_argument(
        "--mask", type=values.path, metavar="FILE", help="a picture, white where FILE may change, black or transparent where it is kept"
    )
    upscale.add_argument(
        "--strength", type=float, metavar="S", help="change the picture: share of the schedule that is run on it, in (0, 1]"
    )
    upscale.add_argument("--split-picture", action="store_true", help="under torchrun: the processes draw together, each a band of rows")
    _add_run_options(upscale, sizes="those of generate that are larger than the picture; all, where --strength redraws it at native size")

    plan = subparsers.add_parser(
        "plan",
        help="count the FLOPs and memory of a run",
        description="Count the FLOPs of every stage and the memory of a run for a full-size model, without its weights, and say what fits.",
    )
    plan.add_argument(
        "--model", choices=tuple(MODELS), default="sdxl", metavar="NAME", help=f"the model: {', '.join(MODELS)} (default: sdxl)"
    )
    plan.add_argument("--size", type=parse_size, metavar="N|HxW", default=(4096, 4096), help="size in pixels (default: 4096)")
    plan.add_argument("--attention", choices=("npa", "full"), default="npa", help="attention above the native size")
    plan.add_argument("--memory", type=values.gib, metavar="GIB", help="memory of the GPU in GiB (default: that of this machine's, if any)")
    plan.add_argument("--json", action="store_true", help="print JSON")

    subparsers.add_parser(
        "models", help="list the supported models", description="List the supported denoisers, what works with each, and the presets."
    )

    web = subparsers.add_parser(
        "web", help="open a page in the browser", description="Serve a page on which pictures are drawn, compared, enlarged and kept."
    )
    _add_model_options(web)
    web.add_argument("--low-memory", action="store_true", help="CPU offload of components not in use")
    web.add_argument(
        "--out",
        type=values.path,
        metavar="FOLDER",
        default=Path("scalediff-pictures"),
        help="folder of the pictures (default: scalediff-pictures)",
    )
    web.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 is every one of this machine (default: 127.0.0.1)")
    web.add_argument("--port", type=values.port, default=7860, metavar="N", help="port to listen on; 0 is any free one (default: 7860)")

    info = subparsers.add_parser("info", help="print the metadata of a picture", description="Print a picture's metadata as JSON.")
    info.add_argument("file", type=values.path, metavar="FILE", help="a picture written by scalediff")
    for command in subparsers.choices.values():
        command.formatter_class = _Help
    return parser


def _add_model_options(command: argparse.ArgumentParser) -> None:
    """Add the options that say which model is loaded, and how."""
    command.add_argument(
        "--model", default="demo", help="demo (the embedded model, default), a pipeline folder, or a Hugging Face model id"
    )
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: auto)")
    command.add_argument(
        "--dtype", choices=("auto", "fp32", "fp16", "bf16"), default="auto", help="data type of the weights (default: auto)"
    )
    command.add_argument(
        "--scheduler", choices=tuple(SCHEDULERS), metavar="NAME", help=f"scheduler: {', '.join(SCHEDULERS)} (default: the model's)"
    )
    command.add_argument("--timestep-spacing", choices=("leading", "linspace", "trailing"), help="timestep spacing of the scheduler")


def _add_run_options(command: argparse.ArgumentParser, *, sizes: str) -> None:
    """Add the options that `generate` and `upscale` have in common; `sizes` says which stages there are without --sizes."""
    command.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid in the picture")
    _add_model_options(command)
    command.add_argument(
        "--seed", type=parse_seeds, default=[0], metavar="N|N-M|N,M", help="random seeds; each one gives a picture (default: 0)"
    )
    command.add_argument(
        "--out", type=values.path, metavar="FILE", help="PNG file or folder (default: current folder; file names from prompt and seed)"
    )
    command.add_argument(
        "--workdir",
        type=values.path,
        metavar="FOLDER",
        help="save every stage here; after an interruption, the same command resumes the run",
    )
    command.add_argument("--sizes", type=_sizes, metavar="HxW,...", help=f"size of every stage (default: {sizes})")
    command.add_argument(
        "--upsampler",
        type=values.upsampler,
        metavar="FILE",
        help="super-resolution network (.safetensors, .pth) that enlarges the stages' pictures; demo is that of the embedded model",
    )
    command.add_argument("--preview", type=values.positive, metavar="N", help="write a preview file at every N-th step")
    command.add_argument(
        "--quiet", action="store_true", help="hide the progress bar, or the line for each stage where stderr is no terminal"
    )
    command.add_argument("--json", action="store_true", help="print a line of JSON for every picture")

    memory = command.add_argument_group("memory", "an estimate is printed before the run, and a run that does not fit is refused")
    memory.add_argument("--force", action="store_true", help="run even if too little memory is available by estimate")
    memory.add_argument(
        "--low-memory", action="store_true", help="--vae-tiling, --split-guidance, and CPU offload of components not in use"
    )
    memory.add_argument("--vae-tiling", action=argparse.BooleanOptionalAction, help="run the autoencoder in parts (default: if needed)")
    memory.add_argument("--vae-attention", choices=("full", "npa"), default="full", help="attention of the autoencoder")
    memory.add_argument("--split-guidance", action="store_true", help="run the two passes of guidance one after the other")

    method = command.add_argument_group(
        "method", "defaults come from the preset; some options take N,M,..., one number for each stage above the native size"
    )
    method.add_argument("--preset", default="default", help="default, paper, turbo or lightning; `scalediff models` lists them")
    method.add_argument("--steps", type=int, help="steps of the whole schedule")
    method.add_argument(
        "--restart", type=values.per_stage, metavar="R", help="share of the steps that a high-resolution stage runs, in (0, 1]"
    )
    method.add_argument("--guidance-scale", type=float, metavar="S", help="scale of classifier-free guidance")
    method.add_argument("--guidance-until", type=values.per_stage, metavar="R", help="share of those steps that use guidance, in [0, 1]")
    method.add_argument("--attention", choices=("npa", "full"), help="neighborhood patch attention, or full attention")
    method.add_argument("--jitter", choices=("none", "alternate", "random"), help="how the patch grid moves from step to step")
    method.add_argument("--lfm", action=argparse.BooleanOptionalAction, help="latent frequency mixing")
    method.add_argument("--sg", action=argparse.BooleanOptionalAction, help="structure guidance")
    method.add_argument("--lfm-cutoff", type=values.per_stage, metavar="C", help="cutoff of --lfm as a fraction of Nyquist, in (0, 1]")
    method.add_argument("--sg-cutoff", type=values.per_stage, metavar="C", help="cutoff of --sg as a fraction of Nyquist, in (0, 1]")
    method.add_argument(
        "--sg-cutoff-start", type=values.per_stage, metavar="C", help="--sg-cutoff at the first step of a stage (default: constant)"
    )
    method.add_argument("--filter", choices=("resize", "gaussian", "butterworth"), help="low-pass filter of --lfm and --sg")
    method.add_argument("--anchor", choices=("picture", "trajectory"), help="target of structure guidance")
    method.add_argument(
        "--tile",
        choices=tuple(TILES),
        dest="wrap",
        help="draw a picture that continues on the other side: x, a panorama; xy, a texture; with a U-Net",
    )
    method.add_argument("--size-conditioning", choices=("target", "native"), help="picture size for the size conditioning of SDXL")


def _generate(options: argparse.Namespace) -> None:
    (ray_workers if options.ray else drawing).generate_pictures(options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Errors are printed as one line on stderr. If the environment variable SCALEDIFF_DEBUG is set, errors of the input raise with their
    traceback.

    Args:
        arguments: Command-line arguments; those of the process when None.

    Returns:
        The exit code: 0 on success; 1 if out of memory, if another process of the run was lost, or if workers could not draw all
        pictures; 2 on invalid input, 130 on Ctrl-C, 141 if the reader of its output has gone.
    """
    options = command_parser().parse_args(arguments)
    try:
        run = {
            "generate": _generate,
            "compare": comparing.compare_methods,
            "upscale": drawing.upscale_pictures,
            "plan": commands.show_plan,
            "models": commands.show_models,
            "web": commands.serve_page,
            "info": commands.show_info,
        }
        run[options.command](options)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        return 141
    except (torch.OutOfMemoryError, LostRankError, PicturesFailedError) as error:
        print(f"scalediff: error: {one_line(error)}", file=sys.stderr)
        return 1
    except (UsageError, ValueError, TypeError, NotImplementedError, ImportError, OSError) as error:
        if os.environ.get("SCALEDIFF_DEBUG"):
            raise
        print(f"scalediff: error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
