"""A COCO data folder of small pictures: bright rectangles on noise, some pictures without."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64  # pixels


def write_tiny_data(root: Path, *, train: int = 12, val: int = 6, seed: int = 0) -> Path:
    """Write splits of so many pictures; every third is empty, every fourth a short insertion."""
    generator = np.random.default_rng(seed)
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for split, count in (("train", train), ("val", val)):
        images, annotations = [], []
        for number in range(1, count + 1):
            name = f"{split}_{number:03d}.png"
            pixels = generator.integers(0, 60, (SIDE, SIDE), dtype=np.uint8)
            if number % 3:
                left, top, width, height = (int(v) for v in generator.integers(12, 32, 4))
                pixels[top : top + height, left : left + width] += 180
                annotations.append(
                    {
                        "id": number,
                        "image_id": number,
                        "category_id": 1,
                        "bbox": [left, top, width, height],
                    }
                )
            Image.fromarray(pixels).save(root / "images" / name)
            entry = {"id": number, "file_name": name, "width": SIDE, "height": SIDE}
            images.append({**entry, "short_insertion": number % 4 == 0})
        (root / "annotations" / f"instances_{split}.json").write_text(
            json.dumps(
                {
                    "images": images,
                    "annotations": annotations,
                    "categories": [{"id": 1, "name": "needle"}],
                }
            )
        )
    return root
