"""The steps with and without a teacher cache that are timed: they train alike."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from bench.bench_teacher_cache import check
from bench.detr import SETTINGS
from bench.model_tables import CACHED
from bench.rounds import SUBJECT
from bench.teacher_cache import WAYS, make_example, sizes_of, steps_of

SETTING = SETTINGS["detr-tiny-128"]._replace(batch=2)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return make_example(SETTING, tmp_path_factory.mktemp("example"))


@pytest.mark.parametrize("way", WAYS)
def test_steps_with_the_cache_have_the_divergence_of_the_running_teacher(way, example):
    steps = steps_of(way, example)
    first = {name: step() for name, step in steps.items()}
    assert first.keys() == {SUBJECT, CACHED}
    assert first[SUBJECT] > 0
    assert check(first[CACHED], first[SUBJECT])["attention_kl"] < 1e-4


def test_another_divergence_is_seen():
    with pytest.raises(AssertionError, match=r"attention_kl .* is 2\.0e-03 off"):
        check(torch.tensor(1.002), torch.tensor(1.0))


def test_bytes_are_those_of_query_key_and_log_sum_exp(example):
    (layer,) = example.cache.recipe.layers
    tokens = 8 * 8 * layer.heads
    assert sizes_of(example.cache) == {
        "cells": 64,
        "heads": layer.heads,
        "layer_bytes": tokens * (2 * 2 * layer.head_dim + 4),
        "map_bytes": tokens * 64 * 4,
    }
