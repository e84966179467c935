"""Metrics against scikit-learn, and the gap between proxy and FM against its definition."""

import pytest
import tiny
import torch
from conftest import ModelFactory
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import AdapterSection
from fedpft.data.batches import sample
from fedpft.data.text import TextDataset
from fedpft.evaluation import Gap, answers, difference, evaluate, format_gaps, measure_gap
from fedpft.model.adapters import attach, extract, load
from fedpft.model.architectures import base_of
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS

TASK = TASKS["sequence-classification"]
MATCHED = ((1, 1), (2, 2))
every_kind = pytest.mark.parametrize("model_type", tiny.KINDS)


# --- accuracy and macro-F1 ---


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40))
def test_score_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    predicted, labels = zip(*pairs, strict=True)
    data = TextDataset(torch.zeros(len(labels)), torch.ones(len(labels)), 0, torch.tensor(labels))
    found = TASK.score(predicted, data, torch.arange(len(labels)))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro", zero_division=0))


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
@pytest.mark.parametrize("chosen", [None, [1, 2, 4, 8, 16, 17, 19]])
def test_evaluation_is_that_of_the_samples_one_by_one(
    model_type: str, chosen: list[int] | None, make_fm: ModelFactory
) -> None:
    fm, data = make_fm(model_type), tiny.dataset(model_type, 20)
    assert data.labels is not None
    each = chosen or range(20)
    predicted = [int(tiny.logits(fm, data.batch(torch.tensor([index]))).argmax()) for index in each]
    labels = data.labels[torch.tensor(each)].tolist()
    assert len(set(predicted)) > 1
    found = evaluate(TASK, fm, data, 6, None if chosen is None else torch.tensor(chosen))
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_majority_names_the_most_frequent_label_always() -> None:
    data = tiny.dataset("bert", 9)
    data.labels = torch.tensor([2, 2, 2, 2, 2, 0, 0, 1, 1])
    found = TASK.baseline_score(data)
    assert found["accuracy"] == pytest.approx(5 / 9)
    assert found["macro_f1"] == pytest.approx(f1_score(data.labels, [2] * 9, average="macro"))


def test_a_difference_has_the_error_of_paired_samples() -> None:
    data = tiny.dataset("bert", 400)
    generator = torch.Generator().manual_seed(5)
    assert data.labels is not None
    ours = data.labels.clone()
    wrong = torch.rand(400, generator=generator) < 0.5
    ours[wrong] = (ours[wrong] + 1) % 3  # both are wrong there
    theirs = ours.clone()
    worse = ~wrong & (torch.rand(400, generator=generator) < 0.1)
    theirs[worse] = (theirs[worse] + 1) % 3
    found = difference(TASK, ours.tolist(), theirs.tolist(), data)
    assert found.value == pytest.approx(float(worse.double().mean()))
    assert found.standard_error == pytest.approx(float(worse.double().std()) / 400**0.5, rel=0.25)
    assert difference(TASK, ours.tolist(), theirs.tolist(), data) == found
    assert difference(TASK, theirs.tolist(), ours.tolist(), data).value == -found.value
    same = difference(TASK, ours.tolist(), ours.tolist(), data)
    assert (same.value, same.standard_error) == (0.0, 0.0)


def test_answers_are_in_the_order_in_which_they_were_asked_for(make_fm: ModelFactory) -> None:
    fm, data = make_fm("bert"), tiny.dataset("bert", 20)
    everything = answers(TASK, fm, data, 6, torch.arange(20))
    assert len(set(everything)) > 1
    chosen = torch.tensor([7, 3, 19, 0])
    assert answers(TASK, fm, data, 3, chosen) == [everything[index] for index in chosen.tolist()]


# --- the gap between proxy and FM ---


def adapted_pair(make_fm: ModelFactory, model_type: str, **settings: object) -> tuple[nn.Module, nn.Module, Selection]:
    """Proxy and FM with the same adapter, of which nothing is 0."""
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2, alpha=4.0), seed=0)
    generator = torch.Generator().manual_seed(3)
    load(fm, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(fm).items())})
    selection = select(fm, tiny.by_weights(**settings))
    return cut(fm, selection), fm, selection


def hidden_error_by_hand(
    proxy: nn.Module, fm: nn.Module, pairs: tuple[tuple[int, int], ...], inputs: dict[str, Tensor]
) -> list[float]:
    with torch.no_grad():
        ours, theirs = (base_of(m)(**inputs, output_hidden_states=True).hidden_states for m in (proxy, fm))
    errors = []
    for on_proxy, on_fm in pairs:
        h, target = ours[on_proxy + 1].double(), theirs[on_fm + 1].double()
        real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(h.shape[:2]) > 0
        errors.append(float((target - h)[real].square().sum() / target[real].square().sum()))
    return errors


def lora_gradient_by_hand(model: nn.Module, model_type: str, layer: int, inputs: dict[str, Tensor]) -> Tensor:
    samples = len(next(iter(inputs.values())))
    labels = torch.randint(3, (samples,), generator=torch.Generator().manual_seed(derive_seed(0, "gap labels")))
    loss = F.cross_entropy(model(**inputs).logits, labels)
    prefix = tiny.NAMES[model_type].layer.format(layer)
    parameters = [p for n, p in model.named_parameters() if n.startswith(prefix) and ".lora_" in n]
    assert parameters
    return torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, parameters)])


@every_kind
def test_whole_proxy_has_no_gap(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = adapted_pair(make_fm, model_type, neurons="all")
    public = tiny.dataset(model_type, 8, labelled=False)
    gap = measure_gap(TASK, proxy, fm, MATCHED, public, samples=8, seed=0)
    assert gap.layers == (1, 2)
    assert gap.hidden_error == pytest.approx((0.0, 0.0), abs=1e-10)
    assert gap.gradient_cosine == pytest.approx((1.0, 1.0), abs=1e-5)


@every_kind
def test_gap_is_its_definition(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, model_type, neurons=8)
    public = tiny.dataset(model_type, 9)  # labels are there and play no part
    gap = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    chosen = sample(9, 6, 0, "gap")
    assert chosen.tolist() != list(range(6)), "the first stand for nobody"
    inputs = public.batch(chosen)
    assert gap.hidden_error == pytest.approx(hidden_error_by_hand(proxy, fm, MATCHED, inputs), rel=1e-4)
    assert min(gap.hidden_error) > 1e-3
    for layer, cosine in zip(gap.layers, gap.gradient_cosine, strict=True):
        ours, theirs = (lora_gradient_by_hand(m, model_type, layer, inputs) for m in (proxy, fm))
        assert cosine == pytest.approx(float(ours @ theirs / ours.norm() / theirs.norm()), abs=1e-4)
        assert cosine < 0.999


def test_the_gap_on_labelled_samples_is_that_of_their_labels(make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, "bert", neurons=8)
    public, test = tiny.dataset("bert", 6, labelled=False), tiny.dataset("bert", 9)
    gap = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0, test=test)
    plain = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    assert (gap.gradient_cosine, plain.task_cosine) == (plain.gradient_cosine, ())
    batch = test.batch(sample(9, 6, 0, "gap, test"))
    for layer, cosine in zip(gap.layers, gap.task_cosine, strict=True):
        gradients = []
        for model in (proxy, fm):
            prefix = tiny.NAMES["bert"].layer.format(layer)
            parameters = [p for n, p in model.named_parameters() if n.startswith(prefix) and ".lora_" in n]
            found = torch.autograd.grad(F.cross_entropy(model(**batch).logits, batch["labels"]), parameters)
            gradients.append(torch.cat([gradient.flatten() for gradient in found]))
        assert cosine == pytest.approx(float(F.cosine_similarity(*gradients, dim=0)), abs=1e-4)


def test_gap_of_a_proxy_with_fewer_layers_compares_matched_layers(make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, "bert", keep="layers", layers=3)
    public = tiny.dataset("bert", 6, labelled=False)
    gap = measure_gap(TASK, proxy, fm, selection.matched, public, samples=6, seed=0)
    inputs = public.batch(torch.arange(6))
    assert gap.layers == (1,)
    assert gap.hidden_error == pytest.approx(hidden_error_by_hand(proxy, fm, ((1, 2),), inputs), rel=1e-4)
    ours = lora_gradient_by_hand(proxy, "bert", 1, inputs)
    theirs = lora_gradient_by_hand(fm, "bert", 2, inputs)
    assert gap.gradient_cosine == pytest.approx([float(F.cosine_similarity(ours, theirs, dim=0))], abs=1e-4)


def test_measuring_leaves_no_gradient_and_changes_nothing(make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, "bert", neurons=8)
    before = tiny.snapshot(proxy), tiny.snapshot(fm)
    measure_gap(TASK, proxy, fm, selection.matched, tiny.dataset("bert", 6), samples=6, seed=0)
    for model, state in zip((proxy, fm), before, strict=True):
        assert tiny.changed(state, model.state_dict()) == set()
        assert all(parameter.grad is None for parameter in model.parameters())


def test_gap_needs_no_more_samples_than_there_are(make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, "bert", neurons=8)
    public = tiny.dataset("bert", 4, labelled=False)
    gaps = [measure_gap(TASK, proxy, fm, selection.matched, public, samples=samples, seed=0) for samples in (4, 50)]
    assert gaps[0] == gaps[1]


def test_gaps_are_printed_one_line_a_stage_and_layer() -> None:
    table = format_gaps(
        [("cut", Gap((1, 2), (0.5, 0.25), (0.9, 0.8))), ("distilled", Gap((1, 2), (0.1, 0.2), (1.0, 0.95)))]
    )
    rows = [line.split() for line in table.splitlines()]
    assert len(rows) == 5
    assert rows[1:] == [
        ["cut", "1", "0.5000", "0.9000"],
        ["cut", "2", "0.2500", "0.8000"],
        ["distilled", "1", "0.1000", "1.0000"],
        ["distilled", "2", "0.2000", "0.9500"],
    ]
    labelled = format_gaps([("cut", Gap((1,), (0.5,), (0.9,), (0.7,)))]).splitlines()
    assert labelled[0].endswith("with labels")
    assert labelled[1].split() == ["cut", "1", "0.5000", "0.9000", "0.7000"]
