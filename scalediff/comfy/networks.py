"""ComfyUI's own networks as data: where the tokens of their attention are. They are other classes than diffusers' of the same models.

What the two share, rotary positions and presets, is taken from diffusers' family of the same model (`scalediff.families`).

Legend: B batch, C channels, F frames, Y x X token grid, T text tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from scalediff import Layout, Sequence, TextRotation
from scalediff.families import FAMILIES
from scalediff.families.grid import Grid, UnknownLayout, level_grid
from scalediff.settings import Settings

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """One class of networks.

    Attributes:
        name: Class name.
        module: Module of ComfyUI that defines the class.
        models: The models it draws with, as text for messages.
        family: Class name of diffusers' network of the same model, whose rotary positions and presets are used.
        layout: Function from a network and the named arguments of its forward pass to the layout of its tokens; raises `UnknownLayout`.
        blocks: Function from a network to the number of attention calls among image tokens in a pass.
        patch: Function from a network to the number of latents per token along an axis.
        config: Function from a network to what diffusers' config of the same model has, as far as `family` reads it.
        native: Function from ComfyUI's config of the network to the token grid that the model was trained on; None if it does not tell.
        shift: As in `TextRotation`, where ComfyUI counts positions in another way than diffusers; None where it does not.
    """

    name: str
    module: str
    models: str
    family: str
    layout: Callable[[Any, Arguments], Layout]
    blocks: Callable[[Any], int]
    patch: Callable[[Any], int] = field(default=lambda net: int(net.patch_size))
    config: Callable[[Any], Mapping[str, Any]] = field(default=lambda net: {})
    native: Callable[[Mapping[str, Any]], Grid | None] = field(default=lambda config: (64, 64))
    shift: Callable[[Grid, Grid], tuple[int, int]] | None = None

    def rotation(self, net: Any) -> TextRotation | None:
        """The rotary positions by which text is rotated for each window; None if text is not rotated."""
        rotation = FAMILIES[self.family].rotation(self._twin(net))
        return rotation if rotation is None or self.shift is None else replace(rotation, shift=self.shift)

    def preset(self, net: Any) -> Settings:
        """The default preset of the model; that of FLUX.1 for models whose family has none."""
        cascade = FAMILIES[self.family].cascade or FAMILIES["FluxTransformer2DModel"].cascade
        assert cascade is not None
        return cascade.presets(self._twin(net))["default"].settings

    def _twin(self, net: Any) -> Any:
        return SimpleNamespace(config=SimpleNamespace(**self.config(net)))


def network_of(net: Any) -> Network | None:
    """The entry for a network, found by name and module of its class so that nothing of ComfyUI is imported; None if there is none."""
    for cls in type(net).__mro__:
        for network in NETWORKS:
            if (cls.__name__, cls.__module__) == (network.name, network.module):
                return _of_version(network, net)
    return None


def known_models() -> str:
    """The models that have an entry, as text for messages."""
    return ", ".join(dict.fromkeys(network.models for network in NETWORKS))


def _of_version(network: Network, net: Any) -> Network:
    """Z-Image has the class of Lumina 2, with tokens that pad text and image to a multiple."""
    z_image = network.name == "NextDiT" and getattr(net, "pad_tokens_multiple", None) is not None
    return replace(network, family="ZImageTransformer2DModel") if z_image else network


def _grid(arguments: Arguments, size: int) -> Grid:
    """The token grid of a picture `[B, C, H, W]` or `[B, C, 1, H, W]`, which the network pads to whole tokens."""
    x: Tensor = arguments["x"]
    if x.ndim == 5 and x.shape[2] != 1:
        raise UnknownLayout(f"windows over several frames are not supported, got latents of {tuple(x.shape)}")
    return -(-x.shape[-2] // size), -(-x.shape[-1] // size)


def _tokens(arguments: Arguments, *names: str) -> int:
    """Number of tokens in the named arguments `[B, T, C]`, as far as they are given."""
    return sum(int(arguments[name].shape[1]) for name in names if arguments.get(name) is not None)


def _refuse(arguments: Arguments, grid: Grid, *names: str) -> None:
    """Raise an error if one of these arguments, which add further tokens, is given."""
    for name in names:
        value = arguments.get(name)
        if value is not None and len(value) > 0:
            raise UnknownLayout(f"tokens of a second picture ({name}) are not supported", grid[0] * grid[1])


def _unet(net: Any, arguments: Arguments) -> Layout:
    grid = _grid(arguments, 1)
    levels = tuple(Sequence(level_grid(grid, level), level) for level in range(len(net.channel_mult)))
    return Layout(grid, levels, () if arguments.get("context") is None else (_tokens(arguments, "context"),))


def _flux(net: Any, arguments: Arguments) -> Layout:
    grid = _grid(arguments, net.patch_size)
    _refuse(arguments, grid, "ref_latents")
    return Layout(grid, (Sequence(grid, text=_tokens(arguments, "context")),))


def _mmdit(net: Any, arguments: Arguments) -> Layout:
    """SD3: text before the image, unlike in diffusers; image only in the second attention of some blocks."""
    grid = _grid(arguments, net.patch_size)
    text = _tokens(arguments, "context")
    return Layout(grid, (Sequence(grid, text=text + net.register_length), Sequence(grid)), (text,))


def _next_dit(net: Any, arguments: Arguments) -> Layout:
    """Text, image, and in Z-Image tokens that pad the image; before that, the image and its padding alone, and the text alone."""
    grid, multiple = _grid(arguments, net.patch_size), _multiple(net)
    _refuse(arguments, grid, "ref_latents", "ref_contexts", "siglip_feats", "ref_frames")
    text = _tokens(arguments, "context", "direct_context")
    text += -text % multiple
    padding = _padding(net, grid)
    return Layout(grid, (Sequence(grid, text=text + padding), Sequence(grid, side="suffix", text=padding)), (text,))


def _multiple(net: Any) -> int:
    """The multiple that Z-Image pads text and image to; 1 for Lumina 2. Versions of ComfyUI without Z-Image do not have the attribute."""
    return getattr(net, "pad_tokens_multiple", None) or 1


def _padding(net: Any, grid: Grid) -> int:
    return -(grid[0] * grid[1]) % _multiple(net)


def tokens_behind(network: Network, net: Any, grid: Grid) -> int:
    """Number of tokens that follow the image where text precedes it (Z-Image). They count as text, which a `Sequence` has on one side."""
    return _padding(net, grid) if network.name == "NextDiT" else 0


def _qwen(net: Any, arguments: Arguments) -> Layout:
    grid = _grid(arguments, net.patch_size)
    _refuse(arguments, grid, "ref_latents")
    return Layout(grid, (Sequence(grid, text=_tokens(arguments, "context")),))


def _qwen_shift(grid: Grid, native: Grid) -> tuple[int, int]:
    """Text starts at half the longer side. Rows and columns start at minus half their number, rounded up where diffusers rounds down."""
    longer, native_longer = max(grid) // 2, max(native) // 2
    return native_longer + native[0] // 2 - longer - grid[0] // 2, native_longer + native[1] // 2 - longer - grid[1] // 2


def _hunyuan(net: Any, arguments: Arguments) -> Layout:
    """HunyuanImage has the class of HunyuanVideo, with patches of two axes; its second text follows the first."""
    if len(net.patch_size) != 2:
        raise UnknownLayout("windows over the frames of a video model are not supported")
    grid = _grid(arguments, net.patch_size[0])
    _refuse(arguments, grid, "clip_fea", "ref_latent")
    text = _tokens(arguments, "context", "txt_byt5")
    return Layout(grid, (Sequence(grid, side="suffix", text=text),), (_tokens(arguments, "context"),))


def _streams(net: Any) -> int:
    skipped = len(getattr(net, "skip_mmdit", ())) + len(getattr(net, "skip_dit", ()))  # Chroma's, by a node
    return len(net.double_blocks) + len(net.single_blocks) - skipped


def _params(net: Any) -> Mapping[str, Any]:
    params = net.params
    guided = getattr(params, "guidance_embed", True)
    return {"axes_dims_rope": params.axes_dim, "rope_axes_dim": params.axes_dim, "rope_theta": params.theta, "guidance_embeds": guided}


_UNET_SIZES = {768: 64, 1280: 128, 2048: 128}  # latents, by the width of the text: SD 1.x; SDXL's refiner; SDXL


def _unet_native(config: Mapping[str, Any]) -> Grid | None:
    size = _UNET_SIZES.get(config.get("context_dim", 0))  # SD 2.x is 64 or 96, which its config does not tell
    return None if size is None else (size, size)


NETWORKS = (
    Network(
        "UNetModel", "comfy.ldm.modules.diffusionmodules.openaimodel", "Stable Diffusion 1.x, 2.x and XL", "UNet2DConditionModel", _unet,
        blocks=lambda net: sum(name.endswith(".attn1") for name, _ in net.named_modules()),
        patch=lambda net: 1,
        # all presets have the same restart and cutoffs
        config=lambda net: {"sample_size": 128, "addition_embed_type": "text_time", "encoder_hid_dim_type": None},
        native=_unet_native,
    ),
    Network("Flux", "comfy.ldm.flux.model", "FLUX", "FluxTransformer2DModel", _flux, blocks=_streams, config=_params),
    Network("Chroma", "comfy.ldm.chroma.model", "Chroma", "ChromaTransformer2DModel", _flux, blocks=_streams, config=_params),
    Network(
        "MMDiT", "comfy.ldm.modules.diffusionmodules.mmdit", "Stable Diffusion 3", "SD3Transformer2DModel", _mmdit,
        blocks=lambda net: sum(1 + bool(getattr(block.x_block, "x_block_self_attn", False)) for block in net.joint_blocks),
    ),
    Network(
        "NextDiT", "comfy.ldm.lumina.model", "Lumina 2 and Z-Image", "Lumina2Transformer2DModel", _next_dit,
        blocks=lambda net: len(net.layers) + len(net.noise_refiner),
        config=lambda net: {"axes_dim_rope": net.axes_dims, "axes_dims": net.axes_dims, "rope_theta": net.rope_embedder.theta},
    ),
    Network(
        "QwenImageTransformer2DModel", "comfy.ldm.qwen_image.model", "Qwen-Image", "QwenImageTransformer2DModel", _qwen,
        blocks=lambda net: len(net.transformer_blocks),
        config=lambda net: {"axes_dims_rope": net.pe_embedder.axes_dim},
        shift=_qwen_shift,
    ),
    Network(
        "HunyuanVideo", "comfy.ldm.hunyuan_video.model", "HunyuanImage 2.1", "HunyuanImageTransformer2DModel", _hunyuan,
        blocks=_streams, patch=lambda net: int(net.patch_size[-1]), config=_params,
    ),
)  # fmt: skip
