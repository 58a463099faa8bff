"""What a teacher cache costs on disk and saves in a training step.

    python -m bench.teacher_cache --preset detr-tiny
    python -m bench.teacher_cache --preset detr-r50 --batch-size 2 --rounds 5

A teacher of six encoder and six decoder layers with random weights and a 1/1 student with its
backbone, on random images of the preset's size, batches loaded in the training's own process. Three
ways to train are compared, each with the teacher running and with its cache, step about (what a
loaded machine does to one it does to the other): the backbone learns; it is frozen, and runs once
for both models; its features are cached.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import DetrForObjectDetection

from attn_kd import AttentionDistiller
from attn_kd.data import CocoDetection
from attn_kd.distill import distillation_loss
from attn_kd.models import (
    build_detr,
    build_image_processor,
    freeze_backbone,
    get_preset,
    load_backbone_weights,
    save_detector,
)
from attn_kd.training import CacheOptions, TeacherCache, TrainingConfig, cache_teacher
from attn_kd.training.backbone_forward import feature_maps_as_input
from attn_kd.training.sources import Source, Views, feature_source, image_source
from attn_kd.training.teacher import Teacher
from attn_kd.training.teacher_cache_batches import teacher_pass

WAYS = ("backbone learns", "backbone frozen", "features cached")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--preset", default="detr-tiny")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15, help="steps of each kind")
    parser.add_argument("--dtype", default="float16")
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        side = min(get_preset(args.preset).input_size)
        _write_data(root / "data", side, args.images)
        teacher = _write_teacher(root / "teacher", args.preset)
        started = time.perf_counter()
        options = CacheOptions(dtype=args.dtype)
        cache = cache_teacher(root / "teacher", root / "data", root / "cache", options)
        seconds = (time.perf_counter() - started) / args.images
        print(f"{args.preset}, {side} x {side} pixels; {1e3 * seconds:.0f} ms an image to cache")
        _report_size(cache)
        for way in WAYS:
            _report_steps(way, teacher, cache, CocoDetection(root / "data", "train"), args)


def _report_size(cache: TeacherCache) -> None:
    (layer,) = cache.recipe.layers
    record = cache.read(0)
    kept = sum(tensor.nbytes for tensor in record.layers[layer.path])
    cells = record.grid[0] * record.grid[1]
    whole = sum((cache.folder / shard.file).stat().st_size for shard in cache.shards)
    each = whole / len(cache.recipe.images)
    maps = layer.heads * cells**2 * 4
    print(
        f"{cells} cells, {layer.heads} heads of {layer.head_dim}: {kept / 1e3:.1f} kB a layer and "
        f"image ({each / 1e3:.1f} kB in the files); its maps in float32: {maps / 1e3:.1f} kB, "
        f"{maps / kept:.1f} times as much"
    )


def _report_steps(
    way: str,
    teacher: Teacher,
    cache: TeacherCache,
    dataset: CocoDetection,
    args: argparse.Namespace,
) -> None:
    frozen = way != WAYS[0]
    student = build_detr(args.preset, encoder_layers=1, decoder_layers=1, num_queries=1)
    load_backbone_weights(student, teacher.model)
    if frozen:
        freeze_backbone(student)
    config = TrainingConfig(
        preset=args.preset, augment=False, freeze_backbone=frozen, cache_features=way == WAYS[2]
    )
    views = Views(1, 0)
    if config.cache_features:
        source = feature_source(student, dataset, teacher.processor, config, views=views)
    else:
        source = image_source(dataset, teacher.processor, config, views)
    cached = Teacher.cached(cache.folder)
    layers = [layer.path for layer in cache.recipe.layers]
    steps = [
        _steps(copy.deepcopy(student), teacher, source, args.batch_size, way),
        _steps(
            copy.deepcopy(student),
            cached,
            cached.taught(source, dataset, layers),
            args.batch_size,
            way,
        ),
    ]
    for step in steps:
        step()
    times = [[_timed(step) for step in steps] for _ in range(args.rounds)]
    live, without = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{way}: {1e3 * live:.0f} ms a step of {args.batch_size} with the teacher, "
        f"{1e3 * without:.0f} ms with its cache: x {ratio:.2f}"
    )


def _steps(
    student: DetrForObjectDetection, teacher: Teacher, source: Source, batch_size: int, way: str
) -> Callable[[], None]:
    """A function that takes one training step, its batch loaded and prepared."""
    student.train()
    learning = [p for p in student.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learning, lr=1e-6)
    batches = _batches(source, batch_size)
    share = way == WAYS[1] and teacher.cache is None

    def step() -> None:
        batch, given = next(batches), None
        models = [student] if teacher.cache else [student, teacher.model]
        with (
            feature_maps_as_input(*models),
            AttentionDistiller(teacher.model, student) as distiller,
        ):
            if teacher.cache is not None:
                batch, given = teacher_pass(batch, teacher.cache.recipe.layers)
            if share:
                with torch.no_grad():
                    maps = student.model.backbone(batch["pixel_values"], batch["pixel_mask"])
                batch = {**batch, "pixel_values": maps[-1][0], "pixel_mask": maps[-1][1]}
            result = distiller.run(batch, teacher_pass=given)
            distillation_loss(result, alpha=0.7).total.backward()
        optimiser.step()
        optimiser.zero_grad()

    return step


def _batches(source: Source, size: int) -> Iterator[dict]:
    generator = torch.Generator().manual_seed(0)
    while True:
        indices = torch.randint(len(source.dataset), (size,), generator=generator)
        yield source.collate([source.dataset[int(index)] for index in indices])


def _timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def _write_teacher(folder: Path, preset: str) -> Teacher:
    names = {0: "needle"}
    model = build_detr(preset, encoder_layers=6, decoder_layers=6, num_queries=1, id2label=names)
    save_detector(model, build_image_processor(preset), folder)
    return Teacher.load(folder)


def _write_data(root: Path, side: int, count: int) -> None:
    """Random pictures with one box each, as a COCO folder."""
    generator = np.random.default_rng(0)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    document: dict[str, list] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "needle"}],
    }
    for number in range(count):
        name = f"{number:04d}.png"
        pixels = generator.integers(0, 256, (side, side), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / name)
        entry = {"id": number, "file_name": name, "width": side, "height": side}
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [8, 8, 40, 30]}
        document["images"].append(entry)
        document["annotations"].append(box)
    (root / "annotations" / "instances_train.json").write_text(json.dumps(document))


if __name__ == "__main__":
    main()
