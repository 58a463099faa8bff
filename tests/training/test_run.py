import json

import pytest
import torch

from attn_kd.errors import InputError
from attn_kd.models import load_detector
from attn_kd.training import TrainingConfig, TrainingData, distill_detector, train_detector
from tests.tiny_data import write_tiny_data


def weights(folder):
    return load_detector(folder)[0].state_dict()


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def backbone(state):
    return {name: tensor for name, tensor in state.items() if ".backbone." in name}


def test_train_leaves_a_model_folder_with_its_settings_and_history(
    tiny_data, tiny_config, tmp_path
):
    run = train_detector(tiny_config, tiny_data, tmp_path / "out", device="cpu")
    assert {path.name for path in run.folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "training.json",
        "history.json",
    }
    record = json.loads((run.folder / "training.json").read_text())
    assert TrainingConfig.from_dict(record["config"]) == tiny_config
    assert record["teacher"] is None
    assert same(weights(run.folder), run.model.state_dict())
    assert run.model.config.id2label == {0: "needle"}


def test_plain_history_has_one_entry_a_step(tiny_data, tiny_config, tmp_path):
    history = train_detector(tiny_config, tiny_data, tmp_path / "out", device="cpu").history
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5]
    for entry in history:
        assert entry["detection_loss"] == pytest.approx(entry["loss"])
        assert "attention_kl" not in entry
    # 12 pictures in batches of 4: three steps are an epoch.
    assert history[2]["epoch"] == pytest.approx(1.0)


def test_same_seed_gives_the_same_weights(tiny_data, tiny_config, tmp_path):
    first = train_detector(tiny_config, tiny_data, tmp_path / "a", device="cpu")
    second = train_detector(tiny_config, tiny_data, tmp_path / "b", device="cpu")
    other = train_detector(tiny_config.replace(seed=1), tiny_data, tmp_path / "c", device="cpu")
    assert same(first.model.state_dict(), second.model.state_dict())
    assert not same(first.model.state_dict(), other.model.state_dict())


def test_distilled_student_mixes_the_losses_by_alpha(
    tiny_data, tiny_config, tiny_teacher, tmp_path
):
    run = distill_detector(tiny_config, tiny_teacher, tiny_data, tmp_path / "out", device="cpu")
    for entry in run.history:
        assert entry["attention_kl"] > 0
        mixed = 0.3 * entry["detection_loss"] + 0.7 * entry["attention_kl"]
        assert entry["loss"] == pytest.approx(mixed, rel=1e-5)


def test_baseline_measures_the_divergence_it_does_not_learn_from(
    tiny_data, tiny_config, tiny_teacher, tmp_path
):
    config = tiny_config.replace(alpha=0.0)
    run = distill_detector(config, tiny_teacher, tiny_data, tmp_path / "baseline", device="cpu")
    for entry in run.history:
        assert entry["attention_kl"] > 0
        assert entry["loss"] == pytest.approx(entry["detection_loss"])


def test_distillation_brings_the_attention_closer_than_the_baseline(
    tiny_data, tiny_config, tiny_teacher, tmp_path
):
    # With the whole loss on the divergence forty steps are plenty.
    config = tiny_config.replace(max_steps=40, freeze_backbone=True, cache_features=True)
    final = {
        alpha: distill_detector(
            config.replace(alpha=alpha),
            tiny_teacher,
            tiny_data,
            tmp_path / str(alpha),
            device="cpu",
        ).history[-1]["attention_kl"]
        for alpha in (0.0, 1.0)
    }
    assert final[1.0] < 0.5 * final[0.0]


def test_class_term_is_logged_when_it_has_weight(tiny_data, tiny_config, tiny_teacher, tmp_path):
    config = tiny_config.replace(class_weight=0.5, temperature=2.0)
    run = distill_detector(config, tiny_teacher, tiny_data, tmp_path / "out", device="cpu")
    for entry in run.history:
        kl = entry["attention_kl"] + 0.5 * 2.0**2 * entry["class_kl"]
        assert entry["loss"] == pytest.approx(0.3 * entry["detection_loss"] + 0.7 * kl, rel=1e-5)


def test_frozen_backbone_stays_that_of_the_teacher(tiny_data, tiny_config, tiny_teacher, tmp_path):
    config = tiny_config.replace(freeze_backbone=True)
    run = distill_detector(config, tiny_teacher, tiny_data, tmp_path / "out", device="cpu")
    assert same(backbone(run.model.state_dict()), backbone(weights(tiny_teacher)))


def test_pretraining_changes_the_backbone_that_is_then_frozen(tiny_data, tiny_config, tmp_path):
    config = tiny_config.replace(freeze_backbone=True, pretrain_backbone_steps=2)
    two = train_detector(config, tiny_data, tmp_path / "two", device="cpu")
    three = train_detector(
        config.replace(pretrain_backbone_steps=3), tiny_data, tmp_path / "three", device="cpu"
    )
    assert not same(backbone(two.model.state_dict()), backbone(three.model.state_dict()))


def test_freezing_an_untrained_backbone_is_refused(tiny_data, tiny_config, tmp_path):
    with pytest.raises(InputError, match="nothing has trained the backbone"):
        train_detector(tiny_config.replace(freeze_backbone=True), tiny_data, tmp_path / "out")


def test_evaluation_during_training_is_in_the_history(tiny_data, tiny_config, tmp_path):
    config = tiny_config.replace(eval_steps=2)
    run = train_detector(config, tiny_data, tmp_path / "out", device="cpu")
    measured = [entry["step"] for entry in run.history if "eval_mAP50" in entry]
    assert measured == [2, 4, 5]  # and at the end


def test_data_without_a_validation_split_trains(tiny_config, tmp_path):
    data = write_tiny_data(tmp_path / "data")
    (data / "annotations" / "instances_val.json").unlink()
    config = tiny_config.replace(eval_steps=2)
    with pytest.warns(UserWarning, match="eval_steps is 2 but the data has no validation split"):
        assert train_detector(config, data, tmp_path / "out", device="cpu").history


def test_bf16_trains_to_finite_weights(tiny_data, tiny_config, tiny_teacher, tmp_path):
    config = tiny_config.replace(amp="bf16")
    run = distill_detector(config, tiny_teacher, tiny_data, tmp_path / "out", device="cpu")
    assert all(torch.isfinite(tensor).all() for tensor in run.model.state_dict().values())


def test_tensorboard_gets_the_curves(tiny_data, tiny_config, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config.replace(tensorboard=True)
    train_detector(config, tiny_data, tmp_path / "out", device="cpu")
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    assert len(events.Scalars("train/detection_loss")) == tiny_config.max_steps


@pytest.mark.parametrize(
    ("existing", "ways"),
    [
        ("config.json", "a model; expected --overwrite to replace it, or another folder"),
        ("training.json", "a training run; expected --resume to go on with it, --overwrite"),
    ],
)
def test_folder_with_a_run_is_not_overwritten_unasked(
    tiny_data, tiny_config, tmp_path, existing, ways
):
    (tmp_path / existing).write_text("{}")
    with pytest.raises(InputError, match=f"already holds {ways}"):
        train_detector(tiny_config, tiny_data, tmp_path, device="cpu")
    assert (tmp_path / existing).read_text() == "{}"


def test_overwriting_starts_anew(tiny_data, tiny_config, tiny_teacher, tmp_path):
    first = train_detector(tiny_config, tiny_data, tmp_path / "out", device="cpu")
    config = tiny_config.replace(seed=1)
    second = train_detector(config, tiny_data, tmp_path / "out", overwrite=True, device="cpu")
    assert not same(first.model.state_dict(), second.model.state_dict())
    assert second.config == config


@pytest.fixture
def data_with_a_broken_image(tmp_path):
    data = write_tiny_data(tmp_path / "broken data")
    file = data / "images" / "train_007.png"
    file.write_bytes(file.read_bytes()[:200])
    return data


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "detr-tinny"}, "did you mean 'detr-tiny'"),
        ({"freeze_backbone": True, "teacher_backbone": False}, "nothing has trained the backbone"),
        ({"preset": "detr-r50"}, "backbone"),
        ({"image_size": 96}, "image_size is 96, the teacher's is height 64, width 64"),
        ({"num_queries": 4, "class_weight": 0.5}, "compares object query with object query"),
    ],
    ids=["preset", "untrained backbone", "other backbone", "image size", "class term"],
)
def test_refused_settings_leave_no_folder(
    tiny_data, tiny_config, tiny_teacher, tmp_path, changes, message
):
    config = tiny_config.replace(**changes)
    with pytest.raises(InputError, match=message):
        distill_detector(config, tiny_teacher, tiny_data, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_class_term_needs_the_classes_of_the_teacher(tiny_config, tiny_teacher, tmp_path):
    data = write_tiny_data(tmp_path / "data")
    for file in (data / "annotations").iterdir():
        file.write_text(file.read_text().replace('"needle"', '"nerve"'))
    config = tiny_config.replace(class_weight=0.5)
    with pytest.raises(InputError, match="the teacher detects needle and the data has nerve"):
        distill_detector(config, tiny_teacher, data, tmp_path / "out", device="cpu")


def test_image_found_broken_in_training_leaves_no_folder(
    data_with_a_broken_image, tiny_config, tmp_path
):
    with pytest.raises(InputError, match="train_007"):
        train_detector(tiny_config, data_with_a_broken_image, tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flaw", ["settings", "data"])
def test_overwriting_by_what_is_refused_keeps_the_model(
    tiny_data, data_with_a_broken_image, tiny_config, tmp_path, flaw
):
    out = tmp_path / "out"
    train_detector(tiny_config, tiny_data, out, device="cpu")
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    config = tiny_config.replace(preset="detr-tinny") if flaw == "settings" else tiny_config
    data = data_with_a_broken_image if flaw == "data" else tiny_data
    with pytest.raises(InputError):
        train_detector(config, data, out, overwrite=True, device="cpu")
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_error_of_a_loading_process_is_its_message_alone(
    data_with_a_broken_image, tiny_config, tmp_path
):
    config = tiny_config.replace(num_workers=1)
    with pytest.raises(InputError) as caught:
        train_detector(config, data_with_a_broken_image, tmp_path / "out", device="cpu")
    assert "train_007" in str(caught.value)
    assert "Traceback" not in str(caught.value)


def test_loss_that_is_no_longer_finite_stops_the_training(tiny_data, tiny_config, tmp_path):
    config = tiny_config.replace(learning_rate=1e30, max_grad_norm=1e30)
    with pytest.raises(InputError, match="learning_rate below 1e"):
        train_detector(config, tiny_data, tmp_path / "out", device="cpu")


def test_nothing_is_printed(tiny_data, tiny_config, tmp_path, capfd):
    train_detector(tiny_config, tiny_data, tmp_path / "out", device="cpu")
    assert capfd.readouterr().out == ""


def test_stream_of_simulated_frames_trains_for_so_many_steps(tiny_config, tmp_path):
    from attn_kd.data.needle import NeedleStream

    data = TrainingData(NeedleStream(seed=0))
    run = train_detector(tiny_config, data, tmp_path / "out", device="cpu")
    assert run.history[-1]["step"] == tiny_config.max_steps
    assert run.model.config.id2label == {0: "needle"}


def test_stream_has_no_epochs(tiny_config, tmp_path):
    from attn_kd.data.needle import NeedleStream

    with pytest.raises(InputError, match="a stream has no epochs"):
        train_detector(
            tiny_config.replace(max_steps=None),
            TrainingData(NeedleStream(seed=0)),
            tmp_path / "out",
            device="cpu",
        )
