"""NeedleStream and SimulatedFrames: simulated frames as data sets."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from torch.utils.data import DataLoader

from attn_kd.data.needle import NeedleSettings, NeedleStream, SimulatedFrames
from attn_kd.errors import InputError

SMALL = NeedleSettings(size=32, frames=4)


def ids(stream, **options) -> list[int]:
    loader = DataLoader(stream, batch_size=None, **options)
    return [item["image_id"] for item in loader]


def test_items_are_those_of_a_coco_data_set():
    item = next(iter(NeedleStream(settings=NeedleSettings(size=32, needle_fraction=1.0))))
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.uint8
    assert item["target"]["boxes"].shape == (1, 4)
    assert item["target"]["class_labels"].tolist() == [0]
    assert isinstance(item["short_insertion"], bool)


def test_a_stream_ends_after_num_frames():
    assert ids(NeedleStream(num_frames=10, settings=SMALL, chunk=4)) == list(range(10))


def test_a_stream_without_a_length_goes_on():
    stream = NeedleStream(settings=SMALL, chunk=4)
    assert [item["image_id"] for item in islice(stream, 50)] == list(range(50))


def test_workers_share_the_clips():
    stream = NeedleStream(num_frames=21, settings=SMALL, chunk=4)
    assert sorted(ids(stream, num_workers=2)) == list(range(21))


def test_a_stream_resumes_where_another_ended():
    whole = list(NeedleStream(3, 12, settings=SMALL, chunk=5))
    rest = list(NeedleStream(3, 5, first_clip=7, settings=SMALL, chunk=5))
    for expected, item in zip(whole[7:], rest, strict=True):
        assert item["image_id"] == expected["image_id"]
        assert (item["image"].int() - expected["image"].int()).abs().max() <= 1


@pytest.mark.gpu
def test_frames_simulated_on_a_gpu_are_handed_out_on_the_cpu():
    here = NeedleStream(num_frames=4, settings=SMALL)
    there = NeedleStream(num_frames=4, settings=SMALL, device="cuda")
    for expected, item in zip(here, there, strict=True):
        assert item["image"].device.type == item["target"]["boxes"].device.type == "cpu"
        assert len(item["target"]["boxes"]) == len(expected["target"]["boxes"])


@pytest.mark.parametrize("options", [{"num_frames": 0}, {"chunk": 0}], ids=str)
def test_lengths_below_one_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        NeedleStream(**options)


def test_a_fixed_set_holds_the_frames_of_its_seed():
    dataset = SimulatedFrames(9, seed=3, settings=SMALL)
    stream = NeedleStream(3, 9, settings=SMALL)
    for index, expected in enumerate(stream):
        assert torch.equal(dataset[index]["image"], expected["image"])
        assert torch.equal(dataset.annotations(index).boxes, expected["target"]["boxes"])
    assert len(dataset) == 9


def test_a_fixed_set_ends():
    with pytest.raises(IndexError):
        SimulatedFrames(2, settings=SMALL)[2]
