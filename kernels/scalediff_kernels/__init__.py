"""Kernels for training-free high-resolution diffusion. They only need torch, and Triton on a GPU."""

from scalediff_kernels.distributed.api import sharded_joint_neighborhood_patch_attention, sharded_neighborhood_patch_attention
from scalediff_kernels.lowpass.api import guide_structure, low_pass, mix_frequencies, packed_view
from scalediff_kernels.lowpass.operators import LowPass
from scalediff_kernels.neighborhood.api import joint_neighborhood_patch_attention, neighborhood_patch_attention
from scalediff_kernels.steps.api import GuidedStep
from scalediff_kernels.steps.geometry import NoiseLevel

__all__ = [
    "GuidedStep",
    "LowPass",
    "NoiseLevel",
    "guide_structure",
    "joint_neighborhood_patch_attention",
    "low_pass",
    "mix_frequencies",
    "neighborhood_patch_attention",
    "packed_view",
    "sharded_joint_neighborhood_patch_attention",
    "sharded_neighborhood_patch_attention",
]
