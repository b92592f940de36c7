"""AccDiffusion: the published loop, written by hand in fp64 with attention maps of its own, gives the same picture."""

from __future__ import annotations

import copy
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import scalediff
from bench.models.zoo import WINDOW
from scalediff.cascade.pipeline import preset
from scalediff.cascade.results import Stage
from scalediff.methods import AccDiffusion
from scalediff.methods.accdiffusion import accdiffusion
from scalediff.methods.attention_maps import recorded_maps, token_masks
from scalediff.methods.edges import find_edges, resolve_controlnet
from tests.conftest import seeded, state_of
from tests.scalediff.cascade.test_pipelines import built

pytest.importorskip("diffusers")

PROMPT = "a full moon over snowy mountains at night"
STEPS, GUIDANCE = 2, 3.0


def run(pipe: Any, size: tuple[int, int], arguments: dict[str, Any], options: AccDiffusion | None = None, **more: Any) -> list[Stage]:
    settings = replace(preset(pipe), steps=STEPS, guidance_scale=GUIDANCE)
    return accdiffusion(pipe, {"generator": seeded(), **arguments}, size, settings, options or AccDiffusion(), **more)


class Explicit:
    """An attention processor that computes the probabilities, and keeps the conditional ones of one number of queries."""

    def __init__(self, queries: int) -> None:
        self.queries, self.kept = queries, list[Tensor]()

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **_: Any) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        q, k, v = (x.view(len(x), -1, attn.heads, x.shape[-1] // attn.heads).transpose(1, 2) for x in (q, k, v))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        if encoder_hidden_states is not None and q.shape[2] == self.queries:
            self.kept.append(weights[1].mean(0))
        out: Tensor = attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        return out


def opened(mask: Tensor, times: int) -> Tensor:
    """Opening by a 3 x 3 square, place by place."""
    for keep in (min, max):
        for _ in range(times):
            before, mask = mask, mask.clone()
            for y in range(mask.shape[0]):
                for x in range(mask.shape[1]):
                    mask[y, x] = keep(before[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].flatten().tolist())
    return mask


def striped_edges(picture: Any, spread: float) -> Any:
    """Stands in for OpenCV's edges: where the picture is brighter than its median, in every fourth row."""
    bright: Any = (picture.max(2) > (1 + spread) * np.median(picture)) * np.uint8(255)
    bright[np.arange(len(bright)) % 4 != 0] = 0
    return bright


def control_of(pipe: Any) -> Any:
    """A ControlNet for the embedded model whose residuals are not zero, as those of a new one are."""
    from diffusers import ControlNetModel

    torch.manual_seed(3)
    controlnet = ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 16, 32)).eval()
    for block in (*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block, controlnet.controlnet_cond_embedding.conv_out):
        nn.init.normal_(block.weight, std=0.05)
    return controlnet


@torch.no_grad()
def by_hand(pipe: Any, size: int, threshold: float, local_scale: float, controlnet: Any = None) -> tuple[list[Tensor], list[list[str]]]:
    """Phases of 16 and of `size` latents in fp64, and the prompts of the views; a view is 16, a coarse token 2 latents.

    A ControlNet sees the view's part of `striped_edges` of the first phase's picture, with the scale 0.8.
    """
    rng, window = seeded(), 16
    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(STEPS)
    unet = copy.deepcopy(pipe.unet).double()
    looking = {name: Explicit(64 if name.startswith(("down", "up")) else -1) for name in unet.attn_processors}
    unet.set_attn_processor(dict(looking))

    def encoded(text: str) -> Tensor:
        ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
        found: Tensor = pipe.text_encoder(ids)[0].double()
        return found

    def model(x: Tensor, t: Tensor, text: str, w: float, edges: Tensor | None = None) -> Tensor:
        pair, texts, residuals = torch.cat([x, x]), torch.cat([encoded(""), encoded(text)]), {}
        if edges is not None:
            down, middle = controlnet(pair, t, texts, torch.cat([edges, edges]), return_dict=False)
            residuals = {
                "down_block_additional_residuals": [0.8 * one for one in down],
                "mid_block_additional_residual": 0.8 * middle,
            }
        empty, named = unet(pair, t, texts, **residuals).sample.chunk(2)
        return empty + w * (named - empty)  # type: ignore[no-any-return]

    def step(out: Tensor, t: Tensor, x: Tensor) -> Tensor:
        after: Tensor = copy.deepcopy(scheduler).step(out, t, x, return_dict=False)[0]
        return after

    z = torch.randn(1, 4, 16, 16, generator=rng).double()
    jitter = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=rng)))
    for t in scheduler.timesteps:
        z = step(model(z, t, PROMPT, GUIDANCE), t, z)
    maps = torch.stack([one for looked in looking.values() for one in looked.kept]).mean(0).T.view(-1, 8, 8)
    for looked in looking.values():
        looked.queries = -1
    masks = torch.stack([opened((one > one.mean()).double(), 8 // 16) for one in maps])

    coarse, s, r = size // 2, 2, 1  # the grid, the phase, the margin in coarse tokens
    corners = []
    for y in range(0, coarse - 7, 4):
        for x in range(0, coarse - 7, 4):
            moved = []
            for place in (y, x):
                low, high = (0 if place + 8 == coarse else -r), (0 if place == 0 else r)
                moved.append(r + place + int(torch.randint(low, high + 1, (), generator=jitter)))
            corners.append((moved[0], moved[1]))
    shuffle = torch.Generator().manual_seed(int(torch.randint(1 << 62, (), generator=rng)))
    canvas = torch.zeros(len(masks), coarse + 2 * r, coarse + 2 * r)
    for y in range(coarse):
        for x in range(coarse):
            canvas[:, r + y, r + x] = masks[:, y * 8 // coarse, x * 8 // coarse]
    ids = pipe.tokenizer(PROMPT).input_ids
    texts = [
        " ".join(pipe.tokenizer.decode([ids[j]]) for j in range(1, len(ids) - 1) if canvas[j, y : y + 8, x : x + 8].mean() >= threshold)
        for y, x in corners
    ]

    edges = None
    if controlnet is not None:
        controlnet = copy.deepcopy(controlnet).double()
        decoded = pipe.vae.decode(z.float() / pipe.vae.config.scaling_factor).sample[0].permute(1, 2, 0)
        picture = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        found = torch.from_numpy(striped_edges(picture, 0.3)).double() / 255
        edges = F.interpolate(found.expand(1, 3, -1, -1), size=(4 * size, 4 * size), mode="bicubic").clamp(0, 1)
        edges = F.pad(edges, (8 * r,) * 4)

    above = F.interpolate(z, size=(size, size), mode="bicubic")
    noise = torch.randn(1, 4, size, size, generator=rng).double()
    x = copy.deepcopy(scheduler).add_noise(above, noise, scheduler.timesteps[:1])
    for t in scheduler.timesteps:
        f = 0.5 * (1 + math.cos(math.pi * (1000 - float(t)) / 1000))
        x = (1 - f**3) * x + f**3 * copy.deepcopy(scheduler).add_noise(above, noise, t[None])
        wide = F.pad(x, (2 * r,) * 4)
        value, count = torch.zeros_like(wide), torch.zeros_like(wide)
        for (i, j), text in zip(corners, texts, strict=True):
            here = (..., slice(2 * i, 2 * i + window), slice(2 * j, 2 * j + window))
            seen = None if edges is None else edges[..., 8 * i : 8 * i + 64, 8 * j : 8 * j + 64]
            value[here] += step(model(wide[here], t, text, local_scale, seen), t, wide[here])
            count[here] += 1
        local = (value / count)[..., 2 * r : 2 * r + size, 2 * r : 2 * r + size]
        std = 0.99 * f + 0.01
        taps = torch.tensor([[math.exp(-(a * a + b * b) / (2 * std * std)) for b in (-1, 0, 1)] for a in (-1, 0, 1)]).double()
        blurred = F.conv2d(x, (taps / taps.sum()).expand(4, 1, -1, -1), padding=1, groups=4)
        blurred = (blurred - blurred.mean()) / blurred.std() * x.std() + x.mean()
        places = [(i, j) for i in range(s) for j in range(s)]
        samples = [blurred[..., i::s, j::s] for i, j in places]
        order = torch.rand(4, 4, size // s, size // s, generator=shuffle).argsort(0)
        mixed = [torch.stack([samples[int(n)][0].flatten()[q] for q, n in enumerate(one.flatten())]).view_as(samples[0]) for one in order]
        outputs = [model(one, t, PROMPT, GUIDANCE) for one in mixed]
        restored = [torch.empty_like(samples[0]) for _ in samples]
        for one, output in zip(order, outputs, strict=True):
            for q, n in enumerate(one.flatten()):
                restored[int(n)].view(-1)[q] = output.flatten()[q]
        dilated = torch.zeros_like(x)
        for (i, j), output in zip(places, restored, strict=True):
            dilated[..., i::s, j::s] = step(output, t, x[..., i::s, j::s])
        x = (1 - f) * local + f * dilated
    return [z, (x - x.mean()) / x.std() * z.std() + z.mean()], [texts]


@pytest.mark.parametrize(
    "options", [AccDiffusion(threshold=0.5, local_guidance_scale=5.0), pytest.param(AccDiffusion(), marks=pytest.mark.slow)]
)
def test_the_embedded_model_is_the_published_loop(demo: Any, options: AccDiffusion) -> None:
    before = state_of(demo.unet)
    stages = run(demo, (96, 96), {"prompt": PROMPT}, options)
    assert state_of(demo.unet) == before
    expected, (texts,) = by_hand(demo, 24, options.threshold, options.local_guidance_scale or GUIDANCE)
    assert len(set(texts)) > 1, "views have prompts of their own"
    for stage, latents in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.latents.double(), latents, rtol=1e-3, atol=2e-3)


def test_the_second_version_gives_the_views_edges(demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("scalediff.methods.edges._opencv", lambda: None)
    monkeypatch.setattr("scalediff.methods.edges.find_edges", striped_edges)
    controlnet = control_of(demo)
    options = AccDiffusion(threshold=0.5, local_guidance_scale=5.0, controlnet=controlnet, controlnet_scale=0.8)
    before = state_of(controlnet)
    stages = run(demo, (96, 96), {"prompt": PROMPT}, options)
    assert state_of(controlnet) == before
    expected, _ = by_hand(demo, 24, 0.5, 5.0, controlnet)
    for stage, latents in zip(stages, expected, strict=True):
        torch.testing.assert_close(stage.latents.double(), latents, rtol=1e-3, atol=2e-3)
    controlnet.save_pretrained(tmp_path)
    latents, text, edges = torch.randn(1, 4, 16, 16), torch.randn(1, 24, 64), torch.ones(1, 3, 64, 64)
    with torch.no_grad():
        residuals = controlnet(latents, 0, text, edges, return_dict=False)[1]
    assert residuals.std() > 0.1, "what the views are given changes the picture"
    loaded, own = resolve_controlnet(demo, tmp_path).state_dict(), controlnet.state_dict()
    assert all(torch.equal(loaded[name], own[name]) for name in own)


def test_edges_have_thresholds_about_the_median() -> None:
    """A step of 60, with a Sobel gradient of 240 and a median of 130: above 1.3 x 130, below the cut threshold of 255 at 2 x 130."""
    pytest.importorskip("cv2")
    picture = np.full((32, 32, 3), 100, np.uint8)
    picture[:, 16:] = 160
    edges = find_edges(picture, 0.3)
    assert edges.dtype == np.uint8
    assert set(edges.nonzero()[1].tolist()) <= {15, 16}
    assert edges.any()
    assert not find_edges(picture, 1.0).any()


def test_without_opencv_nothing_is_computed(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    monkeypatch.setattr(demo.unet, "forward", lambda *_, **__: pytest.fail("the first phase was drawn"))
    with pytest.raises(ImportError, match=r'the edges for a ControlNet need OpenCV: pip install "scalediff\[controlnet\]"'):
        run(demo, (96, 96), {"prompt": PROMPT}, AccDiffusion(controlnet=control_of(demo)))


def test_a_controlnet_for_another_model_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from diffusers import ControlNetModel

    monkeypatch.setattr("scalediff.methods.edges._opencv", lambda: None)
    for controlnet, error, message in (
        ("none", ValueError, "controlnet must be the folder of a ControlNetModel .* model, or the id of one .* fetched, got 'none'$"),
        (tmp_path, ValueError, "controlnet must be the folder of a ControlNetModel .* got '.*': Error no file named config.json"),
        (nn.Linear(1, 1), TypeError, "controlnet must be a ControlNetModel of diffusers, or the folder or id of one, got Linear"),
        (
            ControlNetModel.from_unet(demo.unet),
            ValueError,
            "controlnet must be made for 4 pixels per latent, as the autoencoder has, got 8",
        ),
    ):
        with pytest.raises(error, match=message):
            run(demo, (96, 96), {"prompt": PROMPT}, AccDiffusion(controlnet=controlnet))
    wide = control_of(demo)
    wide.register_to_config(cross_attention_dim=2048)
    with pytest.raises(
        ValueError, match=r"controlnet must be made for this U-Net, whose text has 64 channels, got cross_attention_dim=2048"
    ):
        run(demo, (96, 96), {"prompt": PROMPT}, AccDiffusion(controlnet=wide))
    with pytest.raises(ValueError, match=r"edge_spread must lie in \[0, 1\], got edge_spread=1.5"):
        AccDiffusion(edge_spread=1.5)


def test_masks_are_opened_and_maps_are_recorded_at_the_coarsest_level(demo: Any) -> None:
    maps = torch.rand(3, 32, 20, generator=seeded())
    expected = torch.stack([opened((one > one.mean()).float(), 2) for one in maps])
    assert torch.equal(token_masks(maps), expected)
    block = torch.zeros(1, 32, 32)
    block[0, 4:14, 6:20] = 1
    assert torch.equal(token_masks(block), block)
    with recorded_maps(demo.unet, (8, 8)) as seen, torch.no_grad():
        demo("a moon", num_inference_steps=1, output_type="latent", generator=seeded())
    found = seen.mean()
    assert found.shape == (24, 8, 8)
    torch.testing.assert_close(found.sum(0), torch.ones(8, 8))
    with recorded_maps(demo.unet, (5, 5)) as seen:
        demo("a moon", num_inference_steps=1, output_type="latent", generator=seeded())
    with pytest.raises(NotImplementedError, match="cross-attention maps need a U-Net with cross-attention at its coarsest level"):
        seen.mean()


def test_sdxl_takes_texts_with_pooled_embeddings(demo: Any) -> None:
    """Tokenizer and text encoder are replaced: what matters is that every view is given its own text and pooled text."""
    pipe, arguments = built("SDXL")
    pipe.scheduler = demo.scheduler
    pipe.unet.register_to_config(sample_size=8)
    asked: list[str] = []

    class Tokens:
        model_max_length, all_special_ids = 6, (0,)

        def __call__(self, text: str, **_: Any) -> Any:
            return type("Found", (), {"input_ids": [0, 1, 2, 3, 4, 0]})

        def decode(self, ids: list[int]) -> str:
            return f"w{ids[0]}"

    def encode_prompt(prompt: str, **more: Any) -> tuple[Tensor, ...]:
        asked.append(prompt)
        one = len(prompt) / 10
        return tuple(one * arguments[name] for name in ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds",
                                                        "negative_pooled_prompt_embeds"))  # fmt: skip

    pipe.register_modules(tokenizer=None)
    pipe.tokenizer, pipe.encode_prompt = Tokens(), encode_prompt
    seen: list[Tensor] = []
    remover = pipe.unet.register_forward_pre_hook(lambda _, a, k: seen.append(k["added_cond_kwargs"]["text_embeds"]), with_kwargs=True)
    stages = run(pipe, (32, 32), {"prompt": "w1 w2 w3 w4"}, AccDiffusion(view_batch=1, threshold=0.45))
    remover.remove()
    assert [stage.height for stage in stages] == [16, 32]
    assert stages[-1].latents.isfinite().all()
    assert set(asked) <= {" ".join(w for i, w in enumerate(("w1", "w2", "w3", "w4")) if n >> i & 1) for n in range(16)}
    assert len({float(one[1, 0]) for one in seen}) == len({len(text) for text in asked} | {11})


def test_at_native_size_it_is_the_pipelines_own_picture(demo: Any) -> None:
    (stage,) = run(demo, (64, 64), {"prompt": PROMPT})
    own = demo(PROMPT, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeded(), output_type="latent").images
    assert torch.equal(stage.latents, own)


def test_what_it_cannot_run_is_refused(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, arguments = built("SD3")
    with scalediff.patch_model(pipe, window=WINDOW), pytest.raises(NotImplementedError, match="AccDiffusion needs a U-Net, got SD3Tr"):
        run(pipe, (32, 32), arguments)
    text = torch.zeros(1, 24, 64)
    refused: list[tuple[dict[str, Any], AccDiffusion, type[Exception], str]] = [
        ({"prompt": ["a", "b"]}, AccDiffusion(), NotImplementedError, "AccDiffusion draws one picture at a time, from a prompt as text"),
        ({"prompt_embeds": text}, AccDiffusion(), NotImplementedError, "AccDiffusion draws one picture at a time, from a prompt as text"),
        ({"prompt": "a", "prompt_2": "b"}, AccDiffusion(), NotImplementedError, "AccDiffusion has the same prompt for all text encoders"),
        ({"prompt": "a", "guidance_scale": 1.0}, AccDiffusion(), NotImplementedError, "needs classifier-free guidance, got guidance"),
        ({"prompt": PROMPT}, AccDiffusion(stride=7), ValueError, "stride must be a multiple of 2 latents, one token of the coarsest level"),
    ]
    monkeypatch.setattr(demo.unet, "forward", lambda *_, **__: pytest.fail("the first phase was drawn"))
    for arguments, options, error, message in refused:
        with pytest.raises(error, match=message):
            run(demo, (128, 128), arguments, options)
    with pytest.raises(ValueError, match=r"threshold must lie in \[0, 1\], got threshold=2"):
        AccDiffusion(threshold=2)
    deeper = copy.copy(demo.unet.down_blocks)
    demo.unet.down_blocks = nn.ModuleList([*deeper, nn.Identity(), nn.Identity(), nn.Identity()])
    try:
        with pytest.raises(ValueError, match=r"phases must be multiples of 64 pixels, one token of the coarsest level, got"):
            run(demo, (136, 128), {"prompt": PROMPT})
    finally:
        demo.unet.down_blocks = deeper
