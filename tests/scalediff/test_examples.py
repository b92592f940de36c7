"""The examples of the guide run as they stand, and the attention backend fits the signatures of its hosts."""

from __future__ import annotations

import json
import runpy
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from scalediff import AttentionPlan, Layout, Sequence
from tests.conftest import seeded
from tests.scalediff.families.test_families import allowed

EXAMPLES = Path(__file__).parents[2] / "docs" / "guide" / "examples"
PRINTED = {
    "pipeline": "7 self-attention calls in windows, 0 left to full attention",
    "own_loop": "7 self-attention calls in windows, 0 left to full attention",
    "unlisted_model": "2 self-attention calls in windows, 0 left to full attention",
    "own_attention": "torch.Size([1, 32, 24, 64]) torch.Size([1, 7, 64])",
    "serving_backend": "torch.Size([1, 775, 4, 32]) in windows",
}


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(PRINTED)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "pipeline" else name for name in PRINTED])
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if name in ("pipeline", "own_loop"):
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert PRINTED[name] in capsys.readouterr().out
    if name in ("pipeline", "own_loop"):
        with Image.open(tmp_path / "disc.png") as picture:
            assert picture.size == (128, 128)
            assert len(picture.getcolors(128 * 128)) > 100


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    pytest.importorskip("diffusers")
    notebook = json.loads((EXAMPLES / "embedded_model.ipynb").read_text())
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert names["direct"].size == names["result"].images[0].size == (128, 128)
    assert len(names["handle"].report.patched) == 7
    assert [picture.size for picture in names["sheet"]] == [(128, 128)] * 2


# What the hosts define: vLLM-Omni's diffusion/attention/backends/abstract.py, SGLang's multimodal_gen/.../attention_backend.py (2026).


class HostImpl(ABC):
    @abstractmethod
    def __init__(
        self, num_heads: int, head_size: int, softmax_scale: float, causal: bool = False, num_kv_heads: int | None = None,
        prefix: str = "", **extra_impl_args: Any,
    ) -> None: ...  # fmt: skip

    @abstractmethod
    def forward(self, query: Tensor, key: Tensor, value: Tensor, attn_metadata: Any) -> Tensor: ...


@dataclass
class OmniMetadata:
    attn_mask: Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class SglangMetadata:
    current_timestep: int
    scalediff_plan: AttentionPlan | None = None


GRID, TEXT = (10, 6), 5
PLAN = AttentionPlan(Layout(GRID, (Sequence(GRID, text=TEXT),)), window=(4, 4), text_queries="global")


@pytest.fixture(scope="module")
def layer() -> Any:
    example = runpy.run_path(str(EXAMPLES / "serving_backend.py"))
    impl: Any = type("Impl", (example["ScaleDiffImpl"], HostImpl), {})
    return impl(num_heads=4, head_size=16, softmax_scale=0.25, causal=False, num_kv_heads=2, prefix="blocks.0", qkv_layout=None)


def tensors(heads: tuple[int, int]) -> tuple[Tensor, ...]:
    counts = (heads[0], heads[1], heads[1])
    return tuple(torch.randn(2, TEXT + 60, n, 16, generator=seeded(i), dtype=torch.float64) for i, n in enumerate(counts))


@pytest.mark.parametrize("metadata", [OmniMetadata(extra={"scalediff_plan": PLAN}), SglangMetadata(7, PLAN)], ids=["vLLM-Omni", "SGLang"])
def test_a_serving_backend_computes_windows(layer: Any, metadata: Any) -> None:
    q, k, v = tensors((4, 2))
    mask = torch.ones(TEXT + 60, TEXT + 60, dtype=torch.bool)
    mask[TEXT:, TEXT:] = allowed(GRID, (4, 4), (2, 2))
    first = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*first, mask, scale=0.25, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(layer.forward(q, k, v, metadata), expected)
    torch.testing.assert_close(layer.forward_cuda(q, k, v, metadata), expected)


@pytest.mark.parametrize("metadata", [None, OmniMetadata(), SglangMetadata(7), OmniMetadata(extra={"scalediff_plan": PLAN})])
def test_a_serving_backend_leaves_other_calls(layer: Any, metadata: Any) -> None:
    """Without a plan, and for calls that are not the plan's."""
    q, k, v = (x[:, :9] for x in tensors((4, 2)))
    first = (x.transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(*first, scale=0.25, enable_gqa=True).transpose(1, 2)
    assert torch.equal(layer.forward(q, k, v, metadata), expected)


def test_a_causal_serving_backend_is_refused(layer: Any) -> None:
    with pytest.raises(NotImplementedError, match=r"windows are not causal, got causal=True for blocks\.1"):
        type(layer)(num_heads=4, head_size=16, softmax_scale=0.25, causal=True, prefix="blocks.1")
