"""Which teacher head each student head learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord

#: Teacher head by student head, for all pairs of layers or by student path.
HeadMap = Sequence[int] | Mapping[str, Sequence[int]]


def head_map_by_layer(
    head_map: HeadMap | None, student_paths: Iterable[str], head_reduction: str
) -> dict[str, tuple[int, ...]]:
    """Return the head maps of the distilled layers by student path; a layer may have none.

    Raises:
        InputError: a map is not made of head numbers, names no distilled layer, or meets averaged
            heads.
    """
    if head_map is None:
        return {}
    if head_reduction != "none":
        raise InputError(
            f"head_map is given with head_reduction={head_reduction!r}, which averages heads; "
            'expected "none"'
        )
    paths = list(student_paths)
    if not isinstance(head_map, Mapping):
        head_map = dict.fromkeys(paths, head_map)
    for path, heads in head_map.items():
        if path not in paths:
            raise InputError(
                f"head_map names {path!r}, which is not distilled; the student's distilled layers "
                f"are {', '.join(map(repr, paths))}"
            )
        is_sequence = isinstance(heads, Sequence) and not isinstance(heads, str)
        if not is_sequence or not heads or any(type(h) is not int or h < 0 for h in heads):
            raise InputError(
                f"head_map is {heads!r}; expected a teacher head, from 0, per student head"
            )
    return {path: tuple(heads) for path, heads in head_map.items()}


def mapped_heads(
    record: AttentionRecord, head_map: tuple[int, ...], query: Tensor, *, layer: str
) -> AttentionRecord:
    """Return a teacher's record whose head i is its head `head_map[i]`.

    Only query, key [B, Ht, L, Dt] and log-sum-exp are indexed: no map is made.

    Args:
        query: the student's, [B, H, Lq, D].
        layer: the student's, for messages.

    Raises:
        InputError: the map is not one of H heads to some of Ht.
    """
    heads, teacher_heads = query.shape[1], record.query.shape[1]
    if len(head_map) != heads:
        raise InputError(
            f"head_map {list(head_map)} is for {len(head_map)} heads, student layer {layer!r} has "
            f"{heads}"
        )
    if max(head_map) >= teacher_heads:
        raise InputError(
            f"head_map {list(head_map)} names head {max(head_map)}, but the teacher of student "
            f"layer {layer!r} has heads 0 to {teacher_heads - 1}"
        )
    index = list(head_map)
    mask = record.attn_mask
    if mask is not None and mask.dim() > 2 and mask.shape[-3] > 1:
        mask = mask[..., index, :, :]
    return record._replace(
        query=record.query[:, index],
        key=record.key[:, index],
        lse=None if record.lse is None else record.lse[:, index],
        attn_mask=mask,
    )
