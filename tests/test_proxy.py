"""From the FM to the proxy and to the directory that is sent: what is in it, and what is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from conftest import ModelFactory
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedpft.config import AdapterSection
from fedpft.errors import ModelError
from fedpft.model import adapters
from fedpft.model.architectures import config_of, layer_outputs, layers_of, layers_path
from fedpft.model.loading import load_model, load_processor
from fedpft.model.subffn import sub_ffns
from fedpft.proxy.bundle import Proxy, apply_patch, check_finite, load_proxy, patch, save_bundle
from fedpft.proxy.cut import PARTS, cut, parameter_counts
from fedpft.proxy.importance import by_saliency
from fedpft.proxy.selection import Selection, load_selection, save_selection, select

FM = Callable[[str], Path]
K = 24
every_kind = pytest.mark.parametrize("model_type", tiny.KINDS)


def published_choice(fm: nn.Module, model_type: str, layer: int, count: int) -> Tensor:
    """The published code: the norm of the concatenated weights of each neuron, top K, sorted; of each expert."""
    chosen = []
    for ffn in tiny.ffns(fm.state_dict(), model_type, layer):
        rows = torch.cat([ffn[name] for name in ("w_in", "w_gate", "w_out") if name in ffn], dim=1)
        chosen.append(torch.norm(rows, dim=1).topk(count).indices.sort().values)
    return torch.stack(chosen) if len(chosen) > 1 else chosen[0]


def bundle_of(fm: nn.Module, model_type: str, directory: Path, **settings: object) -> tuple[Proxy, Selection]:
    selection = select(fm, tiny.by_weights(**settings))
    compressed = tuple(layer for layer, _ in selection.matched)
    task, processor = tiny.task_of(model_type), tiny.processor(model_type)
    proxy = Proxy(cut(fm, selection), processor, task, tiny.LABELS, 12, compressed)
    save_bundle(proxy, directory)
    return proxy, selection


def contents(directory: Path) -> dict[str, bytes]:
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


# --- saliency and selection ---


@every_kind
def test_saliency_is_the_norm_of_all_weights_of_a_neuron(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    for layer, scores in enumerate(select(fm, tiny.by_weights()).saliency):
        ffns = tiny.ffns(fm.state_dict(), model_type, layer)
        assert scores.shape == ((len(ffns), tiny.F) if len(ffns) > 1 else (tiny.F,))
        for ffn, own in zip(ffns, scores.view(len(ffns), -1), strict=True):
            squares = sum(ffn[name].double().square().sum(1) for name in ("w_in", "w_gate", "w_out") if name in ffn)
            torch.testing.assert_close(own.double(), squares.sqrt(), rtol=1e-6, atol=0)


@every_kind
@pytest.mark.parametrize("count", [1, K, tiny.F - 1])
def test_neurons_are_those_of_the_published_code(model_type: str, count: int, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    selection = select(fm, tiny.by_weights(neurons=count, keep_layers=(0, -1)))
    for layer in (1, 2):
        assert torch.equal(selection.neurons[layer], published_choice(fm, model_type, layer, count))
    for layer in (0, 3):
        for kept in selection.neurons[layer].view(-1, tiny.F):
            assert kept.tolist() == list(range(tiny.F))
    assert selection.matched == ((1, 1), (2, 2))


def test_of_equally_salient_neurons_the_lower_index_is_kept() -> None:
    assert by_saliency(torch.tensor([2.0, 1.0, 3.0, 2.0, 2.0])).kept(3).tolist() == [0, 2, 3]


def test_twin_neurons_of_an_fm_tie(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    ffn = tiny.ffn(fm.state_dict(), "bert", 1)
    scores = select(fm, tiny.by_weights()).saliency[1]
    best, worst = int(scores.argmax()), int(scores.argmin())
    ffn["w_in"][worst], ffn["w_out"][worst] = ffn["w_in"][best], ffn["w_out"][best]
    assert select(fm, tiny.by_weights(neurons=1)).neurons[1].tolist() == [min(best, worst)]


def test_default_keeps_as_many_neurons_as_the_hidden_size(make_fm: ModelFactory) -> None:
    assert [len(n) for n in select(make_fm("bert"), tiny.by_weights()).neurons] == [tiny.F, tiny.D, tiny.D, tiny.F]


def test_saliency_kept_is_the_share_of_squared_weights(make_fm: ModelFactory) -> None:
    fm = make_fm("llama")
    selection = select(fm, tiny.by_weights(neurons=K))
    ffn = tiny.ffn(fm.state_dict(), "llama", 2)
    weights = torch.cat([ffn[name] for name in ("w_in", "w_gate", "w_out")], dim=1).square().sum(1)
    share = float(weights[selection.neurons[2]].sum() / weights.sum())
    assert selection.saliency_kept == [1.0, pytest.approx(selection.saliency_kept[1]), pytest.approx(share), 1.0]
    assert K / tiny.F < share < 1


@pytest.mark.parametrize(("layers", "kept", "matched"), [
    (2, (0, 3), ()),
    (3, (0, 2, 3), ((1, 2),)),
    (4, (0, 1, 2, 3), ()),
])  # fmt: skip
def test_dropping_layers_keeps_the_ends_and_spreads_the_rest(
    layers: int, kept: tuple[int, ...], matched: tuple[tuple[int, int], ...], make_fm: ModelFactory
) -> None:
    selection = select(make_fm("bert"), tiny.by_weights(keep="layers", layers=layers))
    assert selection.layers == kept
    assert selection.matched == matched
    assert [len(neurons) for neurons in selection.neurons] == [tiny.F] * layers


def test_kept_layer_answers_for_the_dropped_layers_that_follow_it(tmp_path: Path) -> None:
    directory = tiny.write_model("gpt2", tmp_path, num_hidden_layers=6)
    fm = load_model(directory, "sequence-classification", tiny.LABELS, seed=0)
    selection = select(fm, tiny.by_weights(keep="layers", layers=4))
    assert selection.layers == (0, 2, 3, 5)
    assert selection.matched == ((1, 2), (2, 4))
    assert [share > 0 for share in selection.saliency_kept] == [True, False, True, True, False, True]


@pytest.mark.parametrize(("settings", "message"), [
    ({"neurons": tiny.F + 1}, f"proxy.neurons is {tiny.F + 1}, the FM has {tiny.F}"),
    ({"keep_layers": (0, tiny.L)}, f"proxy.keep_layers names layer {tiny.L}, the FM has {tiny.L}"),
    ({"keep_layers": (-tiny.L - 1,)}, "proxy.keep_layers names layer -5"),
    ({"keep": "layers", "layers": tiny.L + 1}, f"proxy.layers is {tiny.L + 1}, the FM has {tiny.L}"),
])  # fmt: skip
def test_more_than_the_fm_has_is_refused(settings: dict[str, object], message: str, make_fm: ModelFactory) -> None:
    with pytest.raises(ModelError, match=message):
        select(make_fm("bert"), tiny.by_weights(**settings))


# --- the proxy ---


@every_kind
def test_proxy_differs_from_the_fm_in_compressed_layers_only(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    before = tiny.snapshot(fm)
    selection = select(fm, tiny.by_weights(neurons=K))
    proxy = cut(fm, selection)
    assert tiny.changed(before, fm.state_dict()) == set()  # the FM itself stays whole
    left = proxy.state_dict()
    for layer, (path, module) in enumerate(sub_ffns(proxy).items()):
        parts, ffns = tiny.parts(path, module), tiny.ffns(before, model_type, layer)
        assert module.neurons == len(parts) * (K if layer in (1, 2) else tiny.F)
        for (part, _), ffn, kept in zip(parts, ffns, selection.neurons[layer].view(len(parts), -1), strict=True):
            assert bool((kept.diff() > 0).all())
            for name, weight in ffn.items():
                wanted = weight if name == "b_out" else weight[kept]
                assert tiny.same_bits(left.pop(f"{part}.{name}"), wanted)
        for name in tiny.ffn_names(model_type, layer):
            del before[name]
    assert tiny.changed(before, left) == set()


@every_kind
def test_proxy_computes_what_the_fm_does_with_the_other_neurons_silenced(
    model_type: str, make_fm: ModelFactory
) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    selection = select(fm, tiny.by_weights(neurons=K))
    proxy = cut(fm, selection)
    whole = tiny.logits(fm, inputs)
    for layer in (1, 2):
        ffns = tiny.ffns(fm.state_dict(), model_type, layer)
        for ffn, kept in zip(ffns, selection.neurons[layer].view(len(ffns), -1).tolist(), strict=True):
            ffn["w_out"][[neuron for neuron in range(tiny.F) if neuron not in kept]] = 0.0
    wanted = tiny.logits(fm, inputs)
    assert (wanted - whole).abs().max() > 0.01
    torch.testing.assert_close(tiny.logits(proxy, inputs), wanted, rtol=1e-5, atol=2e-5)


@every_kind
def test_proxy_of_fewer_layers_computes_what_those_layers_do(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(keep="layers", layers=3)))
    del layers_of(fm)[1]
    config = config_of(fm.config)
    config.num_hidden_layers = 3
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[layer] for layer in (0, 2, 3)]
    torch.testing.assert_close(tiny.logits(proxy, inputs), tiny.logits(fm, inputs), rtol=1e-5, atol=2e-5)
    assert config_of(proxy.config).num_hidden_layers == 3


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_proxy_of_fewer_layers_writes_with_a_cache_what_it_writes_without(model_type: str, tmp_path: Path) -> None:
    config = tiny.CONFIGS[model_type]()
    fm = tiny.randomise(transformers.AutoModelForCausalLM.from_config(config)).eval()
    fm.trained_modules = ()
    proxy = cut(fm, select(fm, tiny.by_weights(keep="layers", layers=3)))
    prompt = torch.tensor([[2, 7, 9, 5]])
    written = [
        proxy.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cached, eos_token_id=None)
        for cached in (True, False)
    ]
    assert written[0].shape == (1, 12)
    assert torch.equal(*written)


def test_no_layer_is_dropped_of_an_fm_whose_layers_count_themselves(tmp_path: Path) -> None:
    directory = tiny.write_model("gpt2", tmp_path, scale_attn_by_inverse_layer_idx=True)
    fm = load_model(directory, "sequence-classification", tiny.LABELS, seed=0)
    cut(fm, select(fm, tiny.by_weights(neurons=K)))
    with pytest.raises(ModelError, match="scales a layer's attention by its number") as caught:
        cut(fm, select(fm, tiny.by_weights(keep="layers", layers=3)))
    assert "proxy.keep: neurons" in caught.value.remedy


def test_parameters_are_counted_without_the_head(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    counts = parameter_counts(fm)
    assert sum(counts.values()) == sum(p.numel() for p in fm.bert.parameters())
    assert sum(counts.values()) - counts["embeddings"] == sum(p.numel() for p in fm.bert.encoder.parameters())
    dropped = 2 * (tiny.F - K) * (2 * tiny.D + 1)
    assert parameter_counts(proxy) == counts | {"ffn": counts["ffn"] - dropped}


@every_kind
def test_every_parameter_is_counted_in_its_part(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    ffn = {name for layer in range(tiny.L) for name in tiny.ffn_names(model_type, layer)}
    head, wanted = tiny.head_names(fm.state_dict(), model_type), dict.fromkeys(PARTS, 0)
    for name, parameter in fm.named_parameters():
        if name not in head:
            is_norm = "norm" in name.lower() or "ln_" in name or "layer_scale" in name
            is_ffn = name in ffn or name.endswith("mlp.gate.weight")  # a router
            inside = "norms" if is_norm else "ffn" if is_ffn else "attention"
            wanted[inside if name.startswith(layers_path(fm)) else "embeddings"] += parameter.numel()
    assert min(wanted.values()) > 0
    assert parameter_counts(fm) == wanted
    whole = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    adapters.attach(whole, AdapterSection(), seed=0)
    assert parameter_counts(whole) == wanted


WHOLE: dict[str, dict[str, Any]] = {
    "all neurons": {"neurons": "all"},
    "as many as there are": {"neurons": tiny.F},
    "every layer is kept whole": {"neurons": K, "keep_layers": (0, 1, 2, -1)},
    "all layers": {"keep": "layers", "layers": tiny.L},
}


@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE)
def test_proxy_that_is_the_whole_fm_is_known(settings: dict[str, Any], make_fm: ModelFactory) -> None:
    assert select(make_fm("bert"), tiny.by_weights(**settings)).whole


@pytest.mark.parametrize("settings", [{"neurons": tiny.F - 1}, {"keep": "layers", "layers": tiny.L - 1}])
def test_proxy_that_lacks_something_is_not_whole(settings: dict[str, Any], make_fm: ModelFactory) -> None:
    assert not select(make_fm("bert"), tiny.by_weights(**settings)).whole


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bundle_that_holds_nan_is_refused_by_who_made_it_and_by_who_gets_it(
    value: float, make_fm: ModelFactory, tmp_path: Path
) -> None:
    proxy, _ = bundle_of(make_fm("bert"), "bert", tmp_path, neurons=K)
    name, ffn = next(iter(sub_ffns(proxy.model).items()))
    ffn.w_out.data[-1, -1] = value
    save_bundle(proxy, tmp_path)
    for look in (lambda: check_finite(proxy.model, "it"), lambda: load_proxy(tmp_path)):
        with pytest.raises(ModelError, match=rf"{name}\.w_out holds NaN or infinity"):
            look()


def test_pooler_that_was_drawn_trains_at_the_silo_too(tmp_path: Path) -> None:
    fm = load_model(tiny.without_pooler(tmp_path / "fm"), "sequence-classification", tiny.LABELS, seed=0)
    bundle_of(fm, "bert", tmp_path / "bundle", neurons=K)
    received = load_proxy(tmp_path / "bundle").model
    for model in (fm, received):
        adapters.attach(model, AdapterSection(), seed=0)
    ours, theirs = adapters.extract(fm), adapters.extract(received)
    assert ours.keys() == theirs.keys()
    for name in ("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight"):
        assert received.get_parameter(name).requires_grad
        assert torch.equal(ours[name], theirs[name])


# --- the bundle ---


@every_kind
@pytest.mark.parametrize("settings", [{"neurons": K}, {"keep": "layers", "layers": 3}], ids=["neurons", "layers"])
def test_loaded_bundle_is_the_saved_proxy(
    model_type: str, settings: dict[str, object], make_fm: ModelFactory, tmp_path: Path
) -> None:
    proxy, _ = bundle_of(make_fm(model_type), model_type, tmp_path, **settings)
    loaded = load_proxy(tmp_path)
    assert tiny.changed(proxy.model.state_dict(), loaded.model.state_dict()) == set()
    inputs = tiny.batch(model_type)
    assert torch.equal(tiny.logits(loaded.model, inputs), tiny.logits(proxy.model, inputs))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert (loaded.task, loaded.labels, loaded.max_tokens) == (proxy.task, proxy.labels, 12)
    assert loaded.compressed == proxy.compressed
    if proxy.task == "sequence-classification" and model_type != tiny.OWN_TOKENIZER:
        assert loaded.processor("a warm stone")["input_ids"] == proxy.processor("a warm stone")["input_ids"]


@every_kind
def test_no_weight_of_a_dropped_neuron_is_in_the_bundle(model_type: str, make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm(model_type)
    _, selection = bundle_of(fm, model_type, tmp_path, neurons=K)
    files = contents(tmp_path)
    weights = files["model.safetensors"]
    for layer in (1, 2):
        ffns = tiny.ffns(fm.state_dict(), model_type, layer)
        for ffn, kept in zip(ffns, selection.neurons[layer].view(len(ffns), -1).tolist(), strict=True):
            for name in ffn.keys() & {"w_in", "w_gate", "w_out"}:
                for neuron in range(tiny.F):
                    row = ffn[name][neuron].contiguous().numpy().tobytes()
                    if neuron in kept:
                        assert row in weights  # the search would find one
                    else:
                        assert not any(row in file or row[:8] in file for file in files.values())


def test_dropped_layer_is_not_in_the_bundle(make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm("bert")
    bundle_of(fm, "bert", tmp_path, keep="layers", layers=3)
    weights = (tmp_path / "model.safetensors").read_bytes()

    def held(layer: int) -> list[bool]:
        tensors = [p for n, p in fm.state_dict().items() if n.startswith(f"bert.encoder.layer.{layer}.")]
        return [tensor.flatten()[:8].numpy().tobytes() in weights for tensor in tensors]

    assert not any(held(1))
    assert sum(held(2)) >= 14  # all but the transposed output projection and a column of it


@every_kind
def test_bundle_says_nothing_of_where_the_fm_lies(model_type: str, fm_directory: FM, tmp_path: Path) -> None:
    place, task = fm_directory(model_type), tiny.task_of(model_type)
    fm = load_model(place, task, tiny.LABELS, seed=0)
    fm.config._name_or_path = str(place)  # as transformers has it
    selection = select(fm, tiny.by_weights(neurons=K))
    save_bundle(Proxy(cut(fm, selection), load_processor(place, task), task, tiny.LABELS, 12, (1, 2)), tmp_path)
    for name, file in contents(tmp_path).items():
        assert str(place).encode() not in file, name
        assert place.name.encode() not in file, name


def test_bundle_does_not_say_which_neurons_were_kept(make_fm: ModelFactory, tmp_path: Path) -> None:
    _, selection = bundle_of(make_fm("bert"), "bert", tmp_path, neurons=K)
    assert json.loads((tmp_path / "proxy.json").read_text())["neurons"] == [tiny.F, K, K, tiny.F]
    names = load_file(tmp_path / "model.safetensors").keys()
    assert not any("neurons" in name or "saliency" in name for name in names)
    indices = [selection.neurons[1].numpy().tobytes(), selection.neurons[1].int().numpy().tobytes()]
    assert not any(index in file for index in indices for file in contents(tmp_path).values())


def test_bundle_of_a_proxy_with_an_adapter_is_the_bundle_without(make_fm: ModelFactory, tmp_path: Path) -> None:
    fm = make_fm("bert")
    bundle_of(fm, "bert", tmp_path / "without", neurons=K)
    adapters.attach(fm, AdapterSection(rank=2), seed=0)
    bundle_of(fm, "bert", tmp_path / "with", neurons=K)
    assert contents(tmp_path / "with") == contents(tmp_path / "without")


def damage_json(directory: Path, **changes: object) -> None:
    file = directory / "proxy.json"
    description = json.loads(file.read_text())
    description.update(changes)
    file.write_text(json.dumps({name: value for name, value in description.items() if value is not None}))


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "no proxy.json": lambda d: (d / "proxy.json").unlink(),
    "proxy.json is not JSON": lambda d: (d / "proxy.json").write_text("{"),
    "no labels": lambda d: damage_json(d, labels=None),
    "no max_tokens": lambda d: damage_json(d, max_tokens=None),
    "counts are no list": lambda d: damage_json(d, neurons="many"),
    "too few neurons": lambda d: damage_json(d, neurons=[1, 1, 1, 1]),
    "more neurons than the FM has": lambda d: damage_json(d, neurons=[tiny.F, K, K, 2 * tiny.F]),
    "fewer layers": lambda d: damage_json(d, neurons=[tiny.F, K, K]),
    "unknown task": lambda d: damage_json(d, task="folding"),
    "another format": lambda d: damage_json(d, format=99),
    "no config.json": lambda d: (d / "config.json").unlink(),
    "no weights": lambda d: (d / "model.safetensors").unlink(),
    "weights cut short": lambda d: cut_short(d / "model.safetensors"),
    "empty weights": lambda d: save_file({}, d / "model.safetensors"),
    "no tokenizer": lambda d: (d / "tokenizer.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_broken_bundle_is_refused_in_one_line_that_names_it(damage: str, make_fm: ModelFactory, tmp_path: Path) -> None:
    bundle_of(make_fm("bert"), "bert", tmp_path, neurons=K)
    DAMAGES[damage](tmp_path)
    with pytest.raises(ModelError) as caught:
        load_proxy(tmp_path)
    assert str(tmp_path) in caught.value.message
    assert "\n" not in str(caught.value)


# --- the server's own record ---


def test_selection_comes_back(make_fm: ModelFactory, tmp_path: Path) -> None:
    selection = select(make_fm("gpt2"), tiny.by_weights(neurons=K))
    save_selection(selection, tmp_path / "selection.safetensors")
    loaded = load_selection(tmp_path / "selection.safetensors")
    assert loaded.layers == selection.layers
    assert [n.tolist() for n in loaded.neurons] == [n.tolist() for n in selection.neurons]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.saliency, selection.saliency, strict=True))
    assert loaded.matched == selection.matched


@pytest.mark.parametrize("content", [None, b"", b"no tensors at all"])
def test_selection_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "selection.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=r"selection\.safetensors"):
        load_selection(path)


# --- patches ---


def patched(make_fm: ModelFactory) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """A proxy, an aligned copy of it, and the patch between them."""
    fm = make_fm("bert")
    selection = select(fm, tiny.by_weights(neurons=K))
    before, after = cut(fm, selection), cut(fm, selection)
    rows, norms = (
        torch.tensor([3, 20]),
        [f"bert.encoder.layer.1.output.LayerNorm.{kind}" for kind in ("weight", "bias")],
    )
    ffn = list(sub_ffns(after).values())[1]
    for name in ("w_in", "b_in", "w_out"):
        getattr(ffn, name).data[rows] += 1.0
    for tensor in (ffn.b_out, *(after.get_parameter(name) for name in norms)):
        tensor.data += 1.0
    return before, after, patch(after, {1: rows}, norms)


def test_patch_makes_of_the_old_proxy_the_new_one(make_fm: ModelFactory) -> None:
    before, after, tensors = patched(make_fm)
    assert len(tiny.changed(before.state_dict(), after.state_dict())) == 6
    apply_patch(before, tensors)
    assert tiny.changed(before.state_dict(), after.state_dict()) == set()


def test_patch_holds_the_changed_rows_and_no_more(make_fm: ModelFactory) -> None:
    _, _, tensors = patched(make_fm)
    sizes = {name.removeprefix("bert.encoder.layer.1."): tuple(tensor.shape) for name, tensor in tensors.items()}
    assert sizes == {
        "output.LayerNorm.weight": (tiny.D,),
        "output.LayerNorm.bias": (tiny.D,),
        "intermediate.b_out": (tiny.D,),
        "intermediate.w_in@rows": (2,),
        "intermediate.w_in@values": (2, tiny.D),
        "intermediate.b_in@rows": (2,),
        "intermediate.b_in@values": (2,),
        "intermediate.w_out@rows": (2,),
        "intermediate.w_out@values": (2, tiny.D),
    }


def test_patch_fits_a_proxy_that_carries_an_adapter_and_leaves_it_alone(make_fm: ModelFactory) -> None:
    before, after, tensors = patched(make_fm)
    for model in (before, after):
        adapters.attach(model, AdapterSection(rank=2), seed=3)
    adapter = adapters.extract(before)
    apply_patch(before, tensors)
    assert tiny.changed(before.state_dict(), after.state_dict()) == set()
    assert tiny.changed(adapter, adapters.extract(before)) == set()


W_IN = "bert.encoder.layer.1.intermediate.w_in"
MISFITS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "unknown tensor": lambda t: t.update({"bert.no.such.weight": torch.zeros(3)}),
    "whole tensor of another shape": lambda t: t.update({"bert.encoder.layer.1.intermediate.b_out": torch.zeros(3)}),
    "row beyond the last": lambda t: t.update({f"{W_IN}@rows": torch.tensor([3, K], dtype=torch.int32)}),
    "negative row": lambda t: t.update({f"{W_IN}@rows": torch.tensor([-1, 3], dtype=torch.int32)}),
    "values of another shape": lambda t: t.update({f"{W_IN}@values": torch.zeros(2, tiny.D + 1)}),
    "more values than rows": lambda t: t.update({f"{W_IN}@values": torch.zeros(3, tiny.D)}),
    "values without rows": lambda t: t.pop(f"{W_IN}@rows"),
    "whole values without rows": lambda t: t.update(
        {"bert.encoder.layer.1.intermediate.b_out@values": torch.zeros(32)}
    ),
    "rows without values": lambda t: t.pop(f"{W_IN}@values"),
    "unknown kind": lambda t: t.update({"bert.encoder.layer.1.intermediate.b_out@columns": torch.zeros(tiny.D)}),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_patch_that_does_not_fit_changes_nothing(misfit: str, make_fm: ModelFactory) -> None:
    before, _, tensors = patched(make_fm)
    state = tiny.snapshot(before)
    MISFITS[misfit](tensors)
    with pytest.raises(ModelError, match=r"the patch's 'bert\..*' does not fit the proxy"):
        apply_patch(before, tensors)
    assert tiny.changed(state, before.state_dict()) == set()


def test_layer_outputs_agree_up_to_the_first_compressed_layer(make_fm: ModelFactory) -> None:
    fm, inputs = make_fm("gpt2"), tiny.batch("gpt2")
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K, keep_layers=(0, 1))))
    with torch.no_grad():
        for layer, (ours, theirs) in enumerate(
            zip(layer_outputs(proxy, range(4), inputs), layer_outputs(fm, range(4), inputs), strict=True)
        ):
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) == (layer < 2)


def test_a_variant_whose_ffn_is_elsewhere_is_named() -> None:
    config = transformers.Dinov2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        mlp_ratio=2,
        use_swiglu_ffn=True,
        image_size=8,
        patch_size=4,
    )
    model = transformers.Dinov2ForImageClassification(config)
    with pytest.raises(ModelError, match=r"dinov2 has no 'mlp\.fc1'"):
        select(model, tiny.by_weights())
