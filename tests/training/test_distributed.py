"""Two processes that share a batch train as one process does with all of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

from attn_kd.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch was built without torch.distributed"
    ),
]


@pytest.mark.parametrize("cached", [False, True], ids=["live teacher", "teacher cache"])
def test_two_processes_follow_the_course_of_one(
    tiny_data, tiny_teacher, tiny_cache, tmp_path, cached
):
    # With alpha 1 the loss is the divergence, a mean over images; DETR's own loss is normalised by
    # the boxes of each process's share.
    options = ["distill", "--data", str(tiny_data), "-q"]
    if cached:
        options += ["--teacher-cache", str(tiny_cache.folder), "--no-augment"]
    else:
        options += ["--teacher", str(tiny_teacher)]
    options += ["--steps", "4", "--log-steps", "1", "--alpha", "1", "--lr", "1e-3"]
    options += ["--amp", "none", "--freeze-backbone", "--device", "cpu"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main([*options, "--batch-size", "4", "--out", str(alone)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "-m", "attn_kd"]
    subprocess.run(
        [*launch, *options, "--batch-size", "2", "--out", str(together)],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    courses = [
        [entry["attention_kl"] for entry in json.loads((out / "history.json").read_text())]
        for out in (alone, together)
    ]
    assert courses[0][-1] != pytest.approx(courses[0][0], rel=1e-2)  # it moves
    assert courses[1] == pytest.approx(courses[0], rel=1e-3)
