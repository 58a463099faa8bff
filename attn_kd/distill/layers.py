"""Which student layer learns from which teacher layer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import (
    attention_kinds,
    attention_modules,
    layers_of_kind,
    listing,
    not_attention,
    without_kind,
)

#: What `layers` may be besides a mapping of paths.
SELECTIONS = ("last", "all")

#: The kinds of attention layers that a detection transformer has.
KINDS = ("encoder_self", "decoder_self", "decoder_cross")

_MOST_SUGGESTIONS = 4


class LayerPair(NamedTuple):
    """A student's attention module and the teacher's that it learns from."""

    student_path: str
    student: nn.Module
    teacher_path: str
    teacher: nn.Module
    kind: str  # of the student's module, see `attention_kinds`

    @property
    def self_attention(self) -> bool:
        """Whether the queries come from the same tokens as the keys."""
        return self.kind.endswith("_self")

    @property
    def over_image(self) -> bool:
        """Whether the keys are tokens of the image, rather than object queries."""
        return self.kind != "decoder_self"


def pair_layers(
    student: nn.Module,
    teacher: nn.Module,
    layers: Mapping[str, str] | str | None = None,
    kinds: Sequence[str] = ("encoder_self",),
) -> list[LayerPair]:
    """Return the pairs of student and teacher layers that a selection stands for.

    Args:
        layers: "last" (or None) pairs the final layers of a kind, for encoder self-attention the
            map of Rubin et al. 2021; "all" pairs every layer of the student, by `depth_map`;
            a mapping {student path: teacher path} names the pairs and needs no `kinds`.
        kinds: of `KINDS`, in the order of the pairs.

    Raises:
        InputError: a selection or kind is unknown, or `layers` is no mapping of paths; a model has
            no layer of a kind, a path leads nowhere (near ones are suggested) or not to an
            attention module, one is cross-attention and the other is not, or there is no pair.
    """
    if layers is None or isinstance(layers, str):
        layers = _selected(student, teacher, layers or "last", kinds)
    _check_pairs(layers)
    return [_pair(student, teacher, *paths) for paths in layers.items()]


def check_selection(layers: str, kinds: Sequence[str]) -> None:
    """Check a selection by name and its kinds.

    Raises:
        InputError: one is unknown, or no kind is given.
    """
    if layers not in SELECTIONS:
        raise InputError(
            f"layers={layers!r} is no selection; expected one of {', '.join(SELECTIONS)}, "
            "or {student path: teacher path}"
        )
    if isinstance(kinds, str) or not kinds:
        raise InputError(f"kinds={kinds!r}; expected a sequence of {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"{kind!r} is no kind of layer; expected one of {', '.join(KINDS)}")


def _check_pairs(layers: object) -> None:
    if not isinstance(layers, Mapping) or not all(
        isinstance(path, str) for pair in layers.items() for path in pair
    ):
        raise InputError(
            f"layers={layers!r}; expected one of {', '.join(SELECTIONS)}, or {{student path: "
            "teacher path}, a mapping of strings"
        )
    if not layers:
        raise InputError("layers={} pairs no layers; expected {student path: teacher path, ...}")


def depth_map(student_layers: int, teacher_layers: int) -> list[int]:
    """Return, for student layers 0 … n-1, the teacher layers they learn from.

    Layer i of n learns from layer max(0, ⌊(i + 1) · N / n⌋ - 1) of N: the student's layers divide
    the teacher's into n stretches, and each learns from the end of its own. Last learns from last;
    equal depths are paired one to one; a student deeper than its teacher shares teacher layers.
    """
    n, total = student_layers, teacher_layers
    return [max(0, (i + 1) * total // n - 1) for i in range(n)]


def attention_at(model: nn.Module, path: str, role: str) -> nn.Module:
    """Return the attention module at `path`; `role` names the model in messages.

    Raises:
        InputError: there is none; near paths are suggested.
    """
    candidates = attention_modules(model)
    if path in candidates:
        return candidates[path]
    try:
        problem = f"{role} layer {path!r} {not_attention(model.get_submodule(path))}"
    except AttributeError:
        problem = f"{role} has no layer {path!r}"
    raise InputError(f"{problem}; {_suggestion(path, list(candidates))}")


def _selected(
    student: nn.Module, teacher: nn.Module, layers: str, kinds: Sequence[str]
) -> dict[str, str]:
    """Return {student path: teacher path} for a selection by name."""
    check_selection(layers, kinds)
    pairs: dict[str, str] = {}
    for kind in kinds:
        mine = _required_layers(student, kind, "student")
        theirs = _required_layers(teacher, kind, "teacher")
        chosen = [theirs[index] for index in depth_map(len(mine), len(theirs))]
        start = len(mine) - 1 if layers == "last" else 0
        pairs |= zip(mine[start:], chosen[start:], strict=True)
    return pairs


def _required_layers(model: nn.Module, kind: str, role: str) -> list[str]:
    paths = layers_of_kind(model, kind)
    if not paths:
        raise InputError(f"{role} {without_kind(model, kind)}")
    return paths


def _pair(
    student: nn.Module, teacher: nn.Module, student_path: str, teacher_path: str
) -> LayerPair:
    pair = LayerPair(
        student_path,
        attention_at(student, student_path, "student"),
        teacher_path,
        attention_at(teacher, teacher_path, "teacher"),
        attention_kinds(student)[student_path],
    )
    relations = [
        kind.replace("_", " ") + "-attention"
        for kind in (pair.kind, attention_kinds(teacher)[teacher_path])
    ]
    if relations[0].split()[1] != relations[1].split()[1]:
        raise InputError(
            f"student layer {student_path!r} is {relations[0]}, teacher layer {teacher_path!r} is "
            f"{relations[1]}; expected the same kind"
        )
    return pair


def _suggestion(path: str, candidates: list[str]) -> str:
    inside = [candidate for candidate in candidates if candidate.startswith(f"{path}.")]
    near = inside or difflib.get_close_matches(path, candidates, n=_MOST_SUGGESTIONS, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near[:_MOST_SUGGESTIONS]))}?"
    return listing(candidates)
