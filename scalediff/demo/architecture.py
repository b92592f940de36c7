"""The untrained networks of the embedded model: a small Stable Diffusion with attention at two levels, as in SDXL."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from scalediff.demo.scenes import VOCABULARY

NATIVE = 64  # pixels per side of a whole scene
TEXT_TOKENS = 24


def autoencoder() -> AutoencoderKL:
    """An autoencoder with 4 latent channels and 4 pixels per latent."""
    return AutoencoderKL(
        sample_size=NATIVE,
        latent_channels=4,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def unet() -> UNet2DConditionModel:
    """Self-attention at two levels, 16 x 16 and 8 x 8 tokens at native size."""
    return UNet2DConditionModel(
        sample_size=NATIVE // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(64, 128),
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(2, 4),  # diffusers reads this as the number of heads: D = 32 at both levels
        cross_attention_dim=64,
        norm_num_groups=8,
    )


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text encoder whose token embeddings are initialised ten times larger than usual.

    With CLIP's standard deviation of 0.02, the embeddings at 64 channels are small compared to the output of the layers, and training never
    separates similar words.
    """
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(10)
    return model


def scheduler() -> DDIMScheduler:
    """A DDIM scheduler for v-prediction with zero terminal SNR."""
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,  # the last step is pure noise, so that dark pictures are possible
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
        set_alpha_to_one=True,
    )


def tokenizer() -> CLIPTokenizer:
    """A byte-pair tokenizer in which every word of the vocabulary is one token; other words are split into letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    tokens = dict.fromkeys([*letters, *(f"{c}</w>" for c in letters)])
    merges: dict[tuple[str, str], None] = {}
    for word in VOCABULARY:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges[parts[0], parts[1]] = None
            parts = [parts[0] + parts[1], *parts[2:]]
            tokens[parts[0]] = None
    vocabulary = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=TEXT_TOKENS)
