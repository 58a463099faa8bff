"""Feature maps of a frozen backbone, computed once and trained from in every epoch.

In the setting of Rubin et al. 2021 teacher and students share one backbone that does not learn:
what it makes of an image is the same in every epoch and for every model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import Dataset

from attn_kd._atomic import replacing_folder
from attn_kd.errors import InputError
from attn_kd.training.datasets import DetectionDataset
from attn_kd.training.sampling import EpochViews, sample_seed

if TYPE_CHECKING:
    from transformers import DetrForObjectDetection

Collator = Callable[[list[dict[str, Any]]], dict[str, Any]]
View = dict[str, torch.Tensor]  # features [C, h, w], mask [h, w] bool, and the labels' tensors


def backbone_fingerprint(model: DetrForObjectDetection) -> str:
    """SHA-256 of the backbone's weights and buffers, names included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.model.backbone.state_dict().items()):
        if not name.endswith("num_batches_tracked"):  # only some kinds of norm have it
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def require_shared_backbone(
    student: DetrForObjectDetection, teacher: DetrForObjectDetection
) -> None:
    """Check that one cache serves both.

    Raises:
        InputError: the weights of the backbones differ.
    """
    if backbone_fingerprint(student) != backbone_fingerprint(teacher):
        raise InputError(
            "cache_features is True but the student's backbone is not the teacher's; "
            "start the student from the teacher's backbone and freeze it"
        )


class CachedFeatures(EpochViews, Dataset):
    """Items ``{"features", "mask", "labels"}``, for :class:`FeatureCollator`.

    Which of an image's views an item is depends on the epoch, by the seed.
    """

    def __init__(self, store: FeatureStore, *, num_images: int, views: int, seed: int) -> None:
        super().__init__(views=views, seed=seed)
        self.store = store
        self.num_images = num_images

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> dict[str, Any]:
        tensors = self.store.read(index, self.view(index))
        features, mask = tensors.pop("features"), tensors.pop("mask")
        return {"features": features, "mask": mask, "labels": tensors}


class FeatureCollator:
    """Makes a batch of cached features in the form of one of images, zero-padded to the largest."""

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        maps = [item["features"] for item in items]
        height = max(features.shape[-2] for features in maps)
        width = max(features.shape[-1] for features in maps)
        pixel_values = maps[0].new_zeros(len(items), maps[0].shape[0], height, width)
        pixel_mask = torch.zeros(len(items), height, width, dtype=torch.int64)
        for row, item in enumerate(items):
            h, w = item["mask"].shape
            pixel_values[row, :, :h, :w] = item["features"]
            pixel_mask[row, :h, :w] = item["mask"]
        return {
            "pixel_values": pixel_values,
            "pixel_mask": pixel_mask,
            "labels": [dict(item["labels"]) for item in items],
        }


class FeatureStore(Protocol):
    """Where views are kept."""

    def read(self, index: int, view: int) -> View:
        """One view of one image, in a new dictionary."""


class MemoryStore:
    """Views held in memory."""

    def __init__(self, images: Iterable[list[View]]) -> None:
        self._images = list(images)

    def read(self, index: int, view: int) -> View:
        return dict(self._images[index][view])


class FolderStore:
    """Views in a folder, one safetensors file an image; only the view that is read is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def write(cls, folder: Path, images: Iterable[list[View]]) -> FolderStore:
        """Write all images as they come; the folder appears when it is complete."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with replacing_folder(folder) as temporary:
            for index, views in enumerate(images):
                tensors = {
                    f"{view}.{name}": tensor.contiguous()
                    for view, named in enumerate(views)
                    for name, tensor in named.items()
                }
                save_file(tensors, temporary / _file_name(index))
        return cls(folder)

    def read(self, index: int, view: int) -> View:
        prefix = f"{view}."
        with safe_open(self.folder / _file_name(index), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def _file_name(index: int) -> str:
    return f"{index:06d}.safetensors"


def cache_features(
    model: DetrForObjectDetection,
    dataset: DetectionDataset,
    collators: Sequence[Collator],
    *,
    seed: int,
    folder: Path | None = None,
    key: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> CachedFeatures:
    """Run a data set through the backbone of ``model``.

    Images go through one by one, so that each keeps its own size. Where images of different sizes
    meet in a batch the backbone would have seen padding at their borders instead of their end; the
    border cells of the features differ by that from training without a cache.

    Args:
        model: a DETR; evaluation mode is used, and its own restored.
        dataset: items for the collators.
        collators: one per view; each turns a list of items into a batch of DETR's inputs, and gets
            the seed of its augmentation as ``item["augmentation_seed"]``.
        seed: of the augmentation, and of which view an epoch sees.
        folder: keep the features there; ``None`` keeps them in memory.
        key: what the features depend on besides the backbone's weights, as JSON values; a folder
            made under the same key is used again.
        device: where the backbone runs.
        progress: wraps the iteration over the images, e.g. by a progress bar.
    """

    def images() -> Iterator[list[View]]:
        for index in progress(range(len(dataset))):
            item = dataset[index]
            yield [
                _view(model, collate([{**item, "augmentation_seed": sample_seed(seed, v, index)}]))
                for v, collate in enumerate(collators)
            ]

    was_training = model.training
    model.to(device).eval()
    try:
        store: FeatureStore
        if folder is None:
            store = MemoryStore(images())
        else:
            store = _stored(folder / _digest(model, len(collators), seed, key), images)
    finally:
        model.train(was_training)
    return CachedFeatures(store, num_images=len(dataset), views=len(collators), seed=seed)


def _stored(folder: Path, images: Callable[[], Iterable[list[View]]]) -> FolderStore:
    return FolderStore(folder) if folder.is_dir() else FolderStore.write(folder, images())


def _digest(
    model: DetrForObjectDetection, views: int, seed: int, key: Mapping[str, Any] | None
) -> str:
    depends_on = {
        "backbone": backbone_fingerprint(model),
        "views": views,
        "seed": seed,
        **(key or {}),
    }
    return hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()[:32]


@torch.no_grad()
def _view(model: DetrForObjectDetection, batch: dict[str, Any]) -> View:
    """Features of a batch of one image, on the CPU."""
    device = next(model.parameters()).device
    features, mask = model.model.backbone(
        batch["pixel_values"].to(device), batch["pixel_mask"].to(device)
    )[-1]
    # Cloned: the labels of several views may share the data set's memory.
    labels = {n: t.clone() for n, t in batch["labels"][0].items() if isinstance(t, torch.Tensor)}
    return {"features": features[0].cpu(), "mask": mask[0].cpu(), **labels}
