"""attn-kd demo --quick: interrupted, resumed, and everything there in the end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from attn_kd.cli import main
from attn_kd.models import load_detector

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A demo that Ctrl-C has stopped when it came to the baseline, and how it ended."""
    out = tmp_path_factory.mktemp("demo") / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "attn_kd", "demo", "--quick", "--quiet", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if "baseline" in line:
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=120)
    return out, process.returncode, error


@pytest.fixture(scope="module")
def finished(interrupted):
    out, _, _ = interrupted
    before = os.stat(out / "teacher" / "model.safetensors").st_mtime_ns
    assert main(["demo", "--quick", "--quiet", "--resume", "--out", str(out)]) == 0
    return out, before


def test_interruption_says_how_to_go_on(interrupted):
    _, code, error = interrupted
    assert code == 130
    assert "--resume" in error.splitlines()[-1]
    assert "Traceback" not in error


def test_resumed_demo_keeps_the_finished_teacher(finished):
    out, before = finished
    assert os.stat(out / "teacher" / "model.safetensors").st_mtime_ns == before


def test_three_models_can_be_loaded(finished):
    out, _ = finished
    layers = [
        load_detector(out / role)[0].config.encoder_layers
        for role in ("teacher", "baseline", "student")
    ]
    assert layers[0] > layers[1] == layers[2] == 1


def test_students_differ_in_alpha_alone(finished):
    out, _ = finished
    baseline, student = (
        json.loads((out / role / "training.json").read_text())["config"]
        for role in ("baseline", "student")
    )
    differing = {name for name in student if student[name] != baseline[name]}
    assert differing == {"alpha"}
    assert (baseline["alpha"], student["alpha"]) == (0.0, 0.7)


def test_results_hold_every_figure(finished):
    out, _ = finished
    document = json.loads((out / "report.json").read_text())
    assert document["quick"] is True
    assert document["attention_memory"]["eager_bytes"] > 0
    for run in document["runs"]:
        assert {"mAP50", "parameters", "macs", "images_per_second"} <= run["metrics"].keys()
        assert (run["attention_kl"] is None) == (run["role"] == "teacher")
        assert all("detection_loss" in entry for entry in run["history"])
    assert (out / "report.html").stat().st_size > 50_000
    assert "Distilled 1/1" in (out / "results.txt").read_text()


def test_other_settings_cannot_be_resumed(finished, capsys):
    out, _ = finished
    assert main(["demo", "--quick", "--seed", "1", "--resume", "--out", str(out)]) == 2
    assert "seed is 1, it was 0" in capsys.readouterr().err


def test_finished_demo_is_not_overwritten_unasked(finished, capsys):
    out, before = finished
    assert main(["demo", "--quick", "--out", str(out)]) == 2
    assert "earlier run" in capsys.readouterr().err
    assert os.stat(out / "teacher" / "model.safetensors").st_mtime_ns == before
