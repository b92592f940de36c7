"""Prompt lists: three formats, and a sentence for what is wrong in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.evaluate.drawing import read_prompts


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.txt", "a red fox\n\n  two owls, at night  \n"),
        ("list.csv", 'id,prompt\n1,a red fox\n2,"two owls, at night"\n'),
        ("list.jsonl", '{"prompt": "a red fox"}\n\n{"id": 2, "prompt": "two owls, at night"}\n'),
        ("list.txt", "\ufeffa red fox\r\ntwo owls, at night\r\n"),
    ],
)
def test_the_prompts_of_every_format(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert read_prompts(tmp_path / name) == ["a red fox", "two owls, at night"]


def test_another_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("TEXT,url\nan owl,x\n")
    assert read_prompts(tmp_path / "a.csv", column="TEXT") == ["an owl"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "\n \n", "at least one prompt and no empty ones, got 0 prompts in .*a.txt"),
        ("a.csv", "TEXT,url\nan owl,x\n", "record 1 of .*a.csv must have a text in 'prompt', the column of --column, got KeyError"),
        ("a.csv", "", "at least one prompt"),
        ("a.csv", "id,prompt\n1\n", "record 1 of .*a.csv must have a text in 'prompt'"),
        ("a.csv", "id,prompt\n1, \n", "no empty ones, got 1 prompts in .*a.csv, 1 of them empty"),
        ("a.jsonl", "an owl\n", "record 1 of .* must have a text in 'prompt', .*, got JSONDecodeError"),
        ("a.jsonl", '{"prompt": "x"}\n["an owl"]\n', "record 2 of .* must have a text in 'prompt'"),
        ("a.jsonl", '{"prompt": 3}\n', "record 1 of .* must have a text in 'prompt'"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / name)


def test_a_missing_file_and_one_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "picture").write_bytes(b"\xff\xd8\xff")
    for name in ("none.txt", "picture"):
        with pytest.raises(ValueError, match=f"a readable text file in UTF-8, got .*{name}"):
            read_prompts(tmp_path / name)
