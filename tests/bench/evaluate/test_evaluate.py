"""The command: options, the CSV and the page, errors as one sentence; and the embedded model drawn and scored."""

from __future__ import annotations

import csv
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from bench.evaluate import __main__ as command
from bench.evaluate.__main__ import _parser, main
from bench.evaluate.protocols import PROTOCOLS
from bench.harness.facts import ROOT
from tests.bench.evaluate.pictures import RedMeansRed, generated_folder, plain_folder, small_inception

PROMPTS = [f"a red fox {i}" for i in range(6)]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    generated_folder(tmp_path / "sharp", PROMPTS)
    generated_folder(tmp_path / "smooth", PROMPTS, blur=True)
    plain_folder(tmp_path / "true", range(20, 28))
    return tmp_path


def rows_of(path: Path) -> dict[str, dict[str, str]]:
    return {row["row"]: row for row in csv.DictReader(path.open())}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of a command that ends with it."""
    with pytest.raises(SystemExit, match="2"):
        main([str(argument) for argument in arguments])
    return capsys.readouterr().err.splitlines()[-1].partition("error: ")[2]


def test_without_a_network_rows_and_page_are_written(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["score", *(str(folders / name) for name in ("sharp", "smooth")), "--reference", str(folders / "true"), "--bootstrap", "20"])
    rows = rows_of(folders / "scores.csv")
    names = ["seconds", "hf_ratio", "sharpness", "discs", "seam", "seam_control", "spectrum", "swd", "swd_fine"]
    of_reference = {"(reference)/hf_ratio", "(reference)/sharpness"}
    assert set(rows) == of_reference | {*(f"{folder}/{name}" for folder in ("sharp", "smooth") for name in names)}
    assert float(rows["(reference)/hf_ratio"]["value"]) == pytest.approx(float(rows["sharp/hf_ratio"]["value"]), rel=0.2)
    assert rows["(reference)/hf_ratio"]["pictures"] == "8"
    row = rows["smooth/spectrum"]
    assert float(row["low"]) < float(row["value"]) < float(row["high"])
    assert float(row["difference"]) == pytest.approx(float(row["value"]) - float(rows["sharp/spectrum"]["value"]), rel=1e-3)
    assert (row["baseline"], row["pictures"], row["references"], row["protocol"]) == ("sharp", "6", "8", "")
    assert row["command"].startswith("python -m bench.evaluate score ")
    assert row["torch"] == torch.__version__
    page = (folders / "scores.md").read_text()
    assert page.strip() in capsys.readouterr().out
    assert "6 pictures a folder, 8 reference pictures; spectra and SWD at 48 x 48." in page
    assert "Differences from sharp, paired by prompt and seed:" in page
    assert f"{float(row['value']):.3g}" in page


def test_folders_of_one_name_are_rows_of_their_own(folders: Path) -> None:
    generated_folder(folders / "flux" / "sharp", PROMPTS, blur=True)
    main(["score", str(folders / "sharp"), str(folders / "flux" / "sharp"), "--bootstrap", "0"])
    rows = rows_of(folders / "scores.csv")
    assert {row["folder"]: row["baseline"] for row in rows.values()} == {f"{folders.name}/sharp": "", "flux/sharp": f"{folders.name}/sharp"}
    assert float(rows["flux/sharp/hf_ratio"]["difference"]) < 0


def test_a_protocol_with_its_networks(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "load_inception", lambda path, device: small_inception())
    monkeypatch.setattr(command, "load_clip", lambda name, device: RedMeansRed())
    main([
        "score", str(folders / "sharp"), "--reference", str(folders / "true"), "--protocol", "scalediff", "--crops", "2",
        "--crop-size", "32", "--splits", "2", "--bootstrap", "0", "--force", "--csv", str(folders / "runs" / "table.csv"),
    ])  # fmt: skip
    rows = rows_of(folders / "runs" / "table.csv")
    for name in ("fid", "kid", "is", "fid_patch", "kid_patch", "is_patch", "clip"):
        assert float(rows[f"sharp/scalediff/{name}"]["value"]) != 0
        assert rows[f"sharp/scalediff/{name}"]["low"] == ""
    page = (folders / "runs" / "table.md").read_text()
    for sentence in (
        "- crops: 2 of each picture, 32 x 32 pixels", "- biased: patch columns: crops of generated pictures against whole photos",
        "- not established: ", "The protocol has 1000 reference pictures, here are 8.", "Network: a small network.", "Network: red.",
    ):  # fmt: skip
        assert sentence in page


def test_a_protocol_without_weights_says_what_to_fetch(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(folders / "hub"))
    few = ("score", folders / "sharp", "--reference", folders / "true", "--protocol", "scalediff", "--splits", 2)
    assert "FID of 2048 features needs as many whole pictures" in refused(capsys, *few), "before anything is to be fetched"
    arguments = (*few, "--force")
    assert "fetch https://github.com/toshas/torch-fidelity/" in refused(capsys, *arguments)
    assert "fetch https://huggingface.co/openai/" in refused(capsys, *arguments, "--statistics", "clip", "--clip", folders / "none")
    assert not (folders / "scores.csv").exists()


def test_what_is_wrong_is_one_sentence(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sharp, true, drawing = folders / "sharp", folders / "true", ("generate", "--prompts", "p", "--out", "o")
    said = {
        "argument --protocol: invalid choice: 'mine'": ("score", sharp, "--protocol", "mine"),
        "--crops and --crop-size change a protocol: pass --protocol, got none": ("score", sharp, "--crops", 3),
        "argument --bootstrap: must be 0 or at least 2, got -3": ("score", sharp, "--bootstrap=-3"),
        "Is a directory": ("score", sharp, "--csv", true),
        "argument --statistics: must be of fid, .*clip, got lpips": ("score", sharp, "--statistics", "fid,lpips"),
        "number and size of this protocol's crops are not established": ("score", sharp, "--reference", true, "--protocol", "hiflow"),
        "pictures must be in an existing folder, got .*none": ("score", folders / "none"),
        "folders must have as many pictures, which are paired, got 6 in .*sharp and 8 in .*true": ("score", sharp, true),
        "argument --methods: must be of scalediff, .*, got magic": (*drawing, "--size", 128, "--methods", "magic"),
        "argument --shard: must be i/n .*, got 2/2": (*drawing, "--size", 128, "--shard", "2/2"),
        "argument --size: a size must be N or HxW in pixels, got '12x'": (*drawing, "--size", "12x"),
        "argument --seeds: seeds must be N, N-M, .*, got '1,a'": (*drawing, "--size", 1, "--seeds", "1,a"),
        "a readable text file in UTF-8, got .*none.txt": ("generate", "--prompts", folders / "none.txt", "--out", "o", "--size", 128),
    }  # fmt: skip
    for message, arguments in said.items():
        assert re.search(message, refused(capsys, *arguments)), message


def test_a_model_that_is_not_on_this_machine_without_internet(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (folders / "prompts.txt").write_text("an owl\n")
    arguments = ("generate", "--prompts", folders / "prompts.txt", "--size", 128, "--out", folders / "out", "--model", "nobody/nothing")
    message = r"--model must be demo, .*, got 'nobody/nothing': it is not in the Hugging Face cache, and fetching it failed with: "
    assert re.match(message + r"Cannot reach .*; `hf download nobody/nothing` puts it there", refused(capsys, *arguments))
    assert not (folders / "out").exists()


def test_the_protocols_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["protocols"])
    printed = capsys.readouterr().out
    assert all(f"Protocol `{name}`: " in printed for name in PROTOCOLS)


def test_an_output_that_nobody_reads_ends_the_command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit, match="141"):
            main(["protocols"])
    assert capfd.readouterr().err == ""


def test_the_commands_of_the_guide_are_valid() -> None:
    pages = "".join((ROOT / "docs" / "guide" / name).read_text() for name in ("evaluate.md", "method.md")).replace("\\\n", " ")
    typed = re.findall(r"^ *(?:python|torchrun --nproc-per-node \d+) -m bench\.evaluate (.*)$", pages, flags=re.MULTILINE)
    assert len(typed) >= 11
    for arguments in typed:
        _parser().parse_args(shlex.split(arguments))


@pytest.mark.slow
def test_the_embedded_model_drawn_in_two_shards_and_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prompts.txt").write_text("a sun over hills at noon\na moon over hills at night\n")
    drawing = ["generate", "--prompts", str(tmp_path / "prompts.txt"), "--methods", "scalediff,multidiffusion", "--steps", "2"]
    drawing += ["--size", "128", "--out", str(tmp_path / "out")]
    for shard in ("1/2", "0/2", "0/1"):
        main([*drawing, "--shard", shard])
    assert "scalediff: 0 pictures drawn, 2 were there" in capsys.readouterr().out
    main(["score", *(str(tmp_path / "out" / name) for name in ("scalediff", "multidiffusion")), "--bootstrap", "10"])
    rows = rows_of(tmp_path / "out" / "scores.csv")
    assert float(rows["scalediff/discs"]["value"]) >= 0
    assert "seam" in rows["multidiffusion/seam"]["statistic"]
    assert float(rows["multidiffusion/hf_ratio"]["difference"]) != 0
    assert [float(rows[f"multidiffusion/{name}"]["value"]) >= 0 for name in ("repetition", "sharpness")] == [True, True]
    assert "belongs to another run (given: " in refused(capsys, *drawing, "--steps", 3)
