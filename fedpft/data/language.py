"""Rows for a language model: batched with padding, or packed, several end to end in one sequence.

n  rows in a dataset
M  rows in one batch
T  tokens of the longest row in one batch
N  tokens of one packed sequence
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedpft.data.chat import Learnt
from fedpft.data.text import TextDataset, end_to_end

NOT_LEARNED = -100  # as transformers marks a label that is none
TENSORS = {"lengths": torch.int64, "tokens": torch.int32, "learned": torch.bool}


def learnt(rows: Sequence[Learnt], *, everything: bool = False) -> dict[str, Tensor]:
    """`tokens`, `learned` and `lengths` of a LanguageDataset, for its next rows; everything: as of its `of`."""
    learned = [at > 0 and (everything or each) for row in rows for at, each in enumerate(row.learned)]
    return {**end_to_end([row.tokens for row in rows]), "learned": torch.tensor(learned, dtype=torch.bool)}


class LanguageDataset(TextDataset):
    """Token ids of all rows end to end, without padding, and which of them are learned.

    Labels stand where transformers wants them, at the token itself: the loss shifts them, so that a token is predicted
    by those before it. The first token of a row, which has none before it, is never a label.

    prompts_cut, completions_cut: rows that lost the beginning of their context, and the end of what is learned.
    """

    prompts_cut: int = 0
    completions_cut: int = 0

    def __init__(self, tokens: Tensor, learned: Tensor, lengths: Tensor, padding: int) -> None:
        """Args:
        tokens: (sum of lengths,) int32. learned: as long, bool, False for the first of each row. lengths: (n,) int64.
        padding: id that fills a batch.
        """
        super().__init__(tokens, lengths, padding, None)
        self.learned = learned

    @classmethod
    def of(cls, rows: Sequence[Learnt], padding: int, *, everything: bool = False) -> "LanguageDataset":
        """everything: all of each row is learned, prompts too, as public text is."""
        found = learnt(rows, everything=everything)
        return cls(found["tokens"], found["learned"], found["lengths"], padding)

    @property
    def counts(self) -> dict[str, int]:
        """`cut_texts`: rows of which anything was cut; `cut_completions`: those of which what is learned was."""
        return {**super().counts, "cut_completions": self.completions_cut}

    def describe_cut(self, name: object, max_tokens: int) -> str:
        """How many rows lost the beginning of their context, and how many the end of what is learned."""
        return (
            f"{name}: of {len(self)} rows, {self.prompts_cut} lose the beginning of their context, and "
            f"{self.completions_cut} the end of what is to be learned, to fit into {max_tokens} tokens"
        )

    @property
    def targets(self) -> Tensor:
        """(n,) int64: the tokens of each row that are learned."""
        return torch.stack([row.sum() for row in self.learned.split(self.lengths.tolist())])

    def question(self, index: int) -> tuple[Tensor, Tensor]:
        """A row's context up to its last run of learned tokens, and that run: what generates, and what it should be."""
        start, length = int(self.starts[index]), int(self.lengths[index])
        tokens, learned = self.tokens[start : start + length].long(), self.learned[start : start + length].tolist()
        row = Learnt(tokens.tolist(), learned)
        return tokens[: row.answer], tokens[row.answer :]

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels: (M, T) int64, padded on the right."""
        inputs = super()._inputs(indices, longest)
        learned = self._padded(self.learned, indices, longest, 0).bool()
        return {**inputs, "labels": inputs["input_ids"].where(learned, NOT_LEARNED)}

    def fitted(self, indices: Tensor, most_tokens: int) -> list[Tensor]:
        """Which of the rows `indices`, (m,) int64, share a sequence, in as few as first fit, longest first, needs.

        Args:
            most_tokens: of one sequence; a longer row stands alone in its own.
        """
        sequences: list[list[int]] = []
        room: list[int] = []
        for index in indices[self.lengths[indices].argsort(descending=True, stable=True)].tolist():
            length = int(self.lengths[index])
            place = next((place for place, free in enumerate(room) if free >= length), len(room))
            if place == len(room):
                sequences.append([])
                room.append(most_tokens)
            sequences[place].append(index)
            room[place] -= length
        return [torch.tensor(rows) for rows in sequences]

    def sequence(self, indices: Tensor) -> dict[str, Tensor]:
        """These rows, (m,) int64, end to end: input_ids, labels, position_ids, each (1, N) int64.

        Positions start at 0 with each row, and there is no attention mask: from such positions transformers itself
        builds the mask of each kind of layer that keeps rows apart. Whether a model really does so
        `fedpft.model.packing.way_to_pack` finds out.
        """
        position = torch.cat([torch.arange(length) for length in self.lengths[indices].tolist()])
        source = self.starts[indices].repeat_interleave(self.lengths[indices]) + position
        input_ids = self.tokens[source].long()
        labels = input_ids.where(self.learned[source], NOT_LEARNED)
        return {"input_ids": input_ids[None], "labels": labels[None], "position_ids": position[None]}
