"""What the cascade does with autoencoders: precision, overflow, statistics of their latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from scalediff.cascade.latents import decode, encode
from scalediff.draw import generate
from tests.conftest import seeded
from tests.scalediff.cascade.test_cascade import PROMPT, latents_of


@pytest.mark.composes("half precision", "cascade")
def test_an_autoencoder_in_another_precision(demo: Any) -> None:
    demo.unet.bfloat16()
    demo.text_encoder.bfloat16()
    try:
        result = generate(demo, PROMPT, height=96, width=96, generator=seeded(), steps=2, restart=0.5)
        assert latents_of(result).dtype == torch.bfloat16
        assert latents_of(result).isfinite().all()
    finally:
        demo.unet.float()
        demo.text_encoder.float()


def test_an_overflowing_autoencoder_is_named(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = demo.vae.decode

    def overflow(latents: Tensor, *args: Any, **kwargs: Any) -> Any:
        out = decode(latents, *args, **kwargs)
        out.sample.fill_(float("nan"))
        return out

    monkeypatch.setattr(demo.vae, "decode", overflow)
    with (
        pytest.raises(ValueError, match=r"the autoencoder overflows in torch.float32"),
        pytest.warns(RuntimeWarning, match="invalid value"),
    ):
        generate(demo, PROMPT, height=128, width=128, generator=seeded(), steps=2, restart=0.5)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("method", ["scalediff", "direct", "diffusehigh", "super-resolution"])
def test_an_overflowing_denoiser_is_named(method: str, size: int, demo: Any) -> None:
    """In the base stage, also where that is the only one; and not the autoencoder, which makes a picture of what it is given."""
    with pytest.raises(ValueError, match=r"got NaN or infinity in torch.float32: the denoiser overflows; use a smaller guidance scale"):
        generate(demo, PROMPT, height=size, width=size, method=method, generator=seeded(), steps=2, guidance_scale=1e30)


def test_an_fp16_autoencoder_that_would_overflow_runs_in_fp32(demo: Any) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    expected = decode(demo, latents)
    assert demo.vae.config.force_upcast
    demo.vae.half()
    try:
        torch.testing.assert_close(decode(demo, latents), expected, rtol=1e-2, atol=1e-2)  # the weights have values of fp16
        assert demo.vae.dtype == torch.float16
    finally:
        demo.vae.float()


def test_latent_statistics_of_the_autoencoder_are_used(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standardised latents of an autoencoder that gives its statistics: the same pictures, by the formula of the pipelines."""
    latents = torch.randn(1, 4, 8, 8, generator=seeded())
    scale = demo.vae.config.scaling_factor
    plain = decode(demo, latents)
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 4, 1, 1), torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1)
    own = dict(demo.vae.config)
    try:
        demo.vae.register_to_config(latents_mean=mean.flatten().tolist(), latents_std=std.flatten().tolist())
        torch.testing.assert_close(decode(demo, (latents / scale - mean) * scale / std), plain, rtol=1e-4, atol=1e-4)
        again = encode(demo, plain) * std / scale + mean
        torch.testing.assert_close(again, demo.vae.encode(plain).latent_dist.mode(), rtol=1e-5, atol=1e-5)
    finally:
        demo.vae.register_to_config(**{name: own.get(name) for name in ("latents_mean", "latents_std")})
