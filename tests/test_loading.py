"""Loading and saving FMs: what comes back, and one clear error for each directory that cannot be used."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import ModelFactory
from safetensors.torch import load_file, save_file

from fedpft.errors import ModelError
from fedpft.model.architectures import ARCHITECTURES, head_of, layers_path
from fedpft.model.compatibility import make_fit
from fedpft.model.loading import empty_model, load_model, load_processor, prepare, save_model

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
    transformers.MambaConfig(num_hidden_layers=1, hidden_size=8).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="'mamba' is not supported") as caught:
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
    with pytest.raises(ModelError, match=r"cannot be loaded|no model\.safetensors there") as caught:
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)
    assert "\n" not in str(caught.value)


# --- what transformers would make up, leave out or do instead ---


def config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def without(*names: str) -> Callable[[Path], None]:
    return lambda directory: weights(directory, lambda tensors: [tensors.pop(name) for name in names])


def spoiled(name: str, value: float) -> Callable[[Path], None]:
    return lambda directory: weights(directory, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def with_file(name: str, content: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_text(content)


def pickled(directory: Path) -> None:
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


def half_copied(directory: Path) -> None:
    index = {"metadata": {}, "weight_map": {"bert.pooler.dense.bias": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 133466304\n"
LAYER = "bert.encoder.layer.2.intermediate.dense.weight"
NOT_THE_FM: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a layer's tensor is gone": (without(LAYER), [LAYER, "(64, 32)"]),
    "a norm outside of the layers is gone": (
        without("bert.embeddings.LayerNorm.weight"),
        ["bert.embeddings.LayerNorm.weight"],
    ),
    "half of the pooler is gone": (without("bert.pooler.dense.bias"), ["bert.pooler.dense.bias"]),
    "another FFN size": (lambda d: config(d, intermediate_size=2 * tiny.F), ["(64,)", "(128,)"]),
    "a larger vocabulary": (
        lambda d: config(d, vocab_size=25),
        ["bert.embeddings.word_embeddings.weight", "(20, 32)", "(25, 32)"],
    ),
    "more positions": (
        lambda d: config(d, max_position_embeddings=50),
        ["position_embeddings", "(40, 32)", "(50, 32)"],
    ),
    "fewer layers than the weights": (lambda d: config(d, num_hidden_layers=3), ["bert.encoder.layer.3."]),
    "NaN in a layer": (spoiled(LAYER, float("nan")), [LAYER, "NaN"]),
    "infinity in an embedding": (
        spoiled("bert.embeddings.word_embeddings.weight", float("inf")),
        ["word_embeddings", "infinity"],
    ),
    "weights not fetched by git-lfs": (with_file("model.safetensors", POINTER), ["model.safetensors", "git-lfs"]),
    "tokenizer not fetched by git-lfs": (with_file("tokenizer.json", POINTER), ["tokenizer.json", "git lfs pull"]),
    "an adapter beside the FM": (with_file("adapter_config.json", "{}"), ["adapter_config.json"]),
    "two sets of weights": (with_file("model.safetensors.index.json", "{}"), ["both"]),
    "a distributed checkpoint beside it": (with_file("shard-00000-model-00001-of-00001.safetensors", ""), ["shards"]),
    "a pickle": (pickled, ["only pytorch_model.bin", "save_pretrained"]),
    "a shard is missing": (half_copied, ["model-00001-of-00002.safetensors"]),
    "quantized": (lambda d: config(d, quantization_config={"quant_method": "gptq"}), ["quantization_config"]),
    "layers of different shapes": (
        lambda d: config(d, per_layer_config={"1": {"intermediate_size": 8}}),
        ["per_layer_config"],
    ),
    "weights by another name": (lambda d: config(d, transformers_weights="x.safetensors"), ["transformers_weights"]),
    "parts fused": (lambda d: config(d, fusion_config={"patch_embeddings": True}), ["fusion_config"]),
    "no layers": (lambda d: config(d, num_hidden_layers=0), ["no layers"]),
    "quantized, and not saying so": (
        lambda d: weights(d, lambda tensors: tensors.update({LAYER: (100 * tensors[LAYER]).to(torch.int8)})),
        [LAYER, "I8"],
    ),
    "a number that is a word": (lambda d: config(d, hidden_size="big"), ["config.json", "hidden_size"]),
    "heads that do not divide": (lambda d: config(d, num_attention_heads=5), ["cannot be loaded"]),
    "an activation that nobody knows": (lambda d: config(d, hidden_act="nonsense"), ["nonsense"]),
    "config.json is a list": (with_file("config.json", "[]"), ["config.json"]),
    "config.json is not UTF-8": (lambda d: (d / "config.json").write_bytes(b"\xff{}"), ["config.json"]),
}


@pytest.mark.parametrize("fault", NOT_THE_FM)
def test_directory_that_is_not_the_fm_it_says_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    damage, named = NOT_THE_FM[fault]
    damage(tiny.write_model("bert", tmp_path))
    with pytest.raises(ModelError) as caught:
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)
    line = str(caught.value)
    assert not [name for name in named if name not in line], line
    assert str(tmp_path) in line
    assert "\n" not in line


def test_quantized_experts_are_refused(tmp_path: Path) -> None:
    tiny.write_model("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if ".experts.1." in name)
    save_file(tensors | {name: tensors[name].to(torch.int8)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{name} is stored as I8"):
        load_model(tmp_path, "sequence-classification", tiny.LABELS, seed=0)


SETTINGS_OF_ITS_LAST_USE = {
    "problem_type": "multi_label_classification",
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "chunk_size_feed_forward": 2,
    "_attn_implementation": "flash_attention_2",
    "attn_implementation": "flash_attention_2",
    "quantization_config": None,
    "auto_map": {"AutoModelForSequenceClassification": "modeling.Other", "AutoConfig": "configuration.Other"},
}


@pytest.mark.parametrize("setting", SETTINGS_OF_ITS_LAST_USE)
def test_what_the_last_user_wanted_of_the_fm_does_not_change_what_it_computes(
    setting: str, fm_directory: FM, tmp_path: Path
) -> None:
    directory, batch = tiny.write_model("bert", tmp_path), tiny.dataset("bert", 5).batch(torch.arange(5))
    config(directory, **{setting: SETTINGS_OF_ITS_LAST_USE[setting]})
    found, wanted = (
        load_model(d, "sequence-classification", tiny.LABELS, seed=0)(**batch)
        for d in (directory, fm_directory("bert"))
    )
    assert torch.equal(found.logits, wanted.logits)
    assert torch.equal(found.loss, wanted.loss)


def test_deit_that_was_saved_with_a_distillation_head_is_loaded_as_the_class_that_can_be_trained(
    fm_directory: FM, tmp_path: Path
) -> None:
    directory = tiny.write_model("deit", tmp_path)
    config(directory, architectures=["DeiTForImageClassificationWithTeacher"])
    fm = load_model(directory, "image-classification", tiny.LABELS, seed=0)
    same = load_model(fm_directory("deit"), "image-classification", tiny.LABELS, seed=0)
    assert torch.equal(tiny.logits(fm, tiny.batch("deit")), tiny.logits(same, tiny.batch("deit")))
    assert head_of(fm) == ("classifier",)


@every_architecture
def test_only_the_head_may_be_missing(model_type: str, make_fm: ModelFactory, fm_directory: FM, tmp_path: Path) -> None:
    task, row = tiny.task_of(model_type), ARCHITECTURES[model_type]
    whole = load_file(fm_directory(model_type) / "model.safetensors")
    shutil.copytree(fm_directory(model_type), tmp_path, dirs_exist_ok=True)
    elsewhere = tuple(f"{layers_path(make_fm(model_type))}{layer}." for layer in (0, 2, 3))  # one stands for all
    groups = {name.rpartition(".")[0] for name in whole if not name.startswith(elsewhere)}
    for group in sorted(groups):
        save_file(
            {name: tensor for name, tensor in whole.items() if name.rpartition(".")[0] != group},
            tmp_path / "model.safetensors",
            metadata={"format": "pt"},
        )
        drawn_here = f"{group}.".startswith(tuple(f"{m}." for m in tiny.HEADS[model_type])) or any(
            f".{module}." in f"{group}." for module in row.optional
        )
        if drawn_here:
            load_model(tmp_path, task, tiny.LABELS, seed=0)
        else:
            fault = "lack" if ".experts." not in group else "config.json"  # transformers puts them together as it loads
            with pytest.raises(ModelError, match=fault):
                load_model(tmp_path, task, tiny.LABELS, seed=0)


def test_pooler_that_the_checkpoint_lacks_is_drawn_from_the_seed_and_counts_as_head(tmp_path: Path) -> None:
    directory = tiny.without_pooler(tmp_path)
    first, again, other = (
        load_model(directory, "sequence-classification", tiny.LABELS, seed=seed) for seed in (1, 1, 2)
    )
    assert head_of(first) == ("classifier", "bert.pooler")
    assert tiny.changed(tiny.snapshot(first), tiny.snapshot(again)) == set()
    assert "bert.pooler.dense.weight" in tiny.changed(tiny.snapshot(first), tiny.snapshot(other))
    whole = load_model(tiny.write_model("bert", tmp_path / "whole"), "sequence-classification", tiny.LABELS, seed=1)
    assert head_of(whole) == ("classifier",)


@every_architecture
def test_processor_comes_back_and_its_padding_is_the_models(model_type: str, fm_directory: FM) -> None:
    task = tiny.task_of(model_type)
    processor = load_processor(fm_directory(model_type), task)
    if task == "sequence-classification":
        model = load_model(fm_directory(model_type), task, tiny.LABELS, seed=0)
        assert processor.pad_token_id == model.config.pad_token_id == tiny.PADDING
    if task == "sequence-classification" and model_type != tiny.OWN_TOKENIZER:
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
    found = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    head = tiny.head_names(shapes, model_type)
    assert {n: s for n, s in found.items() if n not in head} == {n: s for n, s in shapes.items() if n not in head}
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
    make_fit(model, processor, "sequence-classification", 10)
    texts = ["the red bird", "the red bird moves the blue fish"]
    padded = model(**processor(texts, padding=True, return_tensors="pt")).logits
    alone = model(**processor(texts[:1], return_tensors="pt")).logits
    torch.testing.assert_close(padded[:1], alone)
