"""What the report, errors and warnings say after a pass: calls taken, left and never made; layouts that do not fit; causes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from tests.conftest import forward, seeded
from tests.scalediff.patching.research_models import WIDTH
from tests.scalediff.patching.test_entries import conditions, latents
from tests.scalediff.patching.test_unlisted import made
from tests.scalediff.research_models import DiT, PixArt

SDPA = F.scaled_dot_product_attention
pytest.importorskip("diffusers")

from diffusers.models.attention_processor import AttnProcessor  # noqa: E402


@pytest.fixture
def own_processors(unet: Any) -> Iterator[None]:
    own = dict(unet.attn_processors)
    yield
    unet.set_attn_processor(own)


def selfs(handle: scalediff.Handle) -> list[Any]:
    return [row for row in handle.report.rows if row.role == "self"]


CHANGES: dict[str, Callable[[Any], None]] = {
    "slicing": lambda unet: unet.set_attention_slice(1),
    "plain processor": lambda unet: unet.set_attn_processor(AttnProcessor()),
    "own processor": lambda unet: unet.set_attn_processor(Softmax()),
}


class Softmax(AttnProcessor):  # type: ignore[misc]
    """Names the attention function and does not call it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        _ = F.scaled_dot_product_attention
        return AttnProcessor.__call__(self, *args, **kwargs)


def test_the_report_counts_the_calls_of_the_last_pass(unet: nn.Module) -> None:
    with scalediff.patch_model(unet) as handle:
        assert handle.report.last_pass == ""
        assert {(row.taken, row.left) for row in handle.report.rows} == {(None, None)}
        forward(unet, (32, 24))
        assert {(row.taken, row.left) for row in selfs(handle)} == {(1, 0)}
        assert {(row.taken, row.left) for row in handle.report.rows if row.role == "cross"} == {(0, 1)}
        count = len(selfs(handle))
        assert handle.report.last_pass == (
            "32 x 24 tokens; "
            f"{count} self-attention calls in windows, 0 left to full attention, 0 modules without a call; {count} other calls"
        )
        text = str(handle.report)
        assert f"last pass: {handle.report.last_pass}" in text
        assert "  taken  left  status" in text


@pytest.mark.composes("attention slicing", "network", refused="its processors compute attention themselves")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.usefixtures("own_processors")
def test_processors_changed_after_patching_are_an_error(unet: Any, change: str) -> None:
    """In every pass, naming every module; the report says so too."""
    own, plain = dict(unet.attn_processors), forward(unet, (32, 24))
    with scalediff.patch_model(unet) as handle:
        patched = forward(unet, (32, 24))
        count = len(selfs(handle))
        CHANGES[change](unet)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"run full attention: .*{count} of {count} self-attention modules") as caught:
                forward(unet, (32, 24))
        assert all(row.module in str(caught.value) for row in selfs(handle))
        assert not handle.report.patched
        assert {(row.status, row.taken, row.left) for row in selfs(handle)} == {("untouched", 0, 0)}
        assert all("scaled_dot_product_attention" in row.why for row in selfs(handle))
        assert f"0 of {2 * count} attention modules patched" in str(handle.report)
        unet.set_attn_processor(own)
        assert torch.equal(forward(unet, (32, 24)), patched)
        assert len(handle.report.patched) == count
    assert torch.equal(forward(unet, (32, 24)), plain)


@pytest.mark.usefixtures("own_processors")
def test_without_strict_every_change_is_a_warning(unet: Any) -> None:
    own, name = dict(unet.attn_processors), "mid_block.attentions.0.transformer_blocks.0.attn1"
    one = own | {f"{name}.processor": AttnProcessor()}
    with scalediff.patch_model(unet, strict=False) as handle:
        count = len(selfs(handle))
        for processors, missing in ((one, 1), (Softmax(), count), (own, 0), (one, 1), (own, 0)):
            unet.set_attn_processor(processors if isinstance(processors, Softmax) else dict(processors))
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                forward(unet, (32, 24))
                forward(unet, (32, 24))
            assert len(said) == (missing > 0), [str(warning.message) for warning in said]
            assert all(f"{missing} of {count} self-attention modules" in str(warning.message) for warning in said)
            assert len(handle.report.patched) == count - missing
        assert [row.why for row in selfs(handle) if row.module == name] == [""]


def test_a_module_that_is_skipped_is_no_error(unet: Any) -> None:
    """Caches and some kinds of guidance skip modules: the report tells, and nothing is raised."""
    block = unet.mid_block.attentions[0]
    with scalediff.patch_model(unet) as handle, warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(unet, (32, 24))
        own, block.forward = block.forward, lambda x, *_, **__: (x,)
        try:
            forward(unet, (32, 24))
        finally:
            del block.forward
        assert own is not None
        (row,) = (row for row in selfs(handle) if row.status == "untouched")
        assert row.module.startswith("mid_block")
        assert row.why == "a cache or guidance skipped it in the last pass"


def test_an_unlisted_model_has_rows_for_the_calls_left_alone() -> None:
    model = made(PixArt)
    with torch.no_grad(), scalediff.patch_model(model) as handle:
        model(latents((9, 6)), *conditions("PixArt"))
        rows = {row.module: (row.role, row.status, row.why, row.taken, row.left) for row in handle.report.rows}
    assert rows["blocks.0.attn"] == ("self", "patched", "", 1, 0)
    assert rows["cross.1"] == ("cross", "untouched", "other tokens: 54 queries and 5 keys", 0, 1)


class Changing(nn.Module):
    """One attention over latents, by a function that can be exchanged."""

    patch_size = 1

    def __init__(self, attend: Callable[..., Tensor] = SDPA) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(4, 3 * WIDTH), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.flatten(2).mT).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return F.scaled_dot_product_attention(q, k, v) if self.attend is SDPA else self.attend(q, k, v)


def test_an_unlisted_model_that_stops_calling_attention_is_said() -> None:
    model, x = Changing(), torch.randn(1, 4, 9, 6, generator=seeded())
    with scalediff.patch_model(model, window=(4, 4)) as handle:
        model(x)
        assert [row.status for row in handle.report.rows] == ["patched"]
        model.attend = lambda q, k, v: v
        with pytest.warns(
            UserWarning, match=r"had the tokens of 9 x 6, and an earlier pass had some. scaled_dot_product_attention was not"
        ):
            model(x)
        assert [(row.status, row.taken) for row in handle.report.rows] == [("untouched", 0)]
        assert handle.report.last_pass.startswith("9 x 6 tokens; 0 self-attention calls in windows")


def test_a_call_that_is_left_after_calls_were_taken_is_reported() -> None:
    model, x = Changing(), torch.randn(1, 4, 9, 6, generator=seeded())
    with scalediff.patch_model(model, window=(4, 4)) as handle:
        model(x)
        model.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with pytest.warns(UserWarning, match="Changing runs full attention: causal attention is not supported"):
            model(x)
        (row,) = handle.report.rows
        assert (row.role, row.status, row.why) == ("self", "untouched", "causal attention is not supported")
        assert (row.taken, row.left) == (0, 1)


def test_the_report_of_a_pass_that_took_nothing_says_so() -> None:
    model, x = Changing(lambda q, k, v: v), torch.randn(1, 4, 9, 6, generator=seeded())
    with scalediff.patch_model(model, window=(4, 4), strict=False) as handle:
        assert "attention modules are listed here after the first pass" in str(handle.report)
        with pytest.warns(UserWarning, match="Changing runs full attention: no call of scaled_dot_product_attention"):
            model(x)
        assert "listed here" not in str(handle.report)
        assert str(handle.report).startswith("Changing: no module called attention")


# The layout


class LastChannels(Changing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1))


class Frames(Changing):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :, 0])


@pytest.mark.parametrize("size", [(5, 3), (16, 16)])
def test_a_wrong_grid_is_not_native(size: tuple[int, int]) -> None:
    """`[B, H, W, C]` is not `[B, C, H, W]`: the first pass notices at any size."""
    model, x = LastChannels(), torch.randn(1, *size, 4, generator=seeded())
    area = size[0] * size[1]
    with scalediff.patch_model(model, window=(16, 16)):
        for _ in range(2):
            with pytest.raises(
                ValueError, match=rf"does not fit: .*{size[1]} x 4 .*called with {area} queries and {area} keys by LastChannels"
            ):
                model(x)
    with scalediff.patch_model(model, window=(16, 16), strict=False), pytest.warns(UserWarning, match=rf"tokens of {size[1]} x 4"):
        assert torch.equal(model(x), model(x))


def test_an_argument_of_five_axes_is_an_error() -> None:
    model, x = Frames(), torch.randn(1, 4, 1, 9, 6, generator=seeded())
    with (
        scalediff.patch_model(model, window=(4, 4)),
        pytest.raises(ValueError, match=r"Frames runs full attention: no argument is \[B, C, H, W\]"),
    ):
        model(x)


def test_the_first_native_pass_of_a_right_grid_is_the_models_own() -> None:
    model, x = made(DiT), latents((4, 4))
    with torch.no_grad():
        plain = model(x, *conditions("DiT"))
        with scalediff.patch_model(model) as handle, warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(model(x, *conditions("DiT")), plain)
            assert handle.report.last_pass == ""
            assert not handle.report.rows


# Why nothing is taken
