from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from attn_kd.training import (
    CacheOptions,
    TeacherCache,
    TrainingConfig,
    cache_teacher,
    train_detector,
)
from tests.tiny_data import SIDE, write_tiny_data


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_config() -> TrainingConfig:
    """Five steps in two epochs, of a detector with one layer each."""
    return TrainingConfig(
        encoder_layers=1,
        decoder_layers=1,
        num_queries=3,
        image_size=SIDE,
        max_steps=5,
        batch_size=4,
        learning_rate=1e-3,
        warmup=0.0,
        log_steps=1,
    )


@pytest.fixture(scope="session")
def tiny_teacher(tiny_data, tiny_config, tmp_path_factory) -> Path:
    """A model folder; the teacher has two encoder layers, its students one."""
    out = tmp_path_factory.mktemp("teacher") / "teacher"
    train_detector(tiny_config.replace(encoder_layers=2), tiny_data, out, device="cpu")
    return out


@pytest.fixture(scope="session")
def tiny_cache(tiny_data, tiny_teacher, tmp_path_factory) -> TeacherCache:
    """Everything that the teacher makes of the training split, unrounded; three shards."""
    options = CacheOptions(
        layers="all",
        kinds=("encoder_self", "decoder_self", "decoder_cross"),
        dtype="float32",
        images_per_shard=5,
    )
    out = tmp_path_factory.mktemp("cache") / "cache"
    return cache_teacher(tiny_teacher, tiny_data, out, options)
