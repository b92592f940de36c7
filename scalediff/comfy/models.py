"""Patch a model of ComfyUI: a clone with the wrapper and the attention override, while the model itself stays as it is."""

from __future__ import annotations

from typing import Any

from scalediff.comfy.attention import KEY, SLOT, Around, WindowedAttention
from scalediff.comfy.networks import Network, known_models, network_of
from scalediff.families.grid import Grid
from scalediff.settings import Jitter, Settings
from scalediff_kernels.neighborhood.api import TextQueries


def patched(
    model: Any,
    window: Grid,
    *,
    text_queries: TextQueries = "window",
    text_rope: bool = True,
    jitter: Jitter = "none",
    seed: int = 0,
    strict: bool = True,
) -> Any:
    """Clone a model with neighborhood patch attention above its native size.

    Args:
        model: ComfyUI's `ModelPatcher`; not changed.
        window: Key/value window `(Y, X)` in tokens; (0, 0) for the token grid that the model was trained on.
        text_queries, text_rope, jitter, seed, strict: As in `WindowedAttention`.

    Raises:
        NotImplementedError: The network has no known layout.
        ValueError: The window is not two positive numbers, or the network does not tell its native size.
    """
    window = resolve_window(model, window)
    clone = unpatched(model)
    options = clone.model_options.setdefault("transformer_options", {})
    attention = WindowedAttention(
        network(model), diffusion_model(model), window, text_queries=text_queries, text_rope=text_rope, jitter=jitter, seed=seed,
        strict=strict, chained=options.get(SLOT),
    )  # fmt: skip
    options[SLOT] = attention
    clone.add_wrapper_with_key(_wrapper_type(), KEY, Around(attention))
    return clone


def unpatched(model: Any) -> Any:
    """Clone a model without neighborhood patch attention, which it need not have."""
    clone, attention = model.clone(), attention_of(model)
    if attention is not None:
        clone.remove_wrappers_with_key(_wrapper_type(), KEY)
        options = clone.model_options["transformer_options"]
        if options.get(SLOT) is attention:
            del options[SLOT]
            if attention.chained is not None:
                options[SLOT] = attention.chained
    return clone


def attention_of(model: Any) -> WindowedAttention | None:
    """The attention of a patched model; None if it is not patched."""
    wrappers = model.get_wrappers(_wrapper_type(), KEY)
    return wrappers[0].attention if wrappers else None


def diffusion_model(model: Any) -> Any:
    """The network of a model, without torch.compile around it."""
    net = model.get_model_object("diffusion_model")
    return getattr(net, "_orig_mod", net)


def network(model: Any) -> Network:
    """What is known about the network of a model.

    Raises:
        NotImplementedError: Nothing is known.
    """
    net = diffusion_model(model)
    known = network_of(net)
    if known is None:
        raise NotImplementedError(
            f"ScaleDiff does not know where the tokens of this model are: it knows {known_models()}, "
            f"got {type(net).__module__}.{type(net).__qualname__}"
        )
    return known


def latents_per_token(model: Any) -> int:
    """Latents per token along an axis; raises as `network`."""
    return network(model).patch(diffusion_model(model))


def native_window(model: Any) -> Grid | None:
    """The window of a patched model, or the token grid that a model was trained on; None if the model does not tell."""
    attention = attention_of(model)
    return network(model).native(model.model.model_config.unet_config) if attention is None else attention.window


def resolve_window(model: Any, window: Grid) -> Grid:
    """A window in tokens: the given one, or the native one where (0, 0) is given; raises as `patched`."""
    native = network(model).native(model.model.model_config.unet_config)
    if window == (0, 0) and native is None:
        raise ValueError("this model does not tell its native size: set window_height and window_width, such as 64 or 96 for SD 2.x")
    chosen = native if window == (0, 0) else window
    if chosen is None or min(chosen) < 1:
        raise ValueError(f"window_height and window_width must both be positive, or both 0 for the native size, got {window}")
    return chosen


def preset(model: Any) -> Settings:
    """The default preset of a model."""
    return network(model).preset(diffusion_model(model))


def _wrapper_type() -> Any:
    from comfy.patcher_extension import WrappersMP

    return WrappersMP.DIFFUSION_MODEL
