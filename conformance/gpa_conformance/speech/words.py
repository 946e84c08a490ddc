"""Word errors: the fewest words that must be replaced, left out or put in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WordErrors:
    """Of one utterance. words: of what was to be said."""

    substitutions: int
    deletions: int
    insertions: int
    words: int

    @property
    def count(self) -> int:
        """All errors; their share of the words can exceed 1."""
        return self.substitutions + self.deletions + self.insertions


def word_errors(expected: Sequence[str], heard: Sequence[str]) -> WordErrors:
    """The cheapest alignment (Levenshtein 1966); of equal ones that with the most replacements."""
    # A cell: (errors, deletions + insertions, deletions, insertions) of the words so far; tuples compare in this order.
    above = [(column, column, 0, column) for column in range(len(heard) + 1)]
    for row, word in enumerate(expected, 1):
        cells = [(row, row, row, 0)]
        for column, other in enumerate(heard, 1):
            wrong = word != other
            cells.append(
                min(
                    _plus(above[column - 1], wrong, 0, 0),
                    _plus(above[column], 1, 1, 0),
                    _plus(cells[-1], 1, 0, 1),
                )
            )
        above = cells
    errors, moved, deletions, insertions = above[-1]
    return WordErrors(errors - moved, deletions, insertions, len(expected))


def _plus(cell: tuple[int, int, int, int], errors: int, deletions: int, insertions: int) -> tuple[int, int, int, int]:
    moved = deletions + insertions
    return cell[0] + errors, cell[1] + moved, cell[2] + deletions, cell[3] + insertions
