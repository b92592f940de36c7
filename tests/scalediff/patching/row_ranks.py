"""What each of several processes computes with a model whose pictures are split by rows, `patch_model(mesh=)`."""

from __future__ import annotations

import functools
import os
import tempfile
import warnings
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.command.ranks import drawing_together, own_jobs
from scalediff.command.reporting import Job
from scalediff.patching.networks import handle_of
from scalediff.patching.subclass import is_patched
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built
from tests.scalediff.patching.ranks import GRID, HOLES, NATIVE, PLANNED, build, draw, in_parallel, inputs, output

UNET_GRID = (16, 12)


def by_rows(kind: str, rule: str) -> dict[str, Any]:
    """The model with its pictures split by rows: above and at its native size, and after the patch, without the split."""
    world = distributed.get_world_size()
    heads = max(2, world)
    text = 2 * heads if heads > 2 else 6
    model = build(kind, heads=heads)
    before = state_of(model)
    mesh = init_device_mesh("cpu", (world,))
    with scalediff.patch_model(model, window=WINDOW, text_queries=rule, jitter="alternate", mesh=mesh) as handle:
        native = output(model, inputs(kind, NATIVE, text=text))
        handle.restart_jitter()
        lengths = lengths_of_linear_layers(model)
        above, moved = output(model, inputs(kind, GRID, text=text)), output(model, inputs(kind, GRID, text=text))
        report, tokens = handle.report, sorted(set(lengths))
    found = {"above": above, "moved": moved, "native": native, "tokens": tokens}
    found["calls"] = [(row.status, row.taken, row.left) for row in report.rows]
    return found | {"restored": state_of(model) == before, "alone": output(model, inputs(kind, GRID, text=text))}


def patched_again() -> dict[str, Any]:
    """A model whose split is replaced by the same again, and that is unpatched then."""
    model, everyone = build("FLUX.1"), distributed.group.WORLD
    before = state_of(model)
    scalediff.patch_model(model, window=WINDOW, mesh=everyone)
    with scalediff.patch_model(model, window=WINDOW, mesh=everyone):
        above = output(model, inputs("FLUX.1", GRID))
    return {"above": above, "restored": state_of(model) == before}


def odd_heads() -> dict[str, Tensor]:
    """A number of heads that the processes do not divide."""
    model = build("FLUX.1", heads=3)
    with scalediff.patch_model(model, window=WINDOW, mesh=distributed.group.WORLD):
        return {name: output(model, inputs("FLUX.1", grid, text=6)) for name, grid in (("native", NATIVE), ("above", GRID))}


def unet_by_rows(kind: str, guidance: int) -> dict[str, Any]:
    """A U-Net above its native size, by both ways to return its output, and at it; with `guidance` halves of the batch."""
    model, world = ZOO[kind].build().double(), distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world,))
    if guidance > 1:
        mesh = init_device_mesh("cpu", (guidance, world // guidance), mesh_dim_names=("guidance", "rows"))
    functions = F.conv2d, F.group_norm, F.scaled_dot_product_attention
    with scalediff.patch_model(model, window=WINDOW, jitter="alternate", mesh=mesh) as handle:
        rows: list[tuple[int, int]] = []
        model.conv_in.register_forward_pre_hook(lambda module, args: rows.append((args[0].shape[0], args[0].shape[2])))
        above, report = output(model, unet_inputs(kind, UNET_GRID)), handle.report
        with torch.no_grad():
            moved = model(**unet_inputs(kind, UNET_GRID)).sample
        native = output(model, unet_inputs(kind, WINDOW))
        dry = [row.status for row in handle.check(**unet_inputs(kind, WINDOW)).rows]
        handle.attention = "full"
        full = output(model, unet_inputs(kind, UNET_GRID))
    assert functions == (F.conv2d, F.group_norm, F.scaled_dot_product_attention)
    calls = [row.status for row in report.rows]
    return {"above": above, "moved": moved, "native": native, "full": full, "rows": rows, "calls": calls, "dry": dry}


def unet_inputs(kind: str, grid: tuple[int, int]) -> dict[str, Any]:
    def doubled(x: Any) -> Any:
        if isinstance(x, dict):
            return {name: doubled(value) for name, value in x.items()}
        if isinstance(x, list):
            return [doubled(value) for value in x]
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    found: dict[str, Any] = doubled(ZOO[kind].inputs(Draw(1), grid, 2))
    return found


def refused_unets() -> dict[str, str]:
    """What a split U-Net cannot take; afterwards nothing is replaced any more."""
    said, functions = dict[str, str](), (F.conv2d, F.group_norm)
    model, given = ZOO["SD1.5"].build().double(), unet_inputs("SD1.5", UNET_GRID)
    try:
        scalediff.patch_model(model, mesh=init_device_mesh("cpu", (1, distributed.get_world_size()), mesh_dim_names=("guidance", "rows")))
    except ValueError as error:
        said["mesh"] = str(error)
    with scalediff.patch_model(model, window=WINDOW, mesh=distributed.group.WORLD):
        odd = unet_inputs("SD1.5", (UNET_GRID[0] + 2, UNET_GRID[1]))
        for name, arguments in (("rows", odd), ("FreeU", given)):
            if name == "FreeU":
                model.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
            try:
                output(model, arguments)
            except (ValueError, NotImplementedError) as error:
                said[name] = str(error)
    said |= unsplit_attention()
    assert functions == (F.conv2d, F.group_norm)
    return said


def unsplit_attention() -> dict[str, str]:
    """What a U-Net says of attention that would see one band or one half alone."""
    from diffusers.models.attention_processor import AttnProcessor, PAGCFGIdentitySelfAttnProcessor2_0

    given, everyone, said = unet_inputs("SD1.5", UNET_GRID), distributed.group.WORLD, dict[str, str]()
    halves = init_device_mesh("cpu", (2, 1), mesh_dim_names=("guidance", "rows"))
    columns = {"masks": {"cross_attention_kwargs": {"ip_adapter_masks": [torch.ones(1, 1, 16, 12)]}}}
    columns["tokens"] = {"encoder_hidden_states": Draw(3)(2, 24, given["encoder_hidden_states"].shape[-1]).double()}
    processors: dict[str, Any] = {"PAG": PAGCFGIdentitySelfAttnProcessor2_0, "own": AttnProcessor}
    for name in (*columns, *processors):
        model = ZOO["SD1.5"].build().double()
        if name in processors:
            next(part for one, part in model.named_modules() if one.endswith("attn1")).set_processor(processors[name]())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            handle = scalediff.patch_model(model, window=WINDOW, strict=False, mesh=halves if name == "PAG" else everyone)
        try:
            output(model, given | columns.get(name, {}))
        except (ValueError, NotImplementedError) as error:
            said[name] = str(error)
        handle.remove()
    return said


def demo_by_rows() -> Tensor:
    """A picture of the embedded model, of two stages."""
    return drawn_demo(distributed.group.WORLD)


def lost_in_a_pass(kind: str, grid: tuple[int, int], end: Callable[[], None]) -> None:
    """A rank ends in the middle of a pass: of a pipeline's U-Net, or of a transformer."""
    torch.accelerator.device_count = lambda: 1
    if kind == "demo":
        pipe = scalediff.load_demo().to(torch.float64)
        pipe.unet.mid_block.register_forward_hook(lambda module, args, out: end() if args[0].shape[2] == 8 else None)  # half of 16 rows
        with scalediff.patch_model(pipe, mesh=distributed.group.WORLD):
            latents_of_demo(pipe)
    model = build(kind)
    model.transformer_blocks[0].register_forward_hook(lambda module, args, out: end())
    with scalediff.patch_model(model, window=WINDOW, mesh=distributed.group.WORLD):
        output(model, inputs(kind, grid))


def out_of_memory(end: Callable[[], None]) -> None:
    """A rank runs out of memory in a stage of the cascade above the native size."""
    pipe, rank = scalediff.load_demo(), distributed.get_rank()

    def allocate(module: Any, args: tuple[Tensor, ...], out: Any) -> None:
        if rank == 1 and args[0].shape[2] == 8:  # half of 16 rows
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 bytes")

    pipe.unet.mid_block.register_forward_hook(allocate)
    latents_of_demo(pipe, mesh=distributed.group.WORLD)


def compiled_unet() -> dict[str, Any]:
    """A compiled U-Net whose rows are split, the number of its graphs, and what is said of them."""
    model, graphs = ZOO["SD1.5"].build().double(), list[Any]()
    model.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)  # type: ignore[func-returns-value]
    with warnings.catch_warnings(record=True) as said, scalediff.patch_model(model, window=WINDOW, mesh=distributed.group.WORLD):
        warnings.simplefilter("always")
        above = [output(model, unet_inputs("SD1.5", UNET_GRID)) for _ in range(2)]
    return {"above": above, "graphs": len(graphs), "said": [str(one.message) for one in said if "scalediff" in str(one.message)]}


def drawn_demo(mesh: Any) -> Tensor:
    pipe = scalediff.load_demo().to(torch.float64)
    with scalediff.patch_model(pipe, mesh=mesh):
        return latents_of_demo(pipe)


def latents_of_demo(pipe: Any, **options: Any) -> Tensor:
    made = scalediff.generate(pipe, "a full moon", height=128, width=64, steps=2, restart=0.5, generator=seeded(), **options)
    latents: Tensor = made.stages[-1].latents
    return latents


def generated_by_rows() -> dict[str, Any]:
    """A picture that is split for its run alone; and what is said of a patched pipeline, wrap, and ranks with different weights."""
    pipe, everyone = scalediff.load_demo().to(torch.float64), distributed.group.WORLD
    rows: list[int] = []
    hook = pipe.unet.conv_in.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[2]))
    found: dict[str, Any] = {"latents": latents_of_demo(pipe, mesh=everyone), "rows": sorted(set(rows))}
    hook.remove()
    found["restored"] = handle_of(pipe) is None and not is_patched(pipe.unet)
    with scalediff.patch_model(pipe):
        try:
            latents_of_demo(pipe, mesh=everyone)
        except ValueError as error:
            found["patched"] = str(error)
    attempts: dict[str, Callable[[], Any]] = {
        "wrap": lambda: latents_of_demo(pipe, mesh=everyone, wrap=(False, True)),
        "patched wrap": lambda: scalediff.patch_model(pipe, mesh=everyone, wrap=(False, True)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
        except NotImplementedError as error:
            found[name] = str(error)
    found["restored"] &= handle_of(pipe) is None and not is_patched(pipe.unet)
    next(pipe.unet.parameters()).data.add_(distributed.get_rank())
    try:
        latents_of_demo(pipe, mesh=everyone)
    except ValueError as error:
        found["weights"] = str(error)
    return found


def state_of(model: Any) -> dict[str, Any]:
    """What the attributes of every module are, without its parts."""
    parts = model.named_modules()
    return {name: {key: id(x) for key, x in part.__dict__.items() if key != "_parallel_config"} for name, part in parts} | {
        "parallel": model._parallel_config
    }


def lengths_of_linear_layers(model: Any) -> list[int]:
    """Tokens that pass through the first block's projections, filled in by later calls."""
    lengths: list[int] = []
    model.transformer_blocks[0].attn.to_q.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    return lengths


def refused_by_rows() -> dict[str, str]:
    """What is raised where a model or a picture cannot be split, and where ranks differ."""
    world, said = distributed.get_world_size(), dict[str, str]()

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            work()
            said[name] = ""
        except (ValueError, NotImplementedError, UserWarning) as error:
            said[name] = str(error)

    everyone = distributed.group.WORLD
    attempt("family", lambda: scalediff.patch_model(build("Chroma"), window=WINDOW, mesh=everyone))
    parallel = build("FLUX.1")
    in_parallel(parallel)
    attempt("parallel", lambda: scalediff.patch_model(parallel, window=WINDOW, mesh=everyone))
    seed = distributed.get_rank()
    attempt("seed", lambda: scalediff.patch_model(build("FLUX.1"), window=WINDOW, seed=seed, mesh=everyone))
    model = build("FLUX.1")
    next(model.parameters()).data.add_(seed)
    attempt("weights", lambda: scalediff.patch_model(model, window=WINDOW, mesh=everyone))
    few = distributed.new_group([0])
    if seed == 0:
        attempt("few", lambda: scalediff.patch_model(build("FLUX.1"), window=WINDOW, mesh=few))
    before, torch.accelerator.device_count = torch.accelerator.device_count, lambda: 0
    attempt("accelerator", lambda: scalediff.patch_model(build("FLUX.1"), window=WINDOW, mesh=everyone))
    torch.accelerator.device_count = before
    masked = build("Qwen-Image")
    with scalediff.patch_model(masked, window=WINDOW, mesh=everyone):
        attempt("mask", lambda: output(masked, inputs("Qwen-Image", GRID) | {"encoder_hidden_states_mask": HOLES}))
    model = build("FLUX.1")
    with scalediff.patch_model(model, window=WINDOW, mesh=everyone):
        attempt("rows", lambda: output(model, inputs("FLUX.1", (7, 2 * world * 2))))
        prompt = inputs("FLUX.1", GRID)
        prompt["encoder_hidden_states"] += seed
        attempt("prompt", lambda: output(model, prompt))
        attempt("size", lambda: output(model, inputs("FLUX.1", (8, 6) if seed == 0 else (6, 8))))
        attempt("gradients", lambda: model(**inputs("FLUX.1", GRID), return_dict=False))
    with scalediff.patch_model(model, window=WINDOW, jitter="alternate", mesh=everyone) as handle:
        output(model, inputs("FLUX.1", GRID))
        if seed == 1:
            handle.restart_jitter()
        attempt("jitter", lambda: output(model, inputs("FLUX.1", GRID)))
    return said


def missing_pictures() -> dict[str, Any]:
    """What the processes draw together if each sees another folder, and if they have other lists of pictures."""
    rank, found = distributed.get_rank(), dict[str, Any]()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(distributed.get_world_size())}
    options = Namespace(split_picture=True, skip_existing=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = [Job("a moon", seed, Path(folder) / f"{seed}.png") for seed in range(3)]
        jobs[rank].out.touch()
        found["drawn"] = [job.seed for job in own_jobs(options, jobs)]
        try:
            own_jobs(options, jobs[rank:])
        except ValueError as error:
            found["numbers"] = str(error)
    return found


def drawn_by_rows() -> dict[str, Any]:
    """A picture of the whole cascade, of three stages; and what the command's --split-picture does with the pipeline."""
    pipe, prompt = built("FLUX")
    latents = draw(pipe, prompt, mesh=distributed.group.WORLD)
    os.environ |= {"RANK": str(distributed.get_rank()), "WORLD_SIZE": str(distributed.get_world_size())}
    with drawing_together(Namespace(split_picture=True), pipe) as saves:
        split = pipe.transformer._parallel_config is not None
    return {"latents": latents, "saves": saves, "split": split, "after": pipe.transformer._parallel_config}


BY_ROWS: dict[str, Callable[[], dict[str, Any]]] = {
    f"{kind} by rows, {rule}": functools.partial(by_rows, kind, rule) for kind in PLANNED for rule in ("window", "global")
}
UNETS = {
    f"{kind} by rows, {guidance} halves": functools.partial(unet_by_rows, kind, guidance)
    for kind, guidance in (("SD1.5", 1), ("SDXL", 1), ("SDXL", 2), ("U-Net without text", 1))
}
OTHERS = (
    refused_by_rows, patched_again, missing_pictures, drawn_by_rows, odd_heads, refused_unets, compiled_unet, demo_by_rows,
    generated_by_rows,
)  # fmt: skip
CASES: dict[str, Callable[[], Any]] = BY_ROWS | UNETS | {case.__name__: case for case in OTHERS}
