"""The embedded model: small, honest about its training, good enough to stand for a real one; and its training script."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from scalediff.demo import DEMO_PATH
from scalediff.demo.scenes import HELD_OUT_SEED, render

pytest.importorskip("diffusers")


def test_the_model_is_small_and_says_how_it_was_made() -> None:
    assert sum(p.stat().st_size for p in DEMO_PATH.rglob("*") if p.is_file()) <= 12e6
    log = json.loads((DEMO_PATH / "training.json").read_text())
    assert log["autoencoder"]["steps"] == log["autoencoder"]["of"]
    assert log["denoiser"]["steps"] == log["denoiser"]["of"]
    assert {"device", "torch", "python"} <= set(log["machine"])


def test_held_out_pictures_survive_the_autoencoder(trained_demo: Any) -> None:
    pictures = render(HELD_OUT_SEED, 32, 64)
    with torch.no_grad():
        restored = trained_demo.vae.decode(trained_demo.vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    psnr = -10 * (restored - pictures).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() >= 30


def test_the_architecture_is_sdxl_in_small(trained_demo: Any) -> None:
    grids = set()

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        grids.add(args[0].shape[1])

    removers = [m.register_forward_pre_hook(note) for n, m in trained_demo.unet.named_modules() if n.endswith("attn1")]
    with torch.no_grad():
        trained_demo.unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 24, 64))
    for remover in removers:
        remover.remove()
    assert grids == {256, 64}, "self-attention at two levels"
    assert trained_demo.vae_scale_factor == 4


def test_unknown_words_are_no_error(trained_demo: Any) -> None:
    ids = trained_demo.tokenizer("a Moon, zqx über 42 hills", padding="max_length", max_length=24, truncation=True).input_ids
    assert len(ids) == 24
    assert trained_demo.tokenizer.tokenize("moon over hills") == ["moon</w>", "over</w>", "hills</w>"]


def test_training_resumes_to_the_same_weights(tmp_path: Path) -> None:
    from scalediff.demo.train import _fit

    def run(folder: Path, *, stop_at: int | None = None) -> nn.Linear:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)

        def loss(step: int) -> Tensor:
            if step == stop_at:
                raise KeyboardInterrupt
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            return model(x).square().mean()

        folder.mkdir(exist_ok=True)
        _fit("linear", folder, model, loss, steps=12, rate=0.1, ema_decay=0.9, save_every=4)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", stop_at=7)
    resumed = run(tmp_path / "cut")
    assert torch.equal(resumed.weight, whole.weight)
    log = json.loads((tmp_path / "cut" / "training.json").read_text())
    assert log["linear"]["steps"] == 12


@pytest.mark.slow
def test_training_end_to_end_on_a_handful_of_scenes(tmp_path: Path) -> None:
    import diffusers

    from scalediff.demo.train import main

    sizes = ["--scenes", "16", "--vae-steps", "2", "--vae-batch", "4", "--unet-steps", "2", "--unet-batch", "6"]
    main(["--workdir", str(tmp_path / "work"), "--export", str(tmp_path / "model"), "--device", "cpu", *sizes])
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "model")
    assert pipe("a moon", num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 64)


@pytest.mark.slow
def test_native_samples_show_exactly_one_disc(trained_demo: Any) -> None:
    from bench.quality.measuring import native_rows

    drawn, true = native_rows(trained_demo, n=32).values()
    assert drawn["one_disc"] >= 0.9
    assert true["one_disc"] >= 0.99


@pytest.mark.slow
def test_pictures_show_the_hour_and_the_place_of_their_words(trained_demo: Any) -> None:
    from bench.quality.measuring import word_rows

    (heeded,) = word_rows(trained_demo, n=2).values()
    assert heeded["hour"] >= 0.9
    assert heeded["place"] >= 0.75  # chance is a third
