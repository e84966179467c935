"""FM, tokenizer or image processor, and max_tokens: what does not go together is found before a silo is there."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import ModelFactory
from torch import nn

from fedpft.errors import ModelError
from fedpft.model.architectures import ARCHITECTURES, longest_input
from fedpft.model.compatibility import check_travels, make_fit

TEXT, IMAGE = "sequence-classification", "image-classification"
POSITIONS = 40  # of the tiny text models
AFTER_PADDING = ("roberta", "xlm-roberta", "mpnet")  # have positions from the padding token's id on
every_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)
every_text_architecture = pytest.mark.parametrize("model_type", [t for t in ARCHITECTURES if tiny.task_of(t) == TEXT])


@every_architecture
def test_model_with_its_own_processor_fits(model_type: str, make_fm: ModelFactory) -> None:
    make_fit(make_fm(model_type), tiny.processor(model_type), tiny.task_of(model_type), 12)


@every_text_architecture
def test_max_tokens_may_be_all_positions_and_no_more(model_type: str, make_fm: ModelFactory) -> None:
    fm, processor = make_fm(model_type), tiny.processor(model_type)
    longest = longest_input(fm)
    assert longest == (POSITIONS - tiny.PADDING - 1 if model_type in AFTER_PADDING else POSITIONS)
    make_fit(fm, processor, TEXT, longest)
    with pytest.raises(ModelError, match=f"max_tokens is {longest + 1}, the FM has positions for {longest}"):
        make_fit(fm, processor, TEXT, longest + 1)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra", *AFTER_PADDING, "gpt2", "opt"])
def test_the_longest_text_is_the_longest_that_the_model_itself_can_take(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    longest = longest_input(fm)
    assert longest is not None
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():
        fm(input_ids=torch.full((1, longest + 1), 5), attention_mask=torch.ones(1, longest + 1, dtype=torch.int64))


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_max_tokens_leaves_room_for_the_text(max_tokens: int, make_fm: ModelFactory) -> None:
    with pytest.raises(ModelError, match="needs 2 for tokens of its own") as caught:
        make_fit(make_fm("bert"), tiny.processor("bert"), TEXT, max_tokens)
    assert "at least 3" in caught.value.remedy
    make_fit(make_fm("bert"), tiny.processor("bert"), TEXT, 3)


def with_more_tokens(tokenizer: Any) -> None:
    tokenizer.add_tokens(["ice"])


def with_padding_outside(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"pad_token": "[NEW PAD]"})


@pytest.mark.parametrize(
    ("change", "token"),
    [(with_more_tokens, "'ice'"), (with_padding_outside, r"'\[NEW PAD\]'")],
    ids=["token", "padding"],
)
def test_token_outside_of_the_table_is_refused(
    change: Callable[[Any], None], token: str, make_fm: ModelFactory
) -> None:
    processor = tiny.processor("bert")
    change(processor)
    outside = len(tiny.WORDS)
    with pytest.raises(ModelError, match=f"{token} has the id {outside}, the FM's embedding has {outside} rows"):
        make_fit(make_fm("bert"), processor, TEXT, 12)


def test_model_that_counts_positions_from_another_padding_is_refused(make_fm: ModelFactory) -> None:
    fm = make_fm("roberta")
    fm.config.pad_token_id = 0
    with pytest.raises(ModelError, match="pads with 1, the FM counts positions from its padding id 0"):
        make_fit(fm, tiny.processor("roberta"), TEXT, 12)


def test_model_whose_code_fixes_the_padding_is_asked_for_no_other(make_fm: ModelFactory) -> None:
    fm, processor = make_fm("mpnet"), tiny.processor("mpnet")
    fm.config.pad_token_id = 0  # of no consequence
    make_fit(fm, processor, TEXT, 12)
    processor.pad_token = "[UNK]"
    with pytest.raises(ModelError, match="pads with 0, the FM counts positions from its padding id 1"):
        make_fit(make_fm("mpnet"), processor, TEXT, 12)


def test_images_of_another_size_than_the_models_are_refused(make_fm: ModelFactory) -> None:
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    with pytest.raises(ModelError, match=r"own processor makes \(pixel_values \[1, 3, 16, 16\]\)"):
        make_fit(make_fm("vit"), processor, IMAGE, 12)


def test_answer_that_is_no_number_is_refused(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    with torch.no_grad():  # finite weights whose products are not
        fm.bert.encoder.layer[0].output.LayerNorm.weight.fill_(3e38)
    with pytest.raises(ModelError, match="NaN or infinity"):
        make_fit(fm, tiny.processor("bert"), TEXT, 12)


@every_architecture
def test_processor_that_survives_the_way_to_a_silo(model_type: str, tmp_path: Path) -> None:
    check_travels(tiny.processor(model_type), tiny.task_of(model_type), tmp_path)


def test_tokenizer_that_is_another_one_after_the_way_is_refused(tmp_path: Path) -> None:
    processor = tiny.processor("bert")
    save = processor.save_pretrained

    def lose_the_special_tokens(directory: Path) -> None:
        save(directory)
        content = json.loads((directory / "tokenizer.json").read_text())
        (directory / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))

    processor.save_pretrained = lose_the_special_tokens
    with pytest.raises(ModelError, match="another one after it was saved"):
        check_travels(processor, TEXT, tmp_path)


def test_padding_is_the_tokenizers_from_then_on(make_fm: ModelFactory) -> None:
    fm: nn.Module = make_fm("llama")
    fm.config.pad_token_id = 7
    make_fit(fm, tiny.processor("llama"), TEXT, 12)
    assert fm.config.pad_token_id == tiny.PADDING
