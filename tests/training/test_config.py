import dataclasses
import inspect
import math
import re

import pytest

from attn_kd.distill import AttentionDistiller
from attn_kd.errors import InputError
from attn_kd.training.config import TrainingConfig


def test_round_trip_through_json(tmp_path):
    config = TrainingConfig(
        preset="detr-r50",
        alpha=0.5,
        num_queries=1,
        amp="bf16",
        layers="all",
        kinds=("encoder_self", "decoder_cross"),
        head_map=(0, 2, 4, 6),
        alignment="group",
        teacher_grid=(26, 26),
    )
    config.save(tmp_path / "training.json")
    assert TrainingConfig.load(tmp_path / "training.json") == config


def test_round_trip_of_explicit_layers(tmp_path):
    config = TrainingConfig(layers={"s.0": "t.2", "s.1": "t.5"}, head_map={"s.0": (3, 2, 1, 0)})
    config.save(tmp_path / "training.json")
    loaded = TrainingConfig.load(tmp_path / "training.json")
    assert loaded == config
    assert list(loaded.layers) == ["s.0", "s.1"]


def test_layers_given_as_a_mapping_are_the_configurations_own():
    layers = {"s.0": "t.2"}
    config = TrainingConfig(layers=layers)
    layers["s.1"] = "t.5"
    assert config.layers == {"s.0": "t.2"}


@pytest.mark.parametrize("preset", [["detr-tiny"], {}, None, 1])
def test_preset_that_is_no_name_is_refused(preset):
    with pytest.raises(InputError, match=r"preset is .*; expected str"):
        TrainingConfig.for_preset(preset)


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().alpha = 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("batch_size", 2.5),
        ("batch_size", True),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("weight_decay", -1e-4),
        ("alpha", 1.5),
        ("alpha", "0.7"),
        ("temperature", 0),
        ("warmup", 1.0),
        ("schedule", "step"),
        ("amp", "fp8"),
        ("preset", None),
        ("layers", "first"),
        ("layers", {}),
        ("layers", {"s.0": 2}),
        ("kinds", ()),
        ("kinds", "encoder_self"),
        ("kinds", ("encoder",)),
        ("kinds", ("encoder_self", "encoder_self")),
        ("divergence", "l2"),
        ("head_reduction", "max"),
        ("head_map", ()),
        ("head_map", (0, -1)),
        ("head_map", (0, True)),
        ("head_map", {"s.0": ()}),
        ("head_map", {"s.0": (0, "1")}),
        ("teacher_grid", (13,)),
        ("student_grid", (13, 0)),
        ("alignment", "pool"),
    ],
)
def test_bad_value_is_refused_by_name(field, value):
    with pytest.raises(InputError, match=f"^{field} is {re.escape(repr(value))}; expected"):
        TrainingConfig(**{field: value})


def test_optional_field_accepts_none():
    assert TrainingConfig(max_steps=None).max_steps is None


def test_backbone_learns_at_the_common_rate_unless_told():
    assert TrainingConfig(learning_rate=3e-4).backbone_rate == 3e-4
    assert TrainingConfig(learning_rate=3e-4, backbone_learning_rate=0.0).backbone_rate == 0.0


def test_feature_cache_needs_a_frozen_backbone():
    with pytest.raises(InputError, match="freeze_backbone is False"):
        TrainingConfig(cache_features=True)


def test_head_map_contradicts_averaged_heads():
    with pytest.raises(InputError, match=r"head_map is \(0, 1\) but head_reduction is 'mean'"):
        TrainingConfig(head_map=(0, 1), head_reduction="mean")


def test_distiller_options_are_those_of_the_distiller():
    options = inspect.signature(AttentionDistiller).parameters
    assert set(TrainingConfig().distiller_options) <= set(options)


def test_unknown_field_suggests_the_nearest():
    with pytest.raises(InputError, match=r"'learning_rte'.*did you mean 'learning_rate'"):
        TrainingConfig.from_dict({"learning_rte": 1e-4})


def test_former_name_of_a_field_is_read():
    config = TrainingConfig.from_dict({"layer_kinds": ["decoder_self"]})
    assert config.kinds == ("decoder_self",)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff"], ids=["cut off", "a list", "binary"])
def test_broken_file_is_named(tmp_path, content):
    path = tmp_path / "training.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=r"training\.json"):
        TrainingConfig.load(path)


@pytest.mark.parametrize("values", [[], "x", None, 3], ids=repr)
def test_settings_that_are_no_mapping_are_refused(values):
    with pytest.raises(InputError, match=r"config is .*; expected a mapping of the names"):
        TrainingConfig.from_dict(values)


def test_differences_ignore_what_does_not_change_the_weights():
    config = TrainingConfig()
    assert config.differences(config.replace(num_workers=3, log_steps=1)) == {}
    assert config.differences(config.replace(alpha=0.1)) == {"alpha": (0.7, 0.1)}
