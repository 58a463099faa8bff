"""Small COCO folders for tests, written from plain Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

WIDTH, HEIGHT = 40, 30


def document() -> dict[str, Any]:
    """Two images, the second without objects, and two categories whose ids have a gap."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT, "recording": "r1"},
            {"id": 9, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 5, "bbox": [4, 6, 10, 8], "iscrowd": 0},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [20, 3, 5, 9]},
        ],
        "categories": [{"id": 5, "name": "vessel"}, {"id": 2, "name": "nerve"}],
    }


def write_folder(root: Path, content: Any, split: str = "train") -> Path:
    """Write `content` as the split's annotations (text as it is), with images a.png and b.png."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    levels = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    for name in ("a.png", "b.png"):
        PIL.Image.fromarray(levels).save(root / "images" / name)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "annotations" / f"instances_{split}.json").write_text(text)
    return root
