"""Model folders: what is saved is what is loaded, here and by transformers alone."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DetrForObjectDetection

from attn_kd import InputError
from attn_kd.models import build_detr, build_image_processor, load_detector, save_detector


@pytest.fixture
def detector():
    """A model whose batch norm statistics are not those it started with, and its processor."""
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    model.train()(pixel_values=batch())
    return model.eval(), build_image_processor("detr-tiny", image_size={"height": 64, "width": 64})


@pytest.fixture
def folder(detector, tmp_path):
    save_detector(*detector, tmp_path / "model")
    return tmp_path / "model"


def batch():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_loaded_model_computes_the_same(detector, folder):
    loaded, _ = load_detector(folder)
    with torch.no_grad():
        expected, found = detector[0](batch()), loaded(batch())
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.pred_boxes, expected.pred_boxes)


def test_loaded_processor_has_the_saved_size(folder):
    _, processor = load_detector(folder)
    image = torch.zeros(3, 50, 70, dtype=torch.uint8)
    assert processor(image, return_tensors="pt")["pixel_values"].shape[-2:] == (64, 64)


def test_loaded_model_names_its_classes(folder):
    assert load_detector(folder)[0].config.id2label == {0: "needle"}


def test_loaded_backbone_learns_its_statistics(folder):
    model, _ = load_detector(folder)
    before = model.model.backbone.state_dict()["model.embedder.embedder.normalization.running_mean"]
    before = before.clone()
    model.train()(pixel_values=batch() + 1)
    after = model.model.backbone.state_dict()["model.embedder.embedder.normalization.running_mean"]
    assert not torch.equal(before, after)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_plain_transformers_computes_the_same_from_the_folder(detector, folder):
    plain = DetrForObjectDetection.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(batch()).logits, detector[0](batch()).logits)


def test_saving_over_a_model_keeps_other_files(detector, folder):
    (folder / "history.json").write_text("[]")
    save_detector(*detector, folder, extra={"run": {"seed": 3}})
    assert (folder / "history.json").read_text() == "[]"
    assert json.loads((folder / "run.json").read_text()) == {"seed": 3}


def test_saving_leaves_nothing_temporary(folder):
    expected = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in folder.iterdir()} == expected


def test_all_files_can_be_read_by_the_same_users(folder):
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"is not a model folder: it has no {name}"):
        load_detector(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "preprocessor_config.json"])
def test_truncated_file_is_an_input_error(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(InputError, match=str(folder)):
        load_detector(folder)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere is not a model folder: there is no such folder"):
        load_detector(tmp_path / "nowhere")


def test_another_kind_of_model_is_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "yolos"}))
    with pytest.raises(InputError, match="model_type 'yolos'; expected 'detr'"):
        load_detector(folder)


@pytest.mark.skipif(importlib.util.find_spec("timm"), reason="timm is installed")
def test_backbone_of_a_missing_package_is_an_input_error(folder):
    backbone = {"model_type": "timm_backbone", "backbone": "resnet50"}
    config = json.loads((folder / "config.json").read_text()) | {"backbone_config": backbone}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"(?s)cannot load the model: .*timm"):
        load_detector(folder)


def test_weights_of_a_smaller_model_are_refused(folder):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "encoder_layers": 2}))
    with pytest.raises(InputError, match="lacks 16 tensors"):  # 6 Linear and 2 norms, weight, bias
        load_detector(folder)
