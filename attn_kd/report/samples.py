"""Which frames of a split a report shows: drawn at random, of every kind there is."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict

import PIL.Image

from attn_kd.data import CocoDetection
from attn_kd.report.scenes import Sample

_KINDS = ("short insertion", "with object", "without object")


def draw_samples(dataset: CocoDetection, count: int, *, seed: int) -> list[Sample]:
    """``count`` frames (fewer if the split is smaller), as many of each kind as can be.

    The kinds are short insertions, other frames with an object, and frames without; the draw is
    blind to what any detector makes of the frames.
    """
    indices = list(range(len(dataset)))
    random.Random(seed).shuffle(indices)
    by_kind: dict[str, list[int]] = defaultdict(list)
    for index in indices:
        by_kind[_kind(dataset, index)].append(index)
    rounds = itertools.zip_longest(*(by_kind[kind] for kind in _KINDS))
    drawn = [index for one_round in rounds for index in one_round if index is not None][:count]
    drawn.sort(key=lambda index: _KINDS.index(_kind(dataset, index)))
    return [_sample(dataset, index) for index in drawn]


def _kind(dataset: CocoDetection, index: int) -> str:
    if len(dataset.annotations(index).boxes) == 0:
        return _KINDS[2]
    short = dataset.image_entries[index].extra.get("short_insertion", False)
    return _KINDS[0] if short else _KINDS[1]


def _sample(dataset: CocoDetection, index: int) -> Sample:
    pixels = dataset[index]["image"].permute(1, 2, 0).numpy()
    boxes = dataset.annotations(index).boxes.tolist()
    return Sample(PIL.Image.fromarray(pixels), boxes, _kind(dataset, index))
