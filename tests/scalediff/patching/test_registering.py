"""Families of other model libraries, and what a caller says about a known one."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff
from scalediff import Family, Layout, Sequence, families
from scalediff.families import family_of
from tests.conftest import seeded
from tests.scalediff.patching.test_entries import conditions, latents
from tests.scalediff.patching.test_unlisted import GRID, made
from tests.scalediff.research_models import DiT

WINDOW = (4, 4)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})


class FluxTransformer2DModel(DiT):
    """The name of diffusers' class, and nothing else of it."""


def dit_family(**changes: Any) -> Family:
    def layout(denoiser: nn.Module, arguments: Any, read: Any) -> Layout:
        y, x = (n // 2 for n in arguments["x"].shape[-2:])
        return Layout((y, x), (Sequence((y, x)),))

    options = {"denoiser": "FluxTransformer2DModel", "module": __name__, "grid_source": "x.shape[-2:] // 2", "layout": layout}
    return Family(**{"native_grid": lambda denoiser: WINDOW, "listed": False, **options, **changes})


def run_dit(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(latents(GRID), *conditions("DiT"))
    return out


@pytest.mark.usefixtures("registry")
def test_a_class_of_the_same_name_is_another_family() -> None:
    model, twin = made(FluxTransformer2DModel), made(DiT)
    with scalediff.patch_model(twin):
        expected = run_dit(twin)
    with pytest.raises(
        ValueError, match=r"belongs to no known family: pass its token grid .* has the name of FluxTransformer2DModel in diffusers"
    ):
        scalediff.patch_model(type("FluxTransformer2DModel", (nn.Module,), {})())
    with scalediff.patch_model(model, patch_size=2):  # what the caller says
        assert torch.equal(run_dit(model), expected)
    scalediff.register_family(dit_family())
    with scalediff.patch_model(model) as handle:
        assert torch.equal(run_dit(model), expected)
        assert {row.grid_source for row in handle.report.patched} == {"x.shape[-2:] // 2"}
    scalediff.register_family(dit_family(module=__name__.split(".")[0], native_grid=lambda denoiser: (2, 2)))  # a package above it
    scalediff.register_family(dit_family(native_grid=lambda denoiser: (3, 3)))  # again
    with scalediff.patch_model(model) as handle:
        assert handle.window == (3, 3)


@pytest.mark.usefixtures("registry")
def test_a_family_can_be_forgotten() -> None:
    family, model = dit_family(), made(FluxTransformer2DModel)
    scalediff.register_family(family)
    assert family_of(model) is family
    scalediff.unregister_family(family)
    assert family_of(model) is None
    message = f"family must be registered, got {family.module}.{family.denoiser}; registered are none"
    with pytest.raises(ValueError, match=re.escape(message)):
        scalediff.unregister_family(family)
    with pytest.raises(TypeError, match="family must be a Family, got family='DiT'"):
        scalediff.unregister_family("DiT")  # type: ignore[arg-type]


@pytest.mark.usefixtures("registry")
def test_what_is_no_family() -> None:
    with pytest.raises(TypeError, match="family must be a Family, got family='FluxTransformer2DModel'"):
        scalediff.register_family("FluxTransformer2DModel")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=re.escape("a family must name a class and its module, got denoiser='X', module=''")):
        scalediff.register_family(Family("X", module=""))


def test_what_the_caller_says_comes_before_a_known_family(unet: nn.Module) -> None:
    """Of a listed U-Net: the same result where the caller says the same; a refused class is patched if its tokens are described."""
    x, text = torch.randn(1, 4, 32, 24, generator=seeded()), torch.randn(1, 7, 64, generator=seeded())

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = unet(x, 5, encoder_hidden_states=text).sample
        return out

    with scalediff.patch_model(unet):
        expected = run()
    same: list[dict[str, Any]] = [
        {"grid": (32, 24)},
        {"patch_size": 1},
        {"grid": lambda arguments: arguments["sample"].shape[-2:], "levels": 2},
    ]
    for arguments in same:
        with scalediff.patch_model(unet, **arguments) as handle:
            assert torch.equal(run(), expected)
            assert {row.role for row in handle.report.rows} == {"self", "cross"}
    with scalediff.patch_model(unet, grid=(24, 32)) as handle:
        assert not torch.equal(run(), expected)
        assert {row.grid_source for row in handle.report.patched} == {"grid="}


def test_arguments_that_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="layout= describes all tokens of a pass: leave out grid=, levels="):
        scalediff.patch_model(made(DiT), layout=lambda arguments: Layout(GRID, (Sequence(GRID),)), grid=GRID, levels=2)
    with pytest.raises(TypeError, match="layout must be a function, got layout=Layout"):
        scalediff.patch_model(made(DiT), layout=Layout(GRID, (Sequence(GRID),)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="levels must be at least 1, got levels=0"):
        scalediff.patch_model(made(DiT), levels=0)
    model = made(DiT)
    with (
        scalediff.patch_model(model, layout=lambda arguments: GRID),  # type: ignore[arg-type, return-value]
        pytest.raises(TypeError, match=r"the layout of DiT must be a scalediff.Layout, got \(9, 6\)"),
    ):
        run_dit(model)


def test_a_refused_class_is_patched_if_its_tokens_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video model that draws one frame, for example."""
    video = type("WanTransformer3DModel", (DiT,), {"__module__": "diffusers.models.transformers.transformer_wan"})
    model, twin = made(video), made(DiT)
    with pytest.raises(NotImplementedError, match="WanTransformer3DModel is not patched: it attends over frames"):
        scalediff.patch_model(model)
    with scalediff.patch_model(model, patch_size=2), scalediff.patch_model(twin):
        assert torch.equal(run_dit(model), run_dit(twin))
