"""What the call stack tells: whether gradient checkpointing, or a compiled function, is running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

import torch.utils.checkpoint
from torch import nn

CHECKPOINTING = (
    "gradient checkpointing is not supported: it computes blocks again after the forward pass, when attention is no longer "
    "patched; disable it, use torch.no_grad(), or checkpoint the whole model"
)


def frames(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def depth_of(frame: FrameType) -> int:
    """Number of frames from the bottom of the stack up to this one."""
    return sum(1 for _ in frames(frame))


def in_checkpoint(below: int = 0) -> bool:
    """Whether torch.utils.checkpoint is running in a frame above the depth `below`."""
    stack = list(frames(sys._getframe(1)))
    return any(frame.f_code.co_filename == torch.utils.checkpoint.__file__ for frame in stack[: max(0, len(stack) - below)])


def in_forward(module: nn.Module) -> bool:
    """Whether a forward of the module, or a hook of diffusers around it, is running."""
    methods = ("forward", "_call_impl", "new_forward")
    running = (frame.f_locals for frame in frames(sys._getframe(1)) if frame.f_code.co_name in methods)
    return any(names.get("self") is module or names.get("module") is module for names in running)


def has_compiled_parts(module: nn.Module) -> bool:
    """Whether a module or a part of it is compiled."""
    parts = module.modules()
    return _in_compiled_function() or any(getattr(p, "_compiled_call_impl", None) is not None or hasattr(p, "_orig_mod") for p in parts)


def _in_compiled_function() -> bool:
    """Whether the caller runs inside a function that torch.compile has wrapped."""
    wrappers = (frame.f_code for frame in frames(sys._getframe(1)) if frame.f_code.co_name == "compile_wrapper")
    return any(code.co_filename.endswith("_dynamo/eval_frame.py") for code in wrappers)
