"""Which student layer learns from which teacher layer."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from attn_kd.errors import InputError
from attn_kd.integrations.attention_modules import (
    attention_modules,
    is_self_attention,
    last_encoder_self_attention,
    listing,
)

_MOST_SUGGESTIONS = 4


class LayerPair(NamedTuple):
    """A student's attention module and the teacher's that it learns from."""

    student_path: str
    student: nn.Module
    teacher_path: str
    teacher: nn.Module
    self_attention: bool  # of the student's module


def pair_layers(
    student: nn.Module, teacher: nn.Module, layers: Mapping[str, str] | None
) -> list[LayerPair]:
    """Return the pairs that `layers` (student path → teacher path) names.

    None pairs the final encoder self-attention of both, the map of Rubin et al. 2021.

    Raises:
        InputError: a path leads nowhere (near ones are suggested) or not to an attention module,
            one is cross-attention and the other is not, or there is no pair.
    """
    if layers is None:
        layers = {last_encoder_self_attention(student): last_encoder_self_attention(teacher)}
    if not layers:
        raise InputError("layers={} pairs no layers; expected {student path: teacher path, ...}")
    return [_pair(student, teacher, *paths) for paths in layers.items()]


def _pair(
    student: nn.Module, teacher: nn.Module, student_path: str, teacher_path: str
) -> LayerPair:
    student_module = attention_at(student, student_path, "student")
    teacher_module = attention_at(teacher, teacher_path, "teacher")
    kinds = [
        "self-attention" if is_self_attention(module) else "cross-attention"
        for module in (student_module, teacher_module)
    ]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"student layer {student_path!r} is {kinds[0]}, teacher layer {teacher_path!r} is "
            f"{kinds[1]}; expected the same kind"
        )
    return LayerPair(
        student_path, student_module, teacher_path, teacher_module, kinds[0] == "self-attention"
    )


def attention_at(model: nn.Module, path: str, role: str) -> nn.Module:
    """Return the attention module at `path`; `role` names the model in messages.

    Raises:
        InputError: there is none; near paths are suggested.
    """
    candidates = attention_modules(model)
    if path in candidates:
        return candidates[path]
    try:
        found = type(model.get_submodule(path)).__name__
    except AttributeError:
        problem = f"{role} has no layer {path!r}"
    else:
        problem = f"{role} layer {path!r} is a {found}, not an attention module"
    raise InputError(f"{problem}; {_suggestion(path, list(candidates))}")


def _suggestion(path: str, candidates: list[str]) -> str:
    inside = [candidate for candidate in candidates if candidate.startswith(f"{path}.")]
    near = inside or difflib.get_close_matches(path, candidates, n=_MOST_SUGGESTIONS, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(map(repr, near[:_MOST_SUGGESTIONS]))}?"
    return listing(candidates)
