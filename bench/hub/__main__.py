"""Write the kernels as a folder for Hugging Face's `kernels` package: `python -m bench.hub --out FOLDER`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.harness.command import positive
from bench.hub.build import build


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the folder and print what is in it."""
    parser = argparse.ArgumentParser(prog="python -m bench.hub", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument("--version", type=positive(int), default=1, metavar="N", help="version of the kernel (default: 1)")
    parser.add_argument("--repo-id", metavar="OWNER/NAME", help="the repository that it will be published in")
    options = parser.parse_args(arguments)
    try:
        print(*build(options.out, version=options.version, repo_id=options.repo_id), sep="\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
