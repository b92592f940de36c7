"""The networks: found where they are looked for, or a sentence that says which file to fetch; never downloaded."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")

from bench.evaluate import networks
from bench.evaluate.folders import read_picture
from bench.evaluate.networks import INCEPTION_FILE, load_clip, load_inception
from bench.quality.pictures import batch_of
from tests.bench.evaluate.pictures import picture

CPU = torch.device("cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / INCEPTION_FILE


def test_missing_weights_name_the_file_its_address_and_the_place(tmp_path: Path, hub: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"fetch https://github.com/toshas/.*{INCEPTION_FILE} and pass --inception PATH.*no file at {hub}"
    ):
        load_inception(None, CPU)
    with pytest.raises(ValueError, match=r"got no file at .*other.pth"):
        load_inception(tmp_path / "other.pth", CPU)


def test_other_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "other.pth").write_bytes(b"weights")
    found = hashlib.sha256(b"weights").hexdigest()[:8]
    with pytest.raises(ValueError, match=f"SHA-256 begins with 6726825d, got .*other.pth with {found}: other weights"):
        load_inception(tmp_path / "other.pth", CPU)


def test_weights_of_torch_hub_are_found_and_need_torch_fidelity(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    hub.parent.mkdir(parents=True)
    hub.write_bytes(b"weights")
    monkeypatch.setattr(networks, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest()[:8])
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match=r'need torch-fidelity: pip install "scalediff\[evaluate\]"'):
        load_inception(None, CPU)


@pytest.mark.slow  # 24 million random weights
def test_inception_of_torch_fidelity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights in place of the trained ones: the interface, not the numbers."""
    fidelity = pytest.importorskip("torch_fidelity")
    extractor = fidelity.feature_extractor_inceptionv3
    monkeypatch.setattr(extractor, "load_state_dict_from_url", lambda *_, **__: {})
    load = extractor.FeatureExtractorInceptionV3.load_state_dict
    monkeypatch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    made = extractor.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], verbose=False)
    monkeypatch.setattr(extractor.FeatureExtractorInceptionV3, "load_state_dict", load)
    torch.save(made.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(networks, "INCEPTION_SHA256", hashlib.sha256((tmp_path / "weights.pth").read_bytes()).hexdigest()[:8])
    network = load_inception(tmp_path / "weights.pth", CPU)
    pictures = torch.stack([torch.full((3, 299, 299), 90, dtype=torch.uint8), torch.full((3, 299, 299), 200, dtype=torch.uint8)])
    features, logits = network(pictures)
    assert features.shape == (2, network.features)
    assert logits.shape == (2, 1008)
    assert not torch.equal(features[0], features[1])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random CLIP model with a token a letter."""
    import transformers

    torch.manual_seed(0)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *"abcdefghijklmnopqrstuvwxyz",
        *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"),
    ]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, model_max_length=24)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 24, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_clip_gives_the_cosines_of_its_embeddings(clip_folder: Path, tmp_path: Path) -> None:
    """Also of an oblong picture, whose centre square is what the model sees, and of a prompt longer than the model reads."""
    clip = load_clip(str(clip_folder), CPU)
    picture(0, (32, 64)).save(tmp_path / "a.png")
    wide = batch_of(read_picture(tmp_path / "a.png"))
    prompts = ["a fox", "word " * 40]
    both = clip(wide.expand(2, -1, -1, -1), prompts)
    assert torch.allclose(both[:1], clip(wide[:, :, :, 16:48], prompts[:1]), atol=1e-6)
    mean, std = (torch.tensor(values)[:, None, None] for values in (networks._CLIP_MEAN, networks._CLIP_STD))
    seen = (wide[:, :, :, 16:48].float() / 255 - mean) / std
    tokens = clip.tokenizer(prompts[:1], return_tensors="pt")
    with torch.no_grad():
        image = clip.model.visual_projection(clip.model.vision_model(seen).pooler_output)
        text = clip.model.text_projection(clip.model.text_model(tokens["input_ids"]).pooler_output)
    assert both[0] == pytest.approx(F.cosine_similarity(image, text).item(), abs=1e-5)
    assert both[0] != pytest.approx(both[1].item(), abs=1e-4)


def test_a_missing_clip_names_its_address_and_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for given, shown in ((str(tmp_path), str(tmp_path)), (None, "openai/clip-vit-large-patch14"), ("nobody/nothing", "nobody/nothing")):
        with pytest.raises(
            ValueError, match=f"fetch https://huggingface.co/openai/.* pass --clip FOLDER.*in the cache /.*no model at '{shown}'"
        ):
            load_clip(given, CPU)


def test_clip_needs_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r'the CLIP score needs transformers: pip install "scalediff\[diffusers\]"'):
        load_clip(None, torch.device("cpu"))
