"""The settings of a training run: checked when made, written beside the model, read to resume."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import os
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from attn_kd._atomic import replacing_file
from attn_kd.distill.alignment import ALIGNMENTS
from attn_kd.distill.layers import KINDS, SELECTIONS
from attn_kd.errors import InputError
from attn_kd.ops.checks import DIVERGENCES, HEAD_REDUCTIONS
from attn_kd.training.recipes import RECIPES

SCHEDULES = ("constant", "linear", "cosine")
MIXED_PRECISIONS = ("none", "bf16", "bf16-backbone")

#: Fields that may differ between an interrupted run and its continuation: they change what is seen
#: of a run and how fast it goes, never the weights it arrives at.
RESUMABLE_FIELDS = frozenset(
    {"log_steps", "save_steps", "eval_steps", "num_workers", "tensorboard"}
)

#: What a field was called in files of earlier versions -> its name.
_FORMER_NAMES = {"layer_kinds": "kinds"}


@dataclass(frozen=True)
class TrainingConfig:
    """How a detector is trained; every field is checked when the configuration is made.

    The defaults are those of DETR (Carion et al. 2020) where they do not depend on the size of the
    data, and Rubin et al. 2021 for what concerns distillation.

    Raises:
        InputError: a value is out of range; the message names the field.
    """

    # The model.
    preset: str = "detr-tiny"
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int | None = None  # None: the teacher's, or by the objects in the data
    image_size: int | None = None  # height and width in pixels; None: the preset's
    auxiliary_loss: bool = True  # the detection loss after every decoder layer, not only the last
    dropout: float | None = None  # None: the preset's

    # How long, and on what.
    epochs: int = 50
    max_steps: int | None = None  # optimiser steps; overrides epochs
    batch_size: int = 16
    augment: bool = True

    # The optimiser: AdamW.
    learning_rate: float = 1e-4
    backbone_learning_rate: float | None = None  # None: learning_rate
    weight_decay: float = 1e-4
    warmup: float = 0.05  # share of all steps
    schedule: str = "cosine"
    max_grad_norm: float = 0.1
    amp: str = "none"  # bf16-backbone: the convolutions alone, which gain most on a CPU

    # The distillation, eq. 3 of Rubin et al. 2021; without a teacher these are ignored.
    alpha: float = 0.7
    temperature: float = 1.0
    class_weight: float = 0.0
    layers: str | dict[str, str] = "last"  # or "all", by depth; or teacher path by student path
    kinds: tuple[str, ...] = ("encoder_self",)  # of layers that "last" and "all" choose
    divergence: str = "reverse_kl"
    head_reduction: str = "none"
    # Teacher head by student head, for all layers or by student path; None: one to one.
    head_map: tuple[int, ...] | dict[str, tuple[int, ...]] | None = None
    alignment: str = "none"  # of token grids, see attn_kd.distill.alignment
    teacher_grid: tuple[int, ...] | None = None  # (h, w) in tokens; None: deduced
    student_grid: tuple[int, ...] | None = None

    # The backbone.
    teacher_backbone: bool = True  # a student starts from its teacher's
    freeze_backbone: bool = False
    pretrain_backbone_steps: int = 0  # of dense objectness first, unless it is the teacher's
    pretrain_learning_rate: float = 2e-3
    cache_features: bool = False  # needs freeze_backbone
    cache_views: int = 4  # views of each image in the cache: as it is, the others augmented

    # The run.
    seed: int = 0
    log_steps: int = 10
    save_steps: int = 500
    eval_steps: int | None = None  # steps between COCO metrics on the validation split
    num_workers: int = 0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = _from_json(getattr(self, field.name))
            object.__setattr__(self, field.name, value)
            _check_type(field, value)
        for name, (accepts, expected) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not accepts(value):
                raise InputError(f"{name} is {value!r}; expected {expected}")
        if self.cache_features and not self.freeze_backbone:
            raise InputError(
                "cache_features is True but freeze_backbone is False; "
                "features can be cached only while the backbone does not learn"
            )
        if self.head_map is not None and self.head_reduction != "none":
            raise InputError(
                f"head_map is {self.head_map} but head_reduction is {self.head_reduction!r}, which "
                'averages heads; expected "none"'
            )

    @classmethod
    def for_preset(cls, preset: str = "detr-tiny", **values: Any) -> TrainingConfig:
        """The recipe of a preset with some fields changed.

        Raises:
            InputError: a name is no field (the nearest is suggested), or a value is refused.
        """
        recipe = RECIPES.get(preset, {}) if isinstance(preset, str) else {}  # else refused below
        return cls.from_dict({"preset": preset, **recipe, **values})

    @property
    def backbone_rate(self) -> float:
        """Learning rate of the backbone's parameters."""
        if self.backbone_learning_rate is None:
            return self.learning_rate
        return self.backbone_learning_rate

    @property
    def distiller_options(self) -> dict[str, Any]:
        """Keyword arguments of :class:`~attn_kd.AttentionDistiller` beside the two models."""
        return {
            "layers": self.layers,
            "kinds": self.kinds,
            "divergence": self.divergence,
            "head_reduction": self.head_reduction,
            "head_map": self.head_map,
            "alignment": self.alignment,
            "teacher_grid": self.teacher_grid,
            "student_grid": self.student_grid,
        }

    def replace(self, **changes: Any) -> TrainingConfig:
        """A copy with some fields changed, checked anew."""
        _refuse_unknown_fields(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainingConfig:
        """Make a configuration of ``values``; fields left out take their defaults.

        A field may have the name that it had in an earlier version.

        Raises:
            InputError: ``values`` is no mapping, a name is no field (the nearest is suggested), or
                a value is refused.
        """
        if not isinstance(values, Mapping):
            raise InputError(
                f"config is {reprlib.repr(values)}; expected a mapping of the names of settings to "
                "their values"
            )
        values = with_present_names(values)
        _refuse_unknown_fields(values)
        return cls(**values)

    def save(self, path: str | os.PathLike) -> None:
        """Write the configuration as JSON."""
        with replacing_file(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike) -> TrainingConfig:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: the file is missing, is not JSON, or does not hold a configuration.
        """
        return cls.from_dict(read_json(path, dict))

    def differences(self, other: TrainingConfig) -> dict[str, tuple[Any, Any]]:
        """Fields that lead to other weights: name -> (value here, value there)."""
        return {
            field.name: (mine, theirs)
            for field in dataclasses.fields(self)
            if field.name not in RESUMABLE_FIELDS
            and (mine := getattr(self, field.name)) != (theirs := getattr(other, field.name))
        }


def with_present_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by name, as an earlier version may have written them, by the names of this one."""
    return {_FORMER_NAMES.get(name, name): value for name, value in values.items()}


def read_json(path: str | os.PathLike, kind: type) -> Any:
    """The JSON value in a file, which must be of a kind: ``dict`` or ``list``.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(Path(path).read_text())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise InputError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path} holds a {type(value).__name__}; expected a {kind.__name__}")
    return value


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _fraction(value: float) -> bool:
    return 0 <= value <= 1


def _below_one(value: float) -> bool:
    return 0 <= value < 1


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return choices.__contains__, f"one of {', '.join(choices)}"


def _selects_layers(value: str | dict[str, str]) -> bool:
    return len(value) > 0 if isinstance(value, dict) else value in SELECTIONS


def _some_of_kinds(values: tuple[str, ...]) -> bool:
    return 0 < len(set(values)) == len(values) and set(values) <= set(KINDS)


def _head_numbers(value: tuple[int, ...] | dict[str, tuple[int, ...]]) -> bool:
    if isinstance(value, dict):
        return len(value) > 0 and all(map(_head_numbers, value.values()))
    return len(value) > 0 and min(value) >= 0


def _is_grid(values: tuple[int, ...]) -> bool:
    return len(values) in (2, 3) and min(values) >= 1


_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        [
            "encoder_layers",
            "decoder_layers",
            "num_queries",
            "image_size",
            "epochs",
            "max_steps",
            "batch_size",
        ],
        (_positive, "at least 1"),
    ),
    **dict.fromkeys(
        ["cache_views", "log_steps", "save_steps", "eval_steps"], (_positive, "at least 1")
    ),
    **dict.fromkeys(
        ["learning_rate", "max_grad_norm", "temperature", "pretrain_learning_rate"],
        (_positive, "a number above 0"),
    ),
    **dict.fromkeys(
        ["backbone_learning_rate", "weight_decay", "class_weight"],
        (_not_negative, "a number of at least 0"),
    ),
    **dict.fromkeys(
        ["pretrain_backbone_steps", "num_workers", "seed"], (_not_negative, "at least 0")
    ),
    "alpha": (_fraction, "a number from 0 to 1"),
    "warmup": (_below_one, "a share of the steps, from 0 to below 1"),
    "dropout": (_below_one, "a probability below 1"),
    "schedule": _one_of(*SCHEDULES),
    "amp": _one_of(*MIXED_PRECISIONS),
    "layers": (_selects_layers, f"{', '.join(SELECTIONS)} or {{student path: teacher path}}"),
    "kinds": (_some_of_kinds, f"some of {', '.join(KINDS)}, each once"),
    "divergence": _one_of(*DIVERGENCES),
    "head_reduction": _one_of(*HEAD_REDUCTIONS),
    "head_map": (_head_numbers, "a teacher head, from 0, per student head"),
    "alignment": _one_of(*ALIGNMENTS),
    **dict.fromkeys(["teacher_grid", "student_grid"], (_is_grid, "(h, w) or (T, h, w) in tokens")),
}


def _from_json(value: Any) -> Any:
    """The value of a field where JSON may have brought a list; a mapping is copied."""
    if isinstance(value, Mapping):
        return {key: _from_json(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _annotations() -> dict[str, Any]:
    return get_type_hints(TrainingConfig)


def _check_type(field: dataclasses.Field, value: Any) -> None:
    if not _is_a(_annotations()[field.name], value):
        raise InputError(f"{field.name} is {value!r}; expected {field.type}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{field.name} is {value!r}; expected a finite number")


def _is_a(annotation: Any, value: Any) -> bool:
    """Whether a value is of an annotated type; an integer is a float, a bool is neither."""
    parts = get_args(annotation)
    if isinstance(annotation, UnionType):
        return any(_is_a(part, value) for part in parts)
    if isinstance(value, bool):
        return annotation is bool
    if get_origin(annotation) is dict:
        return isinstance(value, dict) and all(
            _is_a(parts[0], key) and _is_a(parts[1], item) for key, item in value.items()
        )
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple) and all(_is_a(parts[0], item) for item in value)
    return isinstance(value, (float, int) if annotation is float else annotation)


def _refuse_unknown_fields(values: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise InputError(f"{name!r} is no setting of a training run; {hint}")
