"""What training and evaluation ask of a data set."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from torch.utils.data import IterableDataset

from attn_kd.data import CocoDetection, ImageAnnotations

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class DetectionDataset(Protocol):
    """Images with boxes, by index, e.g. a :class:`~attn_kd.data.CocoDetection`."""

    @property
    def categories(self) -> list[str]:
        """Names of the classes, by label."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """An item for :class:`~attn_kd.data.DetectionCollator`."""

    def annotations(self, index: int) -> ImageAnnotations:
        """The objects of an image, crowd regions included, without decoding the image."""


class DetectionStream(Protocol):
    """A stream of items without an end, e.g. :class:`~attn_kd.data.needle.NeedleStream`."""

    @property
    def categories(self) -> list[str]:
        """Names of the classes, by label."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Items for :class:`~attn_kd.data.DetectionCollator`."""


def is_stream(dataset: DetectionDataset | DetectionStream) -> TypeIs[DetectionStream]:
    """Whether a data set can only be read on and on."""
    return isinstance(dataset, IterableDataset)


def most_objects(dataset: DetectionDataset) -> int:
    """The number of objects in the image that has most."""
    annotated = (dataset.annotations(index) for index in range(len(dataset)))
    return max(int((~objects.iscrowd).sum()) for objects in annotated)


def data_fingerprint(dataset: DetectionDataset | DetectionStream) -> str:
    """SHA-256 of what is trained on: the classes, the images by file name, and their objects.

    A folder keeps its fingerprint when it is moved. Of a stream only the classes are known.
    """
    digest = hashlib.sha256(json.dumps(dataset.categories).encode())
    if not is_stream(dataset):
        digest.update(f"{len(dataset)} images".encode())
        if isinstance(dataset, CocoDetection):
            digest.update(json.dumps([entry.path.name for entry in dataset.image_entries]).encode())
        for index in range(len(dataset)):
            objects = dataset.annotations(index)
            digest.update(f"{index} {len(objects)}".encode())
            for tensor in (objects.boxes, objects.class_labels, objects.iscrowd):
                digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
