"""Write the example workflows for ComfyUI in docs/guide/comfy/, and draw each as a picture: `python docs/site/comfy_graphs.py`.

The pictures are diagrams of the JSON files, made with matplotlib (extra `bench`). `--check` only compares the JSON files.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "guide" / "comfy"

PROMPT, NEGATIVE = "a lighthouse on a cliff at dusk, highly detailed", "blurry, ugly, duplicate"
SDXL = {"seed": 7, "steps": 50, "cfg": 7.5, "sampler_name": "ddim", "scheduler": "ddim_uniform"}
FLUX = {"seed": 7, "steps": 30, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple"}
WINDOWS = {
    "window_height": 0, "window_width": 0, "text_queries": "window", "text_rope": True, "jitter": "none", "jitter_seed": 0,
}  # fmt: skip
METHOD = {
    "preset": "model", "restart": 0.4, "lfm_cutoff": 0.125, "sg_cutoff": 0.125, "lfm": True, "sg": True, "filter": "resize",
}  # fmt: skip

Node = tuple[str, dict[str, Any], tuple[float, float]]  # class, inputs (a list is a link: node, output), column and row in the picture


def _checkpoint() -> dict[str, Node]:
    return {
        "1": ("CheckpointLoaderSimple", {"ckpt_name": "sd_xl_base_1.0.safetensors"}, (0, 1)),
        "2": ("CLIPTextEncode", {"text": PROMPT, "clip": ["1", 1]}, (1, 2)),
        "3": ("CLIPTextEncode", {"text": NEGATIVE, "clip": ["1", 1]}, (1, 3)),
    }


def _output(latent: list[Any], vae: list[Any], column: float) -> dict[str, Node]:
    return {
        "20": ("VAEDecode", {"samples": latent, "vae": vae}, (column, 8)),
        "21": ("SaveImage", {"images": ["20", 0], "filename_prefix": "scalediff"}, (column, 9)),
    }


def _upscale(model: list[Any], latent: list[Any], seed: int) -> dict[str, Any]:
    links = {"model": model, "vae": ["1", 2], "latent": latent, "scale": 2.0, "positive": ["2", 0], "negative": ["3", 0]}
    return links | SDXL | METHOD | {"seed": seed}


def stages() -> dict[str, Node]:
    """SDXL at 4096 x 4096 with one node for each stage."""
    start = {"model": ["4", 0], "positive": ["2", 0], "negative": ["3", 0], "latent_image": ["5", 0], "denoise": 1.0}
    return _checkpoint() | {
        "4": ("ScaleDiffPatchModel", {"model": ["1", 0], **WINDOWS, "if_not_windowed": "error"}, (1, 0)),
        "5": ("EmptyLatentImage", {"width": 1024, "height": 1024, "batch_size": 1}, (1, 1)),
        "6": ("KSampler", start | SDXL, (2, 1)),
        "7": ("ScaleDiffUpscaleStage", _upscale(["4", 0], ["6", 0], 8), (3, 1)),
        "8": ("ScaleDiffUpscaleStage", _upscale(["4", 0], ["7", 0], 9), (4, 1)),
        "9": ("ScaleDiffReport", {"model": ["4", 0], "latent": ["8", 0]}, (5, 1)),
        **_output(["9", 0], ["1", 2], 5),
    }


def cascade() -> dict[str, Node]:
    """SDXL at 4096 x 3072 with all stages in one node."""
    links = {"model": ["1", 0], "vae": ["1", 2], "positive": ["2", 0], "negative": ["3", 0]}
    size = {"width": 4096, "height": 3072, "batch_size": 1}
    return _checkpoint() | {
        "4": ("ScaleDiffCascadeSampler", links | size | SDXL | METHOD | WINDOWS, (2, 1)),
        **_output(["4", 0], ["1", 2], 3),
    }


def flux() -> dict[str, Node]:
    """FLUX.1-dev at 2048 x 2048, and the report."""
    links = {"model": ["1", 0], "vae": ["3", 0], "positive": ["5", 0], "negative": ["6", 0]}
    size = {"width": 2048, "height": 2048, "batch_size": 1}
    return {
        "1": ("UNETLoader", {"unet_name": "flux1-dev.safetensors", "weight_dtype": "fp8_e4m3fn"}, (0, 0)),
        "2": ("DualCLIPLoader", {"clip_name1": "clip_l.safetensors", "clip_name2": "t5xxl_fp16.safetensors", "type": "flux"}, (0, 1)),
        "3": ("VAELoader", {"vae_name": "ae.safetensors"}, (0, 2)),
        "4": ("CLIPTextEncode", {"text": PROMPT, "clip": ["2", 0]}, (1, 1)),
        "5": ("FluxGuidance", {"conditioning": ["4", 0], "guidance": 3.5}, (2, 1)),
        "6": ("ConditioningZeroOut", {"conditioning": ["4", 0]}, (2, 2)),
        "7": ("ScaleDiffCascadeSampler", links | size | FLUX | METHOD | WINDOWS, (3, 1)),
        "8": ("ScaleDiffReport", {"model": ["7", 1], "latent": ["7", 0]}, (4, 1)),
        **_output(["8", 0], ["3", 0], 4),
    }


WORKFLOWS = {"sdxl-stages": stages, "sdxl-cascade": cascade, "flux": flux}
TITLES = {
    "ScaleDiffPatchModel": "ScaleDiff: Patch Model", "ScaleDiffUpscaleStage": "ScaleDiff: Upscale Stage",
    "ScaleDiffCascadeSampler": "ScaleDiff: Cascade Sampler", "ScaleDiffReport": "ScaleDiff: Report",
}  # fmt: skip
OUTPUTS = {
    "CheckpointLoaderSimple": ("MODEL", "CLIP", "VAE"), "UNETLoader": ("MODEL",), "DualCLIPLoader": ("CLIP",), "VAELoader": ("VAE",),
    "CLIPTextEncode": ("CONDITIONING",), "FluxGuidance": ("CONDITIONING",), "ConditioningZeroOut": ("CONDITIONING",),
    "EmptyLatentImage": ("LATENT",), "KSampler": ("LATENT",), "VAEDecode": ("IMAGE",), "SaveImage": (),
    "ScaleDiffPatchModel": ("MODEL",), "ScaleDiffUpscaleStage": ("LATENT",), "ScaleDiffCascadeSampler": ("LATENT", "MODEL"),
    "ScaleDiffReport": ("LATENT", "STRING"),
}  # fmt: skip
COLORS = {
    "MODEL": "#7e6bc9", "CLIP": "#c2a000", "VAE": "#d9534f", "CONDITIONING": "#e08a2e", "LATENT": "#d65ca8", "IMAGE": "#3c8dbc",
    "STRING": "#5a9e6f",
}  # fmt: skip
SHOWN = (
    "ckpt_name", "unet_name", "vae_name", "text", "width", "height", "steps", "sampler_name", "scheduler", "denoise", "scale", "preset",
    "window_height", "window_width", "text_queries", "jitter", "guidance",
)  # fmt: skip
WIDTH, LINE, COLUMN = 2.3, 0.17, 3.0  # of a node, of a line of text, from column to column


def workflow(nodes: dict[str, Node]) -> str:
    """The JSON text of a workflow in ComfyUI's API format."""
    named = {
        key: {"class_type": kind, "inputs": inputs, "_meta": {"title": TITLES.get(kind, kind)}} for key, (kind, inputs, _) in nodes.items()
    }
    return json.dumps(named, indent=1) + "\n"


def widgets(inputs: dict[str, Any]) -> list[str]:
    """The widgets of a node that the picture shows."""
    texts = (f"{name}: {inputs[name]}" for name in SHOWN if name in inputs and not isinstance(inputs[name], list))
    return [text if len(text) <= 33 else text[:30] + "..." for text in texts]


def links(inputs: dict[str, Any]) -> list[str]:
    """The inputs of a node that are links."""
    return [name for name, value in inputs.items() if isinstance(value, list)]


def corners(nodes: dict[str, Node]) -> dict[str, tuple[float, float, float]]:
    """Left and upper edge and height of every node: columns from left to right, the nodes of a column one below the other."""
    found, bottom = {}, dict[float, float]()
    for key, (kind, inputs, (column, _)) in sorted(nodes.items(), key=lambda item: item[1][2]):
        height = LINE * (1.9 + max(len(links(inputs)), len(OUTPUTS[kind])) + len(widgets(inputs)))
        top = bottom.get(column, 0.0)
        found[key] = COLUMN * column, top, height
        bottom[column] = top - height - 0.3
    return found


def draw(nodes: dict[str, Node], path: Path) -> None:
    """Draw the graph of a workflow."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "scalediff", "font.size": 8})
    places = corners(nodes)
    right, low = max(x for x, _, _ in places.values()) + WIDTH, min(top - height for _, top, height in places.values())
    figure, axes = pyplot.subplots(figsize=(right + 0.6, 0.3 - low))
    for key, (kind, inputs, _) in nodes.items():
        x, top, height = places[key]
        color = "#3f51b5" if kind in TITLES else "#4a4a55"
        axes.add_patch(pyplot.Rectangle((x, top - height), WIDTH, height, facecolor="#f6f6fa", edgecolor=color, zorder=2))
        axes.add_patch(pyplot.Rectangle((x, top - 1.3 * LINE), WIDTH, 1.3 * LINE, facecolor=color, edgecolor=color, zorder=2))
        axes.text(x + 0.07, top - 0.68 * LINE, TITLES.get(kind, kind), color="white", va="center", weight="bold", zorder=3)
        for row, name in enumerate(OUTPUTS[kind]):
            y = top - (1.9 + row) * LINE
            axes.text(x + WIDTH - 0.09, y, name, va="center", ha="right", color="#22222a", zorder=3, fontsize=6.5)
            axes.plot(x + WIDTH, y, "o", color=COLORS[name], markersize=4, zorder=3)
        for row, name in enumerate(links(inputs)):
            y, (source, output) = top - (1.9 + row) * LINE, inputs[name]
            of_kind = OUTPUTS[nodes[source][0]][output]
            axes.text(x + 0.09, y, name, va="center", color="#22222a", zorder=3, fontsize=6.5)
            axes.plot(x, y, "o", color=COLORS[of_kind], markersize=4, zorder=3)
            start = places[source][0] + WIDTH, places[source][1] - (1.9 + output) * LINE
            _link(axes, start, (x, y), COLORS[of_kind])
        first = top - (1.9 + max(len(links(inputs)), len(OUTPUTS[kind]))) * LINE
        for row, text in enumerate(widgets(inputs)):
            axes.text(x + 0.09, first - row * LINE, text, va="center", color="#55555f", zorder=3, fontsize=6.5)
    axes.set(xlim=(-0.3, right + 0.3), ylim=(low - 0.15, 0.15))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, facecolor="white")
    pyplot.close(figure)


def _link(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    """A curve that leaves and arrives horizontally, behind the nodes."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    bend = max(0.35, (end[0] - start[0]) / 2)
    points = [start, (start[0] + bend, start[1]), (end[0] - bend, end[1]), end]
    axes.add_patch(PathPatch(Curve(points, [Curve.MOVETO, *[Curve.CURVE4] * 3]), facecolor="none", edgecolor=color, lw=1.3, zorder=1))


def main() -> None:
    """Write or check all files."""
    for name, make in WORKFLOWS.items():
        path = FOLDER / f"{name}.json"
        if "--check" in sys.argv:
            assert path.read_text() == workflow(make()), f"{path} is not what the script writes"
        else:
            path.write_text(workflow(make()))
            draw(make(), path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
