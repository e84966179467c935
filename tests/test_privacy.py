"""Differential privacy of a silo's samples: gradients of each, noise, what is spent, and who is told what."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting.rdp
import pytest
import tiny
import torch
from devices import each_device
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedpft import gradients, training
from fedpft.config import (
    AdapterSection,
    LimitsSection,
    PrivacySection,
    RoundSettings,
    SimulationConfig,
    TrainingSection,
    load_silo_config,
)
from fedpft.demo.run import run_federation
from fedpft.errors import CheckpointError, ConfigError, FedPFTError, ModelError, PrivacySpent
from fedpft.gradients import Private
from fedpft.model import adapters
from fedpft.model.architectures import ARCHITECTURES
from fedpft.model.persample import per_sample
from fedpft.privacy.accounting import LEAST_NOISE, Steps, epsilon, noise_for
from fedpft.privacy.clipping import ClippedSum
from fedpft.privacy.noise import Secret
from fedpft.silo.budget import FILE, Budget
from fedpft.silo.explain import explain, privacy_report
from fedpft.simulation.run import simulate
from fedpft.tasks import TASKS
from fedpft.training import LocalResult, train_round

FM = Callable[[str], Any]
LORA = AdapterSection(rank=2, alpha=4.0, dropout=0.0)


def adapted(make_fm: FM, model_type: str) -> Any:
    model, generator = make_fm(model_type), torch.Generator().manual_seed(0)
    adapters.attach(model, LORA, seed=0)
    with torch.no_grad():
        for parameter in adapters.lora_parameters(model):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def settings(**training: Any) -> RoundSettings:
    return RoundSettings(
        seed=0, adapter=LORA, training=TrainingSection(**{"batch": 4, "rounds": 2} | training), inactive_below=0.01
    )


def train(model: Any, model_type: str, private: Private | None, *, samples: int = 12, **named: Any) -> LocalResult:
    limits = named.pop("limits", LimitsSection())
    data, task = tiny.dataset(model_type, samples), TASKS[tiny.task_of(model_type)]
    what = settings(**named)
    return train_round(
        task,
        model,
        data,
        what,
        silo="a",
        round=1,
        compressed=(),
        count_inactivity=False,
        limits=limits,
        private=private,
    )


# --- the gradient of each sample --------------------------------------------------------------------------------------


def single_gradients(task: Any, model: Any, batch: dict[str, Tensor], index: int) -> dict[nn.Parameter, Tensor]:
    one = {name: value[index : index + 1] for name, value in batch.items()}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(task.loss(model, one), parameters, allow_unused=True)
    return {p: torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)}


@pytest.mark.parametrize("model_type", [kind for kind in ARCHITECTURES if kind != "deberta-v2"])
def test_they_are_those_of_a_loop_over_single_samples(model_type: str, make_fm: FM) -> None:
    model, task = adapted(make_fm, model_type), TASKS[tiny.task_of(model_type)]
    batch = tiny.dataset(model_type, 5).batch(torch.arange(5))
    with adapters.training(model, 0.0):
        before = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        with per_sample(model, 5) as copies:
            task.loss(model, batch).backward()
        assert {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad} == before
        assert set(copies) == set(before.values())
        weights = [task.weight({name: value[i : i + 1] for name, value in batch.items()}) for i in range(5)]
        for index in range(5):
            wanted = single_gradients(task, model, batch, index)
            whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in wanted.values()))
            for parameter, gradient in wanted.items():
                copied = copies[parameter].grad
                assert copied is not None
                found = copied[index] * sum(weights) / weights[index]
                assert float((found - gradient).norm()) < 1e-4 * whole


def test_what_is_of_no_single_sample_is_named(make_fm: FM) -> None:
    """DeBERTa's query projection is given relative positions too; of one sample alone they are of it."""
    with pytest.raises(ModelError, match=r"no single sample.*max_batch: 1"):
        train(adapted(make_fm, "deberta-v2"), "deberta-v2", Private(1.0, 1.0))
    train(adapted(make_fm, "deberta-v2"), "deberta-v2", Private(1.0, 1.0), limits=LimitsSection(max_batch=1))


def test_a_frozen_a_has_none(make_fm: FM) -> None:
    model = adapted(make_fm, "bert")
    before = adapters.extract(model)
    result = train(model, "bert", Private(1.0, 1.0), frozen_a=True)
    changed = {name for name in before if not tiny.same_bits(before[name], result.adapter[name])}
    assert changed == {name for name in before if "lora_A" not in name}


# --- what a step makes of them ----------------------------------------------------------------------------------------


class Without(Secret):
    """Every sample in every step, and no noise."""

    def sample(self, count: int, rate: float) -> Tensor:
        return torch.arange(count)

    def normal(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.float64)


@given(st.lists(st.floats(0.0, 100.0), min_size=1, max_size=5), st.floats(0.1, 10.0))
def test_no_sample_adds_more_than_the_clip_norm(sizes: list[float], clip: float) -> None:
    first, second = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2))
    total = ClippedSum([first, second], clip)
    samples = len(sizes)
    gradients = {first: torch.ones(samples, 3), second: 2.0 * torch.ones(samples, 2, 2)}
    total.add(gradients, torch.tensor(sizes))
    found = total.noised(0.0, Without(), 1.0)
    whole = math.sqrt(sum(float(gradient.square().sum()) for gradient in found.values()))
    own = math.sqrt(3 + 16)
    assert whole == pytest.approx(sum(min(size * own, clip) for size in sizes), rel=1e-4, abs=1e-6)


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    total = ClippedSum([parameter], 1.0)
    total.add({parameter: torch.tensor([[0.3, 0.4], [torch.inf, 1.0], [torch.nan, 0.0]])}, torch.ones(3))
    assert total.noised(0.0, Without(), 1.0)[parameter].tolist() == pytest.approx([0.3, 0.4])


@each_device
@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_without_noise_and_clipping_it_is_the_plain_step(model_type: str, device: str, make_fm: FM) -> None:
    """One step over all samples: the mean of single gradients is that of the batch, whatever its parts."""
    found = []
    for private, most in ((None, 12), (Private(1e6, 1.0, Without()), 12), (Private(1e6, 1.0, Without()), 5)):
        model = adapted(make_fm, model_type)
        start = adapters.extract(model)
        named: dict[str, Any] = {"batch": 12, "gradient_clip": 1e6, "adam_epsilon": 1e-3, "logit_adjustment": "none"}
        result = train(model.to(device), model_type, private, limits=LimitsSection(max_batch=most), **named)
        assert result.samples == 12
        found.append({name: value - start[name] for name, value in result.adapter.items()})
    for name, wanted in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], wanted, rtol=1e-3, atol=1e-6)


def test_gradients_of_a_large_batch_are_not_all_there_at_once(make_fm: FM, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(training, "AT_ONCE", 5)
    monkeypatch.setattr(gradients, "per_sample", lambda model, count: seen.append(count) or per_sample(model, count))
    private = Private(1.0, 0.0)
    train(adapted(make_fm, "bert"), "bert", private, samples=12, batch=12, rounds=1, local_epochs=1.0)
    assert seen == [5, 5, 2]
    seen.clear()
    limits = LimitsSection(max_batch=8)
    train(adapted(make_fm, "bert"), "bert", private, samples=12, batch=12, rounds=1, local_epochs=1.0, limits=limits)
    assert seen == [8, 4]


def test_a_step_without_a_sample_is_noise_alone(make_fm: FM) -> None:
    class Nobody(Secret):
        def sample(self, count: int, rate: float) -> Tensor:
            return torch.empty(0, dtype=torch.int64)

    model = adapted(make_fm, "bert")
    start = adapters.extract(model)
    result = train(model, "bert", Private(1.0, 1.0, Nobody()))
    assert result.metrics["train_loss"] == 0.0
    assert all(not torch.equal(value, start[name]) and value.isfinite().all() for name, value in result.adapter.items())


def test_noise_has_the_size_that_the_accountant_was_told() -> None:
    """z C / (q n) in each value: a chi-square test at ten deviations."""
    count, clip, noise, expected = 200_000, 0.7, 1.3, 16.0
    parameter = nn.Parameter(torch.zeros(count))
    drawn = ClippedSum([parameter], clip).noised(noise, Secret(), expected)[parameter].double()
    ratio = float(drawn.square().mean()) / (noise * clip / expected) ** 2
    assert abs(ratio - 1.0) < 10 * math.sqrt(2.0 / count)
    assert abs(float(drawn.mean())) < 10 * noise * clip / expected / math.sqrt(count)
    assert float((drawn / drawn.std()).pow(4).mean()) == pytest.approx(3.0, abs=0.2)


def test_each_sample_is_in_a_step_by_itself() -> None:
    """The batch's size is binomial, no constant; and which samples go together is no permutation."""
    secret, samples, rate = Secret(), 400, 0.1
    drawn = [secret.sample(samples, rate) for _ in range(2000)]
    sizes = torch.tensor([len(each) for each in drawn]).double()
    assert float(sizes.mean()) == pytest.approx(40.0, abs=1.5)
    assert float(sizes.var()) == pytest.approx(samples * rate * (1 - rate), rel=0.25)
    counts = torch.bincount(torch.cat(drawn), minlength=samples)
    assert int(counts.min()) > 100
    assert int(counts.max()) < 320


def test_nobody_can_repeat_a_round(make_fm: FM) -> None:
    first, second = (train(adapted(make_fm, "bert"), "bert", Private(1.0, 0.5)).adapter for _ in range(2))
    assert any(not torch.equal(first[name], second[name]) for name in first)


def test_a_stream_is_never_the_same() -> None:
    assert not torch.equal(Secret().uniform(100), Secret().uniform(100))
    drawn = Secret().uniform(100_000)
    assert float(drawn.min()) > 0.0
    assert float(drawn.max()) < 1.0
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.01)


# --- what it costs ----------------------------------------------------------------------------------------------------


def test_one_step_over_all_samples_is_the_gaussian_mechanism() -> None:
    """Whose epsilon at z = 1 and delta = 1e-5 is 4.377 (Balle and Wang 2018, arXiv 1805.06530, theorem 8)."""
    assert epsilon([Steps(1.0, 1.0, 1)], 1e-5) == pytest.approx(4.377, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "noise", "count", "by_moments"),
    [
        (0.01, 4.0, 10_000, 1.26),  # Abadi et al. 2016, section 3.2
        (256 / 60_000, 1.1, 14_062, 2.92),  # TensorFlow Privacy's tutorial on MNIST, 60 epochs
    ],
)
def test_it_is_less_than_moments_say_and_not_much_less(
    rate: float, noise: float, count: int, by_moments: float
) -> None:
    found = epsilon([Steps(rate, noise, count)], 1e-5)
    assert 0.7 * by_moments < found < by_moments
    moments = dp_accounting.rdp.RdpAccountant()
    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(noise))
    assert found < moments.compose(sampled, count).get_epsilon(1e-5) <= by_moments + 0.01


def test_steps_add_up_in_any_order() -> None:
    some, others = Steps(0.1, 1.0, 20), Steps(0.02, 0.7, 50)
    assert epsilon([some, others], 1e-5) == pytest.approx(epsilon([others, some], 1e-5), rel=1e-6)
    assert epsilon([some, others], 1e-5) > max(epsilon([some], 1e-5), epsilon([others], 1e-5))
    assert epsilon([some, some], 1e-5) == pytest.approx(epsilon([Steps(0.1, 1.0, 40)], 1e-5), rel=1e-3)
    assert epsilon([], 1e-5) == 0.0


@pytest.mark.parametrize("before", [[], [Steps(0.1, 1.5, 30)]])
def test_the_noise_is_the_least_that_is_enough(before: list[Steps]) -> None:
    noise = noise_for(6.0, 1e-5, before, 0.05, 100)
    assert epsilon([*before, Steps(0.05, noise, 100)], 1e-5) <= 6.0
    assert epsilon([*before, Steps(0.05, 0.97 * noise, 100)], 1e-5) > 6.0


def test_the_least_noise_is_some_and_the_most_is_said_to_be_too_little() -> None:
    assert noise_for(1000.0, 1e-5, [], 0.001, 1) == LEAST_NOISE
    with pytest.raises(PrivacySpent, match="too much for 1000 steps more"):
        noise_for(0.01, 1e-5, [], 1.0, 1000)


# --- the budget -------------------------------------------------------------------------------------------------------

ALLOWED = PrivacySection(epsilon=5.0, delta=1e-3)
ROUNDS = settings(rounds=3, batch=4)


def test_all_rounds_of_a_federation_fit_and_no_round_more(tmp_path: Path) -> None:
    budget = Budget(tmp_path, ALLOWED, 40, "one")
    steps = budget.plan(ROUNDS, LimitsSection())
    assert (steps.rate, steps.count) == (0.1, 10)
    assert budget.rounds_left(steps) == 3
    for round in (1, 2, 3):
        budget.private(steps)
        budget.spend(round, steps)
        budget = Budget(tmp_path, ALLOWED, 40, "one")  # as after a restart
        assert budget.plan(ROUNDS, LimitsSection()) == steps
        assert budget.rounds_left(steps) == 3 - round
    assert budget.spent == pytest.approx(5.0, rel=1e-2)
    with pytest.raises(PrivacySpent, match=r"of epsilon 5 is spent, and a round of 10 steps would .*nothing was"):
        budget.private(steps)
    assert budget.describe()[-1] == "spent: epsilon 5.00"


def test_another_federation_on_the_same_data_gets_what_is_left(tmp_path: Path) -> None:
    first = Budget(tmp_path, ALLOWED, 40, "one")
    steps = first.plan(ROUNDS, LimitsSection())
    first.spend(1, steps)
    second = Budget(tmp_path, ALLOWED, 40, "two")
    others = second.plan(ROUNDS, LimitsSection())
    assert others.noise > steps.noise
    for round in (1, 2, 3):
        second.private(others)
        second.spend(round, others)
    assert epsilon([steps, *[others] * 3], ALLOWED.delta) <= 5.0
    assert len(second.describe()) == 4


def test_a_stricter_epsilon_holds_at_once(tmp_path: Path) -> None:
    budget = Budget(tmp_path, ALLOWED, 40, "one")
    budget.spend(1, budget.plan(ROUNDS, LimitsSection()))
    stricter = Budget(tmp_path, PrivacySection(epsilon=1.0, delta=1e-3), 40, "one")
    with pytest.raises(PrivacySpent):
        stricter.private(stricter.plan(ROUNDS, LimitsSection()))


def test_fewer_epochs_are_fewer_steps(tmp_path: Path) -> None:
    whole = Budget(tmp_path / "a", ALLOWED, 40, "one")
    half = Budget(tmp_path / "b", ALLOWED, 40, "one")
    for work in (tmp_path / "a", tmp_path / "b"):
        work.mkdir()
    steps = half.plan(ROUNDS, LimitsSection(max_local_epochs=0.5))
    assert steps.count == 5
    assert steps.noise < whole.plan(ROUNDS, LimitsSection()).noise


def test_a_delta_that_promises_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"privacy.delta: 0.05 is no less than 1 / 40.*set it to 3e-03 or less"):
        Budget(tmp_path, PrivacySection(delta=0.05), 40)


@pytest.mark.parametrize("content", ["", "{", '{"spent": [{"round": 1}]}', '{"spent": 3}'])
def test_a_torn_record_is_no_fresh_start(content: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"privacy.json: cannot be read .*restore it"):
        Budget(tmp_path, ALLOWED, 40)


@pytest.mark.parametrize(
    ("own", "asked", "wanted"),
    [
        (None, None, None),
        (None, (8.0, 1e-5, 2.0), (8.0, 1e-5, 2.0)),
        ((3.0, 1e-4, 1.0), None, (3.0, 1e-4, 1.0)),
        ((3.0, 1e-4, 1.0), (8.0, 1e-5, 2.0), (3.0, 1e-5, 1.0)),
        ((9.0, 1e-6, 1.0), (8.0, 1e-5, 2.0), (8.0, 1e-6, 1.0)),
    ],
)
def test_the_stricter_of_both_sides_holds(own: Any, asked: Any, wanted: Any) -> None:
    sections = [
        None if v is None else PrivacySection(epsilon=v[0], delta=v[1], clip=v[2]) for v in (own, asked, wanted)
    ]
    assert PrivacySection.stricter(sections[0], sections[1]) == sections[2]


# --- a whole run ------------------------------------------------------------------------------------------------------


def values_of(tmp_path: Path, fm: Path) -> dict[str, Any]:
    private = {"privacy": {"epsilon": 6.0, "delta": 1e-3}}
    return tiny.federation(tmp_path, fm, 40, proxy={"importance": "weights"}, training=private)


def test_silos_of_a_simulation_keep_to_it(
    fm_directory: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spent, spend = dict[Path, list[Steps]](), Budget.spend

    def noted(self: Budget, round: int, steps: Steps) -> None:
        spend(self, round, steps)
        spent.setdefault(self._path, []).append(steps)

    monkeypatch.setattr(Budget, "spend", noted)
    values = values_of(tmp_path, fm_directory("bert"))
    values |= {"simulation": {"data": str(tmp_path / "data.jsonl"), "silos": 2, "partition": {"kind": "iid"}}}
    simulate(SimulationConfig.model_validate(values | {"out": str(tmp_path / "out")}))
    assert [len(rounds) for rounds in spent.values()] == [2, 2]
    assert all(5.5 < epsilon(rounds, 1e-3) <= 6.0 for rounds in spent.values())


ODD = [
    ({"training": {"packing": True}}, "packing: true; set it to false"),
    ({"adapter": {"ffn": True, "rank": 2}}, "adapter.ffn: true; set it to false"),
    ({"alignment": {"counts": "silos"}}, "alignment.counts: silos; set it to public"),
]


@pytest.mark.parametrize(("changes", "message"), ODD)
def test_what_does_not_go_with_it_is_said_at_the_start(
    changes: dict[str, Any], message: str, fm_directory: Callable[[str], Path], tmp_path: Path
) -> None:
    values = values_of(tmp_path, fm_directory("bert")) | {"out": "/o", "simulation": {"data": "/d", "silos": 2}}
    for section, keys in changes.items():
        values[section] = values.get(section, {}) | keys
    with pytest.raises(ValueError, match=message):
        SimulationConfig.model_validate(values)


def as_processes(values: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of a server that asks for nothing, and of two silos, of which one has an epsilon."""
    del values["training"]["privacy"]
    values |= {"listen": "127.0.0.1:0", "insecure_loopback": True, "federation": {"silos": ["careful", "open"]}}
    plain = {"insecure_loopback": True, "threads": 1, "data": {"path": str(tmp_path / "data.jsonl")}}
    silos = {name: plain | {"insecure_name": name} for name in ("careful", "open")}
    silos["careful"]["privacy"] = {"epsilon": 4.0, "delta": 1e-3}
    return values, silos


@pytest.mark.slow
def test_a_silo_keeps_to_its_own(fm_directory: Callable[[str], Path], tmp_path: Path) -> None:
    server, silos = as_processes(values_of(tmp_path, fm_directory("bert")), tmp_path)
    run_federation(tmp_path, server, silos)
    report = privacy_report(load_silo_config(tmp_path / "silo-careful.yaml")).splitlines()
    assert "2 rounds, 20 steps, epsilon 4.00 by itself" in report[1]
    assert report[2] == "spent: epsilon 4.00"
    assert report[3].startswith("left: 0 more rounds")
    assert not (tmp_path / "work-open" / FILE).exists()
    told = json.loads((tmp_path / "work-careful" / "update.json").read_text())["metrics"]
    assert set(told) == {"seconds"}
    assert {"train_loss", "tokens"} <= set(json.loads((tmp_path / "work-open" / "update.json").read_text())["metrics"])


def test_a_silo_that_has_spent_it_trains_nothing(fm_directory: Callable[[str], Path], tmp_path: Path) -> None:
    server, silos = as_processes(values_of(tmp_path, fm_directory("bert")), tmp_path)
    work = tmp_path / "work-careful"
    work.mkdir()
    (work / FILE).write_text(json.dumps({"spent": [{"run": "x", "round": 1, "rate": 1.0, "noise": 1.0, "count": 9}]}))
    with pytest.raises(FedPFTError):
        run_federation(tmp_path, server, silos)
    log = (tmp_path / "silo-careful.log").read_text()
    assert "of epsilon 4 is spent, too much for 20 steps more" in log
    assert not (work / "update.safetensors").exists()
    assert len(json.loads((work / FILE).read_text())["spent"]) == 1


def test_the_explanation_names_it(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"red {n}", "label": "x"}) for n in range(5)))
    yaml = "server: 127.0.0.1:5\ninsecure_loopback: true\ninsecure_name: a\ndata: {path: data.jsonl}\n"
    (tmp_path / "plain.yaml").write_text(yaml)
    (tmp_path / "silo.yaml").write_text(yaml + "privacy: {epsilon: 3, delta: 1e-3}\n")
    assert "differential" not in explain(load_silo_config(tmp_path / "plain.yaml"))
    assert "epsilon 3 at delta 0.001" in explain(load_silo_config(tmp_path / "silo.yaml"))
    with pytest.raises(ConfigError, match=r"privacy: is not in silo\.yaml"):
        privacy_report(load_silo_config(tmp_path / "plain.yaml"))
    assert privacy_report(load_silo_config(tmp_path / "silo.yaml")).splitlines() == [
        "allowed: epsilon 3 at delta 0.001",
        "spent: epsilon 0.00",
    ]
