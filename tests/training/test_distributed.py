"""Two processes train together as one does alone, and save their model together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attn_kd.cli import main
from attn_kd.training import train_detector

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available(), reason="torch was built without torch.distributed"
    ),
]


def run_in_two(module, *arguments):
    """Run a module in two processes; return what they have printed."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # any free port
    done = subprocess.run(
        [*launch, "-m", module, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    run_in_two("attn_kd", *options, "--batch-size", "2", "--out", str(together))
    courses = [
        [entry["attention_kl"] for entry in json.loads((out / "history.json").read_text())]
        for out in (alone, together)
    ]
    assert courses[0][-1] != pytest.approx(courses[0][0], rel=1e-2)  # it moves
    assert courses[1] == pytest.approx(courses[0], rel=1e-3)


def full_disk(*arguments):
    raise OSError("No space left on device")


def test_trained_model_is_saved_once_all_processes_have_found_the_checkpoint(
    tiny_data, tiny_config, tmp_path, monkeypatch
):
    """Saving the model throws the checkpoints away, from which all see that the run is done."""
    config, out = tiny_config.replace(max_steps=2), tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("attn_kd.training.run.save_detector", full_disk)
        train_detector(config, tiny_data, out, device="cpu")
    printed = run_in_two("tests.training.late_process", str(tiny_data), str(out))
    assert sorted(printed.split("\n")) == ["", "0: step 2", "1: step 2"]
    assert not (out / "checkpoints").exists()
