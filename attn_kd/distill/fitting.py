"""Makes a teacher's record comparable with a student's layer: heads first, then token grids."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from attn_kd.distill.alignment import Grid, deduced_grid, grouped_record, resampled_record
from attn_kd.distill.heads import mapped_heads
from attn_kd.distill.layers import LayerPair
from attn_kd.errors import InputError
from attn_kd.nn.taps import AttentionRecord


@dataclass(frozen=True)
class ModelGrid:
    """What is known of the grid of one model's tokens."""

    role: str  # "teacher" or "student"
    given: Grid | None  # by the user
    image_size: tuple[int, int] | None  # of the model's input, in pixels

    def of(self, tokens: int, layer: str) -> Grid | None:
        """Return the grid of a layer's tokens; None if it is not known.

        Raises:
            InputError: the given one has another number of tokens.
        """
        if self.given is None:
            return deduced_grid(tokens, self.image_size)
        if math.prod(self.given) != tokens:
            raise InputError(
                f"{self.role}_grid={self.given} has {math.prod(self.given)} tokens, {self.role} "
                f"layer {layer!r} has {tokens}; expected its grid, without class tokens"
            )
        return self.given

    def required_of(self, tokens: int, layer: str) -> Grid:
        """Return the grid of a layer's tokens.

        Raises:
            InputError: it is not known, or contradicts what was given.
        """
        grid = self.of(tokens, layer)
        if grid is None:
            image = "x".join(map(str, self.image_size)) if self.image_size else "unknown size"
            raise InputError(
                f"the grid of the {tokens} tokens of {self.role} layer {layer!r} cannot be deduced "
                f"(image: {image}); expected {self.role}_grid=(h, w), and no class tokens"
            )
        return grid


# The compiler of torch 2.11 asks for the hash of what it calls, before it has fields to hash.
@dataclass(frozen=True, eq=False)
class PairFit:
    """Makes the record of a pair's teacher layer comparable with the student's layer.

    Grids concern layers whose keys are tokens of the image: every one but a decoder's
    self-attention.
    """

    pair: LayerPair
    alignment: str
    head_map: tuple[int, ...] | None
    student_grid: ModelGrid
    teacher_grid: ModelGrid

    def __call__(self, record: AttentionRecord, query: Tensor, key: Tensor) -> AttentionRecord:
        """Return the record for a student's query [B, H, Lq, D] and key [B, H, Lk, D].

        Raises:
            InputError: heads or grids do not fit.
        """
        if self.head_map is not None:
            record = mapped_heads(record, self.head_map, query, layer=self.pair.student_path)
        if self.alignment == "none" or not self.pair.over_image:
            return record
        grid = self.teacher_grid.required_of(record.key.shape[2], self.pair.teacher_path)
        target = self.student_grid.required_of(key.shape[2], self.pair.student_path)
        if grid == target:
            return record
        align = resampled_record if self.alignment == "resample" else grouped_record
        return align(record, grid, target, queries_are_tokens=self.pair.self_attention)

    def check_same_grid(self, record: AttentionRecord) -> None:
        """Check that maps compared token by token, of as many tokens, lie on one grid.

        Grids that are not known pass.

        Raises:
            InputError: the two grids are known to differ.
        """
        if self.alignment != "none" or not self.pair.over_image:
            return
        tokens = record.key.shape[2]
        grid = self.teacher_grid.of(tokens, self.pair.teacher_path)
        target = self.student_grid.of(tokens, self.pair.student_path)
        if grid is not None and target is not None and grid != target:
            raise InputError(
                f"student layer {self.pair.student_path!r} has a grid of {target} tokens, teacher "
                f"layer {self.pair.teacher_path!r} one of {grid}; expected the same, or "
                'alignment="resample" or "group"'
            )
