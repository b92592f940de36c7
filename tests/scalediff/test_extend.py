"""The code of the guide page "Extend": the complete example as it stands, and the shorter ones around it."""

from __future__ import annotations

import contextlib
import io
import re
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import scalediff
from scalediff import AttentionPlan, Layout, Sequence, families
from tests.scalediff.families.test_families import allowed

PAGE = (Path(__file__).parents[2] / "docs" / "guide" / "extend.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
COMPLETE = re.search(r"<!-- begin example -->\n\n```python\n(.*?)```", PAGE, flags=re.DOTALL)
SDPA = F.scaled_dot_product_attention


@pytest.fixture(scope="module")
def example() -> tuple[dict[str, Any], str]:
    """What the complete example defines, and what it prints."""
    assert COMPLETE is not None
    printed, names = io.StringIO(), {"__name__": "mylibrary.models"}
    torch.manual_seed(0)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(COMPLETE[1], "extend.md", "exec"), names)
    return names, printed.getvalue()


def test_the_example_reports_its_windows(example: tuple[dict[str, Any], str]) -> None:
    dry, report = example[1].split("\nModel: ")
    assert "a dry run" in dry
    assert "261 queries and 261 keys by Model" in dry
    assert "32 x 24 tokens; 2 self-attention calls in windows, 0 left to full attention" in report
    assert "not rotated" not in report


def test_the_models_class_has_about_thirty_lines() -> None:
    assert COMPLETE is not None
    model = COMPLETE[1].partition("class Model")[2].partition("\nmodel, caption")[0]
    assert len([line for line in model.splitlines() if line.strip()]) <= 30


def test_the_example_is_a_mask_by_hand(example: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With exact text positions: text is at position zero, so that without rotation it keeps its true angle."""
    model, grid = example[0]["model"], (32, 24)
    latents, caption = torch.randn(1, 4, *grid).double(), torch.randn(1, 5, 8).double()
    twin = example[0]["Model"]().double()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        with scalediff.patch_model(twin, patch_size=1, text=("prefix", "caption"), window=(16, 16), text_queries="global"):
            out = twin(latents, caption)
        mask = torch.ones(5 + 768, 5 + 768, dtype=torch.bool)
        mask[5:, 5:] = allowed(grid, (16, 16), (8, 8))
        monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: SDPA(q, k, v, mask))
        expected = twin(latents, caption)
    assert (out - expected).abs().max() < 1e-6 * expected.abs().max()


def test_the_family_of_the_page(example: tuple[dict[str, Any], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the result of the example's arguments."""
    monkeypatch.setattr(families, "_registered", {})
    model, latents, caption = example[0]["Model"](), torch.randn(1, 4, 32, 24), torch.randn(1, 5, 8)
    assert type(model).__module__ == "mylibrary.models"
    (block,) = (block for block in BLOCKS if "register_family(Family(" in block)
    with torch.no_grad():
        arguments = {"patch_size": 1, "text": ("prefix", "caption"), "window": (16, 16), "text_rope": example[0]["rotation"]}
        with scalediff.patch_model(model, **arguments):
            expected = model(latents, caption)
        exec(compile(block, "extend.md", "exec"), {})
        with scalediff.patch_model(model) as handle:
            assert torch.equal(model(latents, caption), expected)
            assert handle.report.notes == ()


def test_the_shorter_blocks(example: tuple[dict[str, Any], str]) -> None:
    """Layouts, an attention function around a plan, and an export in a pass."""
    names: dict[str, Any] = {"scalediff": scalediff, "torch": torch, "Layout": Layout, "Sequence": Sequence}
    layouts, _, levels, _, plan, around = BLOCKS
    exec(layouts, names)
    full: list[int] = []
    names |= {"rotation": example[0]["rotation"], "full_attention": lambda q, k, v, mask: full.append(1)}
    exec(plan, names)
    q = torch.randn(1, 128 * 96 + 77, 1, 16)
    assert isinstance(names["plan"], AttentionPlan)
    assert names["attention"](q[:, :64], q[:, :77], q[:, :77]) is None
    assert full == [1]
    patched: list[Any] = []
    shown = types.SimpleNamespace(patch_model=lambda model, **arguments: patched.append(arguments))
    exec(levels, names | {"scalediff": shown, "unet": None})
    layout = patched[0]["layout"]({"latents": torch.empty(1, 4, 10, 7)})
    assert [sequence.grid for sequence in layout.sequences] == [(10, 7), (5, 3), (2, 1)]
    small = AttentionPlan(Layout((20, 16), (Sequence((20, 16), text=5),)), window=(16, 16))
    model, printed = example[0]["Model"](), io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(around, names | {"plan": small, "model": model, "latents": torch.randn(1, 4, 20, 16), "caption": torch.randn(1, 5, 8)})
    assert re.fullmatch(r"[12] \{\} \{\}\n", printed.getvalue())
