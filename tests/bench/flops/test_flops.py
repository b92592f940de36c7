"""The work of every method: published figures, the library's own plan, torch's count of the attention that windows run."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pandas import read_csv

pytest.importorskip("diffusers", reason="the models are diffusers' classes")

import diffusers

from bench.attention.shapes import view_starts
from bench.flops import __main__ as flops
from bench.flops.__main__ import MODELS, Counter, Row, comma_separated, main, sections
from bench.harness.pages import fill
from scalediff.cost.flops import _attention_flops, _count_flops, attention_work, count, layer_work
from scalediff.patch import patch_model

counter = cache(Counter)


@pytest.mark.parametrize(
    ("model", "method", "part", "expected"),
    [
        ("sdxl", "npa", lambda row: row["forward_linear"] + row["forward_convolution"], 94.9),
        ("sdxl", "direct", lambda row: row["forward_attention"], 192.4),
        ("sdxl", "npa", lambda row: row["forward_attention"], 12.0),
        ("sdxl", "multidiffusion", lambda row: row["tflops_forward"], 331),
        ("sdxl", "npa", lambda row: row["tflops_forward"], 107),
        ("flux", "npa", lambda row: row["forward_linear"], 853),
        ("flux", "direct", lambda row: row["forward_attention"], 3056),
        ("flux", "npa", lambda row: row["forward_attention"], 211 + 106),
        ("flux", "npa-global", lambda row: row["forward_attention"], 235),
        ("flux", "multidiffusion", lambda row: row["tflops_forward"], 3645),
        ("flux", "npa", lambda row: row["tflops_forward"], 1170),
    ],
)
def test_a_pass_at_4096_pixels(model: str, method: str, part: Callable[[Row], float], expected: float) -> None:
    """77 text tokens for SDXL, 512 for FLUX; counted independently of this code."""
    row = counter(model).row(4096, method)
    assert row["text"] == {"sdxl": 77, "flux": 512}[model]
    assert part(row) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("method", ["direct", "multidiffusion", "cascade-full", "cascade-multidiffusion", "npa"])
def test_a_run_is_the_sum_of_its_stages(method: str) -> None:
    """SDXL at 2048 pixels: 50 steps, or 50 at 1024 and 20 at 2048, two passes each; the autoencoder once, or with a round trip."""
    row, base = counter("sdxl").row(2048, method), counter("sdxl").row(1024, "direct")
    cascade = method not in ("direct", "multidiffusion")
    assert row["passes"] == (40 if cascade else 100)
    assert row["run_linear"] == pytest.approx(row["passes"] * row["forward_linear"] + cascade * 100 * base["forward_linear"])
    assert row["run_attention"] == pytest.approx(row["passes"] * row["forward_attention"] + cascade * 100 * base["forward_attention"])
    assert row["vae"] == pytest.approx(85.06 if cascade else 48.48, rel=1e-3)
    assert row["tflops_run"] == pytest.approx(
        row["run_attention"] + row["run_cross"] + row["run_linear"] + row["run_convolution"] + row["vae"]
    )
    assert row["tflops_forward"] == pytest.approx(
        row["forward_attention"] + row["forward_cross"] + row["forward_linear"] + row["forward_convolution"]
    )


@pytest.mark.parametrize(("size", "of_native"), [(2048, 1 + 9 + 4), (4096, 1 + 9 + 25 + 49 + 4 + 9 + 16)])
def test_demofusion_runs_views_and_dilated_samples_in_every_phase(size: int, of_native: int) -> None:
    """SDXL: all of native size at these sizes, 50 steps of two passes; every phase is decoded."""
    row, native = counter("sdxl").row(size, "demofusion"), counter("sdxl").row(1024, "direct")
    assert row["tflops_run"] - row["vae"] == pytest.approx(100 * of_native * native["tflops_forward"])
    assert row["vae"] == pytest.approx(sum(counter("sdxl").row(side, "direct")["vae"] for side in range(1024, size + 1, 1024)))


def test_dilated_samples_of_a_last_phase_that_is_cut_are_smaller() -> None:
    row, native = counter("sdxl").row(2560, "demofusion"), counter("sdxl").work.forward(1024, "full")
    sample = counter("sdxl").work.forward(8 * 107, "full")  # every third of 320
    assert row["forward_attention"] == pytest.approx(16 * native.attention + 9 * sample.attention)


@pytest.mark.slow
def test_a_cascade_is_what_the_plan_says() -> None:
    """The same number in two ways, at a size that is no doubling."""
    _, planned = count("sdxl", (3072, 3072))
    assert counter("sdxl").row(3072, "npa")["tflops_run"] == pytest.approx(sum(stage.total for stage in planned), rel=1e-12)


@pytest.mark.parametrize("text_queries", ["window", "global"])
@pytest.mark.parametrize("attention", ["npa", "full"])
@pytest.mark.parametrize("name", ["sd3.5-large", "lumina-next"])
def test_attention_is_what_torch_counts(name: str, attention: Any, text_queries: Any) -> None:
    """One block at true width, 2048 x 1536 pixels; those of SDXL and FLUX are in tests/scalediff/cost/test_flops.py."""
    with torch.device("meta"):
        if name == "sd3.5-large":
            denoiser: Any = diffusers.SD3Transformer2DModel(
                num_layers=1, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=128, qk_norm="rms_norm"
            )
        else:
            denoiser = diffusers.LuminaNextDiT2DModel(num_layers=1, num_kv_heads=8)
        inputs = MODELS[name].inputs(256, 192)
    attended, cross = attention_work(denoiser, inputs, attention=attention, text_queries=text_queries)
    assert (cross > 0) == (name == "lumina-next")
    with patch_model(denoiser, text_queries=text_queries) as handle:
        handle.attention = attention
        parts = _count_flops(lambda: denoiser(**inputs))
    assert attended + cross == pytest.approx(_attention_flops(parts), rel=1e-12)
    assert sum(layer_work(denoiser, inputs)) == pytest.approx(sum(parts.values()) - _attention_flops(parts))


@pytest.mark.slow
@pytest.mark.parametrize("size", flops.SIZES)
@pytest.mark.parametrize("name", MODELS)
def test_full_attention_of_whole_models_is_what_torch_counts(name: str, size: int) -> None:
    denoiser = counter(name).denoiser
    with torch.device("meta"):
        inputs = MODELS[name].inputs(size // 8, size // 8)
    parts = _count_flops(lambda: denoiser(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}))
    assert sum(attention_work(denoiser, inputs, attention="full")) == pytest.approx(_attention_flops(parts), rel=1e-12)


def test_linear_layers_by_hand() -> None:
    """At 2048 pixels, without the few of embeddings and modulation: what a token passes through, width by width."""
    tokens, width = 128 * 128, 2432
    block = 4 * width**2 + 2 * width * 4 * width  # q, k, v, out; up and down
    text = 333 * (38 * block - block + 3 * width**2)  # the last block's text ends at q, k and v
    assert counter("sd3.5-large").work.forward(2048, "window").linear == pytest.approx(2 * (tokens * 38 * block + text) / 1e12, rel=2e-3)
    width, keys = 2304, 8 * 72
    block = 2 * width**2 + 2 * width * keys + width**2 + 3 * width * 6144  # q of both attentions, k and v, out; gated up, down
    text = 256 * 24 * 2 * 2048 * keys
    assert counter("lumina-next").work.forward(2048, "window").linear == pytest.approx(2 * (tokens * 24 * block + text) / 1e12, rel=2e-3)


def test_models_have_their_published_size() -> None:
    """Parameters in billions, as their publishers say; Lumina-Next's call it 2."""
    billions = {name: sum(p.numel() for p in counter(name).denoiser.parameters()) / 1e9 for name in MODELS}
    assert billions.pop("lumina-next") == pytest.approx(2, rel=0.15)
    assert billions == {
        "sdxl": pytest.approx(2.567, rel=1e-3),
        "flux": pytest.approx(11.9, rel=1e-3),
        "sd3.5-large": pytest.approx(8.06, rel=1e-3),
    }


def test_views_cover_the_picture() -> None:
    assert [len(view_starts(side, 1024)) ** 2 for side in (1024, 2048, 4096, 8192)] == [1, 9, 49, 225]
    assert len(view_starts(1025, 1024)) == len(view_starts(1536, 1024)) == 2


def test_rows_are_printed_as_csv(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.flops.__main__.Counter", counter)
    monkeypatch.setattr(flops, "MODELS", {name: MODELS[name] for name in ("lumina-next", "flux")})
    monkeypatch.setattr(flops, "SIZES", (2048,))
    main([])
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    rules = {(row["model"], row["method"]): row["text_queries"] for row in rows}
    assert rules["lumina-next", "npa"] == ""
    assert (rules["flux", "npa"], rules["flux", "npa-global"]) == ("window", "global")
    assert {("lumina-next", "npa-global"), ("lumina-next", "demofusion")}.isdisjoint(rules), "text in cross-attention, and no U-Net"
    assert all(row["size"] == "2048" and float(row["tflops_run"]) > float(row["tflops_forward"]) > 0 for row in rows)


def test_a_size_that_a_model_cannot_draw_is_refused() -> None:
    with pytest.raises(ValueError, match="at least the model's native 1024 x 1024, got height=512"):
        counter("lumina-next").row(512, "npa")


def test_written_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RESULTS": tmp_path / "flops.csv", "DOC": tmp_path / "flops.md", "SIZES": (2048,)}.items():
        monkeypatch.setattr(flops, name, value)
    monkeypatch.setattr("bench.flops.__main__.Counter", counter)
    monkeypatch.setattr(flops, "MODELS", {"lumina-next": MODELS["lumina-next"]})
    flops.DOC.write_text("<!-- begin tables -->\n<!-- end tables -->\n")
    main(["--write"])
    with pytest.raises(SystemExit) as same:
        main(["--check"])
    assert same.value.code == 0
    flops.RESULTS.write_text(flops.RESULTS.read_text().replace("2048,direct", "2049,direct"))
    flops.DOC.write_text(flops.DOC.read_text().replace("## Lumina-Next", "## Lumina"))
    with pytest.raises(SystemExit, match=r"flops\.csv, line 2, is not what is counted now, got .*2049") as changed:
        main(["--check"])
    assert "flops.md, line 3, is not what is counted now, got '## Lumina' for '## Lumina-Next'" in str(changed.value.code)


def test_a_missing_diffusers_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(flops, "package_version", lambda name: "absent")
    with pytest.raises(SystemExit):
        main([])
    assert "models are built from diffusers, not installed here" in capsys.readouterr().err


def test_the_page_is_that_of_the_committed_rows() -> None:
    rows = read_csv(flops.RESULTS, keep_default_na=False)
    assert len(rows) == 3 * (6 + 6 + 6 + 5)
    assert comma_separated(rows) == flops.RESULTS.read_text()
    page = flops.DOC.read_text()
    assert fill(page, {"tables": sections(rows)}) == page


@pytest.mark.slow
def test_the_committed_rows_are_what_is_counted() -> None:
    with pytest.raises(SystemExit) as same:
        main(["--check"])
    assert same.value.code == 0
