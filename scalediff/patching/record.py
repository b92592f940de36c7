"""What one pass did: the attention calls of every module, and the module that makes a call."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Container
from dataclasses import dataclass, field
from types import FrameType

from torch import nn

from scalediff.patching.call import Call


@dataclass
class ModuleCalls:
    """The attention calls of one module in one pass.

    Attributes:
        taken: Number of calls that were computed in windows.
        left: Number of calls that ran full attention.
        call: The last call that was computed in windows.
        why: Why the last call that ran full attention was left; empty for cross-attention and attention among text tokens.
        lengths: Numbers of queries and keys of the calls that were left.
    """

    taken: int = 0
    left: int = 0
    call: Call | None = None
    why: str = ""
    lengths: dict[tuple[int, int], None] = field(default_factory=dict)


class Callers:
    """Finds the module whose attention is computed, from the stack."""

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = weakref.ref(denoiser)
        self._names = weakref.WeakKeyDictionary({part: name for name, part in denoiser.named_modules()})
        self.may_have_changed = True

    def find(self, sites: Container[str], *, listed: bool) -> tuple[str, nn.Module | None]:
        """The innermost attention module of a listed family whose method is running, or the innermost module of any other model."""
        found: tuple[str, nn.Module | None] = "", None
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__package__") == __package__:  # the interception's own
            frame = frame.f_back
        while frame is not None:
            code = frame.f_code
            if code.co_argcount and code.co_varnames[0] == "self":  # the locals of a frame are a copy: ask for few
                module = frame.f_locals.get("self")
                name = self._name(module) if isinstance(module, nn.Module) else None
                if name == "":
                    break
                if name is not None and (not listed or name in sites):
                    return name, module
                if name is not None and not found[0]:
                    found = name, module
            frame = frame.f_back
        return found

    def _name(self, module: nn.Module) -> str | None:
        name = self._names.get(module)
        denoiser = self._denoiser()
        if name is None and self.may_have_changed and denoiser is not None:
            self.may_have_changed = False
            for path, part in denoiser.named_modules():  # a module keeps its name while other code wraps its block during a pass
                self._names.setdefault(part, path)
            name = self._names.get(module)
        return name
