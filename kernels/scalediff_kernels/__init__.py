"""Kernels for training-free high-resolution diffusion: needs torch, and triton where there is a GPU; nothing else."""

from scalediff_kernels.lowpass.api import guide_structure, low_pass, mix_frequencies
from scalediff_kernels.neighborhood.api import joint_neighborhood_patch_attention, neighborhood_patch_attention

__all__ = ["guide_structure", "joint_neighborhood_patch_attention", "low_pass", "mix_frequencies", "neighborhood_patch_attention"]
