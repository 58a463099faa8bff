import pytest
import torch

from attn_kd.models import build_detr
from attn_kd.training.pretrain import DenseObjectness, cell_targets, generalized_iou


def objects(*boxes, classes=None):
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "class_labels": torch.tensor(classes or [0] * len(boxes), dtype=torch.int64),
    }


def targets_of(*boxes, classes=None, size=8, num_labels=2):
    inside = torch.ones(1, size, size, dtype=torch.bool)
    targets = cell_targets(inside, [objects(*boxes, classes=classes)], num_labels)
    return targets.classes[0], targets.boxes[0]


def test_inner_half_of_a_box_is_central_in_it():
    # Sides at 1/4 and 3/4 of 8 cells; half way from centre to side: cells 3 and 4, whose centres
    # lie 1/16 from the middle; cells 2 and 5 lie 3/16 away, beyond 1/8.
    classes, boxes = targets_of([0.5, 0.5, 0.5, 0.5], classes=[1])
    expected = torch.full((8, 8), 2)
    expected[3:5, 3:5] = 1
    assert torch.equal(classes, expected)
    assert torch.equal(boxes[3, 4], torch.tensor([0.5, 0.5, 0.5, 0.5]))


def test_small_object_has_the_cell_nearest_to_its_centre():
    classes, boxes = targets_of([0.30, 0.70, 0.01, 0.01])  # in column 2, row 5 of 8
    assert classes[5, 2] == 0
    assert (classes < 2).sum() == 1
    assert boxes[5, 2, 2] == pytest.approx(0.01)


def test_cell_belongs_to_the_object_it_is_most_central_in():
    classes, _ = targets_of([0.5, 0.5, 1.0, 1.0], [0.25, 0.25, 0.25, 0.25], classes=[0, 1])
    # Cell (2, 2) has its centre at 5/16: 3/8 of the way to the large box's side, 1/2 to the small.
    assert classes[2, 2] == 0
    # Cell (1, 1), at 3/16: 5/8 to the large box's side, 1/2 to the small one's.
    assert classes[1, 1] == 1


def test_image_without_objects_has_none():
    classes, _ = targets_of()
    assert (classes == 2).all()


def test_coordinates_are_shares_of_the_image_without_its_padding():
    # An image on the left half of the map: its middle is column 2 of 8.
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[:, :, :4] = True
    targets = cell_targets(inside, [objects([0.5, 0.5, 0.2, 0.2])], 1)
    rows, columns = (targets.classes[0] == 0).nonzero(as_tuple=True)
    assert set(columns.tolist()) <= {1, 2}
    assert set(rows.tolist()) <= {3, 4}


def test_generalized_iou_of_known_boxes():
    box = torch.tensor([[0.25, 0.25, 0.5, 0.5]] * 3)
    others = torch.tensor(
        [
            [0.25, 0.25, 0.5, 0.5],  # the same
            [0.5, 0.25, 0.5, 0.5],  # half over: IoU 1/3, hull filled by the union
            [0.75, 0.75, 0.5, 0.5],  # corner to corner: IoU 0, half of the hull empty
        ]
    )
    assert generalized_iou(box, others) == pytest.approx([1.0, 1 / 3, -0.5])


def test_equals_transformers_giou():
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    centres, sizes = torch.rand(2, 20, 2), 0.1 + torch.rand(2, 20, 2)
    boxes, others = torch.cat([centres, sizes], -1)
    corners = [
        torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in (boxes, others)
    ]
    expected = generalized_box_iou(*corners).diagonal()
    torch.testing.assert_close(generalized_iou(boxes, others), expected)


@pytest.fixture
def dense():
    return DenseObjectness(build_detr("detr-tiny", encoder_layers=1, decoder_layers=1))


def batch(labels, size=64):
    return {
        "pixel_values": torch.randn(len(labels), 3, size, size),
        "pixel_mask": torch.ones(len(labels), size, size, dtype=torch.int64),
        "labels": labels,
    }


def test_gradient_reaches_the_whole_backbone(dense):
    dense(**batch([objects([0.5, 0.5, 0.4, 0.4]), objects()])).loss.backward()
    for name, parameter in dense.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_batch_without_any_object_has_a_finite_loss(dense):
    output = dense(**batch([objects(), objects()]))
    output.loss.backward()
    assert output.loss.isfinite()
    assert output.box_loss == 0


def test_learns_where_one_object_is(dense):
    one = batch([objects([0.3, 0.6, 0.4, 0.4])])
    optimizer = torch.optim.AdamW(dense.parameters(), lr=2e-3)
    losses = []
    for _ in range(30):
        loss = dense(**one).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 * losses[0]


def test_padding_does_not_enter_the_loss(dense):
    dense.eval()
    labels = [objects([0.5, 0.5, 0.4, 0.4])]
    padded = batch(labels)
    padded["pixel_mask"][:, :, 32:] = 0
    loss = dense(**padded).loss
    # Whatever the head says about cells that are padding.
    original = dense.head.forward

    def other_padding(features):
        predicted = original(features).clone()
        predicted[..., 2:] += 10.0  # the last two of four columns
        return predicted

    dense.head.forward = other_padding
    assert dense(**padded).loss == loss
