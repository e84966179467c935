"""Whole silos hidden in a sum: the sampler, what goes in, how much noise the sum has, and what is refused."""

import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_simulation import inputs, simulated  # noqa: F401  (inputs is a fixture)
from test_summing import (  # noqa: F401  (kits and world are fixtures)
    ADAPTER,
    LONG_SECONDS,
    SILOS,
    Once,
    Silo,
    die,
    kits,
    tls,
    trained,
    world,
)

from fedpft import audit, doctor
from fedpft.config import (
    SecureTerms,
    ServerConfig,
    SiloConfig,
    SiloDataSection,
    SiloPrivacyBound,
    SiloPrivacySection,
    SiloPrivacyTerms,
    largest_private_sum,
    private_fraction_bits,
)
from fedpft.errors import ConfigError, InvalidUpdate, PrivacyViolation
from fedpft.privacy import fixedpoint
from fedpft.privacy.fixedpoint import Contribution, Layout
from fedpft.privacy.noise import Secret
from fedpft.privacy.secagg import Context
from fedpft.privacy.wholesilo import add_noise, deviation, hidden, multiplier
from fedpft.silo.explain import explain
from fedpft.silo.summing import Summing, check_agreed
from fedpft.silo.work import Update, Work
from fedpft.simulation.run import simulate
from fedpft.wire.hello import greet
from fedpft.wire.tensors import read_tensors

PRIVATE = SiloPrivacyTerms(epsilon=8.0, delta=1e-5, clip=0.02, rounds=6)
TERMS = SecureTerms(
    most_samples=1000, max_entry=1.0, threshold_fraction=0.5, min_silos=5, weights="equal", silo_privacy=PRIVATE
)
LAYOUT = Layout.of({name: tuple(tensor.shape) for name, tensor in ADAPTER.items()}, {})
SECTION = SiloPrivacySection(epsilon=8.0, delta=1e-5, clip=0.02)


# --- the noise --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [0.4, 1.0, 1.7, 4.0])
def test_integers_come_as_often_as_they_should(spread: float) -> None:
    count = 400_000
    drawn = Secret(bytes([7] * 32)).discrete_gaussian(count, spread)
    places = torch.arange(-40, 41)
    chances = torch.exp(-(places.double() ** 2) / (2 * spread**2))
    wanted = count * chances / chances.sum()
    found = (drawn[:, None] == places).sum(0)
    likely = wanted > 10
    surprise = ((found - wanted) ** 2 / wanted)[likely].sum()
    degrees = int(likely.sum()) - 1
    assert surprise < degrees + 5 * math.sqrt(2 * degrees) + 5
    assert int(found.sum()) == count


@pytest.mark.parametrize("spread", [1000.0, 65536.0, 131073.5])
def test_a_wide_noise_has_the_moments_of_a_normal_one(spread: float) -> None:
    drawn = Secret(bytes([3] * 32)).discrete_gaussian(1_000_000, spread).double() / spread
    assert abs(float(drawn.mean())) < 0.006
    assert abs(float(drawn.square().mean()) - 1.0) < 0.008
    assert abs(float(drawn.pow(4).mean()) - 3.0) < 0.06
    assert float((drawn.abs() > 3).double().mean()) == pytest.approx(0.0027, abs=0.0004)


def test_the_same_key_gives_the_same_noise_and_no_key_another() -> None:
    key = bytes(range(32))
    one, other = (Secret(key).discrete_gaussian(1000, 50.0) for _ in range(2))
    assert torch.equal(one, other)
    assert not torch.equal(Secret().discrete_gaussian(1000, 50.0), Secret().discrete_gaussian(1000, 50.0))


@pytest.mark.parametrize("spread", [0.0, -1.0, math.inf, math.nan])
def test_a_spread_that_cannot_be_is_refused(spread: float) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        Secret().discrete_gaussian(1, spread)


@pytest.mark.parametrize("silos", [5, 9])
def test_the_sum_over_the_fewest_silos_has_all_the_noise_and_more_silos_add_to_it(silos: int) -> None:
    entries = 200_000
    total = torch.zeros(entries, dtype=torch.int32)
    for silo in range(silos):
        add_noise(total, TERMS, Secret(bytes([silo] * 32)))
    needed = multiplier(PRIVATE) * (PRIVATE.clip * 2.0**TERMS.fraction_bits + math.sqrt(entries))
    found = float(total.double().square().mean().sqrt())
    assert found / needed == pytest.approx(math.sqrt(silos / TERMS.min_silos), rel=0.01)


def test_fewer_rounds_and_more_epsilon_take_less_noise() -> None:
    base = multiplier(PRIVATE)
    assert base == pytest.approx(1.5, abs=0.1), "of the table in docs/privacy.md"
    assert multiplier(PRIVATE.model_copy(update={"rounds": 1})) < base
    assert multiplier(PRIVATE.model_copy(update={"epsilon": 1.0})) > base


def test_what_no_noise_hides_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no noise hides a silo in 4000 rounds at epsilon 0\.01"):
        multiplier(PRIVATE.model_copy(update={"epsilon": 0.01, "rounds": 4000}))


def test_steps_that_are_too_coarse_for_the_noise_are_refused() -> None:
    generous = PRIVATE.model_copy(update={"epsilon": 1000.0, "clip": 1.0})
    coarse = TERMS.model_copy(update={"min_silos": 300_000, "silo_privacy": generous})
    with pytest.raises(ConfigError, match="steps, which are too coarse"):
        deviation(coarse, 100)


# --- what goes in -----------------------------------------------------------------------------------------------------


def contribution(silo: str, stretch: float = 1.0, **changes: Any) -> Contribution:
    adapter, samples, inactivity = trained(silo, 1)
    after = {name: ADAPTER[name] + stretch * (tensor - ADAPTER[name]) for name, tensor in adapter.items()}
    values = {"samples": samples, "weight": samples, "metrics": {"train_loss": 0.5}, "inactivity": inactivity}
    return Contribution(ADAPTER, after, **(values | changes))


def encoded(what: Contribution, silo: str = "east") -> torch.Tensor:
    key = fixedpoint.rounding_key(5, silo, 1)
    return fixedpoint.encode(hidden(what, PRIVATE.clip), LAYOUT, TERMS, key)[0]


@pytest.mark.parametrize("stretch", [0.1, 1.0, 1000.0, 1e30])
def test_no_silo_moves_the_sum_by_more_than_the_noise_is_made_for(stretch: float) -> None:
    part = encoded(contribution("east", stretch))[: LAYOUT.entries].double()
    bound = PRIVATE.clip * 2.0**TERMS.fraction_bits
    assert float(part.norm()) <= bound + math.sqrt(LAYOUT.entries)
    assert float(part.norm()) > (0.1 if stretch == 0.1 else 0.99) * bound, "and it is used"


def test_a_change_within_the_clip_stays_as_it_is() -> None:
    what = contribution("east", 0.1)
    part = encoded(what)[: LAYOUT.entries].double() / 2.0**TERMS.fraction_bits
    change = torch.cat([(what.trained[name] - what.start[name]).flatten() for name in sorted(ADAPTER)]).double()
    assert float((part - change).abs().max()) < 2.0**-TERMS.fraction_bits + 1e-6 * PRIVATE.clip


def test_but_for_the_change_two_silos_put_in_the_same() -> None:
    one = encoded(contribution("east"))
    other = encoded(contribution("south", samples=999, metrics={"seconds": 17.0, "tokens": 5.0}, weight=0.0))
    assert torch.equal(one[LAYOUT.entries :], other[LAYOUT.entries :])
    total = fixedpoint.decode(one + other, LAYOUT, TERMS, 2)
    assert (total.samples, total.weight, total.metrics, total.inactivity) == (2, 2.0, {}, None)


@pytest.mark.parametrize("odd", [math.nan, math.inf])
def test_a_change_that_is_not_finite_is_refused(odd: float) -> None:
    what = contribution("east")
    what.trained["head"][0] = odd
    with pytest.raises(InvalidUpdate, match="NaN or infinity"):
        encoded(what)


# --- the words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("min_silos", [2, 33, 64, 1000])
def test_a_sum_and_its_noise_do_not_wrap_and_one_bit_more_might(clip: float, min_silos: int) -> None:
    bits = private_fraction_bits(clip, min_silos)
    assert largest_private_sum(clip, min_silos, 2 * min_silos - 1, bits) < 1 << 31
    assert largest_private_sum(clip, min_silos, 2 * min_silos - 1, bits + 1) >= 1 << 31


def test_a_clip_that_leaves_no_bits_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"1999 silos x clip 1e\+06 and noise of up to 12 x 50 x clip x sqrt"):
        private_fraction_bits(1e6, 1000)


# --- what it goes without ---------------------------------------------------------------------------------------------


def server(tmp_path: Path, **changes: Any) -> ServerConfig:
    federation = {"silos": ["a", "b", "c"], "min_silos": 2, "secure_aggregation": True, "silo_privacy": SECTION}
    values = {
        "out": tmp_path,
        "listen": "127.0.0.1:0",
        "tls": {"ca": tmp_path, "certificate": tmp_path, "key": tmp_path},
        "model": {"path": tmp_path, "labels": tmp_path},
        "public_data": tmp_path,
        "aggregation": {"weights": "equal"},
        "alignment": {"counts": "public"},
        "federation": federation | changes.pop("federation", {}),
    }
    return ServerConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"federation": {"secure_aggregation": False}}, "needs federation.secure_aggregation: true"),
        ({"aggregation": {"weights": "samples"}}, "goes without aggregation.weights: samples, .* set it to equal"),
        ({"aggregation": {}}, "goes without aggregation.weights: diversity"),
        (
            {"alignment": {"counts": "silos"}},
            "goes without alignment.counts: silos, .* set it to public",
        ),
        ({"federation": {"min_silos": None}}, "needs federation.min_silos: a silo adds the share"),
        ({"federation": {"silos": ["a", "b", "c", "d"]}}, "needs min_silos of more than half of the 4 silos, not 2"),
        ({"federation": {"silos": [f"s{n}" for n in range(65)], "min_silos": 60}}, "is for 2 to 64 silos"),
    ],
)
def test_what_it_does_not_go_with_is_refused_with_the_reason(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        server(tmp_path, **changes)


def test_silos_are_told_all_that_the_noise_follows_from(tmp_path: Path) -> None:
    terms = server(tmp_path, training={"rounds": 9}).secure_terms
    assert terms is not None
    assert terms.silo_privacy == SiloPrivacyTerms(**dict(SECTION), rounds=9)
    assert server(tmp_path, alignment={"update": "random"}).secure_terms is not None, "nobody counts anything then"


@pytest.mark.parametrize(
    ("said", "private", "demands", "message"),
    [
        (None, None, {"require": ("silo_privacy",)}, "has no silo_privacy, which silo.yaml demands"),
        (None, None, {"silo_privacy": SiloPrivacyBound()}, "has no silo_privacy, which silo.yaml demands"),
        (PRIVATE, PRIVATE, {"silo_privacy": SiloPrivacyBound(epsilon=4.0)}, "of epsilon 8 at delta 1e-05, .* 4 at"),
        (PRIVATE, PRIVATE, {"silo_privacy": SiloPrivacyBound(delta=1e-6)}, "demands 8 at 1e-06"),
        (None, PRIVATE, {}, "says another thing of secure aggregation than before"),
        (PRIVATE, None, {}, "says another thing of secure aggregation than before"),
        (PRIVATE, PRIVATE.model_copy(update={"rounds": 60}), {}, "says another thing of secure aggregation"),
    ],
)
def test_a_federation_with_less_than_a_silo_demands_or_was_told_is_left(
    said: Any, private: Any, demands: Any, message: str, tmp_path: Path
) -> None:
    config = SiloConfig(
        server="127.0.0.1:1",
        tls={"ca": tmp_path, "certificate": tmp_path, "key": tmp_path},
        data=SiloDataSection(path=tmp_path),
        **demands,
    )
    terms = TERMS.model_copy(update={"silo_privacy": private})
    with pytest.raises(PrivacyViolation, match=message):
        check_agreed(config, said=True, terms=terms, said_private=said)


# --- over the wire ----------------------------------------------------------------------------------------------------


def noised(here: Any, silos: Any, round: int = 1) -> torch.Tensor:
    """The sum of what the silos have on disk: the update's words, and the noise of the key beside it."""
    total = torch.zeros(LAYOUT.words, dtype=torch.int32)
    for silo in silos:
        adapter, samples, _ = trained(silo, round)
        what = hidden(Contribution(ADAPTER, adapter, samples, samples, {}, None), PRIVATE.clip)
        words, _ = fixedpoint.encode(what, LAYOUT, here.terms, fixedpoint.rounding_key(5, silo, round))
        entered = Work(here.root / f"work-{silo}").entered(here.ledger.run_id)
        add_noise(words[: LAYOUT.entries], here.terms, Secret(bytes.fromhex(entered.noise)))
        total += words
    return total


@pytest.fixture
def private(world: Any) -> Any:  # noqa: F811
    return lambda **changes: world(**({"min_silos": 2, "silo_privacy": SECTION} | changes))


def test_the_sum_is_of_clipped_changes_and_of_each_silos_noise(private: Any) -> None:
    here = private()
    kit = tls(here.kits / "silos" / "north")
    assert greet(here.address, kit, name=None, timeout_seconds=10.0).terms.silo_privacy == PRIVATE
    here.start_silos()
    here.server.wait_for_silos()
    found = here.run_round(1)
    assert torch.equal(here.words(1), noised(here, SILOS))
    assert (found.silos, found.summed(), found.train_loss(), found.inactivity()) == (3, {}, None, [])
    clean = torch.zeros(LAYOUT.entries)
    for silo in SILOS:
        clean += encoded_of(here, silo)
    noise = (here.words(1)[: LAYOUT.entries] - clean).double()
    assert 0.2 < float(noise.square().mean().sqrt()) / (math.sqrt(3) * deviation(here.terms, LAYOUT.entries)) < 2.5
    mean = found.mean(None, 1)
    for name, tensor in ADAPTER.items():
        assert 0 < float((mean[name] - tensor).abs().max()) < 10 * multiplier(PRIVATE) * PRIVATE.clip
    here.server.close_round()
    keys = {silo: json.loads((here.root / f"work-{silo}" / "entered.json").read_text())["noise"] for silo in SILOS}
    here.run_round(2)
    assert torch.equal(here.words(2), noised(here, SILOS, 2))
    again = {silo: json.loads((here.root / f"work-{silo}" / "entered.json").read_text())["noise"] for silo in SILOS}
    assert not set(keys.values()) & set(again.values()), "each round has noise of its own"
    logs = "".join(path.read_text() for path in here.root.rglob("audit.jsonl"))
    assert not [key for key in (*keys.values(), *again.values()) if key in logs]


def encoded_of(here: Any, silo: str) -> torch.Tensor:
    adapter, samples, _ = trained(silo, 1)
    what = hidden(Contribution(ADAPTER, adapter, samples, samples, {}, None), PRIVATE.clip)
    return fixedpoint.encode(what, LAYOUT, here.terms, fixedpoint.rounding_key(5, silo, 1))[0][: LAYOUT.entries]


def test_a_silo_that_drops_out_takes_its_noise_along_and_the_rest_is_enough(private: Any) -> None:
    here, silent = private(), threading.Event()
    here.start_silos(north=Once("sealed", lambda: silent.wait(LONG_SECONDS) and None, silent=True))
    here.server.wait_for_silos()
    try:
        here.run_round(1)
    finally:
        silent.set()
    assert torch.equal(here.words(1), noised(here, ("east", "south")))


@pytest.mark.parametrize("stage", ["sealed", "survivors"])
def test_a_silo_that_is_killed_puts_in_the_same_words_again(stage: str, private: Any) -> None:
    """So that a round that is opened twice has said no more than once."""
    here, seen = private(min_silos=3), []
    keep = Work.keep_vector

    def kept(self: Work, words: torch.Tensor) -> Any:
        if self.path.name == "work-east":
            seen.append(self.entered(here.ledger.run_id))
        return keep(self, words)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Work, "keep_vector", kept)
        here.start_silos(north=Once(stage, die), east=Once("signatures", die), south=Once("signatures", die))
        here.server.wait_for_silos()
        outcome = here._pool.submit(here.run_round, 1)
        assert here.running["north"].result(LONG_SECONDS) == "killed"
        here.start("north")
        for name in ("east", "south"):
            assert here.running[name].result(LONG_SECONDS) == "killed"
            here.start(name)
        outcome.result(LONG_SECONDS)
    assert torch.equal(here.words(1), noised(here, SILOS))
    assert here.ledger.recorded("sum")[-1]["attempt"] >= 1
    assert len(seen) >= 2
    assert len(set(seen)) == 1, "one key and one update, whatever the attempt"


def test_a_silo_puts_no_second_update_into_a_round(private: Any) -> None:
    """As if the server had shown it another adapter to start from, after its vector was there."""
    here = private(min_silos=2)

    def forget() -> None:
        work = Work(here.root / "work-north")
        work.drop_update()
        die()

    here.start_silos(north=Once("signatures", forget), east=Once("signatures", die), south=Once("signatures", die))
    here.server.wait_for_silos()
    outcome = here._pool.submit(here.run_round, 1)
    for name in SILOS:
        assert here.running[name].result(LONG_SECONDS) == "killed"

    with pytest.MonkeyPatch.context() as patched:
        honest = Silo.train

        def other(self: Any, train: Any) -> None:
            if self.name == "north" and self.work.update_path.exists() is False:
                adapter, samples, _ = trained("north", 5)
                update = self.work.keep_update(train, {"adapter": adapter}, {}, samples=samples, metrics={}, weight=1.0)
                self.connection.fetch(train.adapter, *self.work.received(train.adapter))
                self.summing.begin(train, update, self.connection.settings)
                return
            honest(self, train)

        patched.setattr(Silo, "train", other)
        for name in SILOS:
            here.start(name)
        outcome.result(LONG_SECONDS)
    assert here.ledger.recorded("sum")[-1]["silos"] == ["east", "south"]
    events = [entry for entry in audit.read(here.root / "work-north" / "audit.jsonl") if entry.event == "withdrawn"]
    assert "has put another update into this round" in events[-1].fields["reason"]


def test_the_silo_is_told_what_hides_it_before_and_after_it_joins(private: Any) -> None:
    here = private()
    (here.root / "data.csv").write_text("text,label\nred,1\nblue,2\n", encoding="utf-8")
    silo = Silo(here.root, here.kits, here.address, "north")
    said = explain(silo.config)
    assert "shrunk to norm 0.02, with noise of this silo's own" in said
    assert "hides each whole silo: epsilon 8 at delta 1e-05 over 6 rounds" in said
    assert "No samples, no metrics, no inactivity" in said
    assert "train_loss, seconds" not in said
    terms = greet(here.address, silo.config.tls, name=None, timeout_seconds=10.0).terms
    assert "for this whole silo over 6 rounds, noise of 1.4" in doctor._privacy(silo.config, terms)
    silo.close()


def test_rounds_beyond_those_that_the_noise_is_for_are_refused(private: Any) -> None:
    here = private()
    here.start_silos()
    here.server.wait_for_silos()
    here._pool.submit(here.run_round, 7)
    for name in SILOS:
        with pytest.raises(PrivacyViolation, match="asks for round 7, and silo_privacy is for 6"):
            here.running[name].result(LONG_SECONDS)
    assert not here.ledger.recorded("sum")


@pytest.fixture
def summing(tmp_path: Path) -> Summing:
    """Of a silo that was in round 3 with two others."""
    silo = Summing.__new__(Summing)
    silo._work, silo._server, silo._entry = Work(tmp_path), SimpleNamespace(run_id="run"), None
    silo._update = Update(round=3, proxy_version=0, start="", samples=1, metrics={}, sha256="of the update")
    assert silo._entering(context(), ["east", "north", "south"]) == ""
    silo._work.keep_entered(silo._entry)
    return silo


def context(**terms: Any) -> Context:
    return Context("run", 3, 1, b"", TERMS.model_copy(update={"min_silos": 3} | terms))


def test_a_silo_enters_the_next_attempt_only_if_any_two_sums_have_a_silo_in_common(summing: Summing) -> None:
    former, summing._entry = summing._entry, None
    assert summing._entering(context(), ["east", "north", "west", "up"]) == ""
    assert summing._entry == former.model_copy(update={"silos": frozenset(["east", "north", "south", "west", "up"])})
    others = ["east", "west", "up", "down"]  # three of them, and the three of before
    assert "two sums could be opened" in summing._entering(context(), others)


@pytest.mark.parametrize("terms", [{"min_silos": 2}, {"silo_privacy": PRIVATE.model_copy(update={"clip": 1.0})}])
def test_the_same_noise_is_used_under_the_same_terms_only(terms: Any, summing: Summing) -> None:
    assert "or the same under other terms" in summing._entering(context(**terms), ["east", "north", "south"])


@pytest.mark.parametrize(
    ("round", "terms", "message"),
    [
        (2, PRIVATE, "asks for round 2 again, but this silo was in round 3"),
        (0, PRIVATE, "asks for round 0, and silo_privacy is for 6"),
        (4, None, "has another silo_privacy than in the rounds before"),
        (4, PRIVATE.model_copy(update={"rounds": 60}), "has another silo_privacy than in the rounds before"),
    ],
)
def test_no_round_is_released_twice_or_under_less(round: int, terms: Any, message: str, summing: Summing) -> None:
    summing._check_release(3, TERMS)
    summing._check_release(4, TERMS)
    with pytest.raises(PrivacyViolation, match=message):
        summing._check_release(round, TERMS.model_copy(update={"silo_privacy": terms}))


def test_a_server_that_comes_back_without_it_is_left(private: Any) -> None:
    here = private()
    silo = Silo(here.root, here.kits, here.address, "north")
    here.kill_server()
    here.federation = here.federation.model_copy(update={"silo_privacy": None})
    here.start_server()
    with pytest.raises(PrivacyViolation, match="has another silo_privacy than it began with"):
        silo.connection.enrol(0)
    silo.close()


# --- rehearsed --------------------------------------------------------------------------------------------------------


def test_a_rehearsal_has_more_silos_than_a_sum_could_and_the_noise_of_all(inputs: Path, tmp_path: Path) -> None:  # noqa: F811
    changes: dict[str, Any] = {
        "training": {"rounds": 1, "frozen_a": True},
        "aggregation": {"weights": "equal"},
        "alignment": {"every_rounds": 0},
        "evaluation": {"gap_samples": 0},
    }
    section = {"data": str(inputs / "train.csv"), "silos": 70, "drop_out_fraction": 0.05}
    federation = {"min_silos": 60, "secure_aggregation": True, "silo_privacy": {"epsilon": 8.0, "clip": 0.5}}
    found = {}
    for name in ("one", "other"):
        config = simulated(tmp_path / name, inputs, section, federation=federation, **changes)
        simulate(config)
        before, adapter = (
            read_tensors(config.out / "rounds" / round / "adapter.safetensors", "adapter") for round in ("0", "1")
        )
        resting = [key for key in adapter if ".lora_A." in key]
        assert resting
        assert all(torch.equal(adapter.pop(key), before[key]) for key in resting), "no noise on what does not train"
        found[name] = torch.cat([adapter[key].flatten().double() for key in sorted(adapter)])
    terms, values = config.secure_terms, len(found["one"])
    assert terms is not None
    noise = deviation(terms, values) * 2.0**-terms.fraction_bits  # on a mean of S silos: sqrt(S) / S as much
    spread = float((found["one"] - found["other"]).std()) / math.sqrt(2)
    assert 0.95 * noise / math.sqrt(70) < spread < 1.05 * noise / math.sqrt(60)
