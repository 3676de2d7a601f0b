"""Which weights go together: each alone, n kept of m neighbours, or whole blocks.

`unstructured`   every weight is a unit of the budget.
`n:m`            of m neighbours along the input dimension exactly n are kept, such as 2:4. The pattern fixes the ratio
                 of every layer at 1 - n/m, so there is no budget to share; another ratio is refused.
`rxc`            blocks of r output rows by c input columns, such as 4x4, are one unit: their scores are summed, budgets
                 count blocks. A method that compares magnitudes across layers sees a block's summed |W| as one weight.

A layer whose shape is no multiple of m or of the block is refused: left dense, it would silently break the ratio.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlprune.errors import RequestError
from vlprune.pruning.exact import exact_sum
from vlprune.pruning.selection import lowest


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        text: as the user wrote it.
        block: rows and columns of a unit; (1, 1) for unstructured, (1, m) for n:m.
        kept: the n of n:m, None for the others.
    """

    text: str
    block: tuple[int, int] = (1, 1)
    kept: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """Read a pattern.

        Args:
            text: "unstructured", "n:m" or "rxc".

        Returns:
            Pattern: what it means.

        Raises:
            RequestError: it is none of these.
        """
        if text == "unstructured":
            return cls(text)
        if isinstance(text, str) and (numbers := re.fullmatch(r"([0-9]{1,4})([:x])([0-9]{1,4})", text)):
            first, kind, second = int(numbers[1]), numbers[2], int(numbers[3])
            if kind == "x" and first and second:
                return cls(text, (first, second))
            if kind == ":" and 0 < first < second:
                return cls(text, (1, second), first)
        raise RequestError(
            f"unknown pattern {text!r:.60}: choose unstructured, n:m with n kept of m (2:4), or rxc blocks (4x4)"
        )

    @property
    def fixed_ratio(self) -> float | None:
        """The ratio that the pattern implies, None when it leaves the ratio open."""
        return None if self.kept is None else 1 - self.kept / self.block[1]

    def check_ratio(self, ratio: float) -> None:
        """Refuse a ratio that contradicts the pattern; two decimals of a fraction such as 1/3 are near enough.

        Args:
            ratio: fraction to remove.

        Raises:
            RequestError: the pattern fixes another ratio.
        """
        if self.fixed_ratio is not None and abs(ratio - self.fixed_ratio) > 0.005:
            raise RequestError(
                f"pattern {self.text} removes {self.fixed_ratio:.4g} of the weights, not {ratio}: "
                f"give ratio {self.fixed_ratio:.4g} or none, or choose another pattern"
            )

    def check_shape(self, name: str, shape: Sequence[int]) -> None:
        """Refuse a layer that the pattern does not fit.

        Args:
            name: name of the layer, for the message.
            shape: [out, in].

        Raises:
            RequestError: the shape is no multiple of the block.
        """
        if any(size % side for size, side in zip(shape, self.block, strict=True)):
            raise RequestError(
                f"layer {name!r} is [{shape[0]}, {shape[1]}], which pattern {self.text} does not divide: "
                "choose another pattern or leave the layer out"
            )

    def units(self, scores: Tensor) -> Tensor:
        """Sum scores per block.

        Args:
            scores: [out, in] float32.

        Returns:
            Tensor: [number of blocks] float32, row by row; the scores themselves when a block is one weight.
        """
        if self.block == (1, 1):
            return scores.flatten()
        return exact_sum(_blocked(scores, *self.block), (1, 3)).float().flatten()

    def masks(self, scores: Tensor, counts: Sequence[int]) -> Iterator[Tensor]:
        """Cut a layer at several counts.

        Args:
            scores: [out, in] float32, non-negative.
            counts: units to remove; for n:m only their number matters.

        Yields:
            Tensor: [out, in] bool, True = kept.
        """
        if self.kept is not None:
            mask = _keep_highest(scores, self.kept, self.block[1])
            yield from (mask for _ in counts)
            return
        rows, columns = self.block
        for mask in lowest(self.units(scores), counts):
            grid = mask.view(scores.shape[0] // rows, scores.shape[1] // columns)
            yield grid if self.block == (1, 1) else grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _blocked(scores: Tensor, rows: int, columns: int) -> Tensor:
    return scores.reshape(scores.shape[0] // rows, rows, scores.shape[1] // columns, columns)


def _keep_highest(scores: Tensor, kept: int, group: int) -> Tensor:
    """Keep the `kept` highest of each `group` neighbours; among equals the later ones, as everywhere.

    A score is kept when fewer than `kept` others of its group rank above it; counting them pair by pair needs no sort.
    """
    members = scores.view(scores.shape[0], -1, group).unbind(-1)
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    for i, score in enumerate(members):
        above = torch.zeros(score.shape, dtype=torch.int16, device=scores.device)
        for j, other in enumerate(members):
            if j != i:
                above += (other >= score) if j > i else (other > score)
        mask.view(scores.shape[0], -1, group)[..., i] = above < kept
    return mask
