"""Each row of the table against transformers' own module tree, and the parity of a whole proxy with its FM."""

from pathlib import Path

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fedpft.errors import ModelError
from fedpft.model.architectures import (
    ACTIVATION_NAMES,
    ARCHITECTURES,
    activation_of,
    architecture_of,
    base_name,
    base_of,
    head_of,
    in_head,
    is_post_norm,
    layer_outputs,
    layers_of,
    on_top,
    row,
)
from fedpft.model.loading import load_model
from fedpft.model.subffn import projections, sub_ffns
from fedpft.model.walk import LayerWalk
from fedpft.proxy.bundle import Proxy, load_proxy, save_bundle
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import select

every_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)


@every_architecture
def test_ffn_projections_are_those_that_transformers_names(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    for layer, module in enumerate(layers_of(fm)):
        for found, wanted in zip(projections(fm, module), tiny.ffns(fm.state_dict(), model_type, layer), strict=True):
            assert found.keys() == wanted.keys()
            for name in wanted:
                assert torch.equal(found[name], wanted[name])


@every_architecture
def test_norm_stands_right_before_or_right_after_the_ffn(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    table, post_norm = architecture_of(fm), is_post_norm(fm)
    seen: dict[str, Tensor] = {}
    layer = layers_of(fm)[2]
    norm, projection = layer.get_submodule(table.norm), layer.get_submodule(table.ffn)
    norm.register_forward_hook(lambda _m, _i, output: seen.update(norm=output))
    projection.register_forward_pre_hook(lambda _m, inputs: seen.update(ffn=inputs[0]))
    layer.register_forward_hook(lambda _m, _i, output: seen.update(layer=output))
    tiny.logits(fm, tiny.batch(model_type))
    follows = seen["layer"][0] if isinstance(seen["layer"], tuple) else seen["layer"]
    assert torch.equal(seen["norm"], follows if post_norm else seen["ffn"])


def change_of_the_stream(fm: nn.Module, inputs: dict[str, Tensor], path: str) -> tuple[Tensor, Tensor]:
    """What the stream after the third layer has because of its module at `path`, and what that module returns."""
    layer, seen = layers_of(fm)[2], dict[str, Tensor]()
    added = layer.get_submodule(path)
    added.register_forward_hook(lambda _m, _i, output: seen.update(added=output))
    if is_post_norm(fm):
        norm = layer.get_submodule(architecture_of(fm).norm)
        norm.register_forward_pre_hook(lambda _m, given: seen.update(sum=given[0]))
    with torch.no_grad():
        (after,) = layer_outputs(fm, [2], inputs)
        with_it, answer = seen.get("sum", after), seen["added"]
        added.register_forward_hook(lambda _m, _i, output: torch.zeros_like(output))
        (after,) = layer_outputs(fm, [2], inputs)
        return with_it - seen.get("sum", after), answer.view(with_it.shape)


@every_architecture
def test_stream_changes_by_what_the_table_says_is_added_to_it(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    table = architecture_of(fm)
    path = table.output_norm or (table.ffn if model_type in tiny.MIXTURES else table.output)
    change, answer = change_of_the_stream(fm, tiny.batch(model_type), path)
    if table.scale is not None:
        answer = answer * layers_of(fm)[2].get_parameter(table.scale)
    torch.testing.assert_close(change, answer, rtol=1e-4, atol=1e-5)


@every_architecture
def test_attention_is_every_projection_of_a_layer_outside_the_ffn(model_type: str, make_fm: ModelFactory) -> None:
    fm, table = make_fm(model_type), ARCHITECTURES[model_type]
    layer = layers_of(fm)[0]
    linear = {name for name, module in layer.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert linear - {table.input, table.output, table.gate} == set(table.attention)


@every_architecture
def test_head_is_what_the_base_model_lacks(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    assert head_of(fm) == on_top(fm) == tiny.HEADS[model_type]
    outside = {name for name, _ in fm.named_parameters() if not name.startswith(f"{base_name(fm)}.")}
    assert outside == tiny.head_names(fm.state_dict(), model_type) == {n for n in fm.state_dict() if in_head(fm, n)}
    assert outside


@every_architecture
def test_activation_is_the_function_that_the_fm_applies(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    z = torch.linspace(-6, 6, 101)
    functions = {
        "relu": torch.relu,
        "gelu": nn.functional.gelu,
        "gelu_tanh": lambda z: nn.functional.gelu(z, approximate="tanh"),
        "silu": nn.functional.silu,
        "quick_gelu": lambda z: z / (1 + torch.exp(-1.702 * z)),
    }
    names = ("act", "intermediate_act")
    applied = next(m for n, m in layers_of(fm)[2].named_modules() if n.split(".")[-1].startswith(names))
    torch.testing.assert_close(functions[activation_of(fm)](z), applied(z))


def test_activation_without_a_kernel_is_refused(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    fm.config.hidden_act = "tanh"
    with pytest.raises(ModelError, match="'tanh' is not supported") as caught:
        activation_of(fm)
    assert all(name in caught.value.remedy for name in ACTIVATION_NAMES)


def test_model_type_without_a_row_is_refused_with_those_that_have_one() -> None:
    with pytest.raises(ModelError, match="'mamba' is not supported") as caught:
        row("mamba")
    for word in (*ARCHITECTURES, "architectures.py", "docs/models.md", "FFN", "norm", "attention"):
        assert word in caught.value.remedy


@every_architecture
def test_whole_proxy_holds_every_weight_of_the_fm_bit_for_bit(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    state, left = fm.state_dict(), proxy.state_dict()
    ffns = list(sub_ffns(proxy).items())
    assert len(ffns) == tiny.L
    for layer, (path, ffn) in enumerate(ffns):
        for (part, _), wanted in zip(tiny.parts(path, ffn), tiny.ffns(state, model_type, layer), strict=True):
            for name, weight in wanted.items():
                assert tiny.same_bits(left.pop(f"{part}.{name}"), weight)
        for name in tiny.ffn_names(model_type, layer):
            del state[name]
    assert tiny.changed(state, left) == set()  # and the two have the same names


@every_architecture
def test_whole_proxy_computes_what_the_fm_computes(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    wanted = tiny.logits(fm, inputs)
    assert wanted.std() > 0.01
    torch.testing.assert_close(tiny.logits(proxy, inputs), wanted, rtol=1e-5, atol=1e-5)


@every_architecture
def test_whole_proxy_has_the_fms_gradients(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons="all")))
    gradients = []
    for model in (fm, proxy):
        first = layers_of(model)[0].get_submodule(ARCHITECTURES[model_type].attention[0]).weight.requires_grad_(True)
        loss = model(**inputs, labels=torch.tensor([0, 1, 2, 0, 1])).loss
        gradients.append(torch.autograd.grad(loss, first)[0])
    assert gradients[0].abs().max() > 1e-4
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@every_architecture
def test_layer_outputs_are_the_hidden_states_between_the_layers(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    with torch.no_grad():
        states = base_of(fm)(**inputs, output_hidden_states=True).hidden_states
        third, first = layer_outputs(fm, [2, 0], {**inputs, "labels": torch.zeros(5, dtype=torch.int64)})
    assert torch.equal(third, states[3])
    assert torch.equal(first, states[1])


def test_layer_outputs_of_the_last_layer_are_taken_before_the_final_norm(make_fm: ModelFactory) -> None:
    fm, inputs = make_fm("gpt2"), tiny.batch("gpt2")
    with torch.no_grad():
        (last,) = layer_outputs(fm, [tiny.L - 1], inputs)
        assert torch.equal(fm.transformer.ln_f(last), fm.base_model(**inputs).last_hidden_state)


def test_layer_outputs_run_no_further_than_asked_and_leave_no_hook(make_fm: ModelFactory) -> None:
    fm, inputs = make_fm("bert"), tiny.batch("bert")
    ran = []
    layers_of(fm)[2].register_forward_hook(lambda *_: ran.append(2))
    layer_outputs(fm, [0, 1], inputs)
    assert not ran
    fm(**inputs)
    assert ran == [2]


@pytest.mark.parametrize(
    "model_type", [name for name in ARCHITECTURES if tiny.task_of(name) == "sequence-classification"]
)
def test_padding_does_not_reach_the_logits_of_a_proxy(model_type: str, make_fm: ModelFactory) -> None:
    fm = make_fm(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=16)))
    texts = tiny.dataset(model_type, 5, labelled=False)
    together = tiny.logits(proxy, texts.batch(torch.arange(5)))
    alone = torch.cat([tiny.logits(proxy, texts.batch(torch.tensor([index]))) for index in range(5)])
    assert len(set(texts.lengths.tolist())) > 1
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@every_architecture
def test_a_walk_gives_what_the_layers_give(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    with torch.no_grad():
        wanted = layer_outputs(fm, list(range(tiny.L)), inputs)
        walk = LayerWalk(fm, inputs)
        for layer, states in enumerate(wanted):
            assert walk.position == layer
            assert torch.equal(walk.output(), states)
            walk.advance()
            assert torch.equal(walk.hidden, states)


# --- what one model type has in more than one form ---

VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "OPT with norms at the end, as its 350m": ("opt", {"do_layer_norm_before": False}),
    "OPT without biases": ("opt", {"enable_bias": False}),
    "GPT-NeoX with attention and FFN in turn": ("gpt_neox", {"use_parallel_residual": False}),
    "DeBERTa with position projections and a convolution": (
        "deberta-v2",
        {"share_att_key": False, "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "DeBERTa with absolute positions": ("deberta-v2", {"relative_attention": False, "position_biased_input": True}),
    "LLaMA with biases": ("llama", {"mlp_bias": True, "attention_bias": True}),
    "ModernBERT with biases": ("modernbert", {"mlp_bias": True, "norm_bias": True, "attention_bias": True}),
    "every other layer a mixture": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": []}),
    "no mixture at all": ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whole_proxy_of_a_variant_is_the_variant_and_comes_back_from_its_bundle(variant: str, tmp_path: Path) -> None:
    model_type, settings = VARIANTS[variant]
    task, inputs = tiny.task_of(model_type), tiny.batch(model_type)
    fm = load_model(tiny.write_model(model_type, tmp_path / "fm", **settings), task, tiny.LABELS, seed=0)
    wanted = tiny.logits(fm, inputs)
    whole = tiny.logits(cut(fm, select(fm, tiny.by_weights(neurons="all"))), inputs)
    torch.testing.assert_close(whole, wanted, rtol=1e-4, atol=1e-5)
    for number, kept in enumerate((tiny.by_weights(neurons=24), tiny.by_weights(keep="layers", layers=3))):
        proxy = cut(fm, select(fm, kept))
        assert (tiny.logits(proxy, inputs) - wanted).abs().max() > 0.01
        bundle = Proxy(proxy, tiny.processor(model_type), task, tiny.LABELS, 12, ())
        save_bundle(bundle, tmp_path / f"bundle-{number}")
        received = load_proxy(tmp_path / f"bundle-{number}").model
        assert torch.equal(tiny.logits(received, inputs), tiny.logits(proxy, inputs))


@pytest.mark.parametrize("first", [True, False])
def test_where_opt_has_its_norms_is_read_from_its_configuration(first: bool, tmp_path: Path) -> None:
    directory = tiny.write_model("opt", tmp_path, do_layer_norm_before=first)
    fm = load_model(directory, "sequence-classification", tiny.LABELS, seed=0)
    assert is_post_norm(fm) != first
    change, answer = change_of_the_stream(fm, tiny.batch("opt"), "fc2")
    torch.testing.assert_close(change, answer, rtol=1e-4, atol=1e-5)
