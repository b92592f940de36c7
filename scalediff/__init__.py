"""Training-free high-resolution diffusion: patch a model, generate a picture, or upscale one."""

from scalediff.demo import load_demo
from scalediff.draw import Result, generate, upscale
from scalediff.patch import patch_model, unpatch_model
from scalediff.patching.backend import register_backend
from scalediff.patching.handle import Handle

__all__ = ["Handle", "Result", "generate", "load_demo", "patch_model", "register_backend", "unpatch_model", "upscale"]
