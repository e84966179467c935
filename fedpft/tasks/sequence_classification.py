"""One label for a text."""

from pathlib import Path
from typing import Any

from fedpft.config import BadRows
from fedpft.data.batches import EncodedDataset
from fedpft.data.samples import Samples
from fedpft.data.text import encode_texts
from fedpft.tasks.classification import Classification, class_indices


class SequenceClassification(Classification):
    """One of the label list's classes for each text."""

    name = "sequence-classification"
    model = "AutoModelForSequenceClassification"
    processor = "AutoTokenizer"
    peft = "SEQ_CLS"
    peft_loader = "AutoPeftModelForSequenceClassification"
    forms = (("text", "label"),)
    public_forms = (("text",),)

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
        """Token ids and class indices."""
        labels = class_indices(samples)
        return encode_texts(samples, processor, max_tokens, labels, bad_rows=bad_rows, way_out=way_out, cache=cache)
