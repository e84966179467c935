"""One label for an image."""

from pathlib import Path
from typing import Any

from fedpft.config import BadRows
from fedpft.data.batches import EncodedDataset
from fedpft.data.images import encode_images
from fedpft.data.samples import Samples
from fedpft.tasks.classification import Classification, class_indices


class ImageClassification(Classification):
    """One of the label list's classes for each image."""

    name = "image-classification"
    model = "AutoModelForImageClassification"
    processor = "AutoImageProcessor"
    peft = None
    peft_loader = "AutoPeftModel"
    forms = (("image", "label"),)
    public_forms = (("image",),)
    has_tokens = False

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
        """Pixels as the processor prepares them, and class indices; `max_tokens` and `cache` have no meaning."""
        dataset = encode_images(samples["image"], processor, class_indices(samples))
        dataset.skipped = samples.skipped
        return dataset
