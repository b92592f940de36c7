"""Masks of the text as pipelines send them: holes, padding, numbers that are added to the scores."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from tests.scalediff.families.test_families import Masked, double, specimen

pytest.importorskip("diffusers", reason="the families are diffusers' classes")

HOLES = torch.tensor([[1, 0, 1, 1, 0, 1], [1, 1, 1, 0, 0, 0]]).bool()
FIRST = HOLES.sort(dim=1, descending=True).values
SPREAD, PADDED_FIRST = (torch.cat([mask, torch.ones(2, 54, dtype=torch.bool)], dim=1) for mask in (HOLES, FIRST))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("Qwen-Image", {"encoder_hidden_states_mask": HOLES}),
        ("Krea 2", {"encoder_attention_mask": HOLES}),
        ("Bria FIBO", {"joint_attention_kwargs": {"attention_mask": SPREAD[:, None, None, :]}}),
        ("Chroma", {"attention_mask": PADDED_FIRST}),
        ("GLM-Image", {"kv_caches": type("Caches", (), {"caches": (), "__getitem__": lambda self, index: None})()}),
    ],
)
def test_masks_and_caches_as_pipelines_send_them(name: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Real tokens anywhere, masks that arrive with the call, boolean ones, and caches that hold nothing."""
    _, model = specimen(name)
    inputs = double(ZOO[name].inputs(Draw(1), (9, 6), 2)) | change

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    with warnings.catch_warnings(), scalediff.patch_model(model, window=WINDOW, text_queries="global", text_rope=False):
        warnings.filterwarnings("error", message="scalediff")
        out = forward()
    monkeypatch.setattr(F, "scaled_dot_product_attention", Masked(name, (9, 6)))
    expected = forward()
    assert (out - expected).abs().max() < 1e-9 * expected.abs().max()


def test_a_mask_changed_in_place_is_read_again() -> None:
    _, model = specimen("Qwen-Image")
    with torch.inference_mode(), scalediff.patch_model(model, window=WINDOW):
        mask = torch.ones(1, 6, dtype=torch.bool)
        inputs = double(ZOO["Qwen-Image"].inputs(Draw(1), (9, 6), 1)) | {"encoder_hidden_states_mask": mask}
        whole = model(**inputs, return_dict=False)[0]
        mask[0, 4:] = False
        changed = model(**inputs, return_dict=False)[0]
        fresh = model(**(inputs | {"encoder_hidden_states_mask": mask.clone()}), return_dict=False)[0]
    assert torch.equal(changed, fresh)
    assert not torch.equal(changed, whole)


PADDED = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.float64)


@pytest.mark.parametrize("name", ["Chroma", "CogView4", "GLM-Image"])
def test_padding_that_is_added_to_the_scores(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These add the product of a prompt's mask with itself to the scores: not a mask, and computed as it stands."""
    _, model = specimen(name)
    inputs = double(ZOO[name].inputs(Draw(1), (9, 6), 2))
    inputs["attention_mask"] = torch.cat([PADDED, torch.ones(2, 54)], dim=1).double() if name == "Chroma" else PADDED

    def forward() -> Tensor:
        with torch.no_grad():
            out: Tensor = model(**inputs, return_dict=False)[0]
        return out

    with warnings.catch_warnings(), scalediff.patch_model(model, window=WINDOW, text_queries="global", text_rope=False):
        warnings.simplefilter("error")
        out = forward()
        del inputs["attention_mask"]
        unpadded = forward()
    with warnings.catch_warnings(), scalediff.patch_model(model, window=WINDOW):
        warnings.simplefilter("error")
        forward()
    inputs["attention_mask"] = torch.cat([PADDED, torch.ones(2, 54)], dim=1).double() if name == "Chroma" else PADDED
    monkeypatch.setattr(F, "scaled_dot_product_attention", Masked(name, (9, 6)))
    expected = forward()
    largest = expected.abs().max()
    assert (out - expected).abs().max() < 1e-9 * largest
    assert (out - unpadded).abs().max() > 1e-4 * largest


@pytest.mark.parametrize("name", ["Chroma", "CogView4"])
def test_a_mask_that_adds_one_number_to_all_is_no_mask(name: str) -> None:
    _, model = specimen(name)
    inputs = double(ZOO[name].inputs(Draw(1), (9, 6), 1))
    masked = inputs | {"attention_mask": torch.ones(1, 60 if name == "Chroma" else 6)}
    with torch.no_grad(), scalediff.patch_model(model, window=WINDOW):
        out, expected = (model(**x, return_dict=False)[0] for x in (masked, inputs))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
