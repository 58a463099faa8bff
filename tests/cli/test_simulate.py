"""attn-kd simulate, from the command line to a data folder."""

from __future__ import annotations

import PIL.Image
import pytest

from attn_kd.cli import main
from attn_kd.data import CocoDetection

SMALL = ["--size", "32", "--frames", "3", "--device", "cpu", "--quiet"]


def test_writes_the_splits_that_have_clips(tmp_path, capsys):
    out = tmp_path / "data"
    counts = ["--train", "5", "--val", "2", "--test", "0"]
    assert main(["simulate", "--out", str(out), *counts, *SMALL]) == 0
    assert len(CocoDetection(out, "train")) == 5
    assert len(CocoDetection(out, "val")) == 2
    assert not (out / "annotations" / "instances_test.json").exists()
    assert "5 train, 2 val clips" in capsys.readouterr().out


def test_writes_a_contact_sheet_alone(tmp_path):
    sheet = tmp_path / "sheet.png"
    assert main(["simulate", "--contact-sheet", str(sheet), *SMALL]) == 0
    with PIL.Image.open(sheet) as image:
        assert image.width == 6 * 32 + 5 * 2
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "--out", id="nothing-to-write"),
        pytest.param(["--out", "{}"], "is not empty", id="not-empty"),
        pytest.param(["--out", "{}/new", "--size", "3"], "size is 3", id="tiny"),
        pytest.param(
            ["--out", "{}/new", "--train", "0", "--val", "0", "--test", "0"], "no split", id="empty"
        ),
        pytest.param(["--contact-sheet", "{}/no/s.png"], "no folder {}/no", id="no-folder"),
        pytest.param(["--contact-sheet", "{}"], "is a folder", id="sheet-a-folder"),
        pytest.param(
            ["--out", "{}/new", "--contact-sheet", "{}/no/s.png"], "no/s.png", id="before-the-data"
        ),
    ],
)
def test_what_is_wrong_ends_in_one_line(tmp_path, capsys, arguments, message):
    (tmp_path / "mine").write_text("")
    options = [argument.format(tmp_path) for argument in arguments]
    assert main(["simulate", *options, "--quiet"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message.format(tmp_path) in lines[0]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
