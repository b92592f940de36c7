"""Models that are recognised but cannot be patched, each with the reason."""

from __future__ import annotations

from scalediff.families.base import Family

_FRAMES = "it attends over frames, as video models do, and windows over time are not supported yet"
_LINEAR = "its self-attention is already linear in the number of tokens"
_VIDEO_MODELS = (
    "AllegroTransformer3DModel", "AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel", "ChronoEditTransformer3DModel",
    "CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel", "CosmosTransformer3DModel", "CosmosControlNetModel",
    "EasyAnimateTransformer3DModel", "HeliosTransformer3DModel", "HunyuanVideo15Transformer3DModel",
    "HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoTransformer3DModel", "JoyImageEditPlusTransformer3DModel",
    "JoyImageEditTransformer3DModel", "Kandinsky5Transformer3DModel", "Kandinsky6SRTransformer3DModel", "Kandinsky6Transformer3DModel",
    "LTX2VideoTransformer3DModel", "LTXVideoTransformer3DModel", "LatteTransformer3DModel", "MiniMaxH3Transformer3DModel",
    "MochiTransformer3DModel", "MotifVideoTransformer3DModel", "SanaWMLTX2RefinerTransformer3DModel",
    "SanaWMTransformer3DModel", "SkyReelsV2Transformer3DModel", "SparseControlNetModel",
    "UNet3DConditionModel", "UNetMotionModel", "UNetSpatioTemporalConditionModel", "WanAnimate2Transformer3DModel",
    "WanAnimateTransformer3DModel", "WanTransformer3DModel", "WanVACETransformer3DModel",
)  # fmt: skip
_LINEAR_MODELS = ("SanaTransformer2DModel", "SanaControlNetModel", "SanaVideoTransformer3DModel")
REFUSED = (
    *(Family(denoiser=name, refusal=_FRAMES) for name in _VIDEO_MODELS),
    *(Family(denoiser=name, refusal=_LINEAR, refusal_error=ValueError) for name in _LINEAR_MODELS),
)
