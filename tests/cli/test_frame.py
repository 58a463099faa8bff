"""What holds for every command: help, and how failures end."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from attn_kd.cli import COMMANDS, main

NAMES = [command.name for command in COMMANDS]

# A complete command line for each command that reads something, with the path to replace.
MISSING_INPUT = {
    "train": "--data {missing} --out {out} --preset detr-tiny",
    "distill": "--teacher {missing} --data {missing} --out {out}",
    "eval": "--model {missing} --data {missing} --split val",
    "predict": "{missing} --model {missing} --out {out}",
}
# A complete command line for each command that writes a folder of its own.
WRITING = {"demo": "--quick --out {out}", "simulate": "--out {out}"}


def run(arguments: list[str]) -> int:
    """Run a command as a process would: argparse leaves by SystemExit, the rest by return."""
    try:
        return main(arguments)
    except SystemExit as leaving:
        return int(leaving.code or 0)


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_overview_names_every_command(capsys):
    assert run(["--help"]) == 0
    overview = capsys.readouterr().out
    assert all(f"  {command.name} " in overview for command in COMMANDS)
    assert all(command.summary in overview for command in COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_help_describes_command_and_common_options(name, capsys):
    assert run([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: attn-kd {name}")
    assert "--seed" in text and "--threads" in text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("option", ["--threads=0", "--seed=-1", "--seed=one", "--no-such-option"])
def test_wrong_option_is_one_line(name, option, capsys):
    assert run([name, option]) == 2
    assert only_line(capsys.readouterr().err).startswith(f"attn-kd {name}: error: ")


def test_unknown_command_suggests_the_nearest(capsys):
    assert run(["tarin"]) == 2
    assert "did you mean 'train'?" in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("name", MISSING_INPUT)
def test_missing_input_is_one_line_that_names_it(name, tmp_path, capsys):
    pytest.importorskip("transformers")
    missing, out = tmp_path / "missing", tmp_path / "out"
    arguments = MISSING_INPUT[name].format(missing=missing, out=out).split()
    assert run([name, *arguments]) == 2
    captured = capsys.readouterr()
    assert str(missing) in only_line(captured.err)
    assert captured.out == ""


@pytest.mark.parametrize("name", WRITING)
def test_unwritable_output_is_one_line_that_names_it(name, tmp_path, capsys):
    pytest.importorskip("transformers")
    obstacle = tmp_path / "file"
    obstacle.touch()
    arguments = WRITING[name].format(out=obstacle / "out").split()
    assert run([name, *arguments]) == 2
    assert str(obstacle) in only_line(capsys.readouterr().err)


@pytest.mark.parametrize("filename", [None, "model.safetensors"])
def test_what_the_system_refuses_is_one_line(filename, monkeypatch, capsys):
    def fill_the_disk(args):
        raise OSError(errno.ENOSPC, "No space left on device", filename)

    monkeypatch.setattr("attn_kd.cli.info.run", fill_the_disk)
    assert run(["info"]) == 2
    line = only_line(capsys.readouterr().err)
    where = f"{filename}: " if filename else ""
    assert line == f"attn-kd info: error: {where}No space left on device"


def test_module_runs_as_program():
    done = subprocess.run(
        [sys.executable, "-m", "attn_kd", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("attn-kd ")


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("transformers", "detr", ["predict", "{folder}", "--model", "x", "--out", "{folder}/out"]),
        ("matplotlib", "report", ["demo", "--quick", "--out", "{folder}/out"]),
    ],
)
def test_missing_package_is_one_line_that_names_the_extra(package, extra, arguments, tmp_path):
    pytest.importorskip("transformers")
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"  # as if it were not installed
        "from attn_kd.cli import main\n"
        f"sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"pip install 'attn_kd[{extra}]'" in only_line(done.stderr)


def test_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m attn_kd info | head -n 1 >/dev/null; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
