import copy

import pytest
import torch

from attn_kd.data import CocoDetection, DetectionCollator
from attn_kd.errors import InputError
from attn_kd.models import (
    build_detr,
    build_image_processor,
    freeze_backbone,
    load_backbone_weights,
)
from attn_kd.training import DistillationTrainer, TrainingConfig
from attn_kd.training.arguments import training_arguments
from attn_kd.training.backbone_forward import feature_maps_as_input


def detector(layers):
    return build_detr("detr-tiny", encoder_layers=layers, decoder_layers=1, id2label={0: "needle"})


@pytest.fixture
def trainer(tiny_data, tiny_config, tmp_path):
    """Makes trainers of a student with one layer, with what the test asks for."""

    def make(student=None, config=tiny_config, **options):
        processor = build_image_processor("detr-tiny", image_size={"height": 64, "width": 64})
        return DistillationTrainer(
            model=student or detector(1),
            args=training_arguments(config, tmp_path, "cpu", max_steps=2),
            train_dataset=CocoDetection(tiny_data, "train"),
            data_collator=DetectionCollator(processor),
            processing_class=processor,
            **options,
        )

    return make


def rates(trainer):
    """Learning rate and weight decay of each parameter that learns, by name."""
    group_of = {
        id(parameter): (group["lr"], group["weight_decay"])
        for group in trainer.create_optimizer().param_groups
        for parameter in group["params"]
    }
    named = trainer.model.named_parameters()
    return {name: group_of[id(p)] for name, p in named if id(p) in group_of}


def test_backbone_learns_at_its_own_rate(trainer):
    learned = rates(trainer(backbone_learning_rate=1e-5))
    assert learned.keys() == dict(detector(1).named_parameters()).keys()
    for name, (rate, _) in learned.items():
        assert rate == (1e-5 if ".backbone." in name else 1e-3), name


def test_norms_and_biases_are_not_decayed(trainer):
    learned = rates(trainer())
    assert learned["model.encoder.layers.0.self_attn.q_proj.weight"][1] == 1e-4
    assert learned["model.encoder.layers.0.self_attn.q_proj.bias"][1] == 0
    assert learned["model.encoder.layers.0.self_attn_layer_norm.weight"][1] == 0


def test_frozen_backbone_is_not_given_to_the_optimiser(trainer):
    student = detector(1)
    freeze_backbone(student)
    assert not any(".backbone." in name for name in rates(trainer(student)))


def test_teacher_is_left_as_it_was(trainer):
    teacher = detector(2).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer(teacher=teacher, alpha=0.7).train()
    after = teacher.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert teacher.config._attn_implementation == detector(2).config._attn_implementation


def test_layers_may_be_chosen(trainer):
    """The first layer of the teacher instead of its last: another divergence."""
    torch.manual_seed(0)
    teacher, student = detector(2), detector(1)
    path = "model.encoder.layers.{}.self_attn"
    measured = []
    for number in (0, 1):
        run = trainer(
            student,
            TrainingConfig(batch_size=4, learning_rate=1e-12, warmup=0.0, log_steps=1),
            teacher=teacher,
            distiller_options={"layers": {path.format(0): path.format(number)}},
            alpha=1.0,
        )
        run.train()
        measured.append(run.state.log_history[0]["attention_kl"])
    assert measured[0] != pytest.approx(measured[1], rel=1e-3)


def test_sharing_the_backbone_changes_no_loss(trainer):
    teacher, student = detector(2), detector(1)
    load_backbone_weights(student, teacher)
    freeze_backbone(teacher)
    freeze_backbone(student)
    logged = {}
    for share in (False, True):
        torch.manual_seed(0)
        run = trainer(copy.deepcopy(student), teacher=teacher, share_backbone=share)
        with feature_maps_as_input(run.model, teacher):
            run.train()
        logged[share] = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged[True] == pytest.approx(logged[False], rel=1e-5)


def test_public_resume_restores_weights_that_saving_renames(trainer, tmp_path):
    first = trainer()
    first.train()
    again = trainer()
    again._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    restored = again.model.state_dict()
    for name, tensor in first.model.state_dict().items():
        # How many batches a norm has seen is not kept, nor used: statistics have a fixed momentum.
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(restored[name], tensor), name


def test_only_the_last_checkpoint_is_kept(trainer, tmp_path, tiny_config):
    trainer(config=tiny_config.replace(save_steps=1)).train()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert (tmp_path / "checkpoint-2" / "attn_kd.json").is_file()


def test_weights_that_are_not_finite_do_not_replace_a_checkpoint(trainer, tmp_path, tiny_config):
    trained = trainer(config=tiny_config.replace(save_steps=1))
    trained.train()
    before = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    trained.model.bbox_predictor.layers[0].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="diverged by step 2"):
        trained._save_checkpoint(trained.model, None)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes() == before


def test_evaluation_needs_something_that_evaluates(trainer):
    with pytest.raises(ValueError, match="evaluate_detector"):
        trainer().evaluate()
