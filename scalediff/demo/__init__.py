"""The embedded model: a small latent diffusion model, trained by this project on the scenes of `scenes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEMO_PATH = Path(__file__).parent / "model"


def load_demo() -> Any:
    """The embedded model as a diffusers StableDiffusionPipeline in fp32 on the CPU; native size 64 x 64 pixels.

    `DiffusionPipeline.from_pretrained(scalediff.demo.DEMO_PATH)` loads the same.

    Raises:
        ImportError: diffusers or transformers is missing (`pip install "scalediff[diffusers]"`).
    """
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(DEMO_PATH, local_files_only=True)
