"""What each of several processes computes with a model of diffusers under context parallelism."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff import Layout, Sequence
from scalediff.cascade.pipeline import native_size
from scalediff.patching import interception
from tests import processes
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built

GRID, NATIVE, UNEVEN = (8, 6), (4, 4), (7, 5)
PLANNED = ("FLUX.1", "FLUX.2", "Qwen-Image")  # their classes have a plan for context parallelism
HOLES = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
IMPORTED = (
    "diffusers.models.transformers.transformer_flux", "diffusers.models.transformers.transformer_flux2",
    "diffusers.models.transformers.transformer_qwenimage", "diffusers.models.transformers.transformer_chroma",
    "diffusers.hooks.context_parallel", "torch.distributed.device_mesh",
)  # fmt: skip


def run(world: int, cases: Mapping[str, Callable[[], Any]], folder: Path, *, seconds: float = 600) -> list[dict[str, Any]]:
    """What the cases return in each of `world` processes, by name; errors as in `processes.run`."""
    found: list[dict[str, Any]] = processes.run(functools.partial(_work, dict(cases)), world, folder, imported=IMPORTED, seconds=seconds)
    return found


def _work(cases: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and without an accelerator it is zero
    warnings.filterwarnings("error", message="scalediff")
    return {name: case() for name, case in cases.items()}


def build(kind: str, *, heads: int = 2) -> nn.Module:
    """A small model in fp64."""
    return replace(ZOO[kind], config=ZOO[kind].config | {"num_attention_heads": heads}).build().double()


def inputs(kind: str, grid: tuple[int, int], *, text: int = 6, batch: int = 2) -> dict[str, Any]:
    """Its arguments, with another number of text tokens; prompts of Qwen-Image have different lengths."""
    found = ZOO[kind].inputs(Draw(1), grid, batch)
    found = {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in found.items()}
    found["encoder_hidden_states"] = Draw(2)(batch, text, 32).double()
    if "txt_ids" in found:
        found["txt_ids"] = found["txt_ids"].new_zeros(text, found["txt_ids"].shape[-1])
    if kind == "FLUX.2":  # its plan splits ids with a batch
        found |= {name: found[name][None] for name in ("img_ids", "txt_ids")}
    if "encoder_hidden_states_mask" in found:
        found["encoder_hidden_states_mask"] = torch.arange(text) < text - 2 * torch.arange(batch)[:, None]
    return found


@torch.no_grad()
def output(model: Any, arguments: dict[str, Any]) -> Tensor:
    out: Tensor = model(**arguments, return_dict=False)[0]
    return out


def in_parallel(model: Any, *, plan: Any = None, **options: Any) -> None:
    """Enable Ulysses attention over all processes, or what the options say."""
    from diffusers import ContextParallelConfig

    config = ContextParallelConfig(**options or {"ulysses_degree": distributed.get_world_size()})
    model.enable_parallelism(config=config, cp_plan=plan)


# Every case returns what a test looks at; all processes run all of them, in the same order.


def patched(kind: str, rule: str, patch_first: bool) -> dict[str, Any]:
    """The model above and at its native size, and there without the patch."""
    heads = max(2, distributed.get_world_size())
    text = 2 * heads if heads > 2 else 6
    model, changes = build(kind, heads=heads), {"window": WINDOW, "text_queries": rule}
    if patch_first:
        handle = scalediff.patch_model(model, **changes)
        in_parallel(model)
    else:
        in_parallel(model)
        handle = scalediff.patch_model(model, **changes)
    native = output(model, inputs(kind, NATIVE, text=text))
    above, report = output(model, inputs(kind, GRID, text=text)), handle.report
    handle.remove()
    return {
        "above": above, "native": native, "calls": [(row.status, row.taken, row.left) for row in report.rows],
        "unpatched": output(model, inputs(kind, GRID, text=text)), "unpatched native": output(model, inputs(kind, NATIVE, text=text)),
    }  # fmt: skip


def masked() -> Tensor:
    """Real text tokens anywhere, so that the mask itself is applied."""
    model = build("Qwen-Image")
    in_parallel(model)
    with scalediff.patch_model(model, window=WINDOW):
        return output(model, inputs("Qwen-Image", GRID) | {"encoder_hidden_states_mask": HOLES})


def anything() -> Tensor:
    """Numbers of tokens that the processes do not divide."""
    from diffusers.hooks import context_parallel

    def gather(tensor: Tensor, dim: int, group: Any) -> Tensor:
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, tensor, group=group)
        return torch.cat(found, dim)

    model = build("FLUX.1")
    in_parallel(model, ulysses_degree=distributed.get_world_size(), ulysses_anything=True)
    context_parallel._all_gather_anything = gather  # gloo gathers equal sizes alone
    with scalediff.patch_model(model, window=WINDOW):
        return output(model, inputs("FLUX.1", UNEVEN, text=5))


def gradients() -> dict[str, Tensor]:
    """Those of a number that every process computes, summed over the processes."""
    model, arguments = build("FLUX.1"), inputs("FLUX.1", GRID)
    in_parallel(model)
    found = gradients_of(model, arguments)
    for gradient in found.values():
        distributed.all_reduce(gradient)
    return found


def gradients_of(model: Any, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Gradients of a patched model's parameters and of its input."""
    x = arguments["hidden_states"].requires_grad_()
    with scalediff.patch_model(model, window=WINDOW):
        out = model(**arguments, return_dict=False)[0]
    out.square().mean().backward()  # after the patch is gone
    return {"": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def another_backend() -> dict[str, Any]:
    """A backend that computes its attention itself."""
    from diffusers.models import attention_dispatch as dispatcher

    lengths: list[int] = []

    def softmax(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *options: Any, **more: Any) -> Tensor:
        lengths.append(query.shape[1])
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2)

    def by_hand(query: Tensor, key: Tensor, value: Tensor, _parallel_config: Any = None, **options: Any) -> Any:
        return dispatcher._templated_context_parallel_attention(
            query, key, value, forward_op=softmax, backward_op=None, _parallel_config=_parallel_config
        )

    model, backends = build("FLUX.1"), dispatcher._AttentionBackendRegistry._backends
    in_parallel(model)
    name = dispatcher.AttentionBackendName.NATIVE
    before, backends[name] = backends[name], by_hand
    with scalediff.patch_model(model, window=WINDOW):
        above = output(model, inputs("FLUX.1", GRID))
        in_windows = list(lengths)
        native = output(model, inputs("FLUX.1", NATIVE))
    restored = backends[name] is by_hand
    backends[name] = before
    return {"above": above, "native": native, "in windows": in_windows, "all": lengths, "restored": restored}


def described(arguments: Any) -> Layout:
    return Layout(GRID, (Sequence(GRID, text=6, shards=2),), masked=True)


def custom_plan() -> Tensor:
    """A model whose class has no plan: the caller gives one, and the layout that it makes."""
    from diffusers import FluxTransformer2DModel

    model = build("Chroma")
    in_parallel(model, plan=FluxTransformer2DModel._cp_plan, ulysses_degree=2)
    with scalediff.patch_model(model, layout=described, window=WINDOW, text_rope=False):
        return output(model, inputs("Chroma", GRID))


def two_pictures() -> dict[str, Any]:
    """A layout that the family does not know, though each process could take its own tokens for a picture above the native size."""
    model, arguments = build("FLUX.1"), inputs("FLUX.1", GRID)
    arguments["img_ids"] = torch.cat([inputs("FLUX.1", (4, 6))["img_ids"]] * 2)
    in_parallel(model)
    expected = output(model, arguments)
    with warnings.catch_warnings(record=True) as said, scalediff.patch_model(model, window=WINDOW):
        warnings.simplefilter("always")
        out = output(model, arguments)
    return {"out": out, "expected": expected, "said": [str(one.message) for one in said]}


def unseen() -> str:
    """What a pass says if diffusers computes attention over several devices by another function."""
    model = build("FLUX.1")
    in_parallel(model)
    before, interception._PARALLEL = interception._PARALLEL, "another_function"
    try:
        with scalediff.patch_model(model, window=WINDOW):
            output(model, inputs("FLUX.1", GRID))
    except ValueError as error:
        return str(error)
    finally:
        interception._PARALLEL = before
    return ""


def checked() -> list[str]:
    """A dry run."""
    model = build("FLUX.1")
    in_parallel(model)
    with scalediff.patch_model(model, window=WINDOW) as handle:
        return [row.status for row in handle.check(**inputs("FLUX.1", NATIVE), return_dict=False).rows]


def compiled() -> list[Tensor]:
    """The whole model as one graph a size."""
    model = build("FLUX.1")
    in_parallel(model)
    scalediff.patch_model(model, window=WINDOW)
    model.compile(fullgraph=True, backend="eager")
    return [output(model, inputs("FLUX.1", grid)) for grid in (GRID, (6, 8))]


def drawn() -> dict[str, Any]:
    """A picture of the whole cascade, of three stages; and one whose first stage has an odd number of tokens."""
    pipe, prompt = built("FLUX")
    in_parallel(pipe.transformer)
    latents, refused = draw(pipe, prompt), ""
    try:
        draw(pipe, prompt, sides=(4, 3))
    except ValueError as error:
        refused = str(error)
    return {"latents": latents, "refused": refused}


def draw(pipe: Any, prompt: dict[str, Any], *, sides: tuple[int, int] = (4, 4), mesh: Any = None) -> Tensor:
    with scalediff.patch_model(pipe, window=WINDOW, jitter="random", mesh=mesh):
        height, width = (n * native for n, native in zip(sides, native_size(pipe), strict=True))
        made = scalediff.generate(pipe, None, height=height, width=width, steps=2, generator=seeded(), call=prompt)
    latents: Tensor = made.stages[-1].latents
    return latents


def hangs() -> None:
    """One process waits for another that does not come."""
    if distributed.get_rank() == 0:
        distributed.barrier()
    time.sleep(600)


def fails() -> None:
    if distributed.get_rank() == 1:
        raise ArithmeticError("this process fails")
    distributed.barrier()


PATCHED: dict[str, Callable[[], dict[str, Any]]] = {
    f"{kind}, {rule}, {'patched first' if first else 'patched second'}": functools.partial(patched, kind, rule, first)
    for kind in PLANNED
    for rule in ("window", "global")
    for first in (True, False)
}
ULYSSES = (masked, anything, gradients, another_backend, custom_plan, two_pictures, unseen, checked, compiled, drawn, hangs, fails)
CASES: dict[str, Callable[[], Any]] = PATCHED | {case.__name__: case for case in ULYSSES}
