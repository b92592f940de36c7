"""The example workflows: they are what their script writes, fit the nodes, and run from start to end at a small size."""

from __future__ import annotations

import json
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scalediff.comfy import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from tests.scalediff.comfy.host import StandIn
from tests.scalediff.comfy.test_nodes import cond, sample_node

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "docs" / "guide" / "comfy"
SCRIPT = runpy.run_path(str(ROOT / "docs" / "site" / "comfy_graphs.py"))
Graph = dict[str, Any]

every_workflow = pytest.mark.parametrize("name", SCRIPT["WORKFLOWS"])


def graph_of(name: str) -> Graph:
    graph: Graph = json.loads((FOLDER / f"{name}.json").read_text())
    return graph


@every_workflow
def test_files_are_what_the_script_writes(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text() == SCRIPT["workflow"](SCRIPT["WORKFLOWS"][name]())


def test_every_workflow_has_a_picture_on_the_page() -> None:
    page = (ROOT / "docs" / "guide" / "comfyui.md").read_text()
    assert {path.stem for path in FOLDER.glob("*.json")} == set(SCRIPT["WORKFLOWS"]) == {path.stem for path in FOLDER.glob("*.svg")}
    for name in SCRIPT["WORKFLOWS"]:
        assert f"(comfy/{name}.svg)" in page
        assert f"(comfy/{name}.json)" in page
        picture = (FOLDER / f"{name}.svg").read_text()
        titles = [node["_meta"]["title"] for node in graph_of(name).values()]
        shown = re.findall(r">([^<>]+)</text>", picture)
        assert sorted(text for text in shown if text in titles) == sorted(titles)


@every_workflow
def test_our_nodes_have_all_their_inputs(host: StandIn, name: str) -> None:
    mine = [node for node in graph_of(name).values() if node["class_type"].startswith("ScaleDiff")]
    assert mine
    for node in mine:
        required = NODE_CLASS_MAPPINGS[node["class_type"]].INPUT_TYPES()["required"]
        assert set(node["inputs"]) == set(required)
        assert node["_meta"]["title"] == NODE_DISPLAY_NAME_MAPPINGS[node["class_type"]]
        for key, (kind, *_) in required.items():
            value = node["inputs"][key]
            if kind in ("MODEL", "VAE", "LATENT", "CONDITIONING"):
                source, output = value
                of = graph_of(name)[source]["class_type"]
                assert SCRIPT["OUTPUTS"][of][output] == kind
            elif isinstance(kind, list) and key not in ("sampler_name", "scheduler"):  # those are ComfyUI's
                assert value in kind


def run(graph: Graph, nodes: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    """Contract (execution.py): every node once, after the nodes that it is linked to; a result may be a dictionary with `result`."""
    done: dict[str, Any] = {}

    def result(key: str) -> Any:
        if key not in done:
            node = graph[key]
            inputs = {name: result(v[0])[v[1]] if isinstance(v, list) else v for name, v in node["inputs"].items()}
            kind = node["class_type"]
            if kind in NODE_CLASS_MAPPINGS:
                cls = NODE_CLASS_MAPPINGS[kind]
                out = getattr(cls(), cls.FUNCTION)(**inputs)
            else:
                out = nodes[kind](**inputs)
            done[key] = out["result"] if isinstance(out, dict) else out
        return done[key]

    for key in graph:
        result(key)
    return done


@every_workflow
def test_a_workflow_runs(host: StandIn, name: str) -> None:
    """At a sixteenth of its size, with few steps."""
    graph, saved = graph_of(name), list[torch.Tensor]()
    for node in graph.values():
        inputs = node["inputs"]
        small = {"steps": 4, "preset": "custom", "restart": 0.5, "lfm_cutoff": 0.5, "sg_cutoff": 0.5, "window_height": 8, "window_width": 8}
        small |= {"sampler_name": "euler", "scheduler": "simple"}
        inputs |= {key: value for key, value in small.items() if key in inputs}
        inputs |= {key: inputs[key] // 16 for key in ("width", "height") if key in inputs}
    sdxl, flux = (host.specimen(of).model(dtype=torch.float32) for of in ("SDXL", "FLUX"))
    if name == "flux":
        for node in graph.values():  # 8 tokens of FLUX are 128 pixels
            node["inputs"] |= {key: 512 for key in ("width", "height") if key in node["inputs"]}
    vae = host.vae()
    nodes: dict[str, Callable[..., Any]] = {
        "CheckpointLoaderSimple": lambda ckpt_name: (sdxl, "clip", vae),
        "UNETLoader": lambda unet_name, weight_dtype: (flux,),
        "DualCLIPLoader": lambda clip_name1, clip_name2, type: ("clip",),
        "VAELoader": lambda vae_name: (vae,),
        "CLIPTextEncode": lambda text, clip: (cond(len(text)),),
        "FluxGuidance": lambda conditioning, guidance: (conditioning,),
        "ConditioningZeroOut": lambda conditioning: (conditioning,),
        "EmptyLatentImage": lambda width, height, batch_size: ({"samples": torch.zeros(batch_size, 4, height // 8, width // 8)},),
        "KSampler": sample_node,
        "VAEDecode": lambda samples, vae: (vae.decode(samples["samples"]),),
        "SaveImage": lambda images, filename_prefix: saved.append(images) or (),
    }
    done = run(graph, nodes)
    sizes = {"sdxl-stages": (256, 256), "sdxl-cascade": (192, 256), "flux": (512, 512)}
    assert [tuple(picture.shape) for picture in saved] == [(1, *sizes[name], 3)]
    reports = [done[key][1] for key, node in graph.items() if node["class_type"] == "ScaleDiffReport"]
    assert all("attention blocks in windows" in report for report in reports)
