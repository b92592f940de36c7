"""The command as a user meets it: pictures with their story inside, one-line errors, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import scalediff
from scalediff.cascade.changing import changing_pipeline
from scalediff.cascade.metadata import read_metadata, save_png
from scalediff.command import loading
from scalediff.command.cli import main
from scalediff.command.pictures import side_by_side
from tests.scalediff.cascade.test_pipelines import built

diffusers = pytest.importorskip("diffusers")
Image = pytest.importorskip("PIL.Image")
PngInfo = pytest.importorskip("PIL.PngImagePlugin").PngInfo

FAST = ["--size", "96", "--steps", "2", "--restart", "0.5", "--quiet"]


@pytest.fixture(autouse=True)
def _loaded_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_demo", lambda: demo)


def files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_picture_with_its_stages_and_its_story(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "moon.png"
    assert main(["generate", "a full moon", "--out", str(out), "--seed", "5", "--no-sg", *FAST]) == 0
    assert files(tmp_path) == ["moon.png", "moon.stage1-64x64.png"]
    with Image.open(out) as image:
        assert image.size == (96, 96)
    said = capsys.readouterr()
    assert "64 x 64 -> 96 x 96, seed 5" in said.err
    assert "peak memory" in said.err
    assert main(["info", str(out)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["prompt"] == "a full moon"
    assert told["seed"] == 5
    assert (told["height"], told["width"], told["stage"]) == (96, 96, "2/2")
    assert told["settings"]["sg"] is False
    assert told["settings"]["steps"] == 2
    assert told["sizes"] == ["64x64", "96x96"]
    assert (told["scheduler"], told["dtype"], told["device"]) == ("DDIMScheduler", "float32", f"cpu, {torch.get_num_threads()} threads")
    assert told["versions"]["torch"] == torch.__version__
    assert read_metadata(tmp_path / "moon.stage1-64x64.png")["height"] == 64
    with Image.open(out) as image:  # what other tools read
        told = image.text["parameters"].splitlines()
    assert told == [
        "a full moon",
        "Steps: 2, Sampler: DDIMScheduler, CFG scale: 1.5, Seed: 5, Size: 96x96, Model: demo, Version: scalediff",
    ]


def test_the_same_command_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert main(["generate", "the sun at dawn", "--out", str(tmp_path / name), *FAST]) == 0
    with Image.open(tmp_path / "a.png") as a, Image.open(tmp_path / "b.png") as b:
        assert a.tobytes() == b.tobytes()


def test_compare_writes_three_pictures_with_times(tmp_path: Path) -> None:
    assert main(["generate", "a moon", "--out", str(tmp_path / "x.png"), "--compare", "--no-sg", *FAST]) == 0
    assert files(tmp_path) == ["x.compare.png", "x.png", "x.stage1-64x64.png"]
    with Image.open(tmp_path / "x.compare.png") as sheet:
        assert sheet.width > 3 * 96
        assert sheet.height > 96
    told = read_metadata(tmp_path / "x.compare.png")
    assert told["kind"] == "comparison"
    assert [panel["title"] for panel in told["panels"]] == ["direct", "full attention", "ScaleDiff without SG"]


def test_the_default_name_says_prompt_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", "A moon, over/hills!", *FAST]) == 0
    assert "a-moon-over-hills-0.png" in files(tmp_path)


def test_models_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first = "attention: yes (text: cross-attention); cascade: yes, tested with the embedded model; small models with random weights"
    assert lines[0].split(maxsplit=1) == ["UNet2DConditionModel", first]
    assert any(line.startswith("AuraFlowTransformer2DModel ") and "cascade: yes, tested with small" in line for line in lines)
    assert any(line.startswith("GlmImageTransformer2DModel ") and "cascade: no: an autoregressive model" in line for line in lines)
    assert not any(line.endswith("cascade: no: ") for line in lines)
    assert any(line.startswith("not supported") and "WanTransformer3DModel" in line for line in lines)
    assert [line.split(":")[0] for line in lines if line.startswith("preset")] == [
        *(f"preset {name} of sdxl" for name in ("default", "paper", "turbo", "lightning")),
        *(f"preset {name} of flux" for name in ("default", "paper")),
    ]


def test_upscale_enlarges_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "photo.jpg"
    Image.new("RGB", (72, 72), (20, 30, 60)).save(source)
    out = tmp_path / "large.png"
    run = ["upscale", str(source), "a moon", "--steps", "2", "--restart", "0.5", "--quiet", "--out", str(out)]
    assert main([*run, "--size", "192"]) == 0
    assert files(tmp_path) == ["large.png", "large.stage1-128x128.png", "photo.jpg"]
    assert "72 x 72 -> 192 x 192, seed 0" in capsys.readouterr().err
    told = read_metadata(out)
    assert (told["picture"], told["picture_size"], told["height"], told["stage"]) == ("photo.jpg", "72x72", 192, "2/2")
    before = source.read_bytes()
    for arguments, message in [
        ([*run, "--size", "64"], "the target must be larger than the picture, 72 x 72"),
        ([*run, "--size", "128x256"], "the target must have the aspect ratio of the picture, 72 x 72"),
        (["upscale", str(tmp_path / "none.jpg"), "a moon"], "the picture must be an existing file"),
        (["upscale", str(Path(__file__)), "a moon", "--out", str(tmp_path / "y.png")], "must be a picture that Pillow reads"),
        (["upscale", str(out), "a moon", "--out", str(out)], "--out must not be the input picture"),
    ]:
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert source.read_bytes() == before


def test_upscale_changes_what_a_mask_leaves_free(
    tmp_path: Path, trained_demo: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a strength, a base stage is one more file; the left half, transparent in the mask, is that of the photo, up to the VAE."""
    monkeypatch.setattr(loading, "load_demo", lambda: trained_demo)
    source, mask = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(source)
    white = Image.new("L", (64, 64), 255)
    white.paste(0, (0, 0, 32, 64))
    Image.merge("LA", (Image.new("L", (64, 64), 255), white)).save(mask)
    run = ["upscale", str(source), "a moon", "--steps", "2", "--restart", "0.5", "--size", "96", "--quiet", "--mask", str(mask)]
    assert main([*run, "--out", str(tmp_path / "kept.png")]) == 0
    assert main([*run, "--strength", "1", "--out", str(tmp_path / "changed.png"), "--negative-prompt", "blur"]) == 0
    assert files(tmp_path) == ["changed.png", "changed.stage1-64x64.png", "kept.png", "mask.png", "photo.png"]
    told = read_metadata(tmp_path / "changed.png")
    assert (told["mask"], told["strength"], told["picture"]) == ("mask.png", 1.0, "photo.png")
    assert "strength" not in read_metadata(tmp_path / "kept.png")
    kept, changed = (np.asarray(Image.open(tmp_path / name)).astype(float) for name in ("kept.png", "changed.png"))
    left, right = np.split(np.abs(kept - changed), 2, axis=1)
    assert 4 * left.mean() < right.mean()  # the decoder's normalisation spreads a little of every change
    assert main([*run, "--strength", "2"]) == 2
    assert "strength must lie in (0, 1], got strength=2.0" in capsys.readouterr().err


def test_a_strength_needs_a_pipeline_of_diffusers() -> None:
    pipe, _ = built("Lumina 2")
    for mask, kind in ((True, "inpainting"), (False, "image-to-image")):
        with pytest.raises(ValueError, match=f"strength needs a model for which diffusers has an {kind} pipeline, got Lumina2Pipeline"):
            changing_pipeline(pipe, with_mask=mask)


def test_a_pipeline_that_changes_pictures_is_offloaded_as_the_one_it_is_made_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same device, which under torchrun is not the first one; on a CPU, where nothing is offloaded, not at all."""
    seen = []
    monkeypatch.setattr(diffusers.FluxImg2ImgPipeline, "enable_model_cpu_offload", lambda self, device: seen.append(device))
    for offloaded in (False, True):
        pipe, _ = built("FLUX")
        if offloaded:
            pipe.enable_model_cpu_offload(device="cuda:3")
        assert type(changing_pipeline(pipe, with_mask=False)) is diffusers.FluxImg2ImgPipeline
    assert seen == [torch.device("cuda:3")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "100"], "height and width must be multiples of 8, got height=100, width=100"),
        (["--size", "32"], "at least the model's native 64 x 64, got height=32, width=32"),
        (["--restart", "0"], "restart must lie in (0, 1], got restart=0.0"),
        (["--guidance-scale", "nan"], "guidance_scale must be finite"),
        (["--steps", "0"], "steps must be at least 1"),
        (["--steps", "1001"], "steps must be at most 1000, the number of timesteps of this DDIMScheduler, got steps=1001"),
        (["--lfm-cutoff", "0.01"], "at least one coarse pixel, got cutoff=0.01"),
        (["--model", "no/such/folder"], "--model must be demo, a pipeline folder or the id of an accessible model, got 'no/such/folder'"),
        (["--scheduler", "flow-euler"], "--scheduler flow-euler is for flow models, got demo with prediction_type='v_prediction'"),
        (["--device", "tpu9"], "--device must be a device of this machine, got 'tpu9'"),
        (["--device", "meta"], "--device must be a device of this machine, got 'meta'"),
        (["--out", "missing/folder/x.png"], "existing, writable folder, got missing/folder/x.png"),
        (["--out", "x.gif"], "must be a .png file, got x.gif"),
        (["--out", "/proc/x.png"], "writable folder, got /proc/x.png"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["generate", "a moon", "--size", "128", "--steps", "2", "--quiet", *arguments]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("scalediff: error: ")]
    assert len(error) == 1
    assert message in error[0]
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "x", "--seed", "-1"],
        ["generate", "x", "--seed", "3-1"],
        ["generate", "x", "--restart", "0.5,"],
        ["generate", "x", "--sizes", "64,big"],
        ["generate", "x", "--preview", "0"],
        ["generate", "x", "--seed", "9" * 30],
        ["generate", "x", "--seed", "0-99999999999"],
        ["plan", "--memory", "1e300"],
        ["generate", "x", "--size", "big"],
        ["generate", "x", "--size", "12x"],
        ["paint"],
        [],
    ],
)
def test_bad_usage_is_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: scalediff" in capsys.readouterr().err


def test_size_is_height_by_width(tmp_path: Path) -> None:
    assert main(["generate", "x", "--out", str(tmp_path / "x.png"), "--size", "64x128", "--steps", "2", "--restart", "0.5", "--quiet"]) == 0
    with Image.open(tmp_path / "x.png") as image:
        assert (image.height, image.width) == (64, 128)


def test_ctrl_c_keeps_finished_stages_and_says_where(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = demo.unet.forward

    def interrupted(sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sample.shape[-1] == 24:
            raise KeyboardInterrupt
        return forward(sample, *args, **kwargs)

    monkeypatch.setattr(demo.unet, "forward", interrupted)
    assert main(["generate", "a moon", "--out", str(tmp_path / "x.png"), "--preview", "1", *FAST]) == 130
    assert files(tmp_path) == ["x.preview.png", "x.stage1-64x64.png"]
    assert f"interrupted; files written: {tmp_path / 'x.stage1-64x64.png'}, {tmp_path / 'x.preview.png'}" in capsys.readouterr().err
    assert torch.nn.functional.scaled_dot_product_attention.__module__ != "scalediff.patching.interception"


def test_another_scheduler(tmp_path: Path, demo: Any) -> None:
    own = demo.scheduler
    try:
        assert main(["generate", "a moon", "--out", str(tmp_path / "x.png"), "--scheduler", "euler", *FAST]) == 0
    finally:
        demo.scheduler = own
    assert read_metadata(tmp_path / "x.png")["scheduler"] == "EulerDiscreteScheduler"


def test_debugging_keeps_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEDIFF_DEBUG", "1")
    with pytest.raises(ValueError, match="multiples of 8"):
        main(["generate", "a moon", "--out", str(tmp_path / "x.png"), "--size", "100"])


def test_without_diffusers_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert main(["generate", "a moon", "--out", str(tmp_path / "x.png"), *FAST]) == 2
    assert 'pip install "scalediff[diffusers]"' in capsys.readouterr().err


def test_a_model_without_anything_to_patch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], demo: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    bare = diffusers.UNet2DConditionModel(sample_size=16, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1, **blocks)
    monkeypatch.setattr(demo, "unet", bare)
    assert main(["generate", "a moon", "--out", str(tmp_path / "x.png"), *FAST]) == 2
    assert "found no self-attention to patch in UNet2DConditionModel" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_info_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "foreign.png")
    (tmp_path / "text.png").write_text("no picture")
    broken = PngInfo()
    broken.add_itxt("scalediff", "{no json")
    Image.new("RGB", (4, 4)).save(tmp_path / "broken.png", pnginfo=broken)
    for name in ("foreign.png", "text.png", "missing.png", "broken.png"):
        assert main(["info", str(tmp_path / name)]) == 2
        assert f"the file must be a picture written by scalediff, got {tmp_path / name}" in capsys.readouterr().err


def test_a_picture_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    class Broken:
        def save(self, path: Path, **options: Any) -> None:
            path.write_bytes(b"half")
            raise OSError("disk full")

    target = tmp_path / "x.png"
    target.write_bytes(b"older picture")
    with pytest.raises(OSError, match="disk full"):
        save_png(Broken(), target, metadata={})
    assert files(tmp_path) == ["x.png"]
    assert target.read_bytes() == b"older picture"


def test_metadata_survives_any_text(tmp_path: Path) -> None:
    metadata = {"prompt": 'café ☾ "quoted"\nline', "seed": 2**63}
    save_png(Image.new("RGB", (4, 4)), tmp_path / "x.png", metadata=metadata)
    assert read_metadata(tmp_path / "x.png") == metadata


def test_side_by_side_keeps_the_pictures() -> None:
    parts = [Image.new("RGB", (40, 30), color) for color in ("red", "blue")]
    sheet = side_by_side(parts, ["one", "two"])
    assert sheet.getpixel((20, 15)) == (255, 0, 0)
    assert sheet.getpixel((sheet.width - 20, 15)) == (0, 0, 255)


def test_the_command_is_installed() -> None:
    done = subprocess.run([sys.executable, "-m", "scalediff.command.cli", "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout
    assert "info" in done.stdout


def test_a_reader_that_has_gone_ends_the_command_quietly(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """As in `scalediff models | head -1`."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert main(["models"]) == 141
    assert capfd.readouterr().err == ""


def test_load_demo_and_from_pretrained_are_the_same() -> None:
    diffusers = pytest.importorskip("diffusers")
    from scalediff.demo import DEMO_PATH

    a, b = scalediff.load_demo(), diffusers.DiffusionPipeline.from_pretrained(DEMO_PATH)
    assert type(a) is type(b) is diffusers.StableDiffusionPipeline
    assert all(torch.equal(x, y) for x, y in zip(a.unet.parameters(), b.unet.parameters(), strict=True))
    assert next(a.unet.parameters()).dtype == next(a.vae.parameters()).dtype == next(a.text_encoder.parameters()).dtype == torch.float32
