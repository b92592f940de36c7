"""What each of two processes computes with a network whose batch is halved, and with a U-Net that has residuals of others."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

import scalediff
from bench.models.zoo import WINDOW, ZOO
from scalediff import Layout, Sequence
from scalediff.patching.halves import Halves
from scalediff.patching.patch_networks import patch_networks
from tests.conftest import seeded
from tests.scalediff.patching.ranks import GRID, build, built, draw, in_parallel, output
from tests.scalediff.patching.row_ranks import UNET_GRID, unet_inputs

BATCH_SECOND = ("encoder_hidden_states_llama3",)  # of HiDream-I1: layers come first


def halved(kind: str) -> dict[str, Any]:
    """A network whose batch is halved above its native size; with an odd batch, and after the patch."""
    model, given, batches = ZOO[kind].build().double(), unet_inputs(kind, grid_of(kind)), list[int]()
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",))
    with scalediff.patch_model(model, window=WINDOW, mesh=mesh) as handle:
        first = next(part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear))
        hook = first.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
        above, calls = output(model, given), {row.status for row in handle.report.rows if row.role in ("self", "joint")}
        single = output(model, first_sample(given))
        native = output(model, unet_inputs(kind, WINDOW))
        hook.remove()
    return {"above": above, "single": single, "native": native, "batches": batches, "calls": calls}


def grid_of(kind: str) -> tuple[int, int]:
    return (8, 8) if kind == "DiT" else GRID  # its class takes square pictures alone


def drawn_in_halves() -> dict[str, Any]:
    """A picture of SD3 by the whole cascade, with guidance in every step."""
    pipe, prompt = built("SD3")
    batches: list[int] = []
    pipe.transformer.proj_out.register_forward_pre_hook(lambda module, args: batches.append(args[0].shape[0]))
    latents = draw(pipe, prompt, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",)))
    return {"latents": latents, "batches": batches}


def first_sample(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for the first of two samples."""
    return {name: _half(x, axis=int(name in BATCH_SECOND)) for name, x in given.items()}


def _half(value: Any, *, axis: int = 0) -> Any:
    if isinstance(value, dict):
        return {name: _half(x) for name, x in value.items()}
    if isinstance(value, list):
        return [_half(x) for x in value]
    return value.narrow(axis, 0, 1) if isinstance(value, Tensor) and value.ndim > axis and value.shape[axis] == 2 else value


def controlled(guidance: int) -> dict[str, Tensor]:
    """A U-Net with residuals of a ControlNet, which is patched beside it, and with those of an adapter."""
    world = distributed.get_world_size()
    mesh: Any = init_device_mesh("cpu", (world,))
    if guidance > 1:
        mesh = init_device_mesh("cpu", (guidance, world // guidance), mesh_dim_names=("guidance", "rows"))
    return with_control(mesh)


class Pipe:
    """Networks that are patched together."""

    def __init__(self, **networks: nn.Module) -> None:
        self.__dict__ |= networks

    def __call__(self) -> None: ...


def with_control(mesh: Any) -> dict[str, Tensor]:
    unet, net = (ZOO[kind].build().double() for kind in ("SD1.5", "ControlNet"))
    pipe, found = Pipe(unet=unet, controlnet=net), dict[str, Tensor]()
    with patch_networks(pipe, window=WINDOW, mesh=mesh) as handle, torch.no_grad():
        control = net(**unet_inputs("ControlNet", UNET_GRID), return_dict=False)
        residuals = {"down_block_additional_residuals": control[0], "mid_block_additional_residual": control[1]}
        found["ControlNet"] = output(unet, unet_inputs("SD1.5", UNET_GRID) | residuals)
        assert any(row.module.startswith("controlnet.") and row.status == "patched" for row in handle.report.rows)
        adapter = list(control[0][1::2])
        found["adapter"] = output(unet, unet_inputs("SD1.5", UNET_GRID) | {"down_intrablock_additional_residuals": adapter})
    return found


def sd3_with_control(mesh: Any) -> Tensor:
    """SD3 with residuals of its ControlNet."""
    transformer, net = (ZOO[kind].build().double() for kind in ("SD3", "SD3 ControlNet"))
    with patch_networks(Pipe(transformer=transformer, controlnet=net), window=WINDOW, mesh=mesh), torch.no_grad():
        control = net(**unet_inputs("SD3 ControlNet", GRID), return_dict=False)[0]
        return output(transformer, unet_inputs("SD3", GRID) | {"block_controlnet_hidden_states": control})


def halved_control() -> Tensor:
    return sd3_with_control(init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",)))


def own_network() -> dict[str, Any]:
    """What a network of no known family returns: a tensor, a tuple, and what has no output."""
    halves, x = Halves(init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",)), ("x",)), torch.arange(8.0).reshape(2, 1, 4)
    rank = distributed.get_rank()
    found: dict[str, Any] = {"tensor": halves.run(nn.Identity(), lambda x: x + rank, (x,), {})}
    found["tuple"] = halves.run(nn.Identity(), lambda x: (x + rank, "more"), (), {"x": x})
    try:
        halves.run(nn.Identity(), lambda x: {"x": x}, (x,), {})
    except NotImplementedError as error:
        found["dict"] = str(error)
    return found


class Joint(nn.Module):
    """A network of no known family: attention of texts, padded to the longest of the batch, and 4 x 4 tokens, or more rows."""

    def forward(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        text = tokens.new_ones(len(tokens), tokens.shape[1], int(lengths.max()), tokens.shape[3])
        x = torch.cat([text, tokens], dim=2)
        return nn.functional.scaled_dot_product_attention(x, x, x)[:, :, text.shape[2] :]


def ragged_halves() -> Tensor:
    """A network whose length depends on the texts of its batch; first at its native size, where both ranks compute all of it."""
    return joint([6, 3], init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",)))


def joint(lengths: list[int], mesh: Any = None) -> Tensor:
    def layout(arguments: dict[str, Any]) -> Layout:
        grid = (arguments["tokens"].shape[2] // 4, 4)
        return Layout(grid, (Sequence(grid, text=int(arguments["lengths"].max())),))

    model, tokens = Joint(), torch.randn(1, 1, 32, 8, generator=seeded()).repeat(len(lengths), 1, 1, 1)
    with scalediff.patch_model(model, layout=layout, window=(4, 4), mesh=mesh), torch.no_grad():
        model(tokens[:, :, :16], torch.tensor(lengths))
        out: Tensor = model(tokens, torch.tensor(lengths))
    return out


def refused_halves() -> dict[str, str]:
    """What is raised where a batch cannot be halved."""
    said = dict[str, str]()
    guidance = init_device_mesh("cpu", (2,), mesh_dim_names=("guidance",))
    both = init_device_mesh("cpu", (2, 1), mesh_dim_names=("guidance", "rows"))
    parallel = build("FLUX.1")
    in_parallel(parallel)
    one = init_device_mesh("cpu", (2, 1), mesh_dim_names=("rows", "guidance"))["guidance"]
    for name, model, mesh in (("parallel", parallel, guidance), ("FLUX.1", build("FLUX.1"), both), ("ranks", build("Chroma"), one)):
        try:
            scalediff.patch_model(model, window=WINDOW, mesh=mesh)
        except (ValueError, NotImplementedError) as error:
            said[name] = str(error)
    try:
        pipe = Pipe(transformer=ZOO["FLUX.1"].build(), controlnet=ZOO["FLUX.1 ControlNet"].build())
        patch_networks(pipe, window=WINDOW, mesh=distributed.group.WORLD)
    except NotImplementedError as error:
        said["control"] = str(error)
    model = ZOO["SD3"].build().double()
    lists = ZOO["Z-Image"].build().double()
    attempts: dict[str, Callable[[], Any]] = {"list": lambda: output(lists, unet_inputs("Z-Image", GRID))}
    attempts["gradients"] = lambda: model(**unet_inputs("SD3", GRID))
    with scalediff.patch_model(model, window=WINDOW, mesh=guidance), scalediff.patch_model(lists, window=WINDOW, mesh=guidance):
        for name, attempt in attempts.items():
            try:
                attempt()
            except NotImplementedError as error:
                said[name] = str(error)
    return said


_KINDS = (
    "SD3", "PixArt", "HunyuanDiT", "AuraFlow", "Lumina 2", "PRX", "CogView4", "Qwen-Image", "SDXL", "HiDream-I1", "Bria FIBO",
    "Lumina-Next", "DiT",
)  # fmt: skip
HALVED = {f"{kind} in halves": functools.partial(halved, kind) for kind in _KINDS}
CONTROLLED = {f"control, {guidance} halves": functools.partial(controlled, guidance) for guidance in (1, 2)}
CASES: dict[str, Callable[[], Any]] = (
    HALVED | CONTROLLED | {case.__name__: case for case in (drawn_in_halves, halved_control, own_network, ragged_halves, refused_halves)}
)
