"""The counted work against formulas: what attention costs with windows and without, at SDXL's true size."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from scalediff.cli import main
from scalediff.flops import MODELS, _forward, count
from scalediff.grid import level_grid
from scalediff_kernels.neighborhood.geometry import attention_flops

pytest.importorskip("diffusers", reason="the models are diffusers' classes")


def test_sdxl_attention_is_what_the_formula_says() -> None:
    """Self-attention over windows or all, and cross-attention to 77 tokens: 4 S K H D each."""
    with torch.device("meta"):
        unet: Any = MODELS["sdxl"].denoiser()
    latent = (256, 192)
    for windows in (True, False):
        expected = 0
        for name, module in unet.named_modules():
            if hasattr(module, "processor"):
                level = 1 if "_blocks.1.attentions" in name else 2  # of 128, 64 and 32 tokens a side; the finest has no attention
                grid, heads = level_grid(latent, level), {"heads": module.heads, "head_dim": 64}
                if name.endswith("attn2"):
                    expected += 4 * grid[0] * grid[1] * 77 * module.heads * 64
                else:
                    expected += attention_flops(grid=grid, window=level_grid((128, 128), level) if windows else grid, **heads)
        attention, linear, convolution = _forward(unet, MODELS["sdxl"].inputs(*latent), windows=windows)
        assert attention == pytest.approx(expected / 1e12, rel=1e-12)
        assert linear > convolution > 0


def test_a_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    settings, (base,) = count("sdxl", (1024, 1024))
    assert (base.steps, base.passes, settings.steps) == (50, 100, 50)
    assert base.total == pytest.approx(base.attention + base.linear + base.convolution + base.vae)
    assert main(["plan", "--size", "1024"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].split()[:5] == ["1024", "x", "1024", "50", "100"]
    assert table[-1].split()[-1] == "100.0%"
    assert main(["plan", "--size", "1024", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["unit"] == "TFLOP"
    assert told["stages"][0]["total"] == pytest.approx(base.total)


def test_unknown_models_and_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="model must be one of sdxl, flux, got 'dalle'"):
        count("dalle", (1024, 1024))
    assert main(["plan", "--size", "512"]) == 2
    assert "at least the model's native 1024 x 1024" in capsys.readouterr().err


@pytest.mark.slow
def test_flux_is_counted_too() -> None:
    """Text attends in every window under the authors' rule; the published figure is 28.6 to 31 PFLOP for 4096 x 4096."""
    _, rows = count("flux", (4096, 4096))
    assert [row.passes for row in rows] == [30, 18, 18]
    assert 28_000 < sum(row.total for row in rows) < 31_000
