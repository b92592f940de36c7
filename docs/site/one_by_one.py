"""A docstring may describe several parameters in one entry, `height, width: pixels`. In the reference each has an entry of its own."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"^    (\w+(?:, \w+)+): (.*(?:\n {8}.*)*)$", re.MULTILINE)


class OneByOne(griffe.Extension):
    """Splits the entries of every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ENTRY.sub(_one_by_one, obj.docstring.value)


def _one_by_one(entry: re.Match[str]) -> str:
    return "\n".join(f"    {name}: {entry[2]}" for name in entry[1].split(", "))
