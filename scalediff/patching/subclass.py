"""Subclasses that stand for the class of a patched object: another call, everything else as it was.

A patched object is one of such a class with a mark in its `__dict__`; without the mark the class does nothing of its own.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any, cast

ATTRIBUTE = "_scalediff"
_STANDS_FOR = "_scalediff_stands_for"


class Patched:
    """Marks the subclasses made here; each stands for the class under it. Copies and pickles are of that class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments, *rest = cast("tuple[Any, ...]", super().__reduce_ex__(protocol))
        arguments = tuple(own_class(type(self)) if argument is type(self) else argument for argument in arguments)
        if function is copyreg.__newobj__:  # type: ignore[attr-defined]
            function = object.__new__  # the other asks for the object's own class
        if rest and isinstance(rest[0], dict):
            rest[0] = {name: value for name, value in rest[0].items() if name != ATTRIBUTE}
        return function, arguments, *rest


def own_class(cls: type) -> type:
    """The class that a patched one stands for, also below classes that others have put on top."""
    for base in cls.__mro__:
        if _STANDS_FOR in base.__dict__:
            return own_class(base.__dict__[_STANDS_FOR])
    return cls


def mark(owner: Any, mark: object, calls: Callable[[type], dict[str, Callable[..., Any]]]) -> None:
    """Give an object a class with other calls, made from its own, and the mark.

    Name and module of the class stay, so that saving and printing are as before.
    """
    own = type(owner).__dict__.get(_STANDS_FOR, type(owner))  # an object made from the class of a patched one is not patched
    owner.__class__ = _standing_for(own, calls)
    owner.__dict__[ATTRIBUTE] = mark


@functools.cache  # a graph that was compiled for the class of one patch serves the next one
def _standing_for(cls: type, calls: Callable[[type], dict[str, Callable[..., Any]]]) -> type:
    names = {_STANDS_FOR: cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    return type(cls.__name__, (cls,) if issubclass(cls, Patched) else (Patched, cls), {**calls(cls), **names})


def unmark(owner: Any, mark: object) -> None:
    """Take the mark off, if it is there, and give the object its class back."""
    if owner is not None and owner.__dict__.get(ATTRIBUTE) is mark:
        del owner.__dict__[ATTRIBUTE]
        if _STANDS_FOR in type(owner).__dict__:  # a class that others have put on top stays: our call does nothing without a mark
            owner.__class__ = type(owner).__dict__[_STANDS_FOR]


def is_patched(net: Any) -> bool:
    """Whether a network is patched, by itself or with its pipeline."""
    return ATTRIBUTE in net.__dict__
