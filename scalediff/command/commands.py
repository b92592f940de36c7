"""The commands `scalediff plan`, `scalediff models`, `scalediff info` and `scalediff web`."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
from argparse import Namespace
from dataclasses import asdict

import torch

from scalediff.cascade.fitting import describe_fit, fitting_model_size
from scalediff.cascade.memory import estimate_model, format_gib, total_bytes
from scalediff.cascade.metadata import read_metadata
from scalediff.command.loading import UsageError, load_model
from scalediff.cost.flops import count
from scalediff.cost.models import MODELS, built
from scalediff.families import FAMILIES


def show_plan(options: Namespace) -> None:
    """Print the FLOPs of every stage, the memory of the largest one, and what fits into the memory there is, as a table or as JSON."""
    available = _planned_memory(options.memory)
    try:
        settings, rows = count(options.model, options.size, attention=options.attention)
        peaks = estimate_model(options.model, options.size, available).peaks()
    except ImportError as error:
        raise UsageError(f'the plan needs diffusers: pip install "scalediff[diffusers]" ({error})') from error
    smaller = None
    if available is not None and min(peaks.values()) > available:
        smaller = fitting_model_size(options.model, options.size, available, {"tiled": True, "split": True, "offloaded": True})
    parts = ("attention", "linear", "convolution", "vae", "total")
    whole = {part: sum(getattr(row, part) for row in rows) for part in parts}
    share = {part: whole[part] / whole["total"] for part in parts}
    if options.json:
        stages = [asdict(row) | {"total": row.total, "share": {part: getattr(row, part) / row.total for part in parts}} for row in rows]
        plan = {"model": options.model, "unit": "TFLOP", "settings": asdict(settings), "stages": stages, "share": share}
        memory = {"unit": "byte", "dtype": "bfloat16", "peak": peaks, "available": available, "fitting_size": smaller}
        print(json.dumps(plan | {"memory": memory}, indent=2))
        return
    print(f"{options.model}, TFLOPs by stage; attention above the native size: {options.attention}")
    print(f"{'pixels':>13} {'steps':>6} {'passes':>7}" + "".join(f"{part:>13}" for part in parts))
    for row in rows:
        print(
            f"{row.height:>5} x {row.width:<5} {row.steps:>6} {row.passes:>7}" + "".join(f"{getattr(row, part):>13.1f}" for part in parts)
        )
    print(f"{'all':>28}" + "".join(f"{whole[part]:>13.1f}" for part in parts))
    print(f"{'share':>28}" + "".join(f"{share[part]:>13.1%}" for part in parts))
    print("estimated GPU memory in bf16, not measured yet:")
    for name, peak in peaks.items():
        fits = "" if available is None else f": {'fits' if peak <= available else 'does not fit'}"
        print(f"{format_gib(peak):>12}  {name}{fits}")
    if available is not None and min(peaks.values()) > available:
        print(f"{format_gib(available)} are available: {describe_fit(smaller)}")


def _planned_memory(gib: float | None) -> int | None:
    """Bytes of --memory; without it those of this machine's GPU, or None if there is none."""
    if gib is not None:
        return int(gib * 2**30)
    return total_bytes(torch.device("cuda")) if torch.cuda.is_available() else None


def show_models(options: Namespace) -> None:
    """Print the supported denoisers and what works with each, those that cannot be patched, and the presets."""
    known = [family for family in FAMILIES.values() if not family.refusal]
    width = max(len(family.denoiser) for family in known)
    for family in known:
        cascade = f"yes, tested with {family.cascade.tested}" if family.cascade else f"no: {family.no_cascade}"
        print(f"{family.denoiser:<{width}}  attention: yes (text: {family.text}); cascade: {cascade}")
    print(f"not supported (patch_model gives the reason): {', '.join(name for name, family in FAMILIES.items() if family.refusal)}")
    print("any other module: patch_model(module, grid=, text=, window=); see docs/guide/models.md")
    _show_presets()


def _show_presets() -> None:
    """Print the presets of the models of the paper; those of other families are derived from their pipelines' defaults."""
    for name in ("sdxl", "flux"):
        try:
            denoiser = built(MODELS[name])[0]
        except ImportError:  # without diffusers, only the models are listed
            return
        cascade = FAMILIES[type(denoiser).__name__].cascade
        assert cascade is not None
        for preset, one in cascade.presets(denoiser).items():
            shown = one.settings
            numbers = f"{shown.steps} steps, restart {shown.restart}, guidance {shown.guidance_scale}, cutoff {shown.sg_cutoff}"
            print(f"preset {preset} of {name}: {numbers}; {one.source}")


def show_info(options: Namespace) -> None:
    """Print the metadata of a picture as JSON."""
    print(json.dumps(read_metadata(options.file), indent=2, ensure_ascii=False))


def serve_page(options: Namespace) -> None:
    """Load a model and serve the page until Ctrl-C."""
    if importlib.util.find_spec("gradio") is None:
        raise UsageError('the page needs Gradio: pip install "scalediff[web]"')
    from scalediff.web.server import listen, serve

    if options.out.exists() and not options.out.is_dir():
        raise UsageError(f"--out must be a folder, got the file {options.out}")
    with listen(options.host, options.port) as listener:  # before the model, which can take minutes
        pipe = load_model(
            options.model, device=options.device, dtype=options.dtype, scheduler=options.scheduler, spacing=options.timestep_spacing,
            low_memory=options.low_memory,
        )  # fmt: skip
        name = f"[{options.host}]" if ":" in options.host else options.host
        print(f"http://{name}:{listener.getsockname()[1]}  (Ctrl-C ends it)", file=sys.stderr, flush=True)
        # The server passes the signal on when it has ended; as an exception it lets the folder of the uploads be removed.
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        try:
            serve(pipe, model=options.model, folder=options.out, host=options.host, listener=listener)
        finally:
            signal.signal(signal.SIGTERM, before)
