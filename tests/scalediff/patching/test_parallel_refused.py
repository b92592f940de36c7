"""Context parallelism and `mesh=` that a patched model does not support, and what ranks compare: all that needs no second process."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff import Layout, Sequence
from scalediff.patching.rows import pass_facts

pytest.importorskip("diffusers", reason="context parallelism is diffusers'")

from tests.scalediff.patching.ranks import GRID, UNEVEN, build, inputs, output


def configured(model: Any, **options: Any) -> Any:
    config = {"ring_degree": 1, "ulysses_degree": 1, "ulysses_anything": False} | options
    model._parallel_config = types.SimpleNamespace(context_parallel_config=types.SimpleNamespace(**config))
    return model


RING = r"does not support ring attention, .*got ring_degree=2"


@pytest.mark.parametrize("ulysses", [1, 2])
def test_ring_attention_is_refused_before_and_after_patching(ulysses: int) -> None:
    sdpa, options = F.scaled_dot_product_attention, {"ring_degree": 2, "ulysses_degree": ulysses}
    with pytest.raises(NotImplementedError, match=RING):
        scalediff.patch_model(configured(build("FLUX.1"), **options), window=WINDOW)
    model = build("FLUX.1")
    with scalediff.patch_model(model, window=WINDOW) as handle:
        expected = output(model, inputs("FLUX.1", GRID))
        configured(model, **options)
        with pytest.raises(NotImplementedError, match=RING):
            output(model, inputs("FLUX.1", GRID))
        with pytest.raises(NotImplementedError, match=RING):
            handle.check(**inputs("FLUX.1", GRID))
        assert F.scaled_dot_product_attention is sdpa
        model._parallel_config = None
        assert torch.equal(output(model, inputs("FLUX.1", GRID)), expected)


def test_models_whose_order_of_tokens_is_not_known_are_refused() -> None:
    message = r"of FluxTransformer2DModel, .*QwenImageTransformer2DModel; .*Sequence\(..., shards=2\), got ChromaTransformer2DModel"
    with pytest.raises(NotImplementedError, match=message):
        scalediff.patch_model(configured(build("Chroma"), ulysses_degree=2), window=WINDOW)
    one_piece, other_number = (lambda arguments, n=n: Layout(GRID, (Sequence(GRID, text=6, shards=n),), masked=True) for n in (1, 3))
    for layout, error, of in (
        (None, NotImplementedError, message),
        (one_piece, NotImplementedError, message),
        (other_number, ValueError, r"must have shards=2, the ulysses_degree of the model, got \[3\]"),
    ):
        model: nn.Module = build("Chroma")
        with scalediff.patch_model(model, layout=layout, window=WINDOW):
            configured(model, ulysses_degree=2)
            with pytest.raises(error, match=of):
                output(model, inputs("Chroma", GRID))


@pytest.mark.parametrize(("grid", "text"), [(UNEVEN, 6), (GRID, 5), ((3, 3), 6)])
def test_lengths_that_do_not_divide_are_named(grid: tuple[int, int], text: int) -> None:
    model = configured(build("FLUX.1"), ulysses_degree=2)
    message = f"ulysses_degree=2 splits .* equal parts, got {grid[0] * grid[1]} image and {text} text tokens"
    with scalediff.patch_model(model, window=WINDOW), pytest.raises(ValueError, match=message):
        output(model, inputs("FLUX.1", grid, text=text))


def test_what_a_split_run_cannot_have(demo: Any, tmp_path: Path) -> None:
    size: dict[str, Any] = {"height": 128, "width": 64}
    with pytest.raises(ValueError, match="mesh needs a generator in the same state on all ranks, and no workdir, got generator=None"):
        scalediff.generate(demo, "a moon", **size, mesh="all")
    with pytest.raises(ValueError, match="mesh needs a generator in the same state on all ranks, and no workdir"):
        scalediff.generate(demo, "a moon", **size, mesh="all", generator=torch.Generator(), workdir=tmp_path)
    with pytest.raises(ValueError, match="method='direct' does not support mesh"):
        scalediff.generate(demo, "a moon", **size, mesh="all", method="direct")
    with pytest.raises(RuntimeError, match="there is no process group"):
        scalediff.generate(demo, "a moon", **size, mesh="all", generator=torch.Generator())


def test_facts_of_a_pass_include_tensors_in_dictionaries_and_lists() -> None:
    facts = pass_facts(
        Layout(GRID, (Sequence(GRID),)), "none", {"added": {"pictures": [torch.ones(2, dtype=torch.uint8)], "scale": 1.0}, "x": None}
    )
    assert list(facts) == ["the token layout", "the jitter", "added.pictures.0"]
    assert facts["added.pictures.0"] == "(2,) of torch.uint8 with the checksum 2"
