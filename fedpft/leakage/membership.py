"""Was this row trained on? Asked of adapters, and of inactivity counts.

Of adapters, by two scores of a row, both of its confidence log(p / (1 - p)), p = exp(-loss):

    loss          what it is with the adapter (Yeom et al. 2018, arXiv 1709.01604)
    reference     how much more it is than with an adapter that has seen nothing of the round (Watson et al. 2022,
                  arXiv 2111.08440; the confidence and the reference are those of offline LiRA, Carlini et al. 2022,
                  arXiv 2112.03570, with one reference). That is the one that the round began with, and rounds add up.

Of counts, by how far the row's own shares of inactive neurons lean as the silo's do (Homer et al. 2008,
10.1371/journal.pgen.1000167, for genomes):

    sum over neurons of (x - p) (q - p) / (p (1 - p))        x of the row, q of the silo, p of public rows

n rows that are looked at; K neurons of a layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from fedpft.config import SimulationConfig
from fedpft.data.batches import EncodedDataset, evaluation_batches, sample
from fedpft.leakage.rehearsal import Observed
from fedpft.leakage.scores import Finding, membership
from fedpft.model import adapters
from fedpft.model.adapters import Adapter
from fedpft.model.subffn import counting
from fedpft.silo.learner import Learner

BATCH = 16  # of tasks whose loss is known of each row's logits; of others 1
PUBLIC_ROWS = 128  # that tell how often a neuron is inactive anywhere
LEAST_SPREAD = 1e-3  # of p (1 - p): what is nearly always the same says nothing

Shares = dict[int, Tensor]  # compressed layer -> (K,) share of tokens at which each neuron is inactive


@dataclass(frozen=True)
class Candidates:
    """Rows of one silo: some that it trains on, some that it does not."""

    members: EncodedDataset
    others: EncodedDataset


@dataclass
class Scores:
    """Of one silo's candidates, (n,) by the names in ROWS, as far as there are any; so many of them are members."""

    members: int
    kept: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """To what is there of that name."""
        self.kept[name] = self.kept[name] + values if name in self.kept else values


def confidence(losses: Tensor) -> Tensor:
    """log(p / (1 - p)) of (n,) losses, float64."""
    losses = losses.double().clamp(min=1e-12)
    return -losses - torch.log(-torch.expm1(-losses))


def losses(learner: Learner, adapter: Adapter, dataset: EncodedDataset) -> Tensor:
    """Of each row by itself, (n,) float64, whatever the task's loss is."""
    model, task = learner.proxy.model, learner.task
    adapters.load(model, adapter)
    device, found = next(model.parameters()).device, torch.zeros(len(dataset), dtype=torch.float64)
    with torch.no_grad():
        for rows, inputs in evaluation_batches(dataset, BATCH if task.label_list else 1):
            batch = {name: value.to(device) for name, value in inputs.items()}
            if not task.label_list:
                found[rows] = float(task.loss(model, batch))
                continue
            labels = batch.pop("labels")
            logits = model(**batch).logits.float()
            for row, own, label in zip(rows.tolist(), logits.split(1), labels.split(1), strict=True):
                found[row] = float(task.logit_loss(own, label))
    return found


def inactive_shares(learner: Learner, adapter: Adapter, dataset: EncodedDataset, eps: float) -> list[Shares]:
    """Of each row by itself."""
    model = learner.proxy.model
    adapters.load(model, adapter)
    device, found = next(model.parameters()).device, []
    with torch.no_grad(), counting(model, learner.proxy.compressed, eps) as counters:
        for row in range(len(dataset)):
            inputs = dataset.batch(torch.tensor([row]))
            before = {layer: counter.counts.clone() for layer, counter in counters.items()}
            tokens = {layer: int(counter.tokens) for layer, counter in counters.items()}
            model(**{name: value.to(device) for name, value in inputs.items() if name != "labels"})
            found.append(
                {
                    layer: ((counter.counts - before[layer]).double() / (int(counter.tokens) - tokens[layer])).cpu()
                    for layer, counter in counters.items()
                }
            )
    return found


def score_round(
    learner: Learner,
    config: SimulationConfig,
    observed: Observed,
    candidates: Mapping[str, Candidates],
    public: EncodedDataset,
    scores: dict[str, Scores],
) -> None:
    """Adds what a round says of the candidates of the silos; the learner has the round's version of the proxy."""
    mean, start = observed.mean(config), observed.start
    own = {update.silo: update for update in observed.updates}
    for silo, rows in candidates.items():
        entry = scores.setdefault(silo, Scores(len(rows.members)))

        def of(adapter: Adapter, rows: Candidates = rows) -> Tensor:
            return confidence(torch.cat([losses(learner, adapter, each) for each in (rows.members, rows.others)]))

        before = of(start)
        entry.kept.setdefault("first received", before)
        entry.kept["received"] = before
        if silo in own:
            after = of(own[silo].adapter)
            entry.kept["last"] = after
            entry.add("gained", after - before)
        after = of(mean)
        entry.kept["last, mean"] = after
        entry.add("gained, mean", after - before)
    counted = {silo: counts for silo, update in own.items() if (counts := update.inactivity)}
    if counted:
        _score_counts(learner, start, counted, candidates, public, scores)


def _score_counts(
    learner: Learner,
    start: Adapter,
    counted: Mapping[str, Mapping[str, Tensor]],
    candidates: Mapping[str, Candidates],
    public: EncodedDataset,
    scores: Mapping[str, Scores],
) -> None:
    eps = learner.settings.inactive_below
    usual = inactive_shares(learner, start, public, eps)
    p = {layer: torch.stack([each[layer] for each in usual]).mean(0) for layer in usual[0]}
    names = next(iter(counted.values()))
    together = _shares({name: _sum(counts[name] for counts in counted.values()) for name in names})
    for silo, rows in candidates.items():
        shares = inactive_shares(learner, start, rows.members, eps) + inactive_shares(learner, start, rows.others, eps)
        if silo in counted:
            own = _shares(counted[silo])
            scores[silo].add("counts", torch.tensor([_leans(each, own, p) for each in shares]))
        scores[silo].add("counts, mean", torch.tensor([_leans(each, together, p) for each in shares]))


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Of different silos' counts of the same; one of each neuron and one of all go together."""
    return reduce(torch.add, tensors)


def _leans(x: Shares, q: Shares, p: Shares) -> float:
    spread = {layer: (each * (1 - each)).clamp(min=LEAST_SPREAD) for layer, each in p.items()}
    return sum(float(((x[layer] - p[layer]) * (q[layer] - p[layer]) / spread[layer]).sum()) for layer in p)


def _shares(counts: Mapping[str, Tensor]) -> Shares:
    layers = [name for name in counts if not name.endswith(".tokens")]
    return {int(name): counts[name].double() / counts[f"{name}.tokens"].clamp(min=1).double() for name in layers}


def few_public(public: EncodedDataset, seed: int) -> Tensor:
    """Which public rows are looked at, (m,) int64."""
    return sample(len(public), PUBLIC_ROWS, seed, "leakage, public")


ROWS = (
    ("the server", "single updates", "a row trained on, by loss", "last"),
    ("the server", "single updates", "a row trained on, by reference", "gained"),
    ("the server", "sums", "a row trained on, by loss", "last, mean"),
    ("the server", "sums", "a row trained on, by reference", "gained, mean"),
    ("the server", "single inactivity counts", "a row trained on", "counts"),
    ("the server", "sums of inactivity counts", "a row trained on", "counts, mean"),
    ("another silo", "the adapters it receives", "a row trained on, by loss", "received"),
    ("another silo", "the adapters it receives", "a row trained on, by reference", "gained, received"),
)


def findings(scores: Sequence[Scores]) -> list[Finding]:
    """Of all silos together, in units of each one's spread.

    Each keeps out the same share of its rows, so that whose a row is says nothing.
    """
    for each in scores:
        each.kept["gained, received"] = each.kept["received"] - each.kept["first received"]
    found = []
    for attacker, sees, goal, name in ROWS:
        having = [(each.kept[name], each.members) for each in scores if name in each.kept]
        if having:
            alike = [((values - values.mean()) / values.std().clamp(min=1e-12), m) for values, m in having]
            members, others = (torch.cat(parts) for parts in zip(*((v[:m], v[m:]) for v, m in alike), strict=True))
            found += membership(attacker, sees, goal, members, others)
    return found
