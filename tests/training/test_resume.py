"""An interrupted training goes on, and ends where an uninterrupted one does."""

import errno
import multiprocessing
import os
import shutil
import signal

import pytest
from safetensors.torch import load_file

from attn_kd.data import CocoDetection
from attn_kd.errors import InputError
from attn_kd.models import load_detector
from attn_kd.training import (
    TrainingConfig,
    TrainingData,
    TrainingInterrupted,
    distill_detector,
    train_detector,
)
from attn_kd.training.records import (
    RunFolder,
    RunRecord,
    TeacherIdentity,
    latest_checkpoint,
    write_json,
)
from tests.tiny_data import write_tiny_data


class PressesCtrlC(CocoDetection):
    """A split that sends this process a SIGINT when it is read for the n-th time."""

    def __init__(self, root, split, *, at=1):
        super().__init__(root, split)
        self.reads_left = at

    def __getitem__(self, index):
        self.reads_left -= 1
        if self.reads_left == 0:
            signal.raise_signal(signal.SIGINT)
        return super().__getitem__(index)


@pytest.fixture
def interrupted_data(tiny_data):
    """Interrupts the training at its first evaluation; the step after that is finished."""
    return TrainingData(CocoDetection(tiny_data, "train"), PressesCtrlC(tiny_data, "val"))


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


TEACHER = {"folder": "models/teacher", "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": []}, r"config is \[\]; expected a mapping"),
        ({"config": "x"}, r"config is 'x'; expected a mapping"),
        ({"config": {"alpha": "much"}}, r"alpha is 'much'; expected float"),
        ({"teacher": [1]}, r"teacher is \[1\]; expected null or an object of two strings"),
        ({"teacher": "models/teacher"}, r"teacher is 'models/teacher'; expected null or"),
        ({"teacher": {**TEACHER, "folder": 3}}, r"teacher is \{'folder': 3.*; expected null or"),
        ({"teacher": {**TEACHER, "sha256": None}}, r"teacher is .*None\}; expected null or"),
        ({"teacher": {"folder": "models/teacher"}}, r"teacher is .*; expected null or"),
        ({"teacher_cache": {**TEACHER, "more": ""}}, r"teacher_cache is .*; expected null or"),
        ({"data": 7}, r"data is 7; expected a string or null"),
    ],
)
def test_record_with_a_value_of_another_kind_is_refused_with_its_file(tmp_path, changes, message):
    path = tmp_path / "training.json"
    write_json(path, {**RunRecord(TrainingConfig()).to_dict(), "teacher": TEACHER})
    assert RunRecord.load(path).teacher == TeacherIdentity(**TEACHER)
    write_json(path, {**RunRecord(TrainingConfig()).to_dict(), **changes})
    with pytest.raises(InputError, match=rf"{path}: {message}"):
        RunRecord.load(path)


@pytest.mark.parametrize("name", ["config", "teacher"])
def test_record_that_lacks_a_value_is_refused(tmp_path, name):
    path = tmp_path / "training.json"
    values = RunRecord(TrainingConfig()).to_dict()
    write_json(path, {key: value for key, value in values.items() if key != name})
    with pytest.raises(InputError, match=rf"{path} is no record .*: it has no '{name}'"):
        RunRecord.load(path)


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


@pytest.fixture(scope="module")
def interrupted_run(tiny_data, tiny_config, tmp_path_factory):
    out = tmp_path_factory.mktemp("interrupted") / "out"
    data = TrainingData(CocoDetection(tiny_data, "train"), PressesCtrlC(tiny_data, "val"))
    interrupt(train_detector, tiny_config.replace(eval_steps=1), data, out=out)
    return out


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"]
)
def test_broken_file_of_a_checkpoint_is_named(
    tiny_data, tiny_config, interrupted_run, tmp_path, name
):
    out = shutil.copytree(interrupted_run, tmp_path / "out")
    file = latest_checkpoint(out / "checkpoints") / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot (resume|load)"):
        train_detector(tiny_config, tiny_data, out, resume=True, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", '{"global_step": 2, "foreign": 1}'])
def test_broken_state_of_a_checkpoint_is_named(
    tiny_data, tiny_config, interrupted_run, tmp_path, text
):
    out = shutil.copytree(interrupted_run, tmp_path / "out")
    (latest_checkpoint(out / "checkpoints") / "trainer_state.json").write_text(text)
    with pytest.raises(InputError, match=r"trainer_state\.json"):
        train_detector(tiny_config, tiny_data, out, resume=True, device="cpu")


def test_checkpoint_without_its_optimizer_is_refused(
    tiny_data, tiny_config, interrupted_run, tmp_path
):
    out = shutil.copytree(interrupted_run, tmp_path / "out")
    (latest_checkpoint(out / "checkpoints") / "optimizer.pt").unlink()
    with pytest.raises(InputError, match=r"it has no optimizer\.pt"):
        train_detector(tiny_config, tiny_data, out, resume=True, device="cpu")


def test_other_data_is_refused(tiny_config, interrupted_run, tmp_path):
    other = write_tiny_data(tmp_path / "other", seed=1)  # as many images, of the same names
    with pytest.raises(InputError, match="the training data has other images"):
        train_detector(tiny_config, other, interrupted_run, resume=True, device="cpu")


def test_data_may_have_moved(tiny_data, tiny_config, interrupted_run, tmp_path):
    out = shutil.copytree(interrupted_run, tmp_path / "out")
    moved = shutil.copytree(tiny_data, tmp_path / "moved")
    run = train_detector(tiny_config, moved, out, resume=True, device="cpu")
    assert run.history[-1]["step"] == tiny_config.max_steps


def test_ctrl_c_after_the_last_step_finds_the_training_complete(tiny_data, tiny_config, tmp_path):
    config = tiny_config.replace(max_steps=4, eval_steps=4)  # inside the second epoch
    whole = train_detector(config, tiny_data, tmp_path / "whole", device="cpu")
    data = TrainingData(CocoDetection(tiny_data, "train"), PressesCtrlC(tiny_data, "val"))
    out = tmp_path / "out"
    with pytest.raises(TrainingInterrupted, match="the model is saved"):
        train_detector(config, data, out, device="cpu")
    again = train_detector(config, tiny_data, out, resume=True, device="cpu")
    assert largest_difference(whole.model.state_dict(), again.model.state_dict()) == 0
    assert again.history[-1]["step"] == 4


def disk_is_full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_run_whose_last_step_is_done_is_not_trained_further(
    tiny_data, tiny_config, tmp_path, monkeypatch
):
    config = tiny_config.replace(max_steps=4)
    whole = train_detector(config, tiny_data, tmp_path / "whole", device="cpu")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("attn_kd.training.run.save_detector", disk_is_full)
        train_detector(config, tiny_data, tmp_path / "out", device="cpu")
    resumed = train_detector(config, tiny_data, tmp_path / "out", resume=True, device="cpu")
    assert largest_difference(whole.model.state_dict(), resumed.model.state_dict()) == 0
    assert [entry["step"] for entry in resumed.history] == [1, 2, 3, 4]


@pytest.fixture(scope="module")
def pretrained_config(tiny_config):
    """Three steps of pretraining, in each of which four images are read; then cached features."""
    return tiny_config.replace(
        pretrain_backbone_steps=3, freeze_backbone=True, cache_features=True, save_steps=1
    )


def train_and_count(config, root, out, **options):
    """A training's run, and how many images it has read."""
    train = PressesCtrlC(root, "train", at=0)
    run = train_detector(config, TrainingData(train), out, device="cpu", **options)
    return run, -train.reads_left


@pytest.fixture(scope="module")
def whole(pretrained_config, tiny_data, tmp_path_factory):
    """The uninterrupted training."""
    out = tmp_path_factory.mktemp("whole") / "out"
    return train_and_count(pretrained_config, tiny_data, out)


@pytest.fixture
def goes_on(whole, pretrained_config, tiny_data):
    """Resumes a training, which must end as the uninterrupted one, and counts what it spares."""

    def resume(out):
        run, read = train_and_count(pretrained_config, tiny_data, out, resume=True)
        expected, all_read = whole
        assert largest_difference(expected.model.state_dict(), run.model.state_dict()) < 1e-6
        return all_read - read

    return resume


def test_ctrl_c_in_pretraining_ends_at_a_checkpoint_of_it(
    tiny_data, pretrained_config, goes_on, tmp_path
):
    data = TrainingData(PressesCtrlC(tiny_data, "train", at=3))
    out = tmp_path / "out"
    with pytest.raises(TrainingInterrupted, match="a checkpoint is written; --resume goes on"):
        train_detector(pretrained_config, data, out, device="cpu")
    assert goes_on(out) > 0


class KillsItsProcess(CocoDetection):
    """A split that kills the process when it is read for the n-th time."""

    reads_left = 10

    def __getitem__(self, index):
        self.reads_left -= 1
        if self.reads_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def train_until_killed(config, root, out):
    train_detector(config, TrainingData(KillsItsProcess(root, "train")), out, device="cpu")


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
def test_killed_pretraining_goes_on_from_its_last_checkpoint(
    tiny_data, pretrained_config, goes_on, tmp_path
):
    out = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(
        target=train_until_killed, args=(pretrained_config, tiny_data, out)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert latest_checkpoint(out / "checkpoints" / "pretraining").name == "checkpoint-1"
    assert goes_on(out) == 4


def test_pretraining_whose_last_step_is_done_is_not_trained_further(
    tiny_data, pretrained_config, goes_on, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("attn_kd.training.run.save_detector", disk_is_full)
        train_detector(pretrained_config, tiny_data, out, device="cpu")
    assert goes_on(out) == 12


def test_ctrl_c_before_the_first_checkpoint_begins_caching_again(
    tiny_data, pretrained_config, goes_on, tmp_path
):
    # Every image is read once in pretraining, then once to be cached.
    data = TrainingData(PressesCtrlC(tiny_data, "train", at=20))
    out = tmp_path / "out"
    with pytest.raises(TrainingInterrupted, match="--resume begins the caching of features again"):
        train_detector(pretrained_config, data, out, device="cpu")
    assert goes_on(out) == 12
