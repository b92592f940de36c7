"""The ControlNet of AccDiffusion v2, arXiv:2412.02099, section 3.3: the views are given the edges of the previous phase's picture.

    edges = Canny(picture, thresholds (1 - s) m and (1 + s) m),  m the median of the picture's values and s the edge spread

Legend: V views of one pass, B batch of a view, C channels, Y x X latents; a view has p x p pixels per latent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from scalediff.cascade.pipeline import pixels_per_latent
from scalediff.families.grid import Grid
from scalediff.patching.networks import denoiser_of


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ImportError('the edges for a ControlNet need OpenCV: pip install "scalediff[controlnet]"') from error
    return cv2


def find_edges(picture: NDArray[np.uint8], spread: float) -> NDArray[np.uint8]:
    """Canny edges of a picture, 0 or 255.

    Args:
        picture: `[y, x, 3]` uint8.
        spread: The thresholds are `1 - spread` and `1 + spread` times the median of all values, cut to [0, 255].

    Returns:
        `[y, x]` uint8.

    Raises:
        ImportError: OpenCV is not installed.
    """
    cv2 = _opencv()
    median = float(np.median(picture))
    return np.asarray(cv2.Canny(picture, max(0.0, (1 - spread) * median), min(255.0, (1 + spread) * median)), np.uint8)


def resolve_controlnet(pipe: Any, controlnet: Any) -> Any:
    """The ControlNet for a pipeline's U-Net: the given one, or loaded from its folder to the pipeline's device and dtype.

    Nothing is downloaded: an id is looked for in the Hugging Face cache.

    Raises:
        ValueError: There is none in the folder or under the id; its text width or its pixels per latent are not the U-Net's.
        TypeError: It is neither a ControlNet nor a folder or an id.
        ImportError: OpenCV, which finds its edges, is not installed.
    """
    _opencv()
    unet: Any = denoiser_of(pipe)
    if isinstance(controlnet, str | PathLike):
        from diffusers import ControlNetModel

        try:
            loaded = ControlNetModel.from_pretrained(controlnet, torch_dtype=unet.dtype, local_files_only=True)
        except (OSError, ValueError) as error:
            why = f": {(str(error) or type(error).__name__).splitlines()[0]}" if Path(controlnet).is_dir() else ""
            raise ValueError(
                "controlnet must be the folder of a ControlNetModel of diffusers for this model, or the id of one that `hf download` has "
                f"fetched, got {str(controlnet)!r}{why}"
            ) from error
        controlnet = loaded.to(pipe._execution_device)
    if not hasattr(controlnet, "controlnet_cond_embedding"):
        raise TypeError(f"controlnet must be a ControlNetModel of diffusers, or the folder or id of one, got {type(controlnet).__name__}")
    width, own = controlnet.config.cross_attention_dim, unet.config.get("cross_attention_dim")
    if width != own:
        raise ValueError(f"controlnet must be made for this U-Net, whose text has {own} channels, got cross_attention_dim={width}")
    factor, pixels = 2 ** (len(controlnet.config.conditioning_embedding_out_channels) - 1), pixels_per_latent(pipe)
    if factor != pixels:
        raise ValueError(f"controlnet must be made for {pixels} pixels per latent, as the autoencoder has, got {factor}")
    return controlnet


@dataclass(frozen=True)
class EdgeControl:
    """Adds a ControlNet's residuals to the passes over the views of a phase.

    Attributes:
        controlnet: The ControlNet.
        scale: Factor on its residuals.
        views: `[1, 3, p y, p x]` in [0, 1], the edges within each view.
    """

    controlnet: Any
    scale: float
    views: tuple[Tensor, ...]

    @classmethod
    def of(
        cls,
        controlnet: Any,
        picture: Any,
        *,
        scale: float,
        spread: float,
        size: Grid,
        margin: Grid,
        corners: Sequence[Grid],
        window: Grid,
        pixels: int,
    ) -> EdgeControl:
        """The edges of a PIL picture, enlarged bicubically to the phase and cut by its views.

        `size`, `margin`, `corners` and `window` are in latents; the corners are on the canvas with margin, where there are no edges.
        """
        edges = torch.from_numpy(find_edges(np.asarray(picture.convert("RGB")), spread)).to(controlnet.device, controlnet.dtype) / 255
        (rows, columns), (y, x) = size, margin
        enlarged = F.interpolate(edges.expand(1, 3, -1, -1), size=(pixels * rows, pixels * columns), mode="bicubic").clamp(0, 1)
        canvas = F.pad(enlarged, (pixels * x, pixels * x, pixels * y, pixels * y))
        height, width = pixels * window[0], pixels * window[1]
        views = tuple(canvas[..., pixels * i : pixels * i + height, pixels * j : pixels * j + width] for i, j in corners)
        return cls(controlnet, scale, views)

    def __call__(self, arguments: Mapping[str, Any], here: slice) -> dict[str, Any]:
        """The arguments that a U-Net's pass over the views `here` has besides `arguments`."""
        sample = arguments["sample"]
        some = self.views[here]
        down, middle = self.controlnet(
            sample,
            arguments["timestep"],
            encoder_hidden_states=arguments["encoder_hidden_states"],
            controlnet_cond=torch.cat(some).repeat_interleave(len(sample) // len(some), dim=0),
            conditioning_scale=self.scale,
            added_cond_kwargs=arguments.get("added_cond_kwargs"),
            return_dict=False,
        )
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
