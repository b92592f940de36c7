"""Text in the same softmax: the authors' rule on the real FLUX model, and how far text is turned in every rotary family.

Legend: B batch, H heads, S tokens of a sequence, Y x X token grid, T text tokens, D head dim, N windows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw, ids
from bench.models.zoo import WINDOW, ZOO
from scalediff.families import FAMILIES
from scalediff.families.base import Reader
from scalediff.families.grid import Sequence, Span
from scalediff.families.rotation import TextRotation
from scalediff.families.transformers import lengths
from tests.scalediff.families.test_families import Masked, double, run, specimen

pytest.importorskip("diffusers", reason="the families are diffusers' classes")

SDPA = F.scaled_dot_product_attention
TEXT, AXES = 6, (4, 6, 6)


def angles(position: tuple[float, float, float]) -> Tensor:
    """FLUX's rotary angles of one position, `[D / 2]`, in fp64."""
    parts = [p * 10000.0 ** -(torch.arange(0, n, 2, dtype=torch.float64) / n) for p, n in zip(position, AXES, strict=True)]
    return torch.cat(parts)


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Channels 2c and 2c + 1 of `[..., D]` as complex numbers, turned."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def authors_rule(q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    """Copy every window out, repeat the text for each of them turned by the window's top-left token, attend in one batch of
    windows, put the image queries back and average the text."""
    (height, width), (wy, wx) = grid, WINDOW
    starts = [(i, j) for i in range(0, height, wy // 2) for j in range(0, width, wx // 2)]
    token = torch.arange(height * width).view(height, width)
    keys, queries, rows, columns = [], [], [], []
    for i, j in starts:
        top = min(max(i + wy // 4 - wy // 2, 0), height - wy)
        left = min(max(j + wx // 4 - wx // 2, 0), width - wx)
        keys.append(token[top : top + wy, left : left + wx].flatten())
        queries.append(token[i : i + wy // 2, j : j + wx // 2].flatten())
        rows.append(top)
        columns.append(left)
    turn = torch.stack([angles((0, y, x)) for y, x in zip(rows, columns, strict=True)])[:, None]  # [N, 1, D / 2]
    text_q, text_k = (turned(x[:, :, None, :TEXT].expand(-1, -1, len(starts), -1, -1), turn) for x in (q, k))
    text_v = v[:, :, None, :TEXT].expand(-1, -1, len(starts), -1, -1)
    image_q, image_k, image_v = (x[:, :, TEXT:] for x in (q, k, v))
    window_k, window_v = (x[:, :, torch.stack(keys)] for x in (image_k, image_v))  # [B, H, N, K, D]
    all_k, all_v = torch.cat([text_k, window_k], 3), torch.cat([text_v, window_v], 3)
    out = torch.empty_like(q)
    for n, patch in enumerate(queries):
        weights = (image_q[:, :, patch] @ all_k[:, :, n].mT / math.sqrt(q.shape[-1])).softmax(-1)
        out[:, :, TEXT + patch] = weights @ all_v[:, :, n]
    weights = (text_q @ all_k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    out[:, :, :TEXT] = (weights @ all_v).mean(2)
    return out


@pytest.mark.parametrize("grid", [(8, 8), (8, 6), (6, 10)])
def test_flux_follows_the_authors_rule(grid: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole FluxTransformer2DModel in fp64, double and single blocks, against windows copied out and text repeated."""
    _, model = specimen("FLUX.1")
    plain = run("FLUX.1", model, grid)
    with scalediff.patch_model(model, window=WINDOW):
        out = run("FLUX.1", model, grid)
    with scalediff.patch_model(model, window=WINDOW, text_rope=False):
        unturned = run("FLUX.1", model, grid)
    calls = []

    def stand_in(query: Tensor, key: Tensor, value: Tensor, **rest: Any) -> Tensor:
        calls.append(key.shape)
        return authors_rule(query, key, value, grid)

    monkeypatch.setattr(F, "scaled_dot_product_attention", stand_in)
    expected = run("FLUX.1", model, grid)
    assert len(calls) == 3
    largest = expected.abs().max()
    assert (out - expected).abs().max() < 1e-9 * largest
    assert (unturned - expected).abs().max() > 1e-5 * largest
    assert (plain - expected).abs().max() > 1e-3 * largest


def test_the_angles_are_those_of_the_model() -> None:
    _, model = specimen("FLUX.1")
    cos, sin = model.pos_embed(torch.tensor([[0.0, 5.0, 11.0]]))
    expected = angles((0, 5, 11)).repeat_interleave(2)
    torch.testing.assert_close(cos[0].double(), expected.cos(), rtol=0, atol=1e-6)
    torch.testing.assert_close(sin[0].double(), expected.sin(), rtol=0, atol=1e-6)


def _flux_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    axes = len(model.config.axes_dims_rope)
    return _of(model.pos_embed(torch.zeros(1, axes))), _of(model.pos_embed(ids(grid, axes=axes)))


def _of(rope: tuple[Tensor, Tensor]) -> Tensor:
    """(cos, sin), each channel twice, as complex numbers `[S, D / 2]`."""
    return torch.complex(rope[0][:, ::2].float(), rope[1][:, ::2].float())


def _qwen_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    image, text = model.pos_embed([[(1, *grid)]], max_txt_seq_len=3, device=torch.device("cpu"))
    return text, image


def _lumina2_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    _, text, image, *_ = model.rope_embedder(torch.zeros(1, 4, 2 * grid[0], 2 * grid[1]), torch.ones(1, 3, dtype=torch.long))
    return text[0], image[0]


def _z_image_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    _, _, _, image, text, *_ = model.patchify_and_embed([torch.zeros(4, 1, 2 * grid[0], 2 * grid[1])], [torch.zeros(32, 32)], 2, 1)
    return model.rope_embedder(text[0]), model.rope_embedder(image[0])[: grid[0] * grid[1]]


def _hidream_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    def of(positions: Tensor) -> Tensor:
        turn = model.pe_embedder(positions[None])[0, :, 0]  # [S, D / 2, 2, 2]
        return torch.complex(turn[..., 0, 0].float(), turn[..., 1, 0].float())

    return of(torch.zeros(1, 3)), of(ids(grid))


def _prx_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    turn = model.pe_embedder(ids(grid)[None, :, 1:])[0, 0]  # [S, D / 2, 2, 2]
    image = torch.complex(turn[..., 0, 0].float(), turn[..., 1, 0].float())
    return torch.ones_like(image[:1]), image  # text is not rotated: it stands at zero


def _hunyuan_image_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    image = _of(model.rope(torch.zeros(1, 4, *grid)))
    return torch.ones_like(image[:1]), image


def _krea_angles(model: Any, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return _of(model.rotary_emb(torch.zeros(1, 3))), _of(model.rotary_emb(ids(grid)))


ROTARY: dict[str, Callable[[Any, tuple[int, int]], tuple[Tensor, Tensor]]] = {
    "FLUX.1": _flux_angles,
    "FLUX.1 ControlNet": _flux_angles,
    "FLUX.2": _flux_angles,
    "FLUX.3": _flux_angles,
    "Chroma": _flux_angles,
    "Bria 3": _flux_angles,
    "Bria FIBO": _flux_angles,
    "LongCat-Image": _flux_angles,
    "Ovis-Image": _flux_angles,
    "Lumina 2": _lumina2_angles,
    "Qwen-Image": _qwen_angles,
    "Qwen-Image ControlNet": _qwen_angles,
    "NucleusMoE-Image": _qwen_angles,
    "HiDream-I1": _hidream_angles,
    "Z-Image": _z_image_angles,
    "PRX": _prx_angles,
    "HunyuanImage 2.1": _hunyuan_image_angles,
    "Krea 2": _krea_angles,
}


@pytest.mark.parametrize("grid", [(10, 6), (9, 12)])
@pytest.mark.parametrize("name", ROTARY)
def test_turned_text_is_as_far_from_its_window_as_from_a_native_picture(name: str, grid: tuple[int, int]) -> None:
    """By the model's own rotary tables, on the axes of the picture: turned text minus a token of the window, at any size, is text
    minus the same token of a native picture."""
    model = ZOO[name].build()
    rotation = FAMILIES[ZOO[name].kind].rotation(model)
    assert rotation is not None
    cos, sin = rotation.tables(grid, WINDOW, WINDOW, (2, 2), (0, 0))
    native_text, native = ROTARY[name](model, WINDOW)
    text, image = ROTARY[name](model, grid)
    first = sum(rotation.axes[: rotation.y]) // 2
    picture = slice(first, first + (rotation.axes[rotation.y] + rotation.axes[rotation.x]) // 2)
    for i in range(cos.shape[0]):
        for j in range(cos.shape[1]):
            top, left = (min(max(2 * n + 1 - 2, 0), length - 4) for n, length in zip((i, j), grid, strict=True))
            token = image.view(*grid, -1)[top + 1, left + 2]
            turn = torch.complex(cos[i, j].float(), sin[i, j].float())
            here = (text[0] * turn * token.conj())[picture]
            there = (native_text[0] * native.view(*WINDOW, -1)[1, 2].conj())[picture]
            torch.testing.assert_close(here, there.to(here.dtype), rtol=0, atol=1e-5)


def test_families_that_rotate_are_all_tried() -> None:
    rotating = {name for name, spec in ZOO.items() if FAMILIES[spec.kind].rotation(ZOO[name].build()) is not None}
    assert rotating == set(ROTARY)


def test_hidream_pads_oblong_pictures_and_attends_to_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The padding takes part in the model's own attention, so it is kept, as text is."""
    _, model = specimen("HiDream-I1")
    grid = (8, 16)
    with scalediff.patch_model(model, window=WINDOW, text_queries="global", text_rope=False):
        out = run("HiDream-I1", model, grid)
    monkeypatch.setattr(F, "scaled_dot_product_attention", Masked("HiDream-I1", grid))
    expected = run("HiDream-I1", model, grid)
    assert (out - expected).abs().max() < 1e-9 * expected.abs().max()


def test_spans_of_a_batch() -> None:
    ragged = Sequence((2, 3), text=5, real=(5, 2, 2), ragged=True)
    assert ragged.spans(3) == (Span(0, 1, 0, 5, 5), Span(1, 3, 0, 2, 2))
    padded = Sequence((2, 3), text=5, real=(5, 2, 2))
    assert padded.spans(3) == (Span(0, 1, 0, 5, 5), Span(1, 3, 0, 2, 5))
    suffix = Sequence((2, 3), side="suffix", text=5, real=(1, 1))
    assert suffix.spans(2) == (Span(0, 2, 6, 7, 0),)
    assert Sequence((2, 3), text=4).spans(2) == (Span(0, 2, 0, 4, 4),)
    with pytest.raises(ValueError, match="the text lengths are for a batch of 3 samples, got a batch of 2"):
        ragged.spans(2)


def test_lengths_of_a_mask() -> None:
    assert lengths(torch.tensor([[1, 1, 0], [1, 1, 1]])) == (2, 3)
    assert lengths(torch.tensor([[1, 0, 1], [1, 1, 1]])) == ()


def test_a_reader_reads_once_and_notices_changes() -> None:
    reads = []

    def total(x: Tensor) -> float:
        reads.append(1)
        return float(x.sum())

    read, x = Reader(), torch.ones(3)
    assert (read(x, total), read(x, total), len(reads)) == (3.0, 3.0, 1)
    x.add_(1)
    assert (read(x, total), len(reads)) == (6.0, 2)
    assert (read(torch.zeros(3), total), len(reads)) == (0.0, 3)


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("FLUX.1", {"img_ids": ids((9, 6)).flip(0)}, "img_ids must be the ids of one picture, row by row, for 54 tokens"),
        ("Lumina 2", {"encoder_attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1]])}, "padding must follow the text tokens in"),
    ],
)
def test_what_cannot_be_laid_out_runs_full_attention_and_says_so_once(name: str, change: dict[str, Any], why: str) -> None:
    _, model = specimen(name)
    inputs = double(ZOO[name].inputs(Draw(1), (9, 6), 1)) | double(change)

    def forward() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    plain = forward()
    with scalediff.patch_model(model, window=WINDOW):
        with pytest.warns(UserWarning, match=why):
            assert torch.equal(forward(), plain)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            forward()


def test_a_control_net_for_several_conditions_puts_a_token_before_the_text() -> None:
    spec = ZOO["FLUX.1 ControlNet"]
    union = replace(spec, config=spec.config | {"num_mode": 3})
    model = union.build()
    with warnings.catch_warnings(), scalediff.patch_model(model, window=WINDOW) as handle:
        warnings.simplefilter("error", UserWarning)
        union.run(model, (9, 6), controlnet_mode=torch.tensor([[1]]))
        assert set(model.__dict__["_scalediff"].seen) == {row.module for row in handle.report.patched}


def test_keys_beside_image_and_text_are_said() -> None:
    """As an adapter of SD3 adds them: queries of the image, keys of the image and a picture's tokens."""
    spec = ZOO["SD3"]
    model = spec.build()
    attention = model.transformer_blocks[0].attn  # type: ignore[index, union-attr]

    def adapter(module: Any, args: Any, output: Any) -> None:
        F.scaled_dot_product_attention(Draw()(1, 2, 54, 16), *(Draw(1)(1, 2, 58, 16) for _ in range(2)))

    attention.to_q.register_forward_hook(adapter)
    with (
        scalediff.patch_model(model, window=WINDOW),
        pytest.warns(UserWarning, match=r"blocks.0.attn runs full .*tokens of 9 x 6, got 54, 58"),
    ):
        spec.run(model, (9, 6))


class Unlisted(torch.nn.Module):
    """FLUX under a name that nobody listed."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **arguments: Any) -> Any:
        return self.inner(**arguments)


def test_text_of_an_unlisted_model_is_rotated_by_the_rotation_it_is_given() -> None:
    """The same numbers as from the listed family with the same weights; without a rotation the report says that text is not rotated."""
    spec, inner = specimen("FLUX.1")
    inputs = double(spec.inputs(Draw(0), (9, 6), 1))
    rotation = TextRotation(axes=AXES, theta=10000.0)
    how: dict[str, Any] = {"grid": (9, 6), "text": ("prefix", TEXT), "window": WINDOW}
    model = Unlisted(inner)
    with torch.no_grad():
        with scalediff.patch_model(inner, window=WINDOW):
            expected = inner(**inputs, return_dict=False)[0]
        with scalediff.patch_model(model, **how, text_rope=rotation) as handle:
            out = model(**inputs, return_dict=False)[0]
            assert handle.report.notes == ()
        with scalediff.patch_model(model, **how) as handle:
            unturned = model(**inputs, return_dict=False)[0]
            remedy = "if its positions are rotary, pass text_rope=TextRotation(axes, theta)"
            note = f"the text of Unlisted is not rotated for each window: {remedy}"
            assert handle.report.notes == (note,)
            assert str(handle.report).endswith(note)
    assert (out - expected).abs().max() < 1e-10 * expected.abs().max()
    assert (unturned - expected).abs().max() > 1e-5 * expected.abs().max()


def test_the_rotation_of_the_caller_comes_before_that_of_a_known_family_and_needs_text() -> None:
    _, inner = specimen("FLUX.1")
    rotation = TextRotation(axes=AXES, theta=10000.0)
    outputs = []
    for text_rope in (True, rotation, replace(rotation, theta=10.0)):
        with scalediff.patch_model(inner, window=WINDOW, text_rope=text_rope):
            outputs.append(run("FLUX.1", inner, (9, 6)))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    with pytest.raises(ValueError, match=r"rotates text: pass text= too, got text=None and text_rope=TextRotation"):
        scalediff.patch_model(Unlisted(inner), grid=(9, 6), window=WINDOW, text_rope=rotation)
