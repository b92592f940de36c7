"""The real pipeline classes with tokenizers and text encoders of their own, small and random: what a prompt goes through.

Tokenizers and encoders are of the classes that the pipelines ship with; an encoder has two layers.
"""

from __future__ import annotations

import functools
import math
import string
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from scalediff.cascade.pipeline import latent_size, native_size, preset, size_multiple, stage_sizes
from tests.conftest import seeded
from tests.scalediff.cascade.test_pipelines import PIPELINES as BARE

diffusers = pytest.importorskip("diffusers")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

LETTERS = string.ascii_letters + string.digits + string.punctuation
QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n"
)
CHAT = (
    "{% for one in messages %}<|im_start|>{{ one.role }}\n{{ one.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WIDTH = 32  # of the text that the zoo's denoisers read
_BLOCKS = {"num_hidden_layers": 2, "num_attention_heads": 2}
_GROUPED = {"hidden_size": WIDTH, "intermediate_size": 48, "num_key_value_heads": 1, **_BLOCKS}


def random_weights(build: Callable[[], nn.Module]) -> Any:
    """A model whose every weight matters, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, draw = build().eval(), Draw(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * draw(*parameter.shape))
    return model


# Tokenizers: a token a letter, but for Qwen's


def numbered(*tokens: str) -> dict[str, int]:
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def clip_tokenizer() -> Any:
    vocab = numbered("<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS))
    return transformers.CLIPTokenizer(vocab=vocab, model_max_length=77)


def t5_tokenizer() -> Any:
    special = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>", "\u2581")]
    return transformers.T5Tokenizer(vocab=special + [(letter, -1.0) for letter in LETTERS], extra_ids=0)


def gemma_tokenizer() -> Any:
    """It begins with a token of its own, as the one that is shipped: an empty prompt is not empty."""
    words = transformers.GemmaTokenizer(vocab=numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *LETTERS))
    begin = words.bos_token, words.bos_token_id
    words.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<bos> $A", special_tokens=[begin])
    return words


def qwen_tokenizer() -> Any:
    """The words of the template are a token each: the pipeline counts on it."""
    split = transformers.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str
    pieces = [word for line in f"{QWEN_TEMPLATE}assistant".split("|>") for word, _ in split(line.split("<|")[0])]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in pieces for i in range(1, len(word))))
    vocab = numbered("<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges))
    words = transformers.Qwen2Tokenizer(vocab=vocab, merges=merges, additional_special_tokens=["<|im_start|>", "<|im_end|>"])
    words.chat_template = CHAT
    return words


# Text encoders


def clip(words: Any, *, width: int, projected: int = 0) -> Any:
    """A CLIP text encoder; where `projected`, the class whose pooled output is projected to that width."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=2 * width, projection_dim=projected or width,
        bos_token_id=words.bos_token_id, eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id, **_BLOCKS,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return random_weights(lambda: kind(config))


def t5(words: Any) -> Any:
    sizes = {"d_model": WIDTH, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    return random_weights(lambda: transformers.T5EncoderModel(transformers.T5Config(vocab_size=len(words), **sizes)))


def gemma(words: Any, version: str = "") -> Any:
    config = getattr(transformers, f"Gemma{version}Config")(vocab_size=len(words), head_dim=16, **_GROUPED)
    return random_weights(lambda: getattr(transformers, f"Gemma{version}Model")(config))


def qwen3(words: Any) -> Any:
    config = transformers.Qwen3Config(vocab_size=len(words), head_dim=16, **_GROUPED)
    return random_weights(lambda: transformers.Qwen3Model(config))


def qwen_vl(words: Any) -> Any:
    turned = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    text = {"vocab_size": len(words), "rope_parameters": turned, "bos_token_id": None, "eos_token_id": None, **_GROUPED}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return random_weights(lambda: transformers.Qwen2_5_VLForConditionalGeneration(config))


# Pipelines


def autoencoder(**more: Any) -> Any:
    """Of factor 8, which U-Nets ask of sizes and the classes of Lumina take for granted."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    sizes = {"block_out_channels": (4, 4, 8, 8), "norm_num_groups": 4, "scaling_factor": 0.4}
    return random_weights(lambda: diffusers.AutoencoderKL(**blocks, **sizes, **more))


def stable_diffusion(kind: str = "StableDiffusionPipeline", **more: Any) -> Any:
    words = clip_tokenizer()
    return getattr(diffusers, kind)(
        unet=ZOO["SD1.5"].build(), vae=autoencoder(), tokenizer=words, text_encoder=clip(words, width=WIDTH),
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **more,
    )  # fmt: skip


def sdxl(kind: str = "StableDiffusionXLPipeline", **more: Any) -> Any:
    words, (bare, _) = clip_tokenizer(), BARE["SDXL"]()
    return getattr(diffusers, kind)(
        unet=bare.unet, vae=autoencoder(), scheduler=bare.scheduler, tokenizer=words, tokenizer_2=words,
        text_encoder=clip(words, width=WIDTH // 2), text_encoder_2=clip(words, width=WIDTH // 2, projected=WIDTH),
        add_watermarker=False, **more,
    )  # fmt: skip


def flux(kind: str = "FluxPipeline", **more: Any) -> Any:
    words, words_2, (bare, _) = clip_tokenizer(), t5_tokenizer(), BARE["FLUX"]()
    return getattr(diffusers, kind)(
        transformer=bare.transformer, vae=bare.vae, scheduler=bare.scheduler, tokenizer=words, text_encoder=clip(words, width=WIDTH),
        tokenizer_2=words_2, text_encoder_2=t5(words_2), **more,
    )  # fmt: skip


def sd3(kind: str = "StableDiffusion3Pipeline", **more: Any) -> Any:
    words, words_3, (bare, _) = clip_tokenizer(), t5_tokenizer(), BARE["SD3"]()
    first, second = (clip(words, width=WIDTH // 2, projected=WIDTH // 2) for _ in range(2))
    return getattr(diffusers, kind)(
        transformer=bare.transformer, scheduler=bare.scheduler, tokenizer=words, text_encoder=first, tokenizer_2=words,
        text_encoder_2=second, tokenizer_3=words_3, text_encoder_3=t5(words_3), **{"vae": bare.vae} | more,
    )  # fmt: skip


def lumina_next() -> Any:
    words, flow = gemma_tokenizer(), diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    parts = {"vae": autoencoder(), "scheduler": flow, "tokenizer": words, "text_encoder": gemma(words)}
    return diffusers.LuminaPipeline(transformer=ZOO["Lumina-Next"].build(), **parts)


def lumina2() -> Any:
    words, flow = gemma_tokenizer(), diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0)
    parts = {"vae": autoencoder(shift_factor=0.1), "scheduler": flow, "tokenizer": words, "text_encoder": gemma(words, "2")}
    specimen = replace(ZOO["Lumina 2"], config=ZOO["Lumina 2"].config | {"axes_lens": (300, 64, 64)})  # its system prompt is long
    return diffusers.Lumina2Pipeline(transformer=specimen.build(), **parts)


def qwen_image() -> Any:
    words, (bare, _) = qwen_tokenizer(), BARE["Qwen-Image"]()
    pipe = diffusers.QwenImagePipeline(**bare.components | {"tokenizer": words, "text_encoder": qwen_vl(words)})
    assert pipe.prompt_template_encode.startswith(QWEN_TEMPLATE + "{}")
    assert len(words(QWEN_TEMPLATE).input_ids) == pipe.prompt_template_encode_start_idx  # tokens that the pipeline drops
    return pipe


def z_image() -> Any:
    words, (bare, _) = qwen_tokenizer(), BARE["Z-Image"]()
    return diffusers.ZImagePipeline(**bare.components | {"tokenizer": words, "text_encoder": qwen3(words)})


PROMPTED: dict[str, Callable[[], Any]] = {
    "SD1.5": stable_diffusion, "SDXL": sdxl, "FLUX": flux, "SD3": sd3, "Lumina-Next": lumina_next, "Lumina 2": lumina2,
    "Qwen-Image": qwen_image, "Z-Image": z_image,
}  # fmt: skip


def picture_of(size: tuple[int, int], seed: int = 5) -> Any:
    from PIL import Image

    values = torch.randint(0, 256, (*size, 3), generator=seeded(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ready(name: str) -> Any:
    """The pipeline, patched where its denoiser does not name its native size, for a small one to be known."""
    pipe = quiet(PROMPTED[name]())
    if name in ("FLUX", "Qwen-Image", "Z-Image"):
        scalediff.patch_model(pipe, window=WINDOW)
    return pipe


def target_of(pipe: Any) -> tuple[int, int]:
    """A size that is reached in two stages; that of U-Nets leaves their cutoff of an eighth a pixel."""
    (height, width), multiple = native_size(pipe), size_multiple(pipe)
    return 2 * height, 2 * width if hasattr(pipe, "unet") else math.ceil(3 * width / 2 / multiple) * multiple


def draw(pipe: Any, prompt: str | list[str], **more: Any) -> scalediff.Result:
    """Four steps, then some of them again; every stage is checked."""
    height, width = target_of(pipe)
    how: dict[str, Any] = {"height": height, "width": width, "steps": 4, "generator": seeded()} | more
    result = scalediff.generate(pipe, prompt, **how)
    assert (len(result.stages), result.stages[0].of) == (2, 2)
    assert [stage.steps for stage in result.stages] == [4, replace(preset(pipe), steps=4).stage_steps]
    for stage, (rows, columns) in zip(result.stages, stage_sizes(pipe, height, width), strict=True):
        assert stage.latents.shape[-2:] == latent_size(pipe, (rows, columns))
        assert stage.latents.isfinite().all()
        for image in stage.images:
            assert image.size == (columns, rows)
            assert np.asarray(image).std() > 1  # of 255: a picture, however random
    assert len(result.images) == len(result.stages[-1].latents)
    return result


@functools.cache
def drawn(name: str, prompt: str, seed: int = 0) -> scalediff.Result:
    """`draw` by a pipeline of its own, computed once: what other runs are compared with."""
    return draw(ready(name), prompt, generator=seeded(seed))
