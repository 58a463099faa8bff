import pytest
import torch

from attn_kd.data import Augmentation, CocoDetection, DetectionCollator
from attn_kd.errors import InputError
from attn_kd.models import build_detr, build_image_processor, freeze_backbone
from attn_kd.training import TrainingConfig
from attn_kd.training.backbone_forward import (
    bf16_backbone,
    computes_bf16,
    feature_maps_as_input,
)
from attn_kd.training.feature_cache import FeatureCollator, cache_features
from attn_kd.training.sources import feature_source


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    # Batch norm of an untrained backbone has statistics to forget.
    model.train()(pixel_values=torch.randn(8, 3, 64, 64))
    freeze_backbone(model)
    return model.eval()


@pytest.fixture(scope="module")
def processor():
    return build_image_processor("detr-tiny", image_size={"height": 64, "width": 64})


@pytest.fixture(scope="module")
def dataset(tiny_data):
    return CocoDetection(tiny_data, "train")


def equal(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def test_loss_and_gradients_are_those_of_the_images(model, processor, dataset):
    collate = DetectionCollator(processor)
    cached = cache_features(model, dataset, [collate], seed=0)
    indices = [0, 3, 5, 7]
    images = collate([dataset[i] for i in indices])
    features = FeatureCollator()([cached[i] for i in indices])
    gradients = []
    for batch in (images, features):
        model.zero_grad()
        with feature_maps_as_input(model):
            loss = model(**batch).loss
        loss.backward()
        named = model.named_parameters()
        gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})
        gradients[-1]["loss"] = loss.detach()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5, msg=name)


def test_padded_image_has_the_mask_of_its_cells(dataset):
    model = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1).eval()
    cached = cache_features(model, dataset, [_padding_collator()], seed=0)
    item = cached[0]
    # 64 x 64 pixels on 64 x 96: at stride 16 the last two of six columns are padding.
    assert item["mask"].shape == (4, 6)
    assert item["mask"][:, :4].all() and not item["mask"][:, 4:].any()


def _padding_collator():
    processor = build_image_processor("detr-tiny", image_size={"height": 64, "width": 64})
    processor.pad_size = {"height": 64, "width": 96}
    return DetectionCollator(processor)


def test_collator_pads_to_the_largest():
    def item(height, width):
        features = torch.ones(2, height, width)
        mask = torch.ones(height, width, dtype=torch.bool)
        return {"features": features, "mask": mask, "labels": {}}

    batch = FeatureCollator()([item(2, 3), item(4, 1)])
    assert batch["pixel_values"].shape == (2, 2, 4, 3)
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [6, 4]
    assert batch["pixel_values"].sum((1, 2, 3)).tolist() == [12, 8]


def test_folder_holds_what_memory_does(model, processor, dataset, tmp_path):
    collators = [DetectionCollator(processor), DetectionCollator(processor, Augmentation())]
    in_memory = cache_features(model, dataset, collators, seed=0)
    on_disk = cache_features(model, dataset, collators, seed=0, folder=tmp_path)
    for index in range(len(dataset)):
        for view in range(2):
            assert equal(in_memory.store.read(index, view), on_disk.store.read(index, view))


def test_other_backbone_has_a_folder_of_its_own(model, processor, dataset, tmp_path):
    collators = [DetectionCollator(processor)]
    other = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1, id2label={0: "needle"})
    first = cache_features(model, dataset, collators, seed=0, folder=tmp_path)
    second = cache_features(other, dataset, collators, seed=0, folder=tmp_path)
    assert first.store.folder != second.store.folder


@pytest.mark.skipif(not computes_bf16("cpu"), reason="this CPU has no bfloat16 instructions")
def test_other_precision_has_a_folder_of_its_own(model, processor, dataset, tmp_path):
    config = TrainingConfig(freeze_backbone=True, cache_features=True, cache_views=1)
    first, second = (
        feature_source(model, dataset, processor, config.replace(amp=amp), folder=tmp_path)
        for amp in ("none", "bf16-backbone")
    )
    assert first.dataset.store.folder != second.dataset.store.folder


def test_interrupted_caching_leaves_no_folder_that_would_be_used(
    model, processor, dataset, tmp_path
):
    def stop(indices):
        yield from list(indices)[:3]
        raise KeyboardInterrupt

    collators = [DetectionCollator(processor)]
    with pytest.raises(KeyboardInterrupt):
        cache_features(model, dataset, collators, seed=0, folder=tmp_path, progress=stop)
    assert not any(tmp_path.iterdir())


def test_views_change_from_epoch_to_epoch_and_come_again(model, processor, dataset):
    collators = [DetectionCollator(processor), DetectionCollator(processor, Augmentation())]
    cached = cache_features(model, dataset, collators, seed=0)

    def epoch(number):
        cached.set_epoch(number)
        return torch.stack([cached[i]["features"] for i in range(len(dataset))])

    first = epoch(0)
    assert not torch.equal(first, epoch(1))
    assert torch.equal(first, epoch(0))


def test_first_view_is_the_image_as_it_is(model, processor, dataset):
    config = TrainingConfig(freeze_backbone=True, cache_features=True, cache_views=2)
    source = feature_source(model, dataset, processor, config)
    batch = DetectionCollator(processor)([dataset[1]])
    with torch.no_grad():
        features, _ = model.model.backbone(batch["pixel_values"], batch["pixel_mask"])[-1]
    store = source.dataset.store
    assert torch.equal(store.read(1, 0)["features"], features[0])
    assert not torch.equal(store.read(1, 1)["features"], features[0])


def test_teacher_of_another_backbone_is_refused(model, processor, dataset):
    teacher = build_detr("detr-tiny", encoder_layers=1, decoder_layers=1)
    config = TrainingConfig(freeze_backbone=True, cache_features=True)
    with pytest.raises(InputError, match="backbone is not the teacher's"):
        feature_source(model, dataset, processor, config, teacher=teacher)


def test_images_still_go_through_the_backbone(model):
    images = torch.randn(2, 3, 64, 64)
    expected = model(pixel_values=images).logits
    with feature_maps_as_input(model):
        assert torch.equal(model(pixel_values=images).logits, expected)


def test_forward_of_the_class_comes_back(model):
    backbone = model.model.backbone
    with pytest.raises(RuntimeError), bf16_backbone(model), feature_maps_as_input(model):
        assert "forward" in vars(backbone)
        raise RuntimeError
    assert "forward" not in vars(backbone)


@pytest.mark.skipif(not computes_bf16("cpu"), reason="this CPU has no bfloat16 instructions")
def test_bf16_backbone_rounds_the_features_and_nothing_else(model):
    images, mask = torch.randn(1, 3, 64, 64), torch.ones(1, 64, 64)
    exact, _ = model.model.backbone(images, mask)[-1]
    with bf16_backbone(model):
        rounded, _ = model.model.backbone(images, mask)[-1]
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)
    # bfloat16 has 8 bits; a handful of layers add up to a few per cent of the largest value.
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()
