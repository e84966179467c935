"""A row serves every class with which transformers loads its model type: causal language models, tagging of tokens."""

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft.config import AdapterSection, TaskName
from fedpft.errors import ModelError
from fedpft.model.adapters import attach, extract, frozen_state, merge, plug_in
from fedpft.model.architectures import ARCHITECTURES, head_of, layers_of
from fedpft.model.loading import load_model, save_model
from fedpft.model.subffn import sub_ffns
from fedpft.proxy.bundle import Proxy, load_proxy, save_bundle
from fedpft.proxy.cut import cut, parameter_counts
from fedpft.proxy.selection import select
from fedpft.tasks import TASKS

# T tokens, V words
SEQUENCES = "AutoModelForSequenceClassification"  # which all other tests are about
TASK_OF: dict[str, TaskName] = {task.model: name for name, task in TASKS.items() if task.model != SEQUENCES}
DECODERS = "AutoModelForCausalLM"
K = 24
SETTINGS = AdapterSection(rank=2, alpha=6.0)
TAGGED = ["bert", "roberta", "xlm-roberta", "electra", "mpnet", "distilbert", "deberta-v2", "modernbert"]
CAUSAL = [name for name in ARCHITECTURES if name not in (*TAGGED, *tiny.IMAGES)]
Load = Callable[..., nn.Module]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """Writes a tiny FM of a class, and loads it for the task of that class."""

    def loaded(model_type: str, class_name: str, **settings: object) -> nn.Module:
        config = tiny.CONFIGS[model_type]()
        config.update({"num_labels": len(tiny.LABELS), **settings})
        written = tiny.randomise(getattr(transformers, class_name).from_config(config))
        written.save_pretrained(tmp_path / "fm")
        return load_model(tmp_path / "fm", TASK_OF[class_name], tiny.LABELS, seed=0)

    return loaded


every_class = pytest.mark.parametrize(
    ("model_type", "class_name"),
    [(name, "AutoModelForTokenClassification") for name in TAGGED] + [(name, DECODERS) for name in CAUSAL],
)
every_decoder = pytest.mark.parametrize("model_type", CAUSAL)
either_way = pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])


def tuned(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(model).items())}


@every_class
def test_whole_proxy_is_the_model_in_weights_outputs_and_gradients(
    model_type: str, class_name: str, load: Load
) -> None:
    fm, inputs = load(model_type, class_name), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    state, left = fm.state_dict(), proxy.state_dict()
    for layer, (path, ffn) in enumerate(sub_ffns(proxy).items()):
        for (part, _), wanted in zip(tiny.parts(path, ffn), tiny.ffns(state, model_type, layer), strict=True):
            for name, weight in wanted.items():
                assert tiny.same_bits(left.pop(f"{part}.{name}"), weight)
        for name in tiny.ffn_names(model_type, layer):
            del state[name]
    assert tiny.changed(state, left) == set()
    answers, gradients = [], []
    for model in (fm, proxy):
        first = layers_of(model)[0].get_submodule(ARCHITECTURES[model_type].attention[0]).weight.requires_grad_(True)
        out = model(**inputs)
        answers.append(out.logits.detach())
        gradients.append(torch.autograd.grad(out.logits.square().mean(), first)[0])
    assert answers[0].shape[:2] == inputs["input_ids"].shape
    assert answers[0].std() > 0.1
    assert gradients[0].norm() > 1e-3
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-5)


@every_class
def test_bundle_is_the_proxy_and_says_what_trains(model_type: str, class_name: str, load: Load, tmp_path: Path) -> None:
    fm, inputs = load(model_type, class_name), tiny.batch(model_type)
    proxy = Proxy(
        cut(fm, select(fm, tiny.by_weights(neurons=K))),
        tiny.processor(model_type),
        TASK_OF[class_name],
        tiny.LABELS,
        12,
        (),
    )
    save_bundle(proxy, tmp_path / "bundle")
    received = load_proxy(tmp_path / "bundle").model
    assert tiny.changed(proxy.model.state_dict(), received.state_dict()) == set()
    assert torch.equal(tiny.logits(received, inputs), tiny.logits(proxy.model, inputs))
    causal = class_name == DECODERS
    heads = () if causal else ("head", "classifier") if model_type == "modernbert" else ("classifier",)
    assert head_of(received) == head_of(fm) == heads
    attach(received, SETTINGS, seed=0)
    assert all(".lora_" in name for name in extract(received)) == causal


@every_class
def test_adapter_of_a_proxy_merged_into_the_fm_is_loaded_by_plain_transformers(
    model_type: str, class_name: str, load: Load, tmp_path: Path
) -> None:
    fm, inputs = load(model_type, class_name), tiny.batch(model_type)
    untouched = tiny.logits(fm, inputs)
    attach(fm, SETTINGS, seed=0)
    selection = select(fm, tiny.by_weights(neurons=K))
    plug_in(fm, tuned(cut(fm, selection)), selection.layers, selection.neurons)
    wanted = tiny.logits(fm, inputs)
    assert (wanted - untouched).abs().max() > 0.1
    merge(fm)
    save_model(fm, tiny.processor(model_type), tmp_path / "merged")
    loaded = getattr(transformers, class_name).from_pretrained(tmp_path / "merged").eval()
    assert tiny.changed(fm.state_dict(), loaded.state_dict()) == set()
    torch.testing.assert_close(tiny.logits(loaded, inputs), wanted, rtol=1e-4, atol=1e-4)


@every_decoder
def test_the_loss_of_a_decoder_is_that_of_its_own_logits(model_type: str, load: Load) -> None:
    fm, inputs = load(model_type, DECODERS), tiny.batch(model_type)
    batch = {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    with torch.no_grad():
        wanted = fm(**batch).loss
        torch.testing.assert_close(TASKS[TASK_OF[DECODERS]].loss(fm, batch), wanted, rtol=1e-5, atol=1e-5)


@every_decoder
def test_all_that_a_decoder_has_on_top_is_counted_with_its_embeddings(model_type: str, load: Load) -> None:
    fm = load(model_type, DECODERS)
    counts = parameter_counts(fm)
    assert sum(counts.values()) == sum(parameter.numel() for parameter in fm.parameters())
    inside = sum(parameter.numel() for parameter in layers_of(fm).parameters())
    assert counts["embeddings"] == sum(parameter.numel() for parameter in fm.parameters()) - inside


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text"])
@either_way
def test_embeddings_travel_once_if_they_are_shared(model_type: str, tied: bool, load: Load, tmp_path: Path) -> None:
    fm = load(model_type, DECODERS, tie_word_embeddings=tied)
    embedding, last = fm.get_input_embeddings(), fm.get_output_embeddings()
    assert (last.weight is embedding.weight) == tied
    model = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    save_bundle(Proxy(model, tiny.processor(model_type), TASK_OF[DECODERS], tiny.LABELS, 12, ()), tmp_path / "bundle")
    kept = load_file(tmp_path / "bundle" / "model.safetensors")
    assert kept.keys() == frozen_state(fm).keys() - {
        name for layer in range(tiny.L) for name in tiny.ffn_names(model_type, layer)
    } | {name for name in model.state_dict() if ".w_" in name or ".b_" in name}
    assert sum(tuple(tensor.shape) == tuple(last.weight.shape) for tensor in kept.values()) == (1 if tied else 2)
    received = load_proxy(tmp_path / "bundle").model
    assert (received.get_output_embeddings().weight is received.get_input_embeddings().weight) == tied
    assert torch.equal(received.get_output_embeddings().weight, last.weight)


@either_way
def test_decoder_whose_last_projection_is_missing_is_refused_unless_it_is_the_embedding(
    tied: bool, load: Load, tmp_path: Path
) -> None:
    load("llama", DECODERS, tie_word_embeddings=tied)
    file = tmp_path / "fm" / "model.safetensors"
    tensors = load_file(file)
    assert ("lm_head.weight" in tensors) != tied
    save_file({n: t for n, t in tensors.items() if n != "lm_head.weight"}, file, metadata={"format": "pt"})
    if tied:
        load_model(tmp_path / "fm", TASK_OF[DECODERS], tiny.LABELS, seed=0)
    else:
        with pytest.raises(ModelError, match=r"the weights lack lm_head\.weight"):
            load_model(tmp_path / "fm", TASK_OF[DECODERS], tiny.LABELS, seed=0)
