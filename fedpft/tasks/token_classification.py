"""A tag for each word of a text.

M samples in one batch, T tokens, C tags.
"""

import re
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import BadRows, ColumnsSection
from fedpft.data.batches import EncodedDataset
from fedpft.data.rows import Unusable
from fedpft.data.samples import Reader, Samples
from fedpft.data.text import UNTAGGED, TextDataset, encode_texts, tokenize
from fedpft.errors import ConfigError, ModelError
from fedpft.tasks.classification import ClassNames
from fedpft.tasks.task import Batch, Metric, Task

COUNTED_AT_ONCE = 1 << 24
SPAN_TAG = re.compile(r"[BIESLU]-.")
SAME_PREFIX = str.maketrans("LU", "ES")  # of BILOU and of IOBES, which seqeval knows


class TokenClassification(Task):
    """One of the label list's tags for each word: its first token carries it, all others carry none.

    A word that has no token, or was cut away, is neither learned nor measured.
    """

    name = "token-classification"
    model = "AutoModelForTokenClassification"
    processor = "AutoTokenizer"
    peft = "TOKEN_CLS"
    peft_loader = "AutoPeftModelForTokenClassification"
    forms = (("words", "tags"),)
    public_forms = (("words",), ("text",))
    metrics = (
        Metric("span_f1", "span F1", percent=True),
        Metric("span_precision", "precision", percent=True),
        Metric("span_recall", "recall", percent=True),
        Metric("token_accuracy", "token accuracy", percent=True),
    )
    baseline = ("usual_tag", "the most frequent tag everywhere")

    def reader(self, labels: Sequence[str]) -> Reader:
        """A row has as many tags as words, each the name of a class."""
        names = ClassNames(labels, "tag")

        def read(words: Sequence[str], tags: Sequence[object]) -> list[int]:
            if len(words) != len(tags):
                raise Unusable(f"{len(words)} words and {len(tags)} tags", "give each word one tag")
            return [names.index(tag) for tag in tags]

        return Reader(("words", "tags"), read, tuple(labels))

    def read_labelled(
        self, path: Path, columns: ColumnsSection, labels: Sequence[str], encoding: str | None = None
    ) -> Samples:
        """The owner reads so what will be measured; ConfigError if nothing is installed to measure it by."""
        _seqeval()
        return super().read_labelled(path, columns, labels, encoding)

    def encode(
        self,
        samples: Samples,
        processor: Any,
        max_tokens: int,
        *,
        bad_rows: BadRows = "refuse",
        way_out: str = "",
        cache: Path | None = None,
    ) -> EncodedDataset:
        """Token ids of the words with blanks in between, and a tag's index for each token."""
        if not processor.is_fast:
            raise ModelError(
                f"the tokenizer ({type(processor).__name__}) cannot tell which word a token is of",
                "save a fast one beside the model: one with a tokenizer.json",
            )
        if samples.targets is None:
            return encode_texts(samples, processor, max_tokens, None, bad_rows=bad_rows, way_out=way_out, cache=cache)
        found = tokenize(
            samples, processor, max_tokens, tag_words=True, bad_rows=bad_rows, way_out=way_out, cache=cache
        )
        dataset = TaggedDataset(
            found["tokens"], found["lengths"], found["tags"], processor.pad_token_id, samples.labels
        )
        dataset.cut, dataset.skipped = found.counts["cut"], samples.skipped + found.counts["faults"]
        return dataset

    def label_counts(self, dataset: EncodedDataset, classes: int) -> Tensor:
        """The tokens that carry each tag."""
        assert isinstance(dataset, TaggedDataset)
        parts = dataset.tags.split(COUNTED_AT_ONCE)
        return torch.stack([part[part != UNTAGGED].bincount(minlength=classes) for part in parts]).sum(0)

    def logit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the tokens that carry a tag."""
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=UNTAGGED)

    def weight(self, batch: Batch) -> int:
        """The tokens that carry a tag: at least one in each sample."""
        return int((batch["labels"] != UNTAGGED).sum())

    def with_any_labels(self, inputs: Batch, classes: int, generator: torch.Generator) -> Batch:
        """A tag for each token that is no padding."""
        real = inputs["attention_mask"].bool()
        tags = torch.randint(classes, real.shape, generator=generator).to(real.device)
        return {**inputs, "labels": tags.where(real, UNTAGGED)}

    def answers(self, model: nn.Module, batch: Batch) -> list[list[int]]:
        """The tags that the model gives to a sample's words, as far as it sees them."""
        found, carries = model(**batch).logits.argmax(dim=-1), batch["labels"] != UNTAGGED
        return [tags[here].tolist() for tags, here in zip(found, carries, strict=True)]

    def score(self, answers: Sequence[list[int]], dataset: EncodedDataset, chosen: Tensor) -> dict[str, float]:
        """Spans count as conlleval counts them; a tag that is none of a span scheme's is a span of one word."""
        assert isinstance(dataset, TaggedDataset)
        names = [_span_tag(name) for name in dataset.names]
        wanted = [dataset.tags_of(index) for index in chosen.tolist()]
        precision, recall, f1, _ = _seqeval().precision_recall_fscore_support(
            *([[names[tag] for tag in tags] for tags in each] for each in (wanted, answers)),
            average="micro",
            zero_division=0,
        )
        hits = [a == b for a, b in zip(chain(*answers), chain(*wanted), strict=True)]
        accuracy = sum(hits) / len(hits)
        return {
            "span_f1": float(f1),
            "span_precision": float(precision),
            "span_recall": float(recall),
            "token_accuracy": accuracy,
        }

    def baseline_score(self, dataset: EncodedDataset) -> dict[str, float]:
        """Of giving every word the tag that most words have."""
        assert isinstance(dataset, TaggedDataset)
        usual = int(dataset.tags[dataset.tags != UNTAGGED].mode().values)
        answers = [[usual] * len(dataset.tags_of(index)) for index in range(len(dataset))]
        return self.score(answers, dataset, torch.arange(len(dataset)))


class TaggedDataset(TextDataset):
    """Texts in which some tokens carry a tag.

    tags: (sum of lengths,) int32, a tag's index or UNTAGGED.
    names: the label list.
    """

    def __init__(self, tokens: Tensor, lengths: Tensor, tags: Tensor, padding: int, names: Sequence[str]) -> None:
        super().__init__(tokens, lengths, padding, None)
        self.tags, self.names = tags, names

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        """With `labels`: (M, T) int64."""
        return {
            **super()._inputs(indices, longest),
            "labels": self._padded(self.tags, indices, longest, UNTAGGED),
        }

    def tags_of(self, index: int) -> list[int]:
        """The tags of one sample's words, as far as they have a token."""
        tags = self.tags[int(self.starts[index]) :][: int(self.lengths[index])]
        found: list[int] = tags[tags != UNTAGGED].tolist()
        return found


def _span_tag(name: str) -> str:
    if name == "O":
        return name
    return name[0].translate(SAME_PREFIX) + name[1:] if SPAN_TAG.match(name) else f"S-{name}"


def _seqeval() -> Any:
    try:
        from seqeval.metrics import sequence_labeling
    except ImportError as error:
        raise ConfigError(
            f"token-classification is measured by seqeval, which cannot be imported ({error.name})",
            "pip install 'fedpft[token-classification]', or leave out test_data",
        ) from None
    return sequence_labeling
