"""The public way to build on the patch: passes around any code, exports, dry runs, and families of other model libraries."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff import AttentionPlan, Family, Layout, Sequence, families
from tests.conftest import seeded, state_of
from tests.scalediff.patching.research_models import VisionTransformer
from tests.scalediff.patching.test_entries import conditions, latents
from tests.scalediff.patching.test_unlisted import GRID, SDPA, forward, made, vit
from tests.scalediff.research_models import DiT, PixArt, UNet

WINDOW = (4, 4)


def plan_for(grid: tuple[int, int]) -> AttentionPlan:
    return AttentionPlan(Layout(grid, (Sequence(grid, text=1),)), window=WINDOW)


def patched_result(model: nn.Module) -> Tensor:
    with scalediff.patch_model(model, text=("prefix", 1)):
        return forward(model, vit(GRID))


# Passes around any code.


def test_a_pass_around_any_code_computes_what_a_patched_model_does() -> None:
    model = made(VisionTransformer)
    plain, patched = forward(model, vit(GRID)), patched_result(model)
    with scalediff.attention_pass(plan_for(GRID)) as calls:
        assert torch.equal(model.forward(*vit(GRID)[0]), patched)
    assert (calls.taken, calls.left, calls.others) == (2, {}, {})
    assert torch.equal(forward(model, vit(GRID)), plain)
    assert F.scaled_dot_product_attention is SDPA


def test_a_pass_at_native_size_replaces_nothing() -> None:
    model = made(VisionTransformer)
    native = forward(model, vit(WINDOW))
    with scalediff.attention_pass(plan_for(WINDOW)) as calls:
        assert F.scaled_dot_product_attention is SDPA
        assert torch.equal(forward(model, vit(WINDOW)), native)
    assert calls.taken == 0


def test_a_pass_that_took_nothing_is_an_error_or_a_warning() -> None:
    model = made(VisionTransformer)
    with (
        pytest.raises(ValueError, match=r"no attention call had the tokens of 7 x 7, got no other calls"),
        pytest.warns(UserWarning, match=r"ran full attention: q, k and v must have the tokens of 7 x 7, got 55, 55 \(2 calls\)"),
        scalediff.attention_pass(plan_for((7, 7))),
    ):
        forward(model, vit(GRID))
    with (
        pytest.warns(UserWarning, match="no attention call had the tokens of 7 x 7"),
        scalediff.attention_pass(plan_for((7, 7)), strict=False),
    ):
        pass
    with pytest.raises(KeyError), scalediff.attention_pass(plan_for((7, 7))):  # the block's own error comes first
        raise KeyError("x")
    assert F.scaled_dot_product_attention is SDPA


def test_a_pass_may_be_opened_again_and_inside_another() -> None:
    model, opened = made(VisionTransformer), scalediff.attention_pass(plan_for(GRID))
    patched = patched_result(model)
    with opened, opened:
        assert torch.equal(forward(model, vit(GRID)), patched)
    with opened as calls:
        assert torch.equal(forward(model, vit(GRID)), patched)
    assert calls.taken == 2


def test_a_patched_model_inside_a_pass_has_a_pass_of_its_own() -> None:
    model = made(VisionTransformer)
    patched = patched_result(model)
    opened = scalediff.attention_pass(plan_for(GRID), strict=False)
    with scalediff.patch_model(model, text=("prefix", 1)):
        calls = opened.__enter__()
        assert torch.equal(forward(model, vit(GRID)), patched)
        with pytest.warns(UserWarning, match="no attention call had the tokens"):
            opened.__exit__(None, None, None)
    assert calls.taken == 0


def test_wrong_arguments_of_a_pass() -> None:
    with pytest.raises(TypeError, match=r"plan must be an AttentionPlan, got plan=\(4, 4\)"):
        scalediff.attention_pass((4, 4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="strict must be True or False, got strict=1"):
        scalediff.attention_pass(plan_for(GRID), strict=1)  # type: ignore[arg-type]


def test_checkpointing_inside_a_pass_is_refused_and_around_it_is_right() -> None:
    model, x = made(VisionTransformer), vit(GRID)[0][0].requires_grad_()

    def attend(x: Tensor) -> Tensor:
        with scalediff.attention_pass(plan_for(GRID)):
            out: Tensor = model(x)
        return out

    (expected,) = torch.autograd.grad(attend(x).sum(), x)
    out = torch.utils.checkpoint.checkpoint(attend, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
    assert torch.equal(reentrant_gradient(attend, x), expected)
    with pytest.raises(NotImplementedError, match="gradient checkpointing is not supported"), scalediff.attention_pass(plan_for(GRID)):
        torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)


def reentrant_gradient(function: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    torch.utils.checkpoint.checkpoint(function, x, use_reentrant=True).sum().backward()
    assert x.grad is not None
    return x.grad


# Checkpointing and exports of patched models.


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_whole_model_is_right(reentrant: bool) -> None:
    """The second computation opens a pass of its own."""
    model, x = made(VisionTransformer), vit(GRID)[0][0].requires_grad_()
    with scalediff.patch_model(model, text=("prefix", 1)) as handle:
        (expected,) = torch.autograd.grad(model(x).sum(), x)
        if reentrant:
            assert torch.equal(reentrant_gradient(model, x), expected)
        else:
            out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected)
        handle.jitter = "random"
        with pytest.raises(NotImplementedError, match=r"checkpointing around the model needs jitter='none', got jitter='random'"):
            torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant).sum().backward()


def test_an_export_of_a_patched_model_has_the_windows() -> None:
    model = made(VisionTransformer)
    plain, patched = forward(model, vit(GRID)), patched_result(model)
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)) as handle:
        exported = torch.export.export(model, vit(GRID)[0])
        assert "compiled graphs" in handle.report.last_pass
        assert torch.equal(forward(model, vit(GRID)), patched)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*vit(GRID)[0]), patched)
        with scalediff.attention_pass(plan_for(GRID)) as calls:
            around = torch.export.export(model, vit(GRID)[0])
        assert calls.taken >= 1
        torch.testing.assert_close(around.module()(*vit(GRID)[0]), patched)
    assert torch.equal(forward(model, vit(GRID)), plain)


def test_an_export_of_a_model_with_a_stored_forward() -> None:
    model = made(VisionTransformer)
    patched, own = patched_result(model), model.forward
    model.forward = lambda x: own(x)
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)):
        exported = torch.export.export(model, vit(GRID)[0])
    torch.testing.assert_close(exported.module()(*vit(GRID)[0]), patched)


@pytest.mark.slow
def test_a_package_compiled_ahead_of_time(tmp_path: Path) -> None:
    from torch import _inductor

    model = made(VisionTransformer).float()
    x = vit(GRID)[0][0].float()
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)):
        expected, exported = model(x), torch.export.export(model, (x,))
    package = _inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))  # type: ignore[arg-type]
    out = _inductor.aoti_load_package(package)(x)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = made(VisionTransformer).float()
    x, path = vit(GRID)[0][0].float(), str(tmp_path / "model.onnx")
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)):
        expected = model(x)
        torch.onnx.export(model, (x,), path, dynamo=True)
    (out,) = runtime.InferenceSession(path).run(None, {"x": x.numpy()})
    assert (torch.from_numpy(out) - expected).abs().max() <= 1e-5 * expected.abs().max()


# Dry runs.


def test_a_dry_run_lists_the_calls_and_changes_nothing() -> None:
    model = made(PixArt)
    model.noise, model.seen = nn.BatchNorm1d(32).double(), nn.Dropout(0.5)  # of training, which a pass would change
    inputs = latents((3, 4)), *conditions("PixArt")
    model.x_embedder.register_forward_hook(lambda module, args, out: model.seen(model.noise(out.mT).mT))  # type: ignore[operator, union-attr]
    with scalediff.patch_model(model) as handle:
        before, generator = state_of(model), torch.get_rng_state()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = handle.check(*inputs)
        assert state_of(model) == before
        assert torch.equal(torch.get_rng_state(), generator)
        assert handle.report.rows == ()
    assert [(row.module, row.status, row.taken, row.left) for row in report.rows] == [
        ("blocks.0.attn", "patched", 1, 0), ("cross.0", "untouched", 0, 1),
        ("blocks.1.attn", "patched", 1, 0), ("cross.1", "untouched", 0, 1),
    ]  # fmt: skip
    assert "12 queries and 5 keys by cross.0 and 1 more" in str(report)
    assert "a dry run" in report.call


def test_a_dry_run_names_what_would_stop_it() -> None:
    """Levels left out, a wrong grid, and arguments that do not give one."""
    unet, dit = made(UNet), made(DiT)
    with scalediff.patch_model(unet) as handle:
        report = handle.check(torch.randn(1, 4, 4, 4, generator=seeded(), dtype=torch.float64))
        assert [row.status for row in report.rows] == ["patched", "untouched", "untouched"]
        assert report.rows[1].why == "q, k and v must have the tokens of 4 x 4, got 4, 4"
    with scalediff.patch_model(dit, grid=(3, 3)) as handle:
        report = handle.check(latents((4, 4)), *conditions("DiT"))
        assert not report.patched
        assert "scaled_dot_product_attention was called with 16 queries and 16 keys by blocks.0.attn and 1 more" in report.notes
    with (
        scalediff.patch_model(dit, grid=lambda arguments: arguments["size"]) as handle,
        pytest.raises(ValueError, match="these arguments of DiT do not give its token layout: KeyError"),
    ):
        handle.check(latents((4, 4)), *conditions("DiT"))
    handle = scalediff.patch_model(made(DiT))
    with pytest.raises(RuntimeError, match="the patched DiT no longer exists: the handle does not keep it"):
        handle.check(latents((4, 4)))


def test_a_dry_run_of_a_known_model(unet: nn.Module) -> None:
    with scalediff.patch_model(unet) as handle:
        text = torch.randn(1, 7, 64, generator=seeded())
        report = handle.check(torch.randn(1, 4, 16, 16, generator=seeded()), 5, encoder_hidden_states=text)
        assert {row.status for row in report.rows if row.role == "self"} == {"patched"}
        assert report.known
        assert handle.report.last_pass == ""


# Families.


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
        scalediff.patch_model(made(DiT), layout=lambda arguments: plan_for(GRID).layout, grid=GRID, levels=2)
    with pytest.raises(TypeError, match="layout must be a function, got layout=Layout"):
        scalediff.patch_model(made(DiT), layout=plan_for(GRID).layout)  # type: ignore[arg-type]
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
