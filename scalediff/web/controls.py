"""The controls of the page: one Gradio component for every name in `FIELDS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr

from scalediff.cascade.pipeline import cascade_of, size_multiple
from scalediff.patching.networks import denoiser_of
from scalediff.web.jobs import CHOICES, default_values, method_label

EXAMPLE = "a full moon over snowy mountains at night"


def add_prompt(pipe: Any, *, example: bool) -> dict[str, Any]:
    """What every picture needs: the prompt, the size and the seed."""
    values, multiple = default_values(pipe), size_multiple(pipe)
    prompt = gr.Textbox(EXAMPLE if example else "", label="Prompt", lines=2, max_lines=6, placeholder=EXAMPLE, elem_id="sd-prompt")
    with gr.Row():
        height = gr.Number(values["height"], label="Height", precision=0, step=multiple, min_width=70, elem_id="sd-height")
        width = gr.Number(values["width"], label="Width", precision=0, step=multiple, min_width=70, elem_id="sd-width")
        seed = gr.Number(values["seed"], label="Seed", precision=0, step=1, min_width=70, elem_id="sd-seed")
    return {"prompt": prompt, "height": height, "width": width, "seed": seed}


def add_method(pipe: Any) -> dict[str, Any]:
    """Which method draws, and the parts of ScaleDiff."""
    values = default_values(pipe)
    methods = [(method_label(name), name) for name in CHOICES["method"]]
    method = gr.Radio(methods, value=values["method"], label="Method")
    attention = gr.Radio(
        [("neighborhood patches", "npa"), ("full", "full")], value=values["attention"], label="Attention above the native size"
    )
    with gr.Row():
        lfm = gr.Checkbox(values["lfm"], label="Latent frequency mixing", min_width=140)
        sg = gr.Checkbox(values["sg"], label="Structure guidance", min_width=140)
    with gr.Row():
        restart = _text(values, "restart", "Restart")
        lfm_cutoff = _text(values, "lfm_cutoff", "Mixing cutoff")
        sg_cutoff = _text(values, "sg_cutoff", "Guidance cutoff")
    return {
        "method": method,
        "attention": attention,
        "lfm": lfm,
        "sg": sg,
        "restart": restart,
        "lfm_cutoff": lfm_cutoff,
        "sg_cutoff": sg_cutoff,
    }


def add_change(pipe: Any) -> dict[str, Any]:
    """How much of an uploaded picture changes."""
    empty = "0 to 1; empty: add detail to the picture"
    return {"strength": gr.Textbox(default_values(pipe)["strength"], label="Strength", placeholder=empty, elem_id="sd-strength")}


def add_sampling(pipe: Any) -> dict[str, Any]:
    """Preset, steps, guidance, and the settings that are seldom changed."""
    values, presets = default_values(pipe), list(cascade_of(pipe).presets(denoiser_of(pipe)))
    negative = gr.Textbox(values["negative_prompt"], label="Negative prompt", lines=1)
    with gr.Row():
        preset = gr.Dropdown(presets, value=values["preset"], label="Preset", min_width=100)
        steps = gr.Number(values["steps"], label="Steps", precision=0, step=1, min_width=80)
        guidance_scale = gr.Number(values["guidance_scale"], label="Guidance scale", step=0.5, min_width=80)
    with gr.Row():
        guidance_until = _text(values, "guidance_until", "Guidance until")
        sg_cutoff_start = _text(values, "sg_cutoff_start", "Cutoff at the first step")
        jitter = _choice(values, "jitter", "Jitter")
    with gr.Row():
        kind = _choice(values, "filter", "Filter")
        anchor = _choice(values, "anchor", "Anchor of the guidance")
        conditioning = _choice(values, "size_conditioning", "Size conditioning")
        wrap = _choice(values, "wrap", "Seamless along")
    sizes = gr.Textbox(
        values["sizes"],
        label="Size of every stage",
        placeholder="64x64, 128x128, 256x256; empty: each is twice the one before, of an uploaded picture those larger than it",
    )
    return {
        "negative_prompt": negative, "preset": preset, "steps": steps, "guidance_scale": guidance_scale, "guidance_until": guidance_until,
        "sg_cutoff_start": sg_cutoff_start, "jitter": jitter, "filter": kind, "anchor": anchor, "size_conditioning": conditioning,
        "wrap": wrap, "sizes": sizes,
    }  # fmt: skip


def add_memory(pipe: Any) -> dict[str, Any]:
    """What costs or saves memory and time."""
    values = default_values(pipe)
    with gr.Row():
        tiling = _choice(values, "vae_tiling", "Autoencoder in parts")
        attention = _choice(values, "vae_attention", "Its attention")
    split = gr.Checkbox(values["split_guidance"], label="Run the two passes of guidance one after the other")
    force = gr.Checkbox(values["force"], label="Run even if the memory is too small by estimate")
    preview = gr.Checkbox(values["preview"], label="Show previews of the unfinished picture")
    return {"vae_tiling": tiling, "vae_attention": attention, "split_guidance": split, "force": force, "preview": preview}


def _text(values: Mapping[str, Any], name: str, label: str) -> Any:
    """A field for one number, or one for each stage."""
    return gr.Textbox(values[name], label=label, min_width=90)


def _choice(values: Mapping[str, Any], name: str, label: str) -> Any:
    return gr.Dropdown(list(CHOICES[name]), value=values[name], label=label, min_width=90)
