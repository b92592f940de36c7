"""Training-free high-resolution diffusion: patch a model, generate a picture, or upscale one."""

from scalediff.demo import load_demo
from scalediff.draw import Result, generate, upscale
from scalediff.families import register_family, unregister_family
from scalediff.families.base import Family
from scalediff.families.grid import Layout, Sequence
from scalediff.families.rotation import TextRotation
from scalediff.patch import patch_model, unpatch_model
from scalediff.patching.attention_pass import attention_pass
from scalediff.patching.backend import register_backend
from scalediff.patching.handle import Handle
from scalediff.patching.plan import AttentionPlan

__all__ = [
    "AttentionPlan", "Family", "Handle", "Layout", "Result", "Sequence", "TextRotation", "attention_pass", "generate", "load_demo",
    "patch_model", "register_backend", "register_family", "unpatch_model", "unregister_family", "upscale",
]  # fmt: skip
