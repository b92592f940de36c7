"""Write the kernels as a folder for Hugging Face's `kernels` package: `python -m bench.hub --out FOLDER`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.hub.build import build


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the folder and print what is in it. Returns 0, or 2 for invalid input, with one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m bench.hub", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="a new or an empty folder")
    parser.add_argument("--version", type=int, default=1, metavar="N", help="version of the kernel (default: 1)")
    parser.add_argument(
        "--repo-id", metavar="OWNER/NAME", help="the repository that it will be published in, for build.toml and the README"
    )
    options = parser.parse_args(arguments)
    try:
        folders = build(options.out, version=options.version, repo_id=options.repo_id)
    except (ValueError, OSError) as error:
        print(f"bench.hub: error: {error}", file=sys.stderr)
        return 2
    for folder in folders:
        print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
