"""Arguments that choose attention layers, heads and token grids, and how their words are read."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from attn_kd.cli._training import Option
from attn_kd.distill.layers import KINDS, SELECTIONS
from attn_kd.errors import InputError

KINDS_OPTION = Option(
    "--kinds",
    "kinds",
    "kinds of layers that last and all choose: encoder_self, attention between positions of the "
    "image (default, the paper); decoder_self, between object queries; decoder_cross, from those "
    "to the image",
    str,
    KINDS,
    metavar="KIND",
    several=True,
)

_PAIR_FORM = (
    "STUDENT_PATH=TEACHER_PATH, such as "
    "model.encoder.layers.0.self_attn=model.encoder.layers.2.self_attn"
)
_HEADS_FORM = (
    "a teacher head, from 0, per student head: 0,0,1,1 for all layers, or STUDENT_PATH=0,0,1,1 for "
    "one (--head-reduction mean averages heads)"
)


def layer_selection(words: Sequence[str]) -> str | dict[str, str]:
    """What the words of ``--layers`` stand for: a name of ``SELECTIONS``, or pairs of paths.

    Returns:
        the name, or {student path: teacher path}.

    Raises:
        InputError: a word is neither, a name is not alone, or a student layer has two teachers.
    """
    if len(words) == 1 and words[0] in SELECTIONS:
        return words[0]
    pairs: dict[str, str] = {}
    for word in words:
        student, separator, teacher = word.partition("=")
        if not (student and separator and teacher) or "=" in teacher:
            names = " or ".join(SELECTIONS)
            raise InputError(
                f"--layers {word!r} is no pair of layers; expected {names} alone, or {_PAIR_FORM}"
            )
        if pairs.setdefault(student, teacher) != teacher:
            raise InputError(
                f"--layers pairs {student!r} with {pairs[student]!r} and with {teacher!r}; "
                "expected one teacher layer for a student layer"
            )
    return pairs


def teacher_layers(words: Sequence[str]) -> str | list[str]:
    """What the words of ``--layers`` choose of a teacher alone: a name of ``SELECTIONS``, or paths.

    Of a pair, as students are trained with, that is its teacher's path.
    """
    if len(words) == 1 and words[0] in SELECTIONS:
        return words[0]
    return [word.rpartition("=")[2] for word in words]


def head_map(words: Sequence[str]) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """What the words of ``--head-map`` stand for: one map for all layers, or maps by student path.

    Raises:
        InputError: a word is no head map, or there are several for one layer.
    """
    maps: dict[str, tuple[int, ...]] = {}
    for word in words:
        path, separator, numbers = word.rpartition("=")
        heads = numbers.split(",")
        if bool(path) != bool(separator) or not all(_is_number(head) for head in heads):
            raise InputError(f"--head-map {word!r} is no head map; expected {_HEADS_FORM}")
        if path in maps or (maps and "" in (path, *maps)):
            raise InputError(
                f"--head-map {' '.join(words)!r} has several maps for one layer; expected "
                f"{_HEADS_FORM}"
            )
        maps[path] = tuple(map(int, heads))
    return maps.get("", maps)


def token_grid(text: str) -> tuple[int, ...]:
    """argparse type: a grid of tokens, HxW or TxHxW."""
    sides = text.lower().split("x")
    if len(sides) not in (2, 3) or not all(_is_number(side) and int(side) for side in sides):
        raise argparse.ArgumentTypeError(
            f"expected height x width in tokens, such as 13x13, or TxHxW, got {text!r}"
        )
    return tuple(map(int, sides))


def require_kinds_apply(kinds: Sequence[str] | None, layers: object) -> None:
    """Check that ``--kinds`` has something to choose.

    Raises:
        InputError: it is given, and layers are given by path.
    """
    if kinds is not None and not isinstance(layers, str):
        raise InputError(
            f"--kinds {' '.join(kinds)!r} is of no use with paths of layers; expected it with "
            f"--layers {' or '.join(SELECTIONS)}"
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()
