"""The public way to embed, used in ways that its authors did not have in mind."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff import Family, Layout, Sequence, TextRotation, families
from tests.conftest import seeded

WINDOW, GRID = (4, 4), (8, 6)


class Joint(nn.Module):
    """Text `[B, T, 16]` and latents `[B, 16, Y, X]` in one softmax, one head. It has buffers of every kind, and may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 48)
        self.register_buffer("gain", torch.ones(16))
        self.register_buffer("count", torch.zeros(()))
        self.cached, self.fails = False, False

    def forward(self, latents: Tensor, caption: Tensor) -> Tensor:
        if not self.cached:
            self.register_buffer("cache", torch.zeros(3))
            self.cached = True
        self.get_buffer("count").add_(1)
        if self.fails:
            raise RuntimeError("out of memory")
        x = torch.cat([caption, latents.flatten(2).mT], dim=1) * self.get_buffer("gain")
        q, k, v = self.project(x)[:, None].chunk(3, dim=-1)
        return F.scaled_dot_product_attention(q, k, v)[:, 0]


def made() -> Joint:
    torch.manual_seed(0)
    return Joint().eval()


def inputs(grid: tuple[int, int] = GRID) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 16, *grid, generator=seeded(0)), torch.randn(1, 3, 16, generator=seeded(1))


def patched(model: nn.Module, **options: Any) -> scalediff.Handle:
    rotation = TextRotation((4, 6, 6), 10000.0)
    return scalediff.patch_model(
        model, **{"patch_size": 1, "text": ("prefix", "caption"), "text_rope": rotation, "window": WINDOW, **options}
    )


# Dry runs.


def test_a_dry_run_keeps_a_cache_that_the_model_makes() -> None:
    model = made()
    patched(model).check(*inputs())
    assert model.get_buffer("cache").shape == (3,)
    assert model.get_buffer("count") == 0


def test_a_dry_run_that_fails_restores_the_buffers() -> None:
    model = made()
    handle = patched(model)
    model.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        handle.check(*inputs())
    assert model.get_buffer("count") == 0


def test_a_dry_run_between_a_forward_and_its_backward() -> None:
    model = made()
    handle = patched(model)
    latents, caption = inputs()
    out = model(latents.requires_grad_(), caption)  # keeps `gain` for its gradients
    handle.check(latents, caption)
    out.sum().backward()
    assert latents.grad is not None


def test_a_dry_run_of_a_model_whose_parameters_are_offloaded() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = made()
    handle = patched(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [row.taken for row in handle.check(*inputs()).rows] == [1]


def test_a_dry_run_without_the_arguments_that_give_the_grid() -> None:
    model = made()
    handle = patched(model, grid=lambda arguments: arguments["latent"].shape[-2:], patch_size=None)
    with pytest.raises(ValueError, match=re.escape("these arguments of Joint do not give its token layout: KeyError('latent')")):
        handle.check(*inputs())


# Passes.


def test_an_export_leaves_nothing_behind_in_the_model() -> None:
    model = made()
    model(*inputs())  # makes its cache, which an export could not
    patched(model)
    with torch.no_grad():
        program = torch.export.export(model, inputs())
        out = model(*inputs())
        assert type(out) is Tensor
        assert torch.equal(program.module()(*inputs()), out)


def test_training_after_a_pass_in_inference_mode() -> None:
    model = made()
    patched(model)
    with torch.inference_mode():
        model(*inputs())
    model(*inputs()).sum().backward()
    assert model.project.weight.grad is not None


@pytest.mark.parametrize("grid", [[8, 6], (np.int64(8), np.int32(6)), torch.tensor([8, 6])])
def test_grids_of_other_types(grid: Any) -> None:
    model = made()
    handle = patched(model, grid=lambda arguments: grid, patch_size=None, window=(np.int64(4), np.int64(4)))
    with torch.no_grad():
        model(*inputs())
    assert handle.window == WINDOW
    assert handle.report.last_pass.startswith("8 x 6 tokens; 1 self-attention calls in windows")


@pytest.mark.parametrize("grid", [(8,), 8, None])
def test_what_is_no_grid(grid: Any) -> None:
    model = made()
    patched(model, grid=lambda arguments: grid, patch_size=None)
    with pytest.raises(ValueError, match=re.escape(f"grid must be two positive integers (Y, X) in tokens, got grid={grid!r}")):
        model(*inputs())


class Image(nn.Module):
    """The image alone."""

    def forward(self, latents: Tensor) -> Tensor:
        tokens = latents.flatten(2).mT[:, None]
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


class TwoLevels(nn.Module):
    """Image to image at two levels, and image to text at the coarser one."""

    def forward(self, latents: Tensor, context: Tensor) -> Tensor:
        coarse = F.avg_pool2d(latents, 2)
        for x in (latents, coarse):
            tokens = x.flatten(2).mT[:, None]
            F.scaled_dot_product_attention(tokens, tokens, tokens)
        query, text = coarse.flatten(2).mT[:, None], context[:, None]
        return F.scaled_dot_product_attention(query, text, text)


def test_text_of_as_many_tokens_as_a_coarse_level_is_not_taken_for_the_image() -> None:
    model, latents = TwoLevels(), torch.randn(1, 16, 16, 16, generator=seeded(0))
    handle = scalediff.patch_model(model, patch_size=1, levels=2, window=(8, 8))
    for tokens, taken in ((63, 2), (64, 1)):
        context = torch.randn(1, tokens, 16, generator=seeded(1))
        if taken == 2:
            model(latents, context)
        else:
            with pytest.warns(UserWarning, match="image and text have the same number of tokens and cannot be told apart, got 64"):
                out = model(latents, context)
            handle.remove()
            assert torch.equal(out, model(latents, context))
        assert f"{taken} self-attention calls in windows" in handle.report.last_pass


def test_a_layout_without_text_has_no_note_about_text() -> None:
    model = Image()
    handle = scalediff.patch_model(model, layout=lambda arguments: Layout(GRID, (Sequence(GRID),)), window=WINDOW)
    assert len(handle.check(inputs()[0]).notes) == 1  # the lengths of the calls
    model(inputs()[0])
    assert handle.report.notes == ()


# Families.


def layout(denoiser: nn.Module, arguments: Any, read: Any) -> Layout:
    grid = tuple(arguments["latents"].shape[-2:])
    return Layout(grid, (Sequence(grid, text=arguments["caption"].shape[1]),))


def register_and_patch(family: Family) -> None:
    scalediff.register_family(family)
    scalediff.patch_model(made())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layout": "first"}, TypeError, "layout must be a function, got layout='first'"),
        ({"native_grid": WINDOW}, TypeError, "native_grid must be a function, got native_grid=(4, 4)"),
        ({"native_grid": lambda denoiser: 4}, TypeError, "grid must be two positive integers (Y, X) in tokens, got grid=4"),
        ({"listed": True}, ValueError, "a Family(listed=False) finds them when they call attention"),
        ({"module": "diffusers"}, ValueError, f"register_family with module={__name__!r} makes scalediff recognise it"),
    ],
)
def test_families_that_are_described_wrongly(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(families, "_registered", {})
    described = {"denoiser": "Joint", "module": __name__, "layout": layout, "native_grid": lambda denoiser: WINDOW, "listed": False}
    with pytest.raises(error, match=re.escape(message)):
        register_and_patch(Family(**{**described, **options}))  # type: ignore[arg-type]
