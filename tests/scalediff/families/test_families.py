"""Every known family on the real diffusers class: which calls are taken, and that they compute what is defined.

The oracle is a second formulation: every call is full attention under a dense mask that allows what the definition allows.

Legend: B batch, H heads, S tokens of a sequence, Y x X token grid, T text tokens, D head dim.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO, Specimen
from scalediff.families import FAMILIES, family_of
from scalediff.families.grid import level_grid
from tests.conftest import state_of

pytest.importorskip("diffusers", reason="the families are diffusers' classes")

SDPA = F.scaled_dot_product_attention
SUFFIX = {"SD3", "SD3 ControlNet", "HiDream-I1", "Z-Image", "ERNIE-Image", "HunyuanImage 2.1", "NucleusMoE-Image"}
_built: dict[str, nn.Module] = {}


def specimen(name: str) -> tuple[Specimen, nn.Module]:
    if name not in _built:
        _built[name] = ZOO[name].build().double()
    return ZOO[name], _built[name]


def grid_of(name: str) -> tuple[int, int]:
    return (8, 8) if name in ("DiT", "HiDream-I1", "U-Net without text") else (9, 6)  # what they take; HiDream has a test more


def run(name: str, model: nn.Module, grid: tuple[int, int], *, batch: int = 2) -> Tensor:
    """The output for inputs in fp64."""
    inputs = double(ZOO[name].inputs(Draw(1), grid, batch))
    with torch.no_grad():
        return torch.cat([x.flatten() for x in leaves(model(**inputs, return_dict=False))])


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: double(part) for key, part in value.items()}
    return type(value)(map(double, value)) if isinstance(value, list | tuple) else value


def leaves(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [leaf for part in value if part is not None for leaf in leaves(part)]


def allowed(grid: tuple[int, int], window: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """`[S, S]`: which keys a query of the grid sees, from the definition, one axis at a time."""
    axes = []
    for length, w, p in zip(grid, window, patch, strict=True):
        start = torch.tensor([min(max(i // p * p + p // 2 - w // 2, 0), max(length - w, 0)) for i in range(length)])
        keys = torch.arange(length)
        axes.append((keys >= start[:, None]) & (keys < start[:, None] + w))
    return (axes[0][:, None, :, None] & axes[1][None, :, None, :]).flatten(0, 1).flatten(1, 2)


class Masked:
    """Stands in for scaled_dot_product_attention in an unpatched model: the same windows as a mask over everything."""

    def __init__(self, name: str, grid: tuple[int, int], images: list[int] | None = None) -> None:
        self.name, self.images, self.calls = name, images, 0
        levels = range(2 if name in ("SD1.5", "SDXL", "U-Net without text", "ControlNet", "ControlNet Union") else 1)
        self.grids = {math.prod(level_grid(grid, level)): (level_grid(grid, level), level) for level in levels}
        self.area = math.prod(grid)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **rest: Any
    ) -> Tensor:
        tokens = key.shape[-2]
        text_alone = self.name == "Z-Image" and tokens == 96  # the longer caption, in the refiner
        keys_alone = self.name in ("PRX", "NucleusMoE-Image") and query.shape[-2] == self.area  # text is among the keys alone
        if (query.shape[-2] != tokens and not keys_alone) or (tokens not in self.grids and tokens < self.area) or text_alone:
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **rest)
        self.calls += 1
        grid, level = self.grids.get(tokens, self.grids[self.area])
        window = level_grid(WINDOW, level)
        inside = allowed(grid, window, (window[0] // 2, window[1] // 2))
        masks = []
        for sample in range(len(query)):
            first = 0 if self.name in SUFFIX else tokens - self.area if self.images is None else self.images[sample]
            first = 0 if tokens in self.grids else first
            mask = torch.ones(tokens, tokens, dtype=torch.bool)
            mask[first : first + len(inside), first : first + len(inside)] = inside
            masks.append(mask)
        queries = slice(0, self.area) if self.name in SUFFIX else slice(-query.shape[-2], None)
        mask = torch.stack(masks)[:, None, queries if keys_alone else slice(None)]
        if attn_mask is not None and attn_mask.is_floating_point():  # added to the scores
            return SDPA(query, key, value, attn_mask.masked_fill(~mask, -math.inf), scale=rest.get("scale"))
        if attn_mask is not None:
            mask = mask & attn_mask
        return SDPA(query, key, value, mask | ~mask.any(-1, keepdim=True), scale=rest.get("scale"))


@pytest.mark.parametrize("name", ZOO)
def test_a_family_computes_its_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image queries see text and window; text queries, under the rule "global", everything: in fp64 on the whole model."""
    _, model = specimen(name)
    grid = grid_of(name)
    plain = run(name, model, grid)
    with warnings.catch_warnings(), scalediff.patch_model(model, window=WINDOW, text_queries="global", text_rope=False) as handle:
        warnings.simplefilter("error")
        out = run(name, model, grid)
        seen = set(model.__dict__["_scalediff"].seen)
        assert seen == {row.module for row in handle.report.patched}
    oracle = Masked(name, grid, images=[6, 4] if name == "Lumina 2" else None)
    monkeypatch.setattr(F, "scaled_dot_product_attention", oracle)
    expected = run(name, model, grid)
    assert oracle.calls >= len(seen)
    error, change = (out - expected).abs().max(), (plain - expected).abs().max()
    assert error < 1e-9 * expected.abs().max()
    assert change > 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ZOO)
def test_a_family_at_native_size_computes_the_same_bits(name: str) -> None:
    _, model = specimen(name)
    state, before, smaller = state_of(model), run(name, model, (4, 4)), run(name, model, (2, 2))
    with scalediff.patch_model(model, window=WINDOW):
        assert torch.equal(run(name, model, (4, 4)), before)
        assert torch.equal(run(name, model, (2, 2)), smaller)
        run(name, model, grid_of(name))
    assert state_of(model) == state
    assert F.scaled_dot_product_attention is SDPA
    assert torch.equal(run(name, model, (4, 4)), before)


def test_every_family_has_a_specimen() -> None:
    assert {spec.kind for spec in ZOO.values()} == {name for name, family in FAMILIES.items() if not family.refusal}
    for name in ZOO:
        family = family_of(specimen(name)[1])
        assert family is not None
        assert family.grid_source
        assert family.text


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("SanaTransformer2DModel", ValueError, "its self-attention is already linear in the number of tokens"),
        ("WanTransformer3DModel", NotImplementedError, "WanTransformer3DModel is not patched: it attends over frames, as video models do"),
        ("LTXVideoTransformer3DModel", NotImplementedError, "it attends over frames, as video models do"),
        ("HunyuanVideoTransformer3DModel", NotImplementedError, "it attends over frames, as video models do"),
    ],
)
def test_linear_and_video_models_are_refused_in_a_sentence(kind: str, error: type[Exception], message: str) -> None:
    cls = type(kind, (nn.Module,), {"__module__": "diffusers.models"})  # recognised by name and module: nothing of diffusers is needed
    with pytest.raises(error, match=message):
        scalediff.patch_model(cls())
