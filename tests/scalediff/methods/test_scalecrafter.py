"""ScaleCrafter: the published loop, written by hand in fp64, gives the same picture; the dilated layers are the authors'."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import native_size, preset
from scalediff.cascade.results import Stage
from scalediff.methods import ScaleCrafter
from scalediff.methods.scalecrafter import Dilating, redilated, scalecrafter
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")

STEPS, GUIDANCE = 6, 3.0


def run(pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: ScaleCrafter | None = None, **more: Any) -> Stage:
    settings = replace(preset(pipe), steps=STEPS, guidance_scale=GUIDANCE)
    (stage,) = scalecrafter(pipe, {"generator": seeded(), **arguments}, size, settings, options or ScaleCrafter(), **more)
    return stage


class Dilated(nn.Module):
    """A 3 x 3 convolution with dilation; for a fractional factor, of the enlarged input."""

    def __init__(self, convolution: nn.Conv2d, d: float) -> None:
        super().__init__()
        self.d, self.whole, self.inner = d, math.ceil(d), convolution

    def forward(self, x: Tensor) -> Tensor:
        (y, width), stride = x.shape[-2:], self.inner.stride[0]
        if self.whole != self.d:
            larger = round(y * self.whole / self.d), round(width * self.whole / self.d)
            x = F.interpolate(x, size=larger, mode="bilinear")
        x = F.conv2d(F.pad(x, (self.whole,) * 4), self.inner.weight, self.inner.bias, stride=stride, dilation=self.whole)
        if self.whole != self.d:
            x = F.interpolate(x, size=(math.ceil(y / stride), math.ceil(width / stride)), mode="bilinear")
        return x


@pytest.mark.parametrize("stride", [1, 2])
def test_a_dilated_convolution_has_zeros_between_its_taps(stride: int) -> None:
    convolution, x = nn.Conv2d(2, 3, 3, stride=stride, padding=1).double(), torch.randn(1, 2, 12, 10, dtype=torch.float64)
    kernel = torch.zeros(3, 2, 7, 7, dtype=torch.float64)
    kernel[..., ::3, ::3] = convolution.weight.detach()
    with torch.no_grad(), redilated(nn.ModuleDict({"one": convolution}), {"one": 3.0}):
        torch.testing.assert_close(convolution(x), F.conv2d(x, kernel, convolution.bias, padding=3, stride=stride))
    assert (convolution.dilation, convolution.padding) == ((1, 1), (1, 1))


def dilated_copy(unet: Any, factors: Mapping[str, float]) -> Any:
    """A copy of the U-Net whose blocks have these factors, in all their 3 x 3 convolutions."""
    twin = copy.deepcopy(unet)
    for block, d in factors.items():
        for name, module in list(twin.get_submodule(block).named_modules()):
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                owner, _, last = name.rpartition(".")
                setattr(twin.get_submodule(f"{block}.{owner}"), last, Dilated(module, d))
    return twin


@torch.no_grad()
def by_hand(pipe: Any, arguments: dict[str, Any], size: tuple[int, int], *, tau: int, damped: int, factors: Any) -> Tensor:
    """The loop in fp64 with Euler's step. `factors` gives those of the strong and weak U-Net at a step."""
    unet, scheduler = copy.deepcopy(pipe.unet).double(), copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    text, pooled = (
        torch.cat([arguments[f"negative_{part}"], arguments[part]]).double() for part in ("prompt_embeds", "pooled_prompt_embeds")
    )
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[*size, 0, 0, *size]] * 2).double()}
    sigmas = scheduler.sigmas.double()
    x = torch.randn(1, 4, size[0] // 2, size[1] // 2, generator=seeded()).double() * float(scheduler.init_noise_sigma)
    for i, t in enumerate(scheduler.timesteps):
        given = torch.cat([x, x]) / math.sqrt(sigmas[i] ** 2 + 1)
        strong, weak = factors(i) if i < tau else ({}, {})
        empty, named = dilated_copy(unet, strong)(given, t, text, added_cond_kwargs=added).sample.chunk(2)
        of_weak = dilated_copy(unet, weak)(given, t, text, added_cond_kwargs=added).sample.chunk(2)[0] if i < damped else empty
        x = x + (of_weak + GUIDANCE * (named - empty)) * (sigmas[i + 1] - sigmas[i])
    return x


WEAK = {"mid_block": 2.0, "up_blocks.0": 2.0}


def factors_at(side: float, i: int) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """The published lists for two levels."""
    if side <= 2:
        return {"mid_block": side, "up_blocks.0": side}, {}
    tau = 4
    first = {"down_blocks.1": 4.0, "mid_block": 4.0, "up_blocks.0": 4.0, "up_blocks.1": 3.0}
    return {name: max(2.0, math.ceil(d * (tau - i) / tau)) for name, d in first.items()}, WEAK


@pytest.mark.parametrize(("side", "tau", "damped"), [(4, 4, 4), *(pytest.param(side, 4, 0, marks=pytest.mark.slow) for side in (2, 1.5))])
def test_sdxl_is_the_published_loop(side: float, tau: int, damped: int) -> None:
    """Twice, four times (progressive and damped) and one and a half times (fractional) the native side."""
    pipe, arguments = built("SDXL")
    latents = 8 if side == 1.5 else 4  # sides are multiples of 8 pixels
    pixels = round(2 * latents * side)
    pipe.unet.register_to_config(sample_size=latents)
    with scalediff.patch_model(pipe, window=(latents, latents)):
        before = state_of(pipe.unet)
        stage = run(pipe, (pixels, pixels), arguments)
        assert state_of(pipe.unet) == before
    expected = by_hand(pipe, arguments, (pixels, pixels), tau=tau, damped=damped, factors=lambda i: factors_at(side, i))
    size = expected.abs().max()
    torch.testing.assert_close(stage.latents.double() / size, expected / size, rtol=1e-3, atol=1e-3)
    plain = by_hand(pipe, arguments, (pixels, pixels), tau=0, damped=0, factors=None)
    assert (plain - expected).abs().max() > 0.02 * size, "the dilations change the picture"


class Net(nn.Module):
    """The names of SDXL's blocks, each with one resnet."""

    def __init__(self) -> None:
        super().__init__()

        def block(*samplers: str) -> nn.Module:
            found = nn.Module()
            resnet = nn.Module()
            resnet.conv1, resnet.conv2, resnet.conv_shortcut = nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 1, 1)
            found.resnets = nn.ModuleList([resnet])
            for name in samplers:
                sampler = nn.Module()
                sampler.conv = nn.Conv2d(1, 1, 3)
                setattr(found, name, nn.ModuleList([sampler]))
            return found

        self.down_blocks = nn.ModuleList([block("downsamplers"), block("downsamplers"), block()])
        self.mid_block = block()
        self.up_blocks = nn.ModuleList([block("upsamplers"), block("upsamplers"), block()])


def test_the_lists_are_those_of_the_authors() -> None:
    at_2048, at_4096 = (Dilating.of(Net(), factor, 50, ScaleCrafter()) for factor in (2.0, 4.0))

    def resnet(block: str) -> set[str]:
        return {f"{block}.resnets.0.conv1", f"{block}.resnets.0.conv2"}

    first = resnet("mid_block") | resnet("up_blocks.0") | {"up_blocks.0.upsamplers.0.conv"}
    assert at_2048.strong == dict.fromkeys(first, 2.0) == at_4096.weak
    assert (at_2048.steps, at_2048.damped_steps, at_2048.progressive) == (30, 0, False)
    assert (at_4096.steps, at_4096.damped_steps, at_4096.progressive) == (35, 35, True)
    assert {name for name, d in at_4096.strong.items() if d == 4} == first | resnet("down_blocks.2")
    assert {name for name, d in at_4096.strong.items() if d == 3} == resnet("up_blocks.1") | {"up_blocks.1.upsamplers.0.conv"}
    assert {name for name, d in at_4096.strong.items() if d == 2} == resnet("up_blocks.2")
    name = "mid_block.resnets.0.conv1"
    assert [at_4096.at(at_4096.strong, step).get(name) for step in (0, 8, 9, 17, 18, 34, 35)] == [4, 4, 3, 3, 2, 2, None]


def test_at_native_size_it_is_the_pipelines_own_picture(demo: Any) -> None:
    stage = run(demo, (64, 64), {"prompt": "a moon"})
    own = demo("a moon", num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeded(), output_type="latent").images
    assert torch.equal(stage.latents, own)


def test_without_guidance_nothing_is_damped_and_errors_restore_the_model() -> None:
    pipe, arguments = built("SDXL")
    settings = replace(preset(pipe), steps=STEPS, guidance_scale=1.0)
    calls: list[int] = []
    run(pipe, native_size(pipe), arguments)
    before, rng = state_of(pipe.unet), torch.get_rng_state().tolist()
    dilations = {name: (module.dilation, module.padding) for name, module in pipe.unet.named_modules() if isinstance(module, nn.Conv2d)}
    remover = pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    seen: list[Stage] = []
    scalecrafter(pipe, {"generator": seeded(), **arguments}, (32, 32), settings, ScaleCrafter(), on_stage=seen.append, progress=False)
    assert (len(calls), len(seen)) == (STEPS, 1)
    remover.remove()

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle")

    remover = pipe.unet.mid_block.resnets[0].conv2.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        run(pipe, (24, 24), arguments, ScaleCrafter(dilation=1.5))
    remover.remove()
    assert (state_of(pipe.unet), torch.get_rng_state().tolist()) == (before, rng)
    after = {name: (module.dilation, module.padding) for name, module in pipe.unet.named_modules() if isinstance(module, nn.Conv2d)}
    assert after == dilations


def test_what_it_cannot_run_is_refused() -> None:
    pipe, arguments = built("SD3")
    with (
        scalediff.patch_model(pipe, window=WINDOW),
        pytest.raises(NotImplementedError, match="ScaleCrafter needs a U-Net, whose convolutions it dilates, got SD3Transformer2DModel"),
    ):
        run(pipe, (32, 32), arguments)
    pipe, arguments = built("SDXL")
    with pytest.raises(NotImplementedError, match=r"noise-damped guidance cannot be rescaled, got guidance_rescale=0\.7"):
        run(pipe, (32, 32), arguments | {"guidance_rescale": 0.7})
    for changes, message in (
        ({"dilation": 0.5}, r"dilation must be at least 1, got dilation=0\.5"),
        ({"damped": 1.5}, r"damped must lie in \[0, 1\], got damped=1\.5"),
    ):
        with pytest.raises(ValueError, match=message):
            ScaleCrafter(**changes)  # type: ignore[arg-type]
