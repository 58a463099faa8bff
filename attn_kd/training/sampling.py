"""Randomness of a sample that depends on nothing but the seed, the epoch and the sample.

A running random generator would have to be saved and restored exactly, across worker processes and
batches fetched ahead, for an interrupted run to end where an uninterrupted one does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch.utils.data import Dataset

from attn_kd.training.datasets import DetectionDataset


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """A seed below 2**63 for one sample of one epoch; different triples give unrelated seeds."""
    words = np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


class SeededItems(Dataset):
    """The items of a data set, each with the seed of its augmentation in this epoch.

    Args:
        dataset: of items that are dictionaries.
        seed: of the run.
    """

    def __init__(self, dataset: DetectionDataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            **self.dataset[index],
            "augmentation_seed": sample_seed(self.seed, self.epoch, index),
        }


class EpochViews:
    """Which of an image's views each epoch sees; a base of data sets of such views.

    Args:
        views: of each image.
        seed: of the choice.
    """

    def __init__(self, *, views: int, seed: int) -> None:
        self.views = views
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def view(self, index: int) -> int:
        """The view of an image in this epoch."""
        return sample_seed(self.seed, self.epoch, index) % self.views


class ViewedItems(EpochViews, Dataset):
    """The items of a data set in one of a few fixed views: as it is (0), or augmented.

    Which of an image's views an item is depends on the epoch, by the seed; the augmentation of a
    view depends on the seed alone.

    Args:
        dataset: of items that are dictionaries.
        views: of each image.
        seed: of the augmentation, and of which view an epoch sees.
    """

    def __init__(self, dataset: DetectionDataset, *, views: int, seed: int) -> None:
        super().__init__(views=views, seed=seed)
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(index, self.view(index))

    def item(self, index: int, view: int) -> dict[str, Any]:
        """A view of an image; its ``augmentation_seed`` is ``None`` for view 0."""
        seed = sample_seed(self.seed, view, index) if view else None
        return {**self.dataset[index], "augmentation_seed": seed}
