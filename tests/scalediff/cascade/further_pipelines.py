"""Small random pipelines of further families, each with a tokenizer and text encoders of its own, and how they are called.

Their classes are those that the published pipelines have, or smaller ones with the same outputs: a text model without its vision tower.
Autoencoders have a factor of 2 where the pipeline's class does not fix it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import scalediff
from bench.models.inputs import Draw
from bench.models.zoo import WINDOW, ZOO
from tests.scalediff.cascade import prompted_pipelines as small
from tests.scalediff.cascade.test_pipelines import PIPELINES as BARE

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

Built = tuple[Any, dict[str, Any]]  # a pipeline, and further arguments of its call
_PARTS = (
    "{% for one in messages %}{% if one.content is string %}{{ one.content }}{% else %}{% for part in one.content %}{{ part.text }}"
    "{% endfor %}{% endif %}{% endfor %}"
)
_FACTOR_2 = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4}


def denoiser(name: str, **changes: Any) -> Any:
    return replace(ZOO[name], config=ZOO[name].config | changes).build()


def autoencoder(**more: Any) -> Any:
    sizes = {"block_out_channels": (8, 8), "latent_channels": 4, "scaling_factor": 0.4}
    return small.random_weights(lambda: diffusers.AutoencoderKL(**_FACTOR_2, **sizes | more))


def flux2_autoencoder() -> Any:
    """Its batch norm has another mean and variance for each of the 2 x 2 latents of a token."""
    vae = small.random_weights(lambda: diffusers.AutoencoderKLFlux2(**_FACTOR_2, block_out_channels=(8, 8), latent_channels=4))
    draw = Draw(4)
    vae.bn.running_mean.copy_(0.3 * draw(16))
    vae.bn.running_var.copy_(1 + draw(16).abs())
    return vae


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**more)


def shifted_flow() -> Any:
    return flow(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def language_model(kind: str, words: Any, **more: Any) -> Any:
    sizes = {"hidden_size": small.WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = {"vocab_size": len(words), "num_key_value_heads": 1, "head_dim": 16, **sizes, **special} | more
    build: Callable[[], nn.Module] = lambda: getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**config))  # noqa: E731
    return small.random_weights(build)


def flux2(kind: str = "Flux2KleinPipeline") -> Built:
    words, dev = small.qwen_tokenizer(), kind == "Flux2Pipeline"
    if dev:
        words.chat_template = _PARTS
    encoder = language_model("Mistral", words) if dev else small.qwen3(words)
    transformer = denoiser("FLUX.2", joint_attention_dim=3 * small.WIDTH, guidance_embeds=dev)
    parts = {"vae": flux2_autoencoder(), "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": encoder}
    pipe = getattr(diffusers, kind)(transformer=transformer, **parts)
    return pipe, {"text_encoder_out_layers": (0, 1, 2), "max_sequence_length": 256 if dev else 64}  # dev's system message is long


def kontext() -> Built:
    return small.flux("FluxKontextPipeline"), {}


def chroma() -> Built:
    words = small.t5_tokenizer()
    parts = {"vae": autoencoder(shift_factor=0.1), "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": small.t5(words)}
    return diffusers.ChromaPipeline(transformer=denoiser("Chroma"), **parts), {"max_sequence_length": 24}


def hunyuan_image() -> Built:
    words, glyphs = small.qwen_tokenizer(), small.t5_tokenizer()
    sizes = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 32), "layers_per_block": 1}
    vae = small.random_weights(
        lambda: diffusers.AutoencoderKLHunyuanImage(**sizes, spatial_compression_ratio=2, sample_size=16, scaling_factor=0.4)
    )
    parts = {"tokenizer": words, "text_encoder": small.qwen_vl(words), "tokenizer_2": glyphs, "text_encoder_2": small.t5(glyphs)}
    transformer = denoiser("HunyuanImage 2.1", text_embed_2_dim=small.WIDTH)
    return diffusers.HunyuanImagePipeline(transformer=transformer, vae=vae, scheduler=flow(shift=5.0), **parts), {}


def pixart(kind: str = "PixArtSigmaPipeline") -> Built:
    words = small.t5_tokenizer()
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    parts = {"vae": autoencoder(), "scheduler": scheduler, "tokenizer": words, "text_encoder": small.t5(words)}
    return getattr(diffusers, kind)(transformer=denoiser("PixArt"), **parts), {"clean_caption": False, "max_sequence_length": 24}


def auraflow() -> Built:
    words = small.t5_tokenizer()
    parts = {"vae": autoencoder(), "scheduler": flow(shift=1.73), "tokenizer": words, "text_encoder": small.t5(words)}
    return diffusers.AuraFlowPipeline(transformer=denoiser("AuraFlow"), **parts), {"max_sequence_length": 24}


def cogview4() -> Built:
    words = small.gemma_tokenizer()  # an empty prompt must have a token
    scheduler = flow(use_dynamic_shifting=True, time_shift_type="linear", base_shift=0.25, max_shift=0.75, base_image_seq_len=256)
    parts = {"vae": autoencoder(), "scheduler": scheduler, "tokenizer": words, "text_encoder": language_model("Glm", words)}
    return diffusers.CogView4Pipeline(transformer=denoiser("CogView4"), **parts), {}


def hidream() -> Built:
    words, words_3, words_4 = small.clip_tokenizer(), small.t5_tokenizer(), small.qwen_tokenizer()
    first, second = (small.clip(words, width=small.WIDTH // 2, projected=small.WIDTH // 2) for _ in range(2))
    llama = language_model("Llama", words_4, num_hidden_layers=3, attn_implementation="eager")
    pipe = diffusers.HiDreamImagePipeline(
        transformer=denoiser("HiDream-I1", max_resolution=(8, 8)), vae=autoencoder(shift_factor=0.1), scheduler=flow(shift=3.0),
        tokenizer=words, text_encoder=first, tokenizer_2=words, text_encoder_2=second, tokenizer_3=words_3,
        text_encoder_3=small.t5(words_3), tokenizer_4=words_4, text_encoder_4=llama,
    )  # fmt: skip
    return pipe, {"max_sequence_length": 32}


def bria() -> Built:
    words = small.t5_tokenizer()
    parts = {"vae": autoencoder(), "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": small.t5(words)}
    return diffusers.BriaPipeline(transformer=denoiser("Bria 3"), **parts), {"max_sequence_length": 24}


def fibo() -> Built:
    """An empty prompt is token 128000, and the factor is 16."""
    words = small.qwen_tokenizer()
    encoder = language_model("Llama", words, vocab_size=128001, hidden_size=16, head_dim=8)
    sizes = {"base_dim": 4, "decoder_base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1, "is_residual": True}
    statistics = {"latents_mean": [0.1 * (i % 3) for i in range(16)], "latents_std": [1 + 0.1 * i for i in range(16)]}
    more = {"in_channels": 12, "out_channels": 12, "patch_size": 2, "temperal_downsample": [False, True, True], "scale_factor_spatial": 16}
    vae = small.random_weights(lambda: diffusers.AutoencoderKLWan(**sizes, **statistics, **more))
    parts = {"vae": vae, "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": encoder}
    return diffusers.BriaFiboPipeline(transformer=denoiser("Bria FIBO"), **parts), {}


def longcat() -> Built:
    """Its class counts on 16 channels."""
    words = small.qwen_tokenizer()
    parts = {"tokenizer": words, "text_encoder": small.qwen_vl(words), "text_processor": None, "scheduler": shifted_flow()}
    transformer, vae = denoiser("LongCat-Image", in_channels=64), autoencoder(latent_channels=16, shift_factor=0.1)
    return diffusers.LongCatImagePipeline(transformer=transformer, vae=vae, **parts), {}


def ovis() -> Built:
    words = small.qwen_tokenizer()
    parts = {"vae": autoencoder(shift_factor=0.1), "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": small.qwen3(words)}
    return diffusers.OvisImagePipeline(transformer=denoiser("Ovis-Image"), **parts), {"max_sequence_length": 64}


def deep_compression_autoencoder() -> Any:
    """It has no posterior: it encodes to latents."""
    sides = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_types": ("ResBlock",) * 2, "block_out_channels": (8, 8), "qkv_multiscales": ((), ()), "layers_per_block": (1, 1),
        }.items()
    }  # fmt: skip
    return small.random_weights(lambda: diffusers.AutoencoderDC(latent_channels=4, attention_head_dim=2, **sides))


def prx(vae: Any = None) -> Built:
    words = small.t5_tokenizer()
    vae = vae or autoencoder(shift_factor=0.1)
    parts = {"vae": vae, "scheduler": flow(shift=3.0), "tokenizer": words, "text_encoder": small.t5(words)}
    pipe = diffusers.PRXPipeline(transformer=denoiser("PRX"), **parts)
    pipe.text_preprocessor = Uncleaned()
    return pipe, {"tokenizer_max_length": 24}


class Uncleaned:
    """In place of PRX's cleaning of prompts, which needs the package ftfy."""

    def clean_text(self, text: str) -> str:
        return text


def hunyuan_dit() -> Built:
    """Its class counts on a factor of 8."""
    words = transformers.BertTokenizer(vocab=small.numbered("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *small.LETTERS))
    words_2 = small.t5_tokenizer()
    bert = transformers.BertConfig(
        vocab_size=len(words), hidden_size=small.WIDTH, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    pipe = diffusers.HunyuanDiTPipeline(
        transformer=denoiser("HunyuanDiT", text_len=77, text_len_t5=256), vae=small.autoencoder(), tokenizer=words, tokenizer_2=words_2,
        text_encoder=small.random_weights(lambda: transformers.BertModel(bert)), text_encoder_2=small.t5(words_2),
        scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return pipe, {}


def ernie() -> Built:
    words = small.qwen_tokenizer()
    parts = {"vae": flux2_autoencoder(), "scheduler": flow(shift=4.0), "tokenizer": words, "text_encoder": language_model("Mistral", words)}
    transformer = denoiser("ERNIE-Image", in_channels=16, out_channels=16, text_in_dim=small.WIDTH)
    return diffusers.ErnieImagePipeline(transformer=transformer, **parts), {}


def nucleus() -> Built:
    """Its class takes the text's states before the last seven layers."""
    words, (bare, _) = small.qwen_tokenizer(), BARE["Qwen-Image"]()

    class Processor:
        """What the pipeline asks of the processor of a model that also sees: the chat template and the tokenizer."""

        apply_chat_template = staticmethod(lambda messages, **how: f"<|im_start|>{messages[-1]['content'][0]['text']}")

        def __call__(self, text: list[str], **how: Any) -> Any:
            return words(text, **how)

    encoder = language_model("Qwen3", words, num_hidden_layers=8)
    parts = {"vae": bare.vae, "scheduler": shifted_flow(), "text_encoder": encoder, "processor": None}
    pipe = diffusers.NucleusMoEImagePipeline(transformer=denoiser("NucleusMoE-Image"), **parts)
    pipe.processor = Processor()
    return pipe, {}


def krea2() -> Built:
    words, (bare, _) = small.qwen_tokenizer(), BARE["Qwen-Image"]()
    parts = {"vae": bare.vae, "scheduler": shifted_flow(), "tokenizer": words, "text_encoder": small.qwen_vl(words)}
    pipe = diffusers.Krea2Pipeline(transformer=denoiser("Krea 2"), text_encoder_select_layers=(0, 1, 2), **parts)
    return pipe, {"max_sequence_length": 64}


def z_image_omni() -> Built:
    return diffusers.ZImageOmniPipeline(**small.z_image().components, siglip=None, siglip_processor=None), {}


class Letters:
    """What Kolors' pipeline asks of its tokenizer, which needs the package sentencepiece: ids, a mask and positions, padded on the left."""

    def __call__(self, prompt: str | list[str], *, max_length: int, **_: Any) -> Any:
        rows = [[2 + ord(letter) % 60 for letter in text] or [1] for text in ([prompt] if isinstance(prompt, str) else prompt)]
        padding = [max_length - len(row) for row in rows]
        values = {
            "input_ids": [[0] * n + row for n, row in zip(padding, rows, strict=True)],
            "attention_mask": [[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)],
            "position_ids": [[0] * n + list(range(len(row))) for n, row in zip(padding, rows, strict=True)],
        }
        return transformers.BatchEncoding({name: torch.tensor(value) for name, value in values.items()})


def kolors() -> Built:
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline  # the public name needs the package sentencepiece
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2, padded_vocab_size=64, hidden_size=32, ffn_hidden_size=48, kv_channels=16, num_attention_heads=2, seq_length=64,
        multi_query_attention=True, multi_query_group_num=1, original_rope=True,
    )  # fmt: skip

    def encoder() -> nn.Module:
        model = ChatGLMModel(config)
        for parameter in model.parameters():  # the class leaves them as they were in memory
            nn.init.ones_(parameter) if parameter.ndim == 1 else nn.init.normal_(parameter, std=0.1)
        return model

    more = {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "projection_class_embeddings_input_dim": 32 + 6 * 8}
    scheduler = diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.014)
    parts = {"tokenizer": None, "text_encoder": small.random_weights(encoder), "scheduler": scheduler}
    pipe = KolorsPipeline(unet=denoiser("SDXL", **more), vae=small.autoencoder(), **parts)
    pipe.tokenizer = Letters()
    return pipe, {"max_sequence_length": 32}


FURTHER: dict[str, Callable[[], Built]] = {
    "FLUX.2": lambda: flux2("Flux2Pipeline"), "FLUX.2 Klein": flux2, "FLUX.2 Klein KV": lambda: flux2("Flux2KleinKVPipeline"),
    "FLUX.1 Kontext": kontext, "Chroma": chroma, "HunyuanImage 2.1": hunyuan_image, "PixArt-Sigma": pixart,
    "PixArt-Alpha": lambda: pixart("PixArtAlphaPipeline"), "AuraFlow": auraflow, "CogView4": cogview4, "HiDream-I1": hidream,
    "Kolors": kolors, "Bria 3": bria, "Bria FIBO": fibo, "LongCat-Image": longcat, "Ovis-Image": ovis, "PRX": prx,
    "PRX with DC-AE": lambda: prx(deep_compression_autoencoder()), "HunyuanDiT": hunyuan_dit, "ERNIE-Image": ernie, "Krea 2": krea2,
    "NucleusMoE-Image": nucleus, "Z-Image Omni": z_image_omni,
}  # fmt: skip


def ready(name: str) -> Built:
    """The pipeline, patched with a small window where its denoiser does not name a small native size itself."""
    pipe, call = FURTHER[name]()
    small.quiet(pipe)
    scalediff.patch_model(pipe, window=None if hasattr(pipe, "unet") else WINDOW)
    return pipe, call
