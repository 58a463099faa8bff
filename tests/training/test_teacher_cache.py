"""A cache is used for what it was made of, and for nothing else."""

import json
import shutil

import pytest
from PIL import Image

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.models import load_detector
from attn_kd.training import TeacherCache
from attn_kd.training.teacher_cache_model import load_skeleton


@pytest.fixture
def copied(tiny_cache, tmp_path):
    """The folder of a cache that may be damaged."""
    return shutil.copytree(tiny_cache.folder, tmp_path / "cache")


@pytest.fixture
def data(tiny_data, tmp_path):
    """A data folder that may be changed; its annotations of the training split."""
    folder = shutil.copytree(tiny_data, tmp_path / "data")
    file = folder / "annotations" / "instances_train.json"
    return folder, file, json.loads(file.read_text())


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_intact_shards_pass(tiny_cache):
    tiny_cache.verify()


def test_damaged_shard_is_named(copied):
    flip_a_bit(copied / "shard-00001.safetensors")
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is damaged: its SHA-256"):
        TeacherCache.open(copied).verify()


def test_missing_shard_is_named(copied):
    (copied / "shard-00001.safetensors").unlink()
    cache = TeacherCache.open(copied)
    with pytest.raises(InputError, match=r"cannot read .*shard-00001\.safetensors"):
        cache.verify()
    with pytest.raises(InputError, match=r"shard-00001\.safetensors is missing or damaged"):
        cache.read(6)


def test_shard_cut_short_after_the_check_is_named(copied):
    path = copied / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"shard-00000\.safetensors is missing or damaged"):
        TeacherCache.open(copied).read(0)


def test_damaged_backbone_of_the_teacher_is_named(copied):
    flip_a_bit(copied / "teacher" / "backbone.safetensors")
    with pytest.raises(InputError, match=r"backbone\.safetensors is damaged"):
        TeacherCache.open(copied).teacher_folder()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 1}, "version 1; expected 'attn_kd teacher cache', version 2"),
        ({"format": "zip"}, "has format 'zip'"),
        ({"shards": []}, "0 shards of 3"),
        ({"recipe": {}}, "is broken: KeyError"),
    ],
    ids=["version", "format", "shards", "recipe"],
)
def test_manifest_of_another_kind_is_refused(copied, change, message):
    file = copied / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(InputError, match=message):
        TeacherCache.open(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images_per_shard": 0}, "images_per_shard is 0; expected at least 1"),
        ({"images_per_shard": "x"}, "images_per_shard is 'x'; expected int"),
        ({"views": 1.5}, "views is 1.5; expected int"),
        ({"views": True}, "views is True; expected int"),
        ({"views": 2}, "the grids of 'shard-00000.safetensors' are not those of shard 0"),
        ({"seed": -1}, "seed is -1; expected at least 0"),
        ({"dtype": []}, r"dtype is \[\]; expected str"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"amp": "fp8"}, "amp is 'fp8'"),
        ({"augmentation": 3}, "augmentation is 3; expected Mapping or NoneType"),
        ({"images": 5}, "is broken: TypeError"),
        ({"layers": [{}]}, "is broken: TypeError"),
        ({"teacher": {"folder": "teacher", "sha256": None}}, "sha256 is None; expected str"),
        ({"colour": "red"}, "is broken: TypeError"),
    ],
    ids=lambda value: (
        "-".join(f"{n}={v}" for n, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_manifest_with_a_damaged_recipe_is_refused(copied, change, message):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["recipe"] |= change
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        TeacherCache.open(copied)


@pytest.mark.parametrize(
    "grids",
    [[], [[[4, 4]]], [[[4]]] * 5, [[["x", 4]]] * 5, [[[float("inf"), 4]]] * 5],
    ids=["none", "of one image", "without width", "no number", "infinite"],
)
def test_manifest_with_damaged_grids_is_refused(copied, grids):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["shards"][0]["grids"] = grids
    file.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"manifest\.json is broken"):
        TeacherCache.open(copied)


@pytest.mark.parametrize(
    "files", [{"config.json": None}, {"../config.json": "0"}, ["config.json"], None], ids=str
)
def test_manifest_with_damaged_teacher_files_is_refused(copied, files):
    file = copied / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"teacher_files": files}))
    with pytest.raises(InputError, match=r"manifest\.json is broken"):
        TeacherCache.open(copied)


def test_fewer_images_in_another_order_are_found(tiny_cache, data):
    folder, file, document = data
    kept = [document["images"][number] for number in (7, 2, 10)]
    ids = {image["id"] for image in kept}
    document |= {
        "images": kept,
        "annotations": [a for a in document["annotations"] if a["image_id"] in ids],
    }
    file.write_text(json.dumps(document))
    assert tiny_cache.rows_of(CocoDetection(folder, "train")) == [7, 2, 10]


def test_data_folder_may_have_moved(tiny_cache, data):
    assert tiny_cache.rows_of(CocoDetection(data[0], "train")) == list(range(12))


def test_unknown_image_is_named(tiny_cache, data):
    folder, file, document = data
    document["images"][3]["id"] = 99
    document["annotations"] = []
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"image 99 \(train_004\.png\) .* is not in the teacher"):
        tiny_cache.rows_of(CocoDetection(folder, "train"))


def test_changed_image_is_named(tiny_cache, data):
    Image.new("L", (64, 64)).save(data[0] / "images" / "train_003.png")
    with pytest.raises(InputError, match=r"image 3 is train_003\.png, 64 x 64, \d+ bytes; in the"):
        tiny_cache.rows_of(CocoDetection(data[0], "train"))


def test_image_of_other_content_and_the_same_size_is_named(tiny_cache, data):
    images = CocoDetection(data[0], "train")
    tiny_cache.verify(images)
    flip_a_bit(data[0] / "images" / "train_003.png")
    with pytest.raises(InputError, match=r"image 3 \(.*train_003\.png\) has another content"):
        tiny_cache.verify(images)


def test_other_boxes_are_no_matter(tiny_cache, data):
    folder, file, document = data
    document["annotations"] = []
    file.write_text(json.dumps(document))
    assert tiny_cache.rows_of(CocoDetection(folder, "train")) == list(range(12))


def test_its_own_teacher_is_known_wherever_it_is(tiny_cache, tiny_teacher, tmp_path):
    tiny_cache.require_teacher(shutil.copytree(tiny_teacher, tmp_path / "moved"))


def test_identity_does_not_depend_on_where_the_teacher_was(tiny_cache, copied):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["recipe"]["teacher"]["folder"] = "/elsewhere"
    file.write_text(json.dumps(manifest))
    assert TeacherCache.open(copied).identity.sha256 == tiny_cache.identity.sha256


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["recipe"].update(seed=1),
        lambda manifest: manifest["recipe"]["teacher"].update(sha256="0"),
        lambda manifest: manifest["shards"][1].update(sha256="0"),
        lambda manifest: manifest["teacher_files"].update({"config.json": "0"}),
    ],
    ids=["recipe", "weights", "shard", "teacher file"],
)
def test_identity_depends_on_all_else(tiny_cache, copied, change):
    file = copied / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    assert TeacherCache.open(copied).identity.sha256 != tiny_cache.identity.sha256


def test_another_teacher_is_refused_by_what_differs(tiny_cache, tiny_teacher, tmp_path):
    other = shutil.copytree(tiny_teacher, tmp_path / "other")
    file = other / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"image_mean": [0.5, 0.5, 0.5]}))
    with pytest.raises(InputError, match=r"teacher than \S*other: other image processor \("):
        tiny_cache.require_teacher(other)
    flip_a_bit(other / "model.safetensors")
    with pytest.raises(InputError, match=r"other weights, image processor \("):
        tiny_cache.require_teacher(other)


def test_layer_that_is_not_kept_is_refused_by_name(tiny_cache):
    with pytest.raises(InputError, match=r"'model\.encoder\.layers\.5\.self_attn' is not in the"):
        tiny_cache.require_layers(["model.encoder.layers.5.self_attn"])


def test_skeleton_has_the_backbone_and_the_layers_of_the_teacher(tiny_cache, tiny_teacher):
    skeleton, _ = load_skeleton(tiny_cache.teacher_folder())
    teacher, _ = load_detector(tiny_teacher)
    kept = skeleton.model.backbone.state_dict()
    for name, tensor in teacher.model.backbone.state_dict().items():
        assert kept[name].equal(tensor), name
    assert all(p.is_meta for p in skeleton.model.encoder.parameters())
    assert dict(skeleton.named_modules()).keys() == dict(teacher.named_modules()).keys()
