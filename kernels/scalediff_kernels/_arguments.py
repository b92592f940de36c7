"""Checks of arguments that several operations have in common."""

from __future__ import annotations


def checked_wrap(wrap: tuple[bool, bool]) -> tuple[bool, bool]:
    """A pair of booleans `(Y, X)`: whether the picture continues on the other side along each axis; raises TypeError if it is none."""
    if not isinstance(wrap, tuple | list) or len(wrap) != 2 or not all(isinstance(one, bool) for one in wrap):
        raise TypeError(f"wrap must be a pair of booleans (Y, X), got {wrap=}")
    return wrap[0], wrap[1]
