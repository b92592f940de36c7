"""The pictures that a command line asks for: one for every prompt and seed."""

from __future__ import annotations

import hashlib
import unicodedata
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from scalediff.command.loading import UsageError
from scalediff.command.pictures import check_writable
from scalediff.command.reporting import Job, print_status

_SLUG_LENGTH = 48  # characters
_SLUG_BYTES = 144  # file systems allow 255 in a name, which also has the seed, the stage and an ending


def prompts_of(options: Namespace) -> list[str]:
    """The prompts of the command line, then those of the file, one per line."""
    prompts = list(options.prompt)
    if options.prompts is not None:
        try:
            prompts += [line.strip() for line in options.prompts.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--prompts must be a text file with one prompt per line, got {options.prompts}: {error}") from error
    if not prompts:
        raise UsageError("a prompt is required, as an argument or in a file with --prompts")
    return prompts


def plan_jobs(options: Namespace, prompts: Sequence[str], name: str = "") -> list[Job]:
    """One job per prompt and seed. All files are checked to be writable; several pictures go to a folder, under different names."""
    if not all(prompt.strip() for prompt in prompts):
        print_status("a prompt is empty: its picture follows no text")
    wanted = [(prompt, seed) for prompt in prompts for seed in options.seed]
    out: Path | None = options.out
    if out is not None and len(wanted) > 1 and not out.is_dir():
        raise UsageError(f"--out must be an existing folder for {len(wanted)} pictures, got {out}")
    folder = out if out is not None and out.is_dir() else Path()
    jobs: dict[Path, Job] = {}
    for prompt, seed in wanted:
        stem = f"{name or _slug(prompt)}-{seed}"
        names = (f"{stem}.png", *(f"{stem}-again-{i}.png" for i in range(1, len(wanted))))
        file = out if out is not None and not out.is_dir() else next(folder / one for one in names if folder / one not in jobs)
        check_writable(file)
        jobs[file] = Job(prompt, seed, file)
    return list(jobs.values())


def _slug(prompt: str) -> str:
    """The prompt as a file name: letters of any script, their marks and digits, and a hyphen for everything between them.

    Of a long prompt it is the start, with a hash of the whole: many long prompts begin alike, and none may overwrite another's picture.
    """
    text = unicodedata.normalize("NFC", prompt.lower())
    words = "-".join("".join(one if unicodedata.category(one)[0] in "LMN" else " " for one in text).split())
    if len(words) <= _SLUG_LENGTH and len(words.encode()) <= _SLUG_BYTES:
        return words or "picture"
    whole = unicodedata.normalize("NFC", prompt).encode(errors="surrogatepass")
    ending = f"-{hashlib.sha256(whole).hexdigest()[:8]}"
    start = words[: _SLUG_LENGTH - len(ending)].encode()[: _SLUG_BYTES - len(ending)].decode(errors="ignore")
    return start.rstrip("-") + ending
