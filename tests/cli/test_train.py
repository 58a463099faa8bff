"""attn-kd train, from a data folder to a model folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("transformers")

from attn_kd.cli import main
from attn_kd.models import load_detector
from attn_kd.training.records import latest_checkpoint
from tests.tiny_data import write_tiny_data

MODEL = ["--encoder-layers", "1", "--decoder-layers", "1", "--num-queries", "3"]
BRIEF = [*MODEL, "--image-size", "64", "--batch-size", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return str(write_tiny_data(tmp_path_factory.mktemp("data") / "data"))


def train(data, out, *more):
    return main(["train", "--data", data, "--out", str(out), *BRIEF, *more])


def settings(out):
    return json.loads((out / "training.json").read_text())["config"]


def test_writes_a_model_and_says_where(data, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert train(data, out, "--steps", "2", "--pretrain-steps", "1", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("2 steps in ")
    assert captured.out.endswith(f"wrote {out}\n")
    assert captured.err == ""
    assert load_detector(out)[0].config.num_queries == 3


def test_settings_come_from_argument_then_file_then_recipe(data, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"learning_rate": 0.01, "max_steps": 1, "pretrain_backbone_steps": 0}')
    assert train(data, tmp_path / "out", "--config", str(file), "--lr", "0.02", "-q") == 0
    values = settings(tmp_path / "out")
    assert values["learning_rate"] == 0.02  # argument
    assert values["max_steps"] == 1  # file
    assert values["amp"] == "bf16-backbone"  # recipe of the preset


def test_settings_may_be_those_of_another_run(data, tmp_path):
    options = ["--steps", "1", "--pretrain-steps", "0", "-q"]
    assert train(data, tmp_path / "first", *options, "--lr", "0.02") == 0
    record = str(tmp_path / "first" / "training.json")
    assert train(data, tmp_path / "second", "--config", record, "-q", "--seed", "1") == 0
    assert settings(tmp_path / "second") == settings(tmp_path / "first") | {"seed": 1}


@pytest.mark.parametrize(("seed", "expected"), [([], 7), (["--seed", "3"], 3)])
def test_seed_is_a_setting_like_any_other(data, tmp_path, seed, expected):
    file = tmp_path / "settings.json"
    file.write_text('{"seed": 7}')
    options = ["--steps", "1", "--pretrain-steps", "0", "-q", "--config", str(file)]
    assert train(data, tmp_path / "out", *options, *seed) == 0
    assert settings(tmp_path / "out")["seed"] == expected


def test_resuming_with_other_settings_is_refused_by_the_argument(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(data, out, "--steps", "1", "--pretrain-steps", "0", "-q") == 0
    for arguments, message in (
        (["--seed", "5"], "--seed is 5, it was 0"),
        (["--steps", "7"], "--steps is 7, it was 1"),
        (["--no-augment"], "it was begun without --no-augment"),
    ):
        capsys.readouterr()
        assert main(["train", "--data", data, "--out", str(out), "--resume", *arguments]) == 2
        assert f"cannot resume {out}: {message}" in capsys.readouterr().err


def test_help_tells_what_the_recipes_say(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "passes over the training split (default: 50)" in text
    assert "images a step (default: detr-tiny 16, detr-r50 8)" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "detr-tinny"], "did you mean 'detr-tiny'?"),
        (["--lr", "-1"], "expected a number above 0"),
        (["--cache-features"], "freeze_backbone is False"),
        (["--config", "missing.json"], "cannot read missing.json"),
        (["--resume"], "it has no training.json; no training was begun there"),
        (["--freeze-backbone", "--pretrain-steps", "0"], "nothing has trained the backbone"),
    ],
    ids=[
        "preset",
        "learning rate",
        "cache without freezing",
        "no such file",
        "nothing to resume",
        "untrained backbone",
    ],
)
def test_bad_input_is_one_line(data, tmp_path, capsys, arguments, message):
    try:
        code = train(data, tmp_path / "out", "-q", *arguments)
    except SystemExit as stop:  # refused by the parser
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("attn-kd train: error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_missing_data_leaves_nothing_half_written(tmp_path, capsys):
    assert train(str(tmp_path / "nowhere"), tmp_path / "out", "-q") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nowhere" in line
    assert not (tmp_path / "out").exists()


def test_output_that_cannot_be_written_is_refused_before_training(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert train(data, tmp_path / "file" / "out", "-q") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot write to" in line


@pytest.fixture
def start():
    """Starts a program with its stderr piped; kills it at the end if a test has failed before."""
    started = []

    def popen(command):
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        return started[-1]

    yield popen
    for process in started:
        process.kill()


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to another process")
def test_ctrl_c_in_pretraining_ends_at_a_checkpoint(data, start, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "attn_kd", "train", "--data", data, "--out", str(out), *BRIEF]
    command += ["--steps", "1", "--pretrain-steps", "100000", "-q"]
    process = start(command)
    deadline = time.monotonic() + 60
    while not (out / "training.json").exists() and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    time.sleep(0.5)  # into the first steps
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    (line,) = errors.split("\n")[1:-1]
    assert line.endswith("interrupted; a checkpoint is written; --resume goes on from there")
    assert latest_checkpoint(out / "checkpoints" / "pretraining") is not None


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to another process")
def test_ctrl_c_ends_at_a_checkpoint_and_resume_ends_the_training(data, start, tmp_path):
    out = tmp_path / "out"
    options = [*BRIEF, "--steps", "25", "--pretrain-steps", "0", "--save-steps", "1"]
    options += ["--amp", "none"]
    command = [sys.executable, "-m", "attn_kd", "train", "--data", data, "--out", str(out)]
    process = start([*command, *options])
    deadline = time.monotonic() + 60
    while latest_checkpoint(out / "checkpoints") is None and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert "--resume goes on from there" in errors
    assert "Traceback" not in errors
    checkpoint = latest_checkpoint(out / "checkpoints")
    load_detector(checkpoint)

    # With the settings it was begun with, but fewer checkpoints: they take most of the time.
    resume = ["train", "--data", data, "--out", str(out), "--resume", "--save-steps", "100"]
    assert main([*resume, "--device", "cpu", "-q"]) == 0
    assert json.loads((out / "history.json").read_text())[-1]["step"] == 25
    assert not (out / "checkpoints").exists()
