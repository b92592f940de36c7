"""The public way to build on the patch: passes around any code, exports, dry runs, and families of other model libraries."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from scalediff import AttentionPlan, Layout, Sequence
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
    with scalediff.patch_model(model, text=("prefix", 1)) as handle, scalediff.attention_pass(plan_for(GRID)) as calls:
        assert torch.equal(forward(model, vit(GRID)), patched)
        assert len(handle.report.patched) == 2
    assert calls.taken == 0


def test_a_pass_object_counts_for_every_thread() -> None:
    model, opened, counts = made(VisionTransformer), scalediff.attention_pass(plan_for(GRID)), list[int]()
    together = threading.Barrier(3)

    def work() -> None:
        with opened as calls:
            together.wait(timeout=60)
            forward(model, vit(GRID))
            together.wait(timeout=60)
        counts.append(calls.taken)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts == [2, 2, 2]
    assert F.scaled_dot_product_attention is SDPA


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


@pytest.mark.composes("export", "network")
def test_an_export_of_a_patched_model_has_the_windows() -> None:
    model = made(VisionTransformer)
    plain, patched = forward(model, vit(GRID)), patched_result(model)
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)) as handle:
        exported = torch.export.export(model, vit(GRID)[0])
        assert handle.report.last_pass.startswith("9 x 6 tokens; 2 self-attention calls in windows")
        assert torch.equal(forward(model, vit(GRID)), patched)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(*vit(GRID)[0]), patched)
        with scalediff.attention_pass(plan_for(GRID)) as calls:
            around = torch.export.export(model, vit(GRID)[0])
        assert calls.taken == 2
        torch.testing.assert_close(around.module()(*vit(GRID)[0]), patched)
    assert torch.equal(forward(model, vit(GRID)), plain)


def test_an_export_of_a_model_with_a_stored_forward() -> None:
    model = made(VisionTransformer)
    patched, own = patched_result(model), model.forward
    model.forward = lambda x: own(x)
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)):
        exported = torch.export.export(model, vit(GRID)[0])
    torch.testing.assert_close(exported.module()(*vit(GRID)[0]), patched)


@pytest.mark.composes("export", "network")
@pytest.mark.slow
def test_a_package_compiled_ahead_of_time(tmp_path: Path) -> None:
    from torch import _inductor

    model = made(VisionTransformer).float()
    x = vit(GRID)[0][0].float()
    with torch.no_grad(), scalediff.patch_model(model, text=("prefix", 1)):
        expected, exported = model(x), torch.export.export(model, (x,))
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}
    package = _inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"), inductor_configs=quickly)  # type: ignore[arg-type]
    out = _inductor.aoti_load_package(package)(x)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.composes("export", "network")
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
