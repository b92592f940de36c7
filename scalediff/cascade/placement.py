"""Where the weights of a pipeline are, and how many bytes they take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn


def is_offloaded(pipe: Any) -> bool:
    """Whether the pipeline's components are offloaded, and on the device only while in use."""
    return any(hasattr(part, "_hf_hook") for part in pipe.components.values())


def weights_of(pipe: Any) -> dict[str, int]:
    """Bytes of the weights of every component of a pipeline."""
    return bytes_of({name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)})


def check_placement(pipe: Any) -> None:
    """Check that components are on one device as a whole.

    Raises:
        NotImplementedError: Weights come to the device layer by layer or in groups, or are spread over devices.
    """
    inner = (module for part in pipe.components.values() if isinstance(part, nn.Module) for module in part.modules())
    for module in inner:
        hooks = getattr(module, "_diffusers_hook", None)
        by_layer = hasattr(module, "_hf_hook") and not any(module is part for part in pipe.components.values())
        if by_layer or (hooks is not None and hooks.get_hook("group_offloading") is not None):
            raise NotImplementedError("the memory of a pipeline whose weights are offloaded by layers or groups cannot be estimated")
    if getattr(pipe, "hf_device_map", None) is not None:
        raise NotImplementedError("the memory of a pipeline on several devices cannot be estimated")


def bytes_of(parts: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of parameters and buffers, by the names of the modules."""
    return {name: sum(x.numel() * x.element_size() for x in (*part.parameters(), *part.buffers())) for name, part in parts.items()}
