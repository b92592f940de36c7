"""docs/reference/command.md from the command's own help: `python docs/site/command_page.py` writes it."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from pathlib import Path
from unittest import mock

PAGE = Path(__file__).parents[1] / "reference" / "command.md"
_HEAD = """# The command line

`pip install -e ".[diffusers]"` installs the command `scalediff`. Examples are in the [quickstart](../guide/quickstart.md).

The command exits with 0 when it is done; 1 when memory runs out, another process of the run is lost, or workers could not draw all
pictures; 2 on bad input (one line on stderr); 130 on Ctrl-C; and 141 if the reader of its output has gone. With the environment variable
`SCALEDIFF_DEBUG` set, errors of the input keep their traceback.

This page is written by `python docs/site/command_page.py`.
"""


def help_of(*arguments: str) -> str:
    """What `scalediff ARGUMENTS --help` prints in a terminal of 100 columns."""
    from scalediff.command.cli import main

    printed = io.StringIO()
    with mock.patch.dict(os.environ, COLUMNS="100"), contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*arguments, "--help"])
    return printed.getvalue().rstrip()


def commands() -> list[str]:
    """The names of the subcommands, in the order of the parser."""
    from scalediff.command.cli import command_parser

    subparsers = next(action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    return list(subparsers.choices)


def page() -> str:
    """The whole page."""
    sections = [f"```text\n{help_of()}\n```\n", *(f"## scalediff {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands())]
    return "\n".join([_HEAD, *sections])


if __name__ == "__main__":
    PAGE.write_text(page())
