"""`generate`: options, upsampler and ControlNet reach pictures and records, and what cannot be drawn is refused before anything is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from bench.evaluate import __main__ as command
from bench.evaluate.__main__ import main
from scalediff.cascade.metadata import read_metadata
from scalediff.cascade.upsampling import NetworkUpsampler
from scalediff.cascade.workdir import fingerprint_weights
from tests.bench.evaluate.test_evaluate import refused
from tests.scalediff.cascade.test_pipelines import built

Command = Callable[..., list[Any]]


@pytest.fixture
def generate(demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The arguments of a command that draws two prompts into the folder `out`."""
    monkeypatch.setattr(command, "load_model", lambda name, **_: demo)
    (tmp_path / "prompts.txt").write_text("a moon\na sun\n")
    fixed = ["generate", "--prompts", tmp_path / "prompts.txt", "--size", 96, "--steps", 2, "--out", tmp_path / "out"]
    return lambda *more: [str(argument) for argument in (*fixed, *more)]


def test_options_reach_the_picture_and_its_record(generate: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out" / "demofusion"
    main(generate("--methods", "demofusion", "--option", "demofusion.blur-std=2"))
    record = read_metadata(folder / "000001-1.png")
    assert (record["options"]["blur_std"], record["options"]["view_batch"], record["given"]) == (2, 16, {"steps": 2})
    first = (folder / "000000-0.png").read_bytes()
    assert "belongs to another run (options: " in refused(capsys, *generate("--methods", "demofusion"))
    main(generate("--methods", "demofusion", "--out", tmp_path / "plain"))
    assert (tmp_path / "plain" / "demofusion" / "000000-0.png").read_bytes() != first
    main(generate("--methods", "demofusion", "--option", "demofusion.blur-std=2"))
    assert "demofusion: 0 pictures drawn, 2 were there" in capsys.readouterr().out


def test_an_upsampler_is_read_once_and_known_by_its_weights(
    generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read: list[Path] = []

    def resolve(path: Path) -> NetworkUpsampler:
        read.append(path)
        return NetworkUpsampler(torch.nn.Upsample(scale_factor=2), 2, fingerprint=path.read_text())

    monkeypatch.setattr(command, "resolve_upsampler", resolve)
    names = tmp_path / "a.pth", tmp_path / "b.pth"
    for name in names:
        name.write_text("weights")
    arguments = generate("--methods", "scalediff,super-resolution,direct", "--upsampler")
    main([*arguments, str(names[0])])
    assert read == [names[0]]
    records = {name: read_metadata(tmp_path / "out" / name / "000001-1.png") for name in ("scalediff", "super-resolution", "direct")}
    assert {name: (record["given"], record["options"]) for name, record in records.items()} == {
        "scalediff": ({"steps": 2, "upsampler": "weights"}, {}),
        "super-resolution": ({"steps": 2}, {"upsampler": "weights"}),
        "direct": ({"steps": 2}, {}),
    }
    main([*arguments, str(names[1])])
    assert "super-resolution: 0 pictures drawn, 2 were there" in capsys.readouterr().out
    names[0].write_text("others")
    assert "scalediff belongs to another run (given: {'steps': 2, 'upsampler': 'weights'} there)" in refused(
        capsys, *arguments, str(names[0])
    )


def test_guidance_and_upsampler_of_one_method(generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method's own value goes before that of all, wherever it stands; one command draws methods with different settings."""
    monkeypatch.setattr(command, "resolve_upsampler", lambda path: path and NetworkUpsampler(torch.nn.Upsample(scale_factor=2), 2))
    scales = ["--guidance-scale", "direct=3", "--guidance-scale", "2"]
    main(generate("--methods", "scalediff,super-resolution,direct", *scales, "--upsampler", "super-resolution=demo"))
    records = {name: read_metadata(tmp_path / "out" / name / "000001-1.png") for name in ("scalediff", "super-resolution", "direct")}
    assert {name: record["given"]["guidance_scale"] for name, record in records.items()} == {
        "scalediff": 2, "super-resolution": 2, "direct": 3,
    }  # fmt: skip
    assert "upsampler" not in records["scalediff"]["given"]
    assert records["super-resolution"]["options"]["upsampler"] is not None


def test_the_model_is_loaded_with_the_scheduler(generate: Command, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def load(name: str, **how: Any) -> Any:
        raise ValueError(f"{name} with {how['scheduler']} in {how['dtype']}")

    monkeypatch.setattr(command, "load_model", load)
    assert refused(capsys, *generate("--scheduler", "euler", "--dtype", "fp16")) == "demo with euler in fp16"


def test_a_controlnet_is_loaded_before_the_pictures(
    generate: Command, demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusers import ControlNetModel

    controlnet = ControlNetModel.from_unet(demo.unet, conditioning_embedding_out_channels=(8, 16, 32))
    controlnet.save_pretrained(tmp_path / "canny")
    monkeypatch.setattr("scalediff.methods.edges._opencv", lambda: None)
    edges: list[float] = []
    monkeypatch.setattr(
        "scalediff.methods.edges.find_edges", lambda picture, spread: edges.append(spread) or np.zeros(picture.shape[:2], np.uint8)
    )
    arguments = generate("--methods", "accdiffusion", "--option", f"accdiffusion.controlnet={tmp_path / 'canny'}")
    loads: list[str] = []
    load = ControlNetModel.from_pretrained
    monkeypatch.setattr(ControlNetModel, "from_pretrained", lambda path, **named: loads.append(path) or load(path, **named))
    main([*arguments, "--option", "accdiffusion.edge-spread=0.2", "--seeds", "0,1"])
    assert (loads, edges) == ([str(tmp_path / "canny")], [0.2] * 4)
    folder = tmp_path / "out" / "accdiffusion"
    assert read_metadata(folder / "000001-1.png")["options"]["controlnet"] == fingerprint_weights([controlnet])
    refusal = refused(capsys, *generate("--methods", "accdiffusion", "--seeds", "0,1", "--option", "accdiffusion.edge-spread=0.2"))
    assert "belongs to another run (options: " in refusal


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "scalediff,hiflow"], "HiFlow needs a flow model with FlowMatchEulerDiscreteScheduler, got DDIMScheduler"),
        (["--methods", "scalediff,demofusion", "--option", "demofusion.stride=99"], "stride must be at most the window's 16 latents"),
        (["--methods", "scalediff,direct", "--option", "stride=8"], "--option must be METHOD.NAME=VALUE, got 'stride=8'"),
        (["--methods", "direct", "--option", "demofusion.stride=8"], "--option is for methods of --methods that have options (none)"),
        (
            ["--methods", "direct", "--upsampler", "demo"],
            "--upsampler must be with a method that enlarges pictures in --methods, got direct",
        ),
        (
            ["--methods", "direct,diffusehigh", "--upsampler", "direct=demo"],
            "must be with a method that enlarges pictures in --methods, got direct",
        ),
        (["--methods", "direct", "--guidance-scale", "diffusehigh=5"], "--guidance-scale is for methods of --methods, got diffusehigh=5.0"),
        (["--guidance-scale", "1", "--guidance-scale", "2"], "--guidance-scale of all methods must be given once, got 2.0 as well"),
        (
            ["--methods", "direct", "--guidance-scale", "1", "--guidance-scale", "direct=2"],
            "--guidance-scale 1.0 has no effect: every method of --methods has its own",
        ),
        (
            ["--methods", "direct,super-resolution", "--upsampler", "demo", "--upsampler", "super-resolution=demo"],
            "--upsampler must be with a method that enlarges pictures in --methods, got direct",
        ),
        (["--guidance-scale", "direct=much"], "argument --guidance-scale: must be a number, alone or after METHOD=, got 'direct=much'"),
        (["--methods", "direct", "--size-conditioning", "native"], "--size-conditioning must be with scalediff in --methods, got direct"),
        (["--size-conditioning", "native"], "size_conditioning needs a pipeline with the arguments original_size and target_size"),
        (["--preset", "turbo"], "preset must be one of default, paper for this UNet2DConditionModel, got 'turbo'"),
        (["--size", "100"], "height and width must be multiples of 8, got height=100, width=100"),
        (["--methods", "super-resolution", "--upsampler", "nothing.pth"], "upsampler must be an existing file, got nothing.pth"),
        (["--methods", "scalediff,accdiffusion", "--option", "accdiffusion.controlnet=nothing"], "the id of one that `hf download` has"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is(
    arguments: list[str], message: str, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo: Any, capsys: Any
) -> None:
    monkeypatch.setattr("scalediff.methods.edges._opencv", lambda: None)
    monkeypatch.setattr(demo.unet, "forward", lambda *_, **__: pytest.fail("a picture was drawn"))
    assert message in refused(capsys, *generate(*arguments))
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused_before_a_new_one_is_made(generate: Command, tmp_path: Path, capsys: Any) -> None:
    main(generate("--methods", "direct"))
    assert "direct belongs to another run (given: " in refused(capsys, *generate("--methods", "scalediff,direct", "--guidance-scale", 2))
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["direct"]


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("spandrel", ["--methods", "super-resolution", "--upsampler"], 'pip install "scalediff[upsampler]"'),
        ("cv2", ["--methods", "accdiffusion", "--option", "accdiffusion.controlnet=canny"], 'pip install "scalediff[controlnet]"'),
    ],
)
def test_a_missing_package_is_one_sentence(
    module: str, arguments: list[str], message: str, generate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    torch.save({"weight": torch.zeros(1)}, tmp_path / "network.pth")
    monkeypatch.setitem(sys.modules, module, None)
    if module == "spandrel":
        arguments = [*arguments, str(tmp_path / "network.pth")]
    assert message in refused(capsys, *generate(*arguments))
    assert not (tmp_path / "out").exists()


def test_the_size_conditioning_of_sdxl_is_scalediffs_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pipe, _ = built("SDXL")
    monkeypatch.setattr(command, "load_model", lambda name, **_: pipe)
    (tmp_path / "prompts.txt").write_text("a moon\n")
    arguments = ["generate", "--prompts", tmp_path / "prompts.txt", "--size", 64, "--steps", 2, "--methods", "scalediff,direct"]
    given: list[Any] = []
    monkeypatch.setattr(command, "prepared", lambda pipe, task, item: task)
    monkeypatch.setattr(command, "draw_items", lambda pipe, task, *_, **__: given.append(task) or 0)
    main([str(argument) for argument in (*arguments, "--out", tmp_path, "--size-conditioning", "native")])
    assert [task.preset.settings.size_conditioning for task in given] == ["native", "target"]
    refusal = refused(capsys, *arguments, "--out", tmp_path, "--size-conditioning", "target")
    assert "scalediff belongs to another run (preset: " in refusal


def test_a_seed_that_is_named_twice_is_drawn_once(generate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []

    def draw(pipe: Any, task: Any, items: Any, folder: Path, *, shard: tuple[int, int]) -> int:
        drawn.extend(item.seed for item in items if item.index == 0)
        return len(items)

    monkeypatch.setattr(command, "draw_items", draw)
    main(generate("--seeds", "3,0-3"))
    assert drawn == [3_000_000, 0, 1_000_000, 2_000_000]
