"""What a silo's training can do against data unlike the other silos': each key's effect, and that it has no other.

C classes, n samples of a silo.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn

from fedpft.aggregation.mean import weighted_mean
from fedpft.config import AdapterSection, LimitsSection, RoundSettings, TrainingSection
from fedpft.data.text import TextDataset
from fedpft.model import adapters
from fedpft.tasks import TASKS
from fedpft.tasks.task import diversity, log_shares
from fedpft.training import LocalResult, train_round
from fedpft.wire.encoding import ENCODINGS, decode, encode
from fedpft.wire.tensors import Spec

TASK = TASKS["sequence-classification"]
EVERYTHING = {
    "schedule": "cosine",
    "adam_epsilon": 1e-4,
    "proximal": 0.1,
    "frozen_a": True,
    "logit_adjustment": "none",
}
Gradients = list[list[Tensor]]  # of each step, as they are when they are clipped


@pytest.fixture
def gradients(monkeypatch: pytest.MonkeyPatch) -> Gradients:
    found: Gradients = []
    clip = nn.utils.clip_grad_norm_

    def recorded(parameters: list[nn.Parameter], most: float) -> Any:
        found.append([p.grad.clone() for p in parameters if p.grad is not None])
        return clip(parameters, most)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", recorded)
    return found


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The settings of LoRA's group of parameters in each step."""
    found: list[dict[str, Any]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: Any, **others: Any) -> Any:
        found.append({key: value for key, value in self.param_groups[0].items() if key != "params"})
        return step(self, *arguments, **others)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    return found


Trained = Callable[..., tuple[dict[str, Tensor], LocalResult]]


@pytest.fixture
def trained(make_fm: ModelFactory) -> Trained:
    """The adapter before a round, and its result."""

    def train(
        samples: int = 12,
        *,
        model_type: str = "bert",
        labels: Tensor | None = None,
        shift: Tensor | None = None,
        silo: str = "north",
        round: int = 1,
        max_batch: int | None = None,
        dropout: float = 0.0,
        **training: Any,
    ) -> tuple[dict[str, Tensor], LocalResult]:
        settings = RoundSettings(
            seed=0,
            adapter=AdapterSection(rank=2, alpha=6.0, dropout=dropout),
            training=TrainingSection(**{"rounds": 3, "batch": 4, "learning_rate": 0.01, **training}),
            inactive_below=0.0,
        )
        model, data = make_fm(model_type), tiny.dataset(model_type, samples)
        adapters.attach(model, settings.adapter, seed=0)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # of 0, it would hide A's gradient
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        start = adapters.extract(model)
        data.labels = data.labels if labels is None else labels
        result = train_round(
            TASKS[tiny.task_of(model_type)],
            model,
            data,
            settings,
            silo=silo,
            round=round,
            compressed=(),
            count_inactivity=False,
            limits=LimitsSection(max_batch=max_batch),
            shift=shift,
        )
        assert all(p.requires_grad for n, p in model.named_parameters() if ".lora_" in n), "the next round needs it"
        return start, result

    return train


def distance(start: dict[str, Tensor], result: LocalResult) -> float:
    return math.sqrt(sum(float((result.adapter[n] - t).double().square().sum()) for n, t in start.items()))


# --- AdamW and its rate -----------------------------------------------------------------------------------------------


def test_epsilon_reaches_the_optimizer_and_small_gradients_then_make_small_steps(
    trained: Trained, groups: list[dict[str, Any]]
) -> None:
    moved = {epsilon: distance(*trained(adam_epsilon=epsilon)) for epsilon in (1e-8, 0.5)}
    assert [group["eps"] for group in groups] == [1e-8] * 3 + [0.5] * 3
    assert moved[0.5] < 0.2 * moved[1e-8]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("linear", [1 - step / 9 for step in range(9)]),
        # cos^2 of half the angle, worked out by hand: of 0, 10, 20, ... 80 degrees
        ("cosine", [1, 0.969846, 0.883022, 0.75, 0.586824, 0.413176, 0.25, 0.116978, 0.030154]),
        ("constant", [1] * 9),
    ],
)
def test_rates_follow_the_schedule_over_the_steps_of_all_rounds(
    schedule: str, shares: list[float], trained: Trained, groups: list[dict[str, Any]]
) -> None:
    for number in (1, 2, 3):
        trained(10, round=number, schedule=schedule, learning_rate=0.09)  # 3 steps each
    assert [group["lr"] for group in groups] == pytest.approx([0.09 * share for share in shares], rel=1e-4)


# --- FedProx ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_batch", [None, 2])
def test_the_proximal_term_is_mu_times_the_way_from_the_rounds_adapter(
    max_batch: int | None, trained: Trained, gradients: Gradients
) -> None:
    """Seen before the second step; the first goes by Adam's rate against the sign of each value's gradient."""
    mu, rate, others = 3.0, 0.01, {"max_batch": max_batch, "weight_decay": 0.0}
    trained(8, learning_rate=rate, **others)
    trained(8, learning_rate=rate, proximal=mu, **others)
    first, second, first_pulled, second_pulled = (torch.cat([g.flatten() for g in step]) for step in gradients)
    assert torch.equal(first, first_pulled), "nothing pulls at the start"
    clear = first.abs() > 1e-4  # of AdamW's epsilon
    assert float(clear.double().mean()) > 0.9
    torch.testing.assert_close((second_pulled - second)[clear], -mu * rate * first.sign()[clear], rtol=1e-2, atol=1e-4)


def test_a_strong_pull_keeps_a_silo_near_the_rounds_adapter(trained: Trained) -> None:
    moved = {mu: distance(*trained(80, proximal=mu, schedule="constant")) for mu in (0.0, 0.01, 100.0)}
    assert moved[100.0] < 0.3 * moved[0.0]
    assert moved[100.0] < moved[0.01] < moved[0.0]


def test_the_reported_loss_is_that_of_the_data_alone(trained: Trained) -> None:
    _, plain = trained(8, schedule="constant", learning_rate=1e-5)
    _, pulled = trained(8, schedule="constant", learning_rate=1e-5, proximal=1e6)
    assert pulled.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-3)


# --- A frozen ---------------------------------------------------------------------------------------------------------


def projections(adapter: dict[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """A and B of each, in float64."""
    names = [name for name in adapter if ".lora_A." in name]
    return [(adapter[name].double(), adapter[name.replace("lora_A", "lora_B")].double()) for name in names]


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "vit"])
def test_a_frozen_a_stays_bit_for_bit_and_all_else_trains(model_type: str, trained: Trained) -> None:
    start, result = trained(model_type=model_type, frozen_a=True, weight_decay=0.5, proximal=0.1, dropout=0.3)
    assert tiny.changed(start, result.adapter) == {name for name in start if ".lora_A." not in name}


def test_a_frozen_a_leaves_the_other_gradients_as_they_are(trained: Trained, gradients: Gradients) -> None:
    for frozen in (False, True):
        start, _ = trained(4, frozen_a=frozen, dropout=0.3)
    every, others = gradients
    is_a = [".lora_A." in name for name in start]
    assert len(others) == len(every) - sum(is_a)
    kept = [gradient for gradient, skip in zip(every, is_a, strict=True) if not skip]
    assert all(torch.equal(a, b) for a, b in zip(kept, others, strict=True))


def test_the_mean_of_adapters_is_exact_if_a_is_frozen_and_only_then(trained: Trained) -> None:
    weights, gaps = [7, 11], {}
    for frozen in (False, True):
        start, _ = trained(frozen_a=frozen)
        results = [trained(frozen_a=frozen, silo=silo)[1].adapter for silo in ("north", "south")]
        mean = {
            name: weighted_mean([(result[name], weight) for result, weight in zip(results, weights, strict=True)])
            for name in start
        }
        assert (tiny.changed(start, mean) == {name for name in start if ".lora_A." not in name}) == frozen
        changes = [[b @ a for a, b in projections(result)] for result in results]
        wanted = [(x * weights[0] + y * weights[1]) / sum(weights) for x, y in zip(*changes, strict=True)]
        parts = zip(projections(mean), wanted, changes[0], changes[1], strict=True)
        # as a share of what the silos differ by: the mean is rounded to float32
        gaps[frozen] = max(float((b @ a - whole).norm() / (x - y).norm()) for (a, b), whole, x, y in parts)
    assert gaps[True] < 1e-5
    assert gaps[False] > 10 * gaps[True]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_frozen_a_travels_bit_for_bit_in_every_encoding(encoding: Any, trained: Trained) -> None:
    start, result = trained(frozen_a=True)
    sent, _ = encode(result.adapter, start, encoding, {})
    for name in (name for name in start if ".lora_A." in name):
        spec = Spec.of(start[name])
        arrived = decode(spec, encoding, start=lambda n=name: start[n], stored=lambda group, n=name: sent[group][n])
        assert tiny.same_bits(arrived, start[name])


# --- the silo's own label shares --------------------------------------------------------------------------------------


def test_a_silo_with_equal_shares_has_no_shift() -> None:
    assert torch.equal(log_shares(torch.tensor([5, 5, 5])), torch.zeros(3))


def test_the_shift_is_the_log_of_share_over_equal_share() -> None:
    counts = torch.tensor([9_000, 1_000])
    assert log_shares(counts).tolist() == pytest.approx([math.log(1.8), math.log(0.2)], abs=1e-3)
    assert log_shares(counts).dtype == torch.float32


@pytest.mark.parametrize("classes", [2, 50, 1000])
def test_classes_that_a_silo_lacks_weigh_nothing_however_many(classes: int) -> None:
    counts = torch.zeros(classes, dtype=torch.int64)
    counts[3 % classes] = 60
    shift = log_shares(counts)
    assert bool(shift.isfinite().all())
    assert float(1 - shift.double().softmax(0)[3 % classes]) < 1e-10


@pytest.mark.parametrize(
    ("counts", "wanted"),
    [([5, 0, 0], 0.0), ([5, 5], 0.5), ([1, 1, 1, 1], 0.75), ([[9, 5], [0, 5]], 0.25), ([0, 0], 1.0)],
)
def test_diversity_is_how_likely_two_labels_differ(counts: Any, wanted: float) -> None:
    assert diversity(torch.tensor(counts)) == pytest.approx(wanted)


def test_a_silo_with_one_class_leaves_the_head_where_it_is_under_its_own_shares(
    trained: Trained, gradients: Gradients
) -> None:
    labels = torch.full((40,), 1)
    shift = TASK.logit_shift(TASK.label_counts(TextDataset(labels, labels, 0, labels), len(tiny.LABELS)))
    found = {}
    for name, given in (("none", None), ("own", shift)):
        del gradients[:]
        start, result = trained(40, labels=labels, shift=given)
        total = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients[0]))
        moved = float((result.adapter["classifier.bias"] - start["classifier.bias"]).norm())
        found[name] = total, moved
    (plain, moves), (adjusted, rests) = found["none"], found["own"]
    assert adjusted < 1e-9 * plain
    assert rests < 0.01 * moves


def test_a_silo_with_one_class_learns_nothing_but_that_class_without_the_shift(trained: Trained) -> None:
    """What the shift is for: two silos of one class each, whose head's bias drifts apart, or does not."""
    apart = {}
    for adjusted in (False, True):
        biases = []
        for label in (0, 1):
            labels = torch.full((40,), label)
            shift = log_shares(labels.bincount(minlength=3)) if adjusted else None
            _, result = trained(40, labels=labels, shift=shift)
            biases.append(result.adapter["classifier.bias"])
        apart[adjusted] = float((biases[0] - biases[1]).norm())
    assert apart[True] < 0.01 * apart[False]


def test_no_shift_is_the_plain_loss_and_equal_shares_come_to_the_same(trained: Trained) -> None:
    _, plain = trained()
    _, even = trained(shift=torch.zeros(3))
    assert even.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-6)
    for name, tensor in plain.adapter.items():
        torch.testing.assert_close(even.adapter[name], tensor, rtol=1e-3, atol=1e-5)


# --- all together -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_the_same_round_gives_the_same_bits(model_type: str, trained: Trained) -> None:
    shift = torch.tensor([0.5, 0.0, -2.0])
    results = [trained(model_type=model_type, shift=shift, dropout=0.3, **EVERYTHING)[1].adapter for _ in range(2)]
    assert tiny.changed(*results) == set()


def test_all_of_it_travels_to_the_silo() -> None:
    training = TrainingSection(**EVERYTHING)  # type: ignore[arg-type]
    settings = RoundSettings(seed=0, adapter=AdapterSection(), training=training, inactive_below=0.0)
    received = RoundSettings.model_validate_json(settings.model_dump_json()).training
    assert {key: getattr(received, key) for key in EVERYTHING} == EVERYTHING
    default = TrainingSection()
    assert all(getattr(default, key) != value for key, value in EVERYTHING.items()), "or nothing is shown"
