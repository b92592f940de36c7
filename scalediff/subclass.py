"""Subclasses that stand for the class of a patched object: another call, everything else as it was.

A patched object is one of such a class with a mark in its `__dict__`; without the mark the class does nothing of its own.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any, cast

ATTRIBUTE = "_scalediff"


class Patched:
    """Marks the subclasses made here; their second base is the class that they stand for. Copies and pickles are of that class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function, arguments = object.__new__, (own_class(type(self)),)
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ATTRIBUTE}
        return function, arguments, *rest


def own_class(cls: type) -> type:
    """The class that a patched one stands for, also below classes that others have put on top."""
    order = cls.__mro__
    return order[order.index(Patched) + 1] if Patched in order else cls


def unmark(owner: Any, mark: object) -> None:
    """Take the mark off, if it is there, and give the object its class back."""
    if owner is not None and owner.__dict__.get(ATTRIBUTE) is mark:
        del owner.__dict__[ATTRIBUTE]
        if Patched in type(owner).__bases__:  # a class that others have put on top stays: our call does nothing without a mark
            owner.__class__ = own_class(type(owner))


def subclass(cls: type, calls: dict[str, Callable[..., Any]]) -> type:
    """A subclass with other calls; name and module stay, so that saving and printing are as before."""
    return type(cls.__name__, (Patched, cls), {**calls, "__module__": cls.__module__, "__qualname__": cls.__qualname__})
