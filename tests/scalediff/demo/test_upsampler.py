"""The embedded model's upsampler: its score, its shapes, what its weights do to held-out scenes, and its training."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from bench.quality.metrics import power_above
from scalediff.cascade.upsampling import NetworkUpsampler, identify_upsampler, load_upsampler, upsampled_picture
from scalediff.demo.scenes import HELD_OUT_SEED, render
from scalediff.demo.upsampler import WEIGHTS, SceneUpsampler, energy_score, main, noise_of
from tests.conftest import seeded


def test_the_score_is_least_for_samples_of_the_true_distribution() -> None:
    """The true pictures are noise of standard deviation 1 around a mean: less noise, more noise and another mean score worse."""
    rng = seeded()
    one, two, true = torch.randn(3, 64, 3, 16, 16, generator=rng)
    scores = {
        (mean, std): float(energy_score(mean + std * one, mean + std * two, true)) for mean, std in ((0, 1), (0, 0), (0, 2), (0.5, 1))
    }
    assert min(scores, key=scores.__getitem__) == (0, 1)


def test_a_picture_is_doubled_alike_every_time_and_in_any_batch() -> None:
    torch.manual_seed(0)
    network = SceneUpsampler().eval()
    x = torch.rand(2, 3, 12, 20, generator=seeded())
    with torch.no_grad():
        found = network(x)
        assert found.shape == (2, 3, 24, 40)
        assert (found.min() >= 0) & (found.max() <= 1)
        torch.testing.assert_close(network(x[1:]), found[1:])
        assert not torch.equal(network(x, torch.zeros(2, 4, 12, 20)), found)


@pytest.mark.parametrize("wrap", [(False, True), (True, True)])
def test_ends_meet_where_a_picture_wraps(wrap: tuple[bool, bool]) -> None:
    """As the middle of many copies of the picture and of the noise that it has without wrapping."""
    x, found = 2 * torch.rand(1, 3, 40, 48, generator=seeded()) - 1, load_upsampler("demo")
    assert isinstance(found, NetworkUpsampler)
    copies = [3 if on else 1 for on in wrap]
    many = [one.repeat(1, 1, *copies) for one in (x / 2 + 0.5, noise_of(x))]
    middle = 2 * found(*many) - 1
    for dim, (n, count) in enumerate(zip((80, 96), copies, strict=True), start=2):
        middle = middle.narrow(dim, count // 2 * n, n)
    torch.testing.assert_close(upsampled_picture(x, (80, 96), found, wrap=wrap), middle, rtol=1e-5, atol=1e-5)
    unwrapped = upsampled_picture(x, (80, 96), found)
    inside = slice(24, -24) if wrap[0] else slice(None)
    torch.testing.assert_close(unwrapped[..., inside, 24:-24], middle[..., inside, 24:-24], rtol=1e-5, atol=1e-5)
    assert (unwrapped - middle).abs().max() > 1e-2, "the border shows without wrap"


def test_the_weights_give_held_out_scenes_the_power_that_bicubic_lacks(trained_demo: Any) -> None:
    """Above the Nyquist frequency of the decoded picture, at both sizes that the cascade doubles; nearer to the truth by 6 dB at least."""
    found = load_upsampler("demo")
    assert isinstance(found, NetworkUpsampler)
    assert (found.factor, identify_upsampler(found)) == (2, found.fingerprint)
    assert WEIGHTS.stat().st_size < 1e6
    for size in (64, 128):
        small, true = render(HELD_OUT_SEED, 4, size), render(HELD_OUT_SEED, 4, 2 * size)
        with torch.no_grad():
            decoded = trained_demo.vae.decode(trained_demo.vae.encode(2 * small - 1).latent_dist.mode()).sample

        def lack(enlarged: Tensor, true: Tensor = true) -> float:
            power = (power_above((x / 2 + 0.5).clamp(0, 1), frequency=0.25).sum() for x in (enlarged, 2 * true - 1))
            return abs(10 * math.log10(next(power) / next(power)))

        ours, bicubic = (lack(upsampled_picture(decoded, (2 * size, 2 * size), upsampler)) for upsampler in (found, None))
        assert ours < bicubic - 6, size


@pytest.mark.slow
def test_training_end_to_end_on_a_handful_of_scenes(tmp_path: Path) -> None:
    file = tmp_path / "upsampler.safetensors"
    main(["--export", str(file), "--steps", "2", "--scenes", "4", "--batch", "4"])
    first = file.read_bytes()
    main(["--export", str(file), "--steps", "2", "--scenes", "4", "--batch", "4"])
    assert file.read_bytes() == first
    assert len(first) == pytest.approx(WEIGHTS.stat().st_size, rel=0.01)
