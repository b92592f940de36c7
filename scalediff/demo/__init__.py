"""The embedded model: a small latent diffusion model, trained by this project on the scenes of `scenes.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DEMO_PATH = Path(__file__).parent / "model"


def load_demo() -> Any:
    """Load the embedded model, whose native size is 64 x 64 pixels.

    `DiffusionPipeline.from_pretrained(scalediff.demo.DEMO_PATH)` loads the same model.

    Returns:
        A diffusers StableDiffusionPipeline in fp32 on the CPU.

    Raises:
        ImportError: diffusers or transformers is not installed (`pip install "scalediff[diffusers]"`).
    """
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(DEMO_PATH, local_files_only=True)
