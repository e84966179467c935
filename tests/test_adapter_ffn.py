"""LoRA on the FFN: on a proxy's kept neurons in training, on the FM's own projections when it is plugged in."""

import copy
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn

from fedpft.config import (
    AdapterSection,
    AlignmentSection,
    LimitsSection,
    RoundSettings,
    TrainingSection,
)
from fedpft.data.batches import batches, round_window
from fedpft.errors import InvalidUpdate, ModelError
from fedpft.evaluation import measure_gap
from fedpft.model.adapters import (
    Adapter,
    attach,
    extract,
    frozen_state,
    load,
    merge,
    plug_in,
    save_peft,
    without_lora,
)
from fedpft.model.architectures import ARCHITECTURES
from fedpft.model.loading import load_model, save_model
from fedpft.model.subffn import NEURON_PARAMETERS, sub_ffns
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import neuron_level
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS
from fedpft.training import train_round

FM = Callable[[str], Path]
TASK = TASKS["sequence-classification"]
K, RANK, SCALE = 24, 2, 3.0
SETTINGS = AdapterSection(rank=RANK, alpha=6.0, dropout=0.0, ffn=True)
DENSE = [name for name in (*tiny.KINDS, "phi3") if name not in tiny.MIXTURES]
every_dense = pytest.mark.parametrize("model_type", DENSE)


def proxy_of(fm: nn.Module, **wanted: object) -> tuple[nn.Module, Selection]:
    selection = select(fm, tiny.by_weights(**wanted))
    proxy = cut(fm, selection)
    attach(proxy, SETTINGS, seed=0)
    return proxy, selection


def pair(make_fm: ModelFactory, model_type: str, **wanted: object) -> tuple[nn.Module, nn.Module, Selection]:
    """FM and proxy, both with the same adapter, of which nothing is 0."""
    fm = make_fm(model_type)
    proxy, selection = proxy_of(fm, **wanted)
    attach(fm, SETTINGS, seed=0)
    load(proxy, tuned(proxy))
    plug_in(fm, extract(proxy), selection.layers, selection.neurons)
    return fm, proxy, selection


def tuned(model: nn.Module, seed: int = 1) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(model).items())}


@every_dense
def test_it_is_on_every_projection_of_the_fm_and_leaves_that_on_attention_as_it_was(
    model_type: str, make_fm: ModelFactory
) -> None:
    with_it, without = make_fm(model_type), make_fm(model_type)
    attach(with_it, SETTINGS, seed=0)
    attach(without, SETTINGS.model_copy(update={"ffn": False}), seed=0)
    found, wanted = extract(with_it), extract(without)
    weights = {name for layer in range(tiny.L) for name in tiny.ffn_names(model_type, layer) if "weight" in name}
    added = {name.replace("weight", f"lora_{factor}.weight") for name in weights for factor in "AB"}
    assert found.keys() == wanted.keys() | added
    assert tiny.changed(wanted, {name: found[name] for name in wanted}) == set()
    trained = {name.replace(".default.", ".") for name, p in with_it.named_parameters() if p.requires_grad}
    assert trained == found.keys()
    assert not any(module.training for module in with_it.modules())


@every_dense
def test_on_a_proxy_it_is_drawn_from_the_seed_and_nothing_else(model_type: str, make_fm: ModelFactory) -> None:
    drawn, random = [], []
    for number, seed in enumerate((0, 0, 1)):
        proxy = cut(make_fm(model_type), select(make_fm(model_type), tiny.by_weights(neurons=K)))
        torch.manual_seed(number)  # only now: making an FM may draw
        attach(proxy, SETTINGS, seed=seed)
        drawn.append(extract(proxy))
        random.append(torch.rand(3))
        torch.manual_seed(number)
        assert torch.equal(random[-1], torch.rand(3)), "the caller's random numbers"
    assert tiny.changed(drawn[0], drawn[1]) == set()
    assert {name for name in drawn[0] if "lora_A" in name} == tiny.changed(drawn[0], drawn[2])
    assert not any(tensor.any() for name, tensor in drawn[0].items() if "lora_B" in name)
    trained = {name.replace(".default.", ".") for name, p in proxy.named_parameters() if p.requires_grad}
    assert trained == drawn[0].keys()
    for path, ffn in sub_ffns(proxy).items():
        assert drawn[0][f"{path}.lora_A.w_out"].shape == (RANK, ffn.neurons)


@every_dense
def test_untrained_it_changes_no_bit_of_any_answer(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    for model in (fm, proxy):
        wanted = tiny.logits(model, inputs)
        attach(model, SETTINGS, seed=0)
        assert tiny.same_bits(tiny.logits(model, inputs), wanted)


@every_dense
def test_without_lora_both_answer_as_if_they_had_none(model_type: str, make_fm: ModelFactory) -> None:
    fm, inputs = make_fm(model_type), tiny.batch(model_type)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    for model in (fm, proxy):
        wanted = tiny.logits(model, inputs)
        attach(model, SETTINGS, seed=0)
        load(model, {name: t if ".lora_" in name else extract(model)[name] for name, t in tuned(model).items()})
        assert not tiny.same_bits(tiny.logits(model, inputs), wanted)
        with without_lora(model):
            assert tiny.same_bits(tiny.logits(model, inputs), wanted)
        assert not tiny.same_bits(tiny.logits(model, inputs), wanted)


@every_dense
def test_proxy_with_every_neuron_answers_as_the_fm_that_it_is_plugged_into(
    model_type: str, make_fm: ModelFactory
) -> None:
    inputs, plain = tiny.batch(model_type), tiny.logits(make_fm(model_type), tiny.batch(model_type))
    fm, proxy, _ = pair(make_fm, model_type, neurons="all")
    wanted = tiny.logits(fm, inputs)
    assert (wanted - plain).abs().max() > 0.01
    torch.testing.assert_close(tiny.logits(proxy, inputs), wanted, rtol=1e-5, atol=1e-5)


@every_dense
def test_fm_is_changed_by_b_times_a_in_the_kept_neurons_alone(model_type: str, make_fm: ModelFactory) -> None:
    before = tiny.snapshot(make_fm(model_type))
    fm, proxy, selection = pair(make_fm, model_type, neurons=K)
    adapter, fused = extract(proxy), tiny.NAMES[model_type].fused
    merge(fm)
    after = dict(fm.state_dict())
    for layer, (path, ffn) in enumerate(sub_ffns(proxy).items()):
        old, new = (tiny.ffn(state, model_type, layer) for state in (before, after))
        kept = selection.neurons[layer]
        assert len(kept) == (tiny.F if layer in (0, tiny.L - 1) else K)
        for name in {"w_in", "w_gate", "w_out"} & old.keys():
            of = "w_in" if fused and name == "w_gate" else name
            change = SCALE * adapter[f"{path}.lora_B.{of}"] @ adapter[f"{path}.lora_A.{of}"]
            if name == "w_out":
                change = change.t()
            elif fused:
                change = change[: len(kept)] if name == "w_gate" else change[len(kept) :]
            wanted = old[name].clone()
            wanted[kept] += change
            torch.testing.assert_close(new[name], wanted, rtol=1e-6, atol=1e-6)
            others = torch.ones(tiny.F, dtype=torch.bool)
            others[kept] = False
            assert torch.equal(new[name][others], old[name][others])
            assert not torch.equal(getattr(ffn, name), new[name][kept])
        for name in {"b_in", "b_out"} & old.keys():
            assert torch.equal(new[name], old[name])


@every_dense
def test_training_is_what_torch_does_to_the_fm_with_pefts_layers(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy, selection = pair(make_fm, model_type, neurons="all")
    data, start = tiny.dataset(model_type, 10), extract(fm)
    wanted = RoundSettings(
        seed=0,
        adapter=SETTINGS,
        training=TrainingSection(
            rounds=3,
            batch=5,
            learning_rate=1e-3,
            schedule="constant",
            logit_adjustment="none",
            adam_epsilon=tiny.ADAM_EPSILON,
        ),
        inactive_below=0.05,
    )
    parameters = [parameter for parameter in fm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.01, eps=tiny.ADAM_EPSILON)
    begin, count = round_window(10, 1.0, 0)
    for batch in batches(data, batch=5, start=begin, count=count, seed=derive_seed(0, "order", "north")):
        fm(**batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    by_hand, frozen = extract(fm), {name: tensor.clone() for name, tensor in frozen_state(proxy).items()}
    result = train_round(
        TASK,
        proxy,
        data,
        wanted,
        silo="north",
        round=1,
        compressed=(1, 2),
        count_inactivity=True,
        limits=LimitsSection(),
    )
    assert tiny.changed(frozen, frozen_state(proxy)) == tiny.head_names(frozen, model_type)
    plug_in(fm, result.adapter, selection.layers, selection.neurons)
    for name, tensor in extract(fm).items():
        moved = (by_hand[name] - start[name]).norm()
        assert moved > 0, name
        assert (tensor - by_hand[name]).norm() <= 0.01 * moved, name


def test_with_a_frozen_only_b_trains_in_the_ffn_too(make_fm: ModelFactory) -> None:
    _, proxy, _ = pair(make_fm, "llama", neurons=K)
    wanted = RoundSettings(
        seed=0, adapter=SETTINGS, training=TrainingSection(frozen_a=True, batch=5), inactive_below=0.0
    )
    before = extract(proxy)
    given = {"compressed": (1, 2), "count_inactivity": False, "limits": LimitsSection()}
    result = train_round(TASK, proxy, tiny.dataset("llama", 10), wanted, silo="north", round=1, **given)
    assert tiny.changed(before, result.adapter) == {name for name in before if ".lora_A." not in name}


@pytest.mark.parametrize("model_type", ["bert", "llama", "phi3", "gpt2"])
def test_on_a_proxy_with_fewer_layers_it_goes_to_the_layers_it_was_cut_from(
    model_type: str, make_fm: ModelFactory
) -> None:
    before = tiny.snapshot(make_fm(model_type))
    fm, _, _ = pair(make_fm, model_type, neurons="all")  # what an earlier round may have left behind
    proxy, selection = proxy_of(make_fm(model_type), keep="layers", layers=3)
    assert selection.layers == (0, 2, 3)
    load(proxy, tuned(proxy, seed=2))
    plug_in(fm, extract(proxy), selection.layers, selection.neurons)
    found, adapter = extract(fm), extract(proxy)
    ffns = list(sub_ffns(proxy))
    for on_proxy, on_fm in enumerate(selection.layers):
        name = f"{tiny.NAMES[model_type].layer.format(on_fm)}{tiny.NAMES[model_type].w_out[0]}"
        for factor in "AB":
            assert torch.equal(found[f"{name}.lora_{factor}.weight"], adapter[f"{ffns[on_proxy]}.lora_{factor}.w_out"])
    merge(fm)
    dropped = {name for name in tiny.changed(before, dict(fm.state_dict())) if ".1." in name}
    assert not dropped


@pytest.mark.parametrize("change", ["missing", "other neurons"])
def test_adapter_of_another_proxy_is_not_plugged_in(change: str, make_fm: ModelFactory) -> None:
    fm, proxy, selection = pair(make_fm, "bert", neurons=K)
    before, broken, neurons = tiny.snapshot(fm), tuned(proxy, seed=2), selection.neurons
    if change == "missing":
        del broken["bert.encoder.layer.1.intermediate.lora_B.w_in"]
    else:
        neurons = tuple(kept[:-1] for kept in neurons)
    with pytest.raises(InvalidUpdate, match="intermediate"):
        plug_in(fm, broken, selection.layers, neurons)
    assert tiny.changed(before, fm.state_dict()) == set()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft's own
@pytest.mark.parametrize("model_type", ["bert", "modernbert", "vit", "gpt2", "llama", "phi3"])
def test_saved_and_merged_it_is_the_plugged_in_model_wherever_it_is_loaded(
    model_type: str, make_fm: ModelFactory, fm_directory: FM, tmp_path: Path
) -> None:
    fm, _, _ = pair(make_fm, model_type, neurons=K)
    inputs, task = tiny.batch(model_type), tiny.task_of(model_type)
    wanted = tiny.logits(fm, inputs)
    save_peft(fm, SETTINGS, tmp_path / "adapter", base=str(fm_directory(model_type)), task=task)
    tiny.processor(model_type).save_pretrained(tmp_path / "adapter")
    merge(fm)
    save_model(fm, tiny.processor(model_type), tmp_path / "merged")
    loader = peft.AutoPeftModel if model_type == "vit" else peft.AutoPeftModelForSequenceClassification
    loaded = loader.from_pretrained(str(tmp_path / "adapter")).eval()
    torch.testing.assert_close(tiny.logits(loaded, inputs), wanted, rtol=1e-6, atol=1e-6)
    merged = tiny.AUTO[task].from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(tiny.logits(merged, inputs), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", tiny.MIXTURES)
def test_mixture_of_experts_is_refused_with_the_key(model_type: str, make_fm: ModelFactory) -> None:
    for model in (
        make_fm(model_type),
        cut(make_fm(model_type), select(make_fm(model_type), tiny.by_weights(neurons=K))),
    ):
        with pytest.raises(ModelError, match=r"adapter\.ffn.*mixture of experts") as caught:
            attach(model, SETTINGS, seed=0)
        assert "adapter.ffn: false" in caught.value.remedy


@every_dense
def test_alignment_is_with_the_adapter_and_leaves_it_alone(model_type: str, make_fm: ModelFactory) -> None:
    fm, proxy, selection = pair(make_fm, model_type, neurons=K)
    public, before, adapter = tiny.dataset(model_type, 6, labelled=False), frozen_state(proxy), extract(proxy)
    before = {name: tensor.clone() for name, tensor in before.items()}
    gap = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    updated = {1: torch.tensor([0, 5, 23]), 2: torch.tensor([7])}

    def align(student: nn.Module, steps: int) -> list[float]:
        wanted = AlignmentSection(steps=steps, batch=6, learning_rate=3e-3)
        given = {"seed": 0, "round": 1, "progress": lambda step, loss: None}
        return neuron_level(student, fm, selection.matched, updated, public, wanted, **given)

    begun = sum(gap.hidden_error) / 2
    assert align(copy.deepcopy(proxy), 1) == pytest.approx([begun], rel=1e-4)
    align(proxy, 20)
    assert tiny.changed(adapter, extract(proxy)) == set()
    after = frozen_state(proxy)
    for layer, (path, ffn) in enumerate(sub_ffns(proxy).items()):
        for name in {name for name in NEURON_PARAMETERS if getattr(ffn, name) is not None}:
            moved = (before[f"{path}.{name}"] != after[f"{path}.{name}"]).view(ffn.neurons, -1).any(1)
            assert moved.nonzero().flatten().tolist() == updated.get(layer, torch.tensor([])).tolist()
    # what is written back are the weights alone: the loss is still that of weights and adapter
    again = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    assert sum(again.hidden_error) / 2 < 0.99 * begun


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_gap_compares_the_gradients_of_what_both_have(model_type: str, make_fm: ModelFactory) -> None:
    public = tiny.dataset(model_type, 6, labelled=False)
    fm, proxy, selection = pair(make_fm, model_type, neurons=K)
    gap = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    labels = torch.randint(3, (6,), generator=torch.Generator().manual_seed(derive_seed(0, "gap labels")))
    inputs = public.batch(torch.arange(6))
    for layer, cosine in zip(gap.layers, gap.gradient_cosine, strict=True):
        prefix = tiny.NAMES[model_type].layer.format(layer)
        names = [
            f"{prefix}{path}.lora_{f}.default.weight" for path in ARCHITECTURES[model_type].attention for f in "AB"
        ]
        ours, theirs = (gradient(model, names, inputs, labels) for model in (proxy, fm))
        assert cosine == pytest.approx(float(torch.cosine_similarity(ours, theirs, dim=0)), abs=1e-4)
        assert cosine < 0.9999


def gradient(model: nn.Module, names: list[str], inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
    loss = nn.functional.cross_entropy(model(**inputs).logits, labels)
    found = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    return torch.cat([part.flatten() for part in found])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_in_half_precision_it_is_float32_and_proxy_and_fm_agree(dtype: str, fm_directory: FM) -> None:
    fm = load_model(fm_directory("llama"), "sequence-classification", tiny.LABELS, seed=0, dtype=dtype)
    plain = tiny.logits(fm, tiny.batch("llama")).float()
    proxy, selection = proxy_of(fm, neurons="all")
    attach(fm, SETTINGS, seed=0)
    load(proxy, tuned(proxy))
    assert {tensor.dtype for tensor in extract(proxy).values()} == {torch.float32}
    plug_in(fm, extract(proxy), selection.layers, selection.neurons)
    ours, theirs = (tiny.logits(model, tiny.batch("llama")).float() for model in (proxy, fm))
    # some roundings of 2^-9 or 2^-12 in each of four layers
    assert (ours - theirs).norm() < (0.05 if dtype == "bfloat16" else 0.01) * (theirs - plain).norm()
    parameters = [p for p in proxy.parameters() if p.requires_grad]
    loss = proxy(**tiny.batch("llama")).logits.float().square().sum()
    assert all(bool(g.isfinite().all()) and bool(g.any()) for g in torch.autograd.grad(loss, parameters))
