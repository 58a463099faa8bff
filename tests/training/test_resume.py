"""An interrupted training goes on, and ends where an uninterrupted one does."""

import shutil
import signal

import pytest
from safetensors.torch import load_file
from torch.utils.data import Dataset

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.models import load_detector
from attn_kd.training import (
    TrainingData,
    TrainingInterrupted,
    distill_detector,
    train_detector,
)
from attn_kd.training.records import RunFolder, RunRecord, TeacherIdentity, latest_checkpoint


class PressesCtrlC(Dataset):
    """A validation split that sends this process a SIGINT when it is first read."""

    def __init__(self, dataset):
        self.dataset = dataset
        self.categories = dataset.categories
        self.annotations = dataset.annotations
        self.pressed = False

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        if not self.pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return self.dataset[index]


@pytest.fixture
def interrupted_data(tiny_data):
    """Interrupts the training at its first evaluation; the step after that is finished."""
    val = PressesCtrlC(CocoDetection(tiny_data, "val"))
    return TrainingData(CocoDetection(tiny_data, "train"), val)


@pytest.fixture
def config(tiny_config):
    """Eight steps, three an epoch; interrupted in the second epoch, after step 4."""
    return tiny_config.replace(max_steps=8, eval_steps=3, dropout=0.1)


def interrupt(train, *arguments, out, **options):
    with pytest.raises(TrainingInterrupted):
        train(*arguments, out, device="cpu", **options)
    return latest_checkpoint(out / "checkpoints")


def largest_difference(first, second):
    return max((first[n].float() - second[n].float()).abs().max().item() for n in first)


def test_ctrl_c_leaves_a_loadable_checkpoint(interrupted_data, config, tmp_path):
    checkpoint = interrupt(train_detector, config, interrupted_data, out=tmp_path / "out")
    assert checkpoint.name == "checkpoint-4"
    model, processor = load_detector(checkpoint)
    assert model.config.encoder_layers == 1
    assert dict(processor.size) == {"height": 64, "width": 64}
    assert not (tmp_path / "out" / "config.json").exists()


def test_signal_handler_is_put_back(interrupted_data, config, tmp_path):
    before = signal.getsignal(signal.SIGINT)
    interrupt(train_detector, config, interrupted_data, out=tmp_path / "out")
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("cached", [False, True], ids=["images", "cached features"])
def test_resumed_training_ends_where_an_uninterrupted_one_does(
    tiny_data, interrupted_data, config, tiny_teacher, tmp_path, cached
):
    config = config.replace(freeze_backbone=cached, cache_features=cached)
    whole = distill_detector(config, tiny_teacher, tiny_data, tmp_path / "whole", device="cpu")
    out = tmp_path / "out"
    interrupt(distill_detector, config, tiny_teacher, interrupted_data, out=out)
    resumed = distill_detector(config, tiny_teacher, tiny_data, out, resume=True, device="cpu")
    assert largest_difference(whole.model.state_dict(), resumed.model.state_dict()) < 1e-6
    losses = [[e["loss"] for e in run.history if "loss" in e] for run in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_checkpoint_names_its_teacher(interrupted_data, config, tiny_teacher, tmp_path):
    checkpoint = interrupt(
        distill_detector, config, tiny_teacher, interrupted_data, out=tmp_path / "out"
    )
    record = RunRecord.load(checkpoint / "attn_kd.json")
    assert record.config == config
    assert record.teacher == TeacherIdentity.of(tiny_teacher)
    weights = load_file(checkpoint / "model.safetensors")
    # The teacher has a second encoder layer.
    assert not any(name.startswith("model.encoder.layers.1.") for name in weights)


def test_another_teacher_is_refused(
    tiny_data, interrupted_data, config, tiny_config, tiny_teacher, tmp_path
):
    out = tmp_path / "out"
    interrupt(distill_detector, config, tiny_teacher, interrupted_data, out=out)
    other = train_detector(tiny_config.replace(seed=5), tiny_data, tmp_path / "other", device="cpu")
    with pytest.raises(InputError, match=r"the teacher is .*other .*, it was .*teacher"):
        distill_detector(config, other.folder, tiny_data, out, resume=True, device="cpu")


def test_teacher_may_have_moved(tiny_data, interrupted_data, config, tiny_teacher, tmp_path):
    out = tmp_path / "out"
    interrupt(distill_detector, config, tiny_teacher, interrupted_data, out=out)
    moved = shutil.copytree(tiny_teacher, tmp_path / "moved")
    run = distill_detector(config, moved, tiny_data, out, resume=True, device="cpu")
    assert run.history[-1]["step"] == 8


def test_other_settings_are_refused_by_name(tiny_data, interrupted_data, config, tmp_path):
    out = tmp_path / "out"
    interrupt(train_detector, config, interrupted_data, out=out)
    changed = config.replace(learning_rate=5e-4)
    with pytest.raises(InputError, match=r"learning_rate is 0.0005, it was 0.001"):
        train_detector(changed, tiny_data, out, resume=True, device="cpu")


def test_finished_run_is_returned_as_it_is(tiny_data, tiny_config, tmp_path):
    first = train_detector(tiny_config, tiny_data, tmp_path / "out", device="cpu")
    again = train_detector(tiny_config, tiny_data, tmp_path / "out", resume=True, device="cpu")
    assert again.history == first.history
    assert largest_difference(first.model.state_dict(), again.model.state_dict()) == 0


def test_run_that_had_not_come_to_a_checkpoint_begins_again(tiny_data, tiny_config, tmp_path):
    whole = train_detector(tiny_config, tiny_data, tmp_path / "whole", device="cpu")
    RunFolder(tmp_path / "out").begin(RunRecord(tiny_config), overwrite=False)
    resumed = train_detector(tiny_config, tiny_data, tmp_path / "out", resume=True, device="cpu")
    assert largest_difference(whole.model.state_dict(), resumed.model.state_dict()) == 0


def test_folder_without_a_run_cannot_be_resumed(tiny_data, tiny_config, tmp_path):
    with pytest.raises(InputError, match=r"cannot resume .*: it has no training.json"):
        train_detector(tiny_config, tiny_data, tmp_path, resume=True, device="cpu")


def test_checkpoint_cut_short_does_not_count(interrupted_data, config, tmp_path):
    checkpoint = interrupt(train_detector, config, interrupted_data, out=tmp_path / "out")
    # What a process killed while saving leaves behind.
    (checkpoint.parent / ".saving" / "checkpoint-5").mkdir(parents=True)
    assert latest_checkpoint(checkpoint.parent) == checkpoint
