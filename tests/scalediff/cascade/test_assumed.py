"""The cascade of a pipeline whose denoiser belongs to no known family: what is assumed, and that it is said."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.latents import unpacked
from scalediff.cascade.pipeline import cascade_of, native_size, preset
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")


class Foreign(nn.Module):
    """A denoiser of another library: what a pipeline asks of it, and nothing that a known family has."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net, self.config, self.dtype, self.device = net, net.config, net.dtype, net.device
        self.cache_context = getattr(net, "cache_context", None)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any) -> Any:
        return self.net(hidden_states, encoder_hidden_states=encoder_hidden_states, **others)


def foreign(name: str) -> tuple[Any, dict[str, Any]]:
    pipe, call = built(name)
    pipe.transformer = Foreign(pipe.transformer)
    return pipe, call


def drawn(pipe: Any, call: dict[str, Any]) -> Tensor:
    height, width = native_size(pipe)
    result = scalediff.generate(pipe, None, height=2 * height, width=3 * width // 2, steps=4, call=call, generator=seeded())
    return result.stages[-1].latents


def grid_of(arguments: Any) -> tuple[int, int]:
    rows, columns = arguments["img_ids"][-1, 1:3].long().tolist()
    return rows + 1, columns + 1


CASES = {
    "SD3": ({"patch_size": 2, "text": ("suffix", "encoder_hidden_states")}, r"latents \[B, C, Y, X\], 2 x 2 of them in a token"),
    "FLUX": ({"grid": grid_of, "text": ("prefix", "encoder_hidden_states")}, "latents as packed tokens, 2 x 2 of them in a token"),
}


@pytest.mark.draws("text-to-image", CASES, switch="of no known family")
@pytest.mark.parametrize("name", CASES)
def test_an_unknown_pipeline_draws_as_a_known_one(name: str) -> None:
    """The same latents bit for bit, where text is not rotated and the presets are the pipeline's own steps and guidance."""
    how, said = CASES[name]
    known, call = built(name)
    pipe, _ = foreign(name)
    with pytest.raises(ValueError, match=r"the cascade supports pipelines with one of .*, got Foreign"):
        scalediff.generate(pipe, None, height=32, width=32, call=call)
    with pytest.warns(UserWarning, match=f"Foreign belongs to no known family: the cascade assumes that .* has {said}") as caught:
        handle = scalediff.patch_model(pipe, **how, window=WINDOW, strict=False)
    assert "default: 28 steps with guidance_scale=" in str(caught[0].message)
    assert "runs the cascade above the native size" in str(handle.report)
    scalediff.patch_model(known, window=WINDOW, text_rope=False)
    assert cascade_of(pipe).assumed
    assert not cascade_of(known).assumed
    chosen = {"preset": preset(pipe)}
    latents = [
        scalediff.generate(one, None, height=32, width=24, call=call, generator=seeded(), **chosen, steps=4).stages[-1].latents
        for one in (pipe, known)
    ]
    assert torch.equal(*latents)
    height, width = 32, 24
    own = pipe(**call, height=height, width=width, num_inference_steps=4, generator=seeded(), output_type="latent").images
    assert torch.equal(unpacked(pipe, own, (height, width)), latents[0])


def test_latents_that_are_not_as_assumed_are_refused() -> None:
    """One latent in a token, where the pipeline packs 2 x 2."""
    pipe, call = foreign("FLUX")
    with pytest.warns(UserWarning, match="1 x 1 of them in a token"):
        scalediff.patch_model(
            pipe, grid=lambda a: (8, 8), patch_size=1, text=("prefix", "encoder_hidden_states"), window=(8, 8), strict=False
        )
    with pytest.raises(ValueError, match=r"FluxPipeline must return latents of 9 x 7 as tokens, got .*1, 12, 16"):
        drawn(pipe, call)


def test_nothing_is_assumed_of_a_module_or_a_known_pipeline() -> None:
    pipe, _ = foreign("SD3")
    known, _ = built("SD3")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model, how in ((pipe.transformer, {"patch_size": 2, "text": ("suffix", "encoder_hidden_states")}), (known, {})):
            with scalediff.patch_model(model, window=WINDOW, **how):
                pass
    with pytest.raises(ValueError, match="the cascade supports pipelines"):
        preset(pipe)
