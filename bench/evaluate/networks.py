"""The networks behind FID, KID, IS and the CLIP score, from weights that are on this machine. Nothing is ever downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION_FILE}"
INCEPTION_SHA256 = "6726825d"  # its first digits
CLIP_MODEL = "openai/clip-vit-large-patch14"
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass
class Inception:
    """torch-fidelity's InceptionV3 of 2015-12-05: pool3 features and logits without bias."""

    network: Any
    device: torch.device
    features: int = 2048  # D
    side: int = 299  # pixels per side that pictures are resized to
    name: str = "InceptionV3 2015-12-05"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, D]` features and `[B, K]` logits of `[B, 3, Y, X]` uint8 pictures."""
        features, logits = self.network(pictures.to(self.device))
        return features.cpu(), logits.cpu()


def load_inception(path: Path | None, device: torch.device) -> Inception:
    """Load InceptionV3 from a file with its weights: `path`, or torch hub's copy when None.

    ValueError where there is no such file, it holds other weights, or torch-fidelity is not installed.
    """
    in_hub = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    where = path or in_hub
    if not where.is_file():
        raise ValueError(
            "FID, KID and IS need the weights of InceptionV3 (2015-12-05), which this command does not download: fetch "
            f"{INCEPTION_URL} and pass --inception PATH, or put it at {in_hub}; got no file at {where}"
        )
    with where.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if not found.startswith(INCEPTION_SHA256):
        raise ValueError(
            f"the weights must be {INCEPTION_FILE}, whose SHA-256 begins with {INCEPTION_SHA256}, got {where} with {found[:8]}: "
            "other weights give numbers that cannot be compared"
        )
    try:
        from torch_fidelity import FeatureExtractorInceptionV3
    except ImportError as error:
        raise ValueError(f'FID, KID and IS need torch-fidelity: pip install "scalediff[evaluate]" ({error})') from error
    made = FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(where), verbose=False
    )
    return Inception(made.to(device), device)


@dataclass
class Clip:
    """A CLIP model of transformers. Pictures: shorter side to the model's, bicubic with antialias, and the centre square of it."""

    model: Any
    tokenizer: Any
    device: torch.device
    name: str

    @torch.no_grad()
    def __call__(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """`[B]` cosines of `[B, 3, Y, X]` uint8 pictures and their prompts."""
        side = self.model.config.vision_config.image_size
        scale = side / min(pictures.shape[2:])
        size = [max(side, round(n * scale)) for n in pictures.shape[2:]]
        resized = F.interpolate(pictures.float() / 255, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((n - side) // 2 for n in size)
        x = resized[:, :, top : top + side, left : left + side]
        x = (x - x.new_tensor(_CLIP_MEAN)[:, None, None]) / x.new_tensor(_CLIP_STD)[:, None, None]
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        done = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=x.to(self.device))
        cosines: Tensor = F.cosine_similarity(done.image_embeds.double(), done.text_embeds.double())
        return cosines.cpu()


def load_clip(name: str | None, device: torch.device) -> Clip:
    """Load a CLIP model: a folder or an id in the Hugging Face cache, `CLIP_MODEL` when None; ValueError where it is not there."""
    try:
        from huggingface_hub.constants import HF_HUB_CACHE
        from transformers import CLIPModel, CLIPTokenizer
    except ImportError as error:
        raise ValueError(f'the CLIP score needs transformers: pip install "scalediff[diffusers]" ({error})') from error
    chosen = name or CLIP_MODEL
    try:
        model = CLIPModel.from_pretrained(chosen, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(chosen, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the CLIP score needs a CLIP model, which this command does not download: fetch https://huggingface.co/{CLIP_MODEL} "
            f"(config.json, model.safetensors, the tokenizer's files) and pass --clip FOLDER, or have it in the cache {HF_HUB_CACHE}; "
            f"got no model at {chosen!r}"
        ) from error
    return Clip(model.eval().to(device), tokenizer, device, chosen)
