"""Loading and saving FMs: what comes back, and one clear error for each directory that cannot be used."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from conftest import ModelFactory
from safetensors.torch import load_file, save_file

from fedpft.architectures import ARCHITECTURES
from fedpft.errors import ModelError
from fedpft.models import empty_model, load_model, load_processor, pad_alike, prepare, save_model

FM = Callable[[str], Path]
every_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)


@every_architecture
def test_loaded_model_is_the_saved_one_frozen_and_without_dropout(model_type: str, fm_directory: FM) -> None:
    directory = fm_directory(model_type)
    model = load_model(directory, tiny.task_of(model_type), tiny.LABELS, seed=0)
    plain = tiny.AUTO[tiny.task_of(model_type)].from_pretrained(directory, num_labels=len(tiny.LABELS))
    assert tiny.changed(plain.state_dict(), model.state_dict()) == set()
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert tuple(model.config.id2label.values()) == tiny.LABELS


def test_fresh_head_is_drawn_from_the_seed_and_nothing_else(tmp_path: Path) -> None:
    directory = tiny.write_model("bert", tmp_path, labels=2)  # its head has 2 rows, 3 are wanted

    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(hash(directory) % 1000 + len(drawn))  # the caller's own random numbers play no part
        return load_model(directory, "sequence-classification", tiny.LABELS, seed=seed).classifier.weight

    drawn: list[torch.Tensor] = []
    for seed in (7, 7, 8):
        drawn.append(head(seed))
    assert drawn[0].shape == (3, tiny.D)
    assert drawn[0].std() > 0
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_loading_leaves_the_callers_random_numbers_alone(tmp_path: Path) -> None:
    directory = tiny.write_model("bert", tmp_path, labels=2)
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load_model(directory, "sequence-classification", tiny.LABELS, seed=0)
    assert torch.equal(torch.rand(3), wanted)


def test_checkpoints_own_head_is_kept_where_it_fits(fm_directory: FM) -> None:
    models = [load_model(fm_directory("bert"), "sequence-classification", tiny.LABELS, seed=seed) for seed in (1, 2)]
    assert torch.equal(models[0].classifier.weight, models[1].classifier.weight)


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere: no config\.json there"):
        load_model(tmp_path / "nowhere", "sequence-classification", tiny.LABELS, seed=0)


def test_model_type_that_has_no_row_is_refused_with_the_list_of_those_that_have(tmp_path: Path) -> None:
    transformers.DistilBertConfig(n_layers=1, dim=8, hidden_dim=8, n_heads=1).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'distilbert' is not supported") as caught:
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)
    assert all(model_type in caught.value.remedy for model_type in ARCHITECTURES)


def test_model_type_unknown_to_transformers_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)


def test_config_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)


def test_model_of_another_task_is_refused(fm_directory: FM) -> None:
    with pytest.raises(ModelError, match="cannot be loaded for image-classification"):
        load_model(fm_directory("bert"), "image-classification", tiny.LABELS, seed=0)


@pytest.mark.parametrize("damage", ["gone", "cut short", "not safetensors"])
def test_damaged_weights_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    weights = tiny.write_model("bert", tmp_path) / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    if damage != "gone":
        weights.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"not a model")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)
    assert "\n" not in str(caught.value)


def without_a_layer_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["bert.encoder.layer.2.intermediate.dense.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def with_another_config(directory: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "intermediate_size": 2 * tiny.F}))


@pytest.mark.parametrize("damage", [without_a_layer_tensor, with_another_config])
def test_layer_whose_weights_are_not_there_is_not_drawn_at_random(
    damage: Callable[[Path], None], tmp_path: Path
) -> None:
    damage(tiny.write_model("bert", tmp_path))
    with pytest.raises(ModelError, match=r"has no bert\.encoder\.layer\.\d\.intermediate\.dense"):
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)


@every_architecture
def test_processor_comes_back_and_its_padding_is_the_models(model_type: str, fm_directory: FM) -> None:
    task = tiny.task_of(model_type)
    processor = load_processor(fm_directory(model_type), task)
    if task == "sequence-classification":
        model = load_model(fm_directory(model_type), task, tiny.LABELS, seed=0)
        assert processor.pad_token_id == model.config.pad_token_id == tiny.PADDING
        assert processor("the red bird")["input_ids"] == [
            tiny.WORDS.index(w) for w in ("[CLS]", "the", "red", "bird", "[SEP]")
        ]


def test_causal_model_without_padding_token_pads_with_the_end_of_text(tmp_path: Path) -> None:
    tiny.write_model("gpt2", tmp_path)
    tokenizer = tiny.processor("gpt2")
    tokenizer.add_special_tokens({"eos_token": "[SEP]"})
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    config.pad_token_id, config.eos_token_id = None, tiny.WORDS.index("[SEP]")
    config.save_pretrained(tmp_path)
    model = load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)
    padding = load_processor(tmp_path, "sequence-classification").pad_token_id
    assert padding == model.config.pad_token_id == tiny.WORDS.index("[SEP]")


def test_directory_without_a_processor_is_refused(tmp_path: Path) -> None:
    tiny.CONFIGS["bert"]().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_processor(tmp_path, "sequence-classification")
    with pytest.raises(ModelError, match="holds no tokenizer"):
        load_processor(tmp_path, "image-classification")


@every_architecture
def test_saved_model_is_loaded_by_plain_transformers(model_type: str, make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm(model_type)
    save_model(fm, tiny.processor(model_type), tmp_path)
    loaded = tiny.AUTO[tiny.task_of(model_type)].from_pretrained(tmp_path).eval()
    assert tuple(loaded.config.id2label.values()) == tiny.LABELS
    assert torch.equal(tiny.logits(loaded, tiny.batch(model_type)), tiny.logits(fm, tiny.batch(model_type)))


@every_architecture
def test_empty_model_has_the_asked_number_of_layers_and_the_fms_shapes(model_type: str, fm_directory: FM) -> None:
    task = tiny.task_of(model_type)
    fm = load_model(fm_directory(model_type), task, tiny.LABELS, seed=0)
    shapes = {name: tensor.shape for name, tensor in fm.state_dict().items()}
    empty = empty_model(fm_directory(model_type), task, tiny.L)
    config_labels = len(empty.config.id2label)
    assert {n: t.shape for n, t in empty.state_dict().items() if not n.startswith(ARCHITECTURES[model_type].head)} == {
        n: s for n, s in shapes.items() if not n.startswith(ARCHITECTURES[model_type].head)
    }
    assert config_labels == len(tiny.LABELS)
    assert len(empty_model(fm_directory(model_type), task, 2).state_dict()) < len(shapes)


@pytest.mark.parametrize("end", [3, [3, 5]], ids=["one end of text", "two"])
def test_prepare_freezes_and_returns_the_model_itself(end: int | list[int]) -> None:
    model = transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=9, n_positions=4, eos_token_id=end)
    ).train()
    assert prepare(model) is model
    assert not model.training
    assert model.config.pad_token_id == 3
    assert model.config.use_cache is False


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_padding_does_not_change_what_a_causal_classifier_says(model_type: str, tmp_path: Path) -> None:
    directory = tiny.write_model(model_type, tmp_path)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["pad_token_id"] = None
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    model = load_model(directory, "sequence-classification", tiny.LABELS, seed=0)
    processor = load_processor(directory, "sequence-classification")
    pad_alike(model, processor)
    texts = ["the red bird", "the red bird moves the blue fish"]
    padded = model(**processor(texts, padding=True, return_tensors="pt")).logits
    alone = model(**processor(texts[:1], return_tensors="pt")).logits
    torch.testing.assert_close(padded[:1], alone)
