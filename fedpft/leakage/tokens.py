"""What was written in the texts? Read from what became of the first layer's LoRA.

The embeddings are frozen, so that no row of theirs tells a word by moving. But LoRA's A of the first layer's query, key
and value sees the embedded tokens themselves, and moves within their span:

    occurrence   which tokens are in a silo's texts: those on whose embeddings the change acts most. What guessing comes
                 to is what the changes of shadows say, whose texts are others: some tokens are likely anywhere
    spans        whole texts: an update of one step on few tokens names them all, each as the one whose embedding lies
                 in the span of A's gradient (DAGER: Petrov et al. 2024, arXiv 2405.15586). AdamW's first step is undone
                 before: it is g / (|g| + eps) in each value.

V tokens of the vocabulary; T positions; D hidden size; R rank; M projections; Q directions of a span.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fedpft.config import SimulationConfig
from fedpft.data.batches import EncodedDataset, round_window, training_order
from fedpft.data.samples import Samples
from fedpft.leakage.rehearsal import Observed
from fedpft.leakage.scores import Finding, auc, auc_error
from fedpft.leakage.shadows import Shadow, fit, has_classes
from fedpft.model import adapters
from fedpft.model.adapters import Adapter
from fedpft.model.architectures import architecture_of, layers_path
from fedpft.model.streaming import for_backward
from fedpft.seeding import derive_seed
from fedpft.silo.learner import Learner
from fedpft.training import rate_share

AT_ONCE = 512  # tokens of the vocabulary
POSITION = 4  # in a text, at which a token is looked at where any would do
TRIAL_ROWS = 2  # of a silo that sends one step's update: of one class alone nothing would be learned
ROUNDING = 2.0**-22  # of a float32, relative, twice
ROOM = 2 / 3  # of the directions that LoRA has, so many tokens are in the texts of a trial


class _Reached(Exception):
    """Ends a forward pass whose rest nobody would look at."""


def projections(model: nn.Module) -> list[str]:
    """The names of the first layer's LoRA that sees the layer's input: query, key and value."""
    return [f"{layers_path(model)}0.{path}" for path in architecture_of(model).attention[:-1]]


def embedded(model: nn.Module, tokens: Tensor, length: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(some of the (V,) tokens, what those projections are given of each at each position, (v, T, D))."""
    kept: list[Tensor] = []

    def keep(_module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0])
        raise _Reached

    hook = model.get_submodule(projections(model)[0]).register_forward_pre_hook(keep)
    device = next(model.parameters()).device
    try:
        for part in tokens.split(AT_ONCE):
            ids = part.to(device)[:, None].expand(-1, length)
            with torch.no_grad():
                try:
                    model(input_ids=ids, attention_mask=torch.ones_like(ids))
                except _Reached:
                    yield part, kept.pop().float()
    finally:
        hook.remove()


def vocabulary(datasets: Sequence[EncodedDataset]) -> Tensor:
    """The different tokens in these texts, (v,) int64."""
    every = [dataset.batch(torch.tensor([row]))["input_ids"] for dataset in datasets for row in range(len(dataset))]
    found: Tensor = torch.cat([each.flatten() for each in every]).unique()
    return found


# --- which tokens occur -----------------------------------------------------------------------------------------------


def occurrence(
    learner: Learner,
    start: Adapter,
    trained: dict[str, Adapter],
    mean: Adapter,
    shadows: Sequence[Shadow],
    texts: dict[str, Tensor],
    known: Tensor,
) -> list[Finding]:
    """Args:
    trained: of each silo. texts: the (v,) tokens of each silo's texts. known: those of public and of shadows' texts.
    """
    model = learner.proxy.model
    size = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]
    unknown = torch.ones(size, dtype=torch.bool)
    unknown[known] = False
    candidates = unknown.nonzero()[:, 0]
    changes = [_change(model, start, each) for each in (*trained.values(), mean, *(s.adapter for s in shadows))]
    found = []
    for _, given in embedded(model, candidates, POSITION + 1):
        x = given[:, POSITION].cpu().double()
        found.append(torch.stack([(x @ change.t()).norm(dim=1) for change in changes], dim=1))
    acts = torch.cat(found)
    occurs = {silo: torch.isin(candidates, texts[silo]) for silo in trained}
    there = [(place, each) for place, each in enumerate(occurs.values()) if each.any() and not each.all()]
    if not there:
        return []

    def mean_auc(columns: Sequence[int]) -> float:
        values = [auc(acts[each, c], acts[~each, c]) for c, (_, each) in zip(columns, there, strict=True)]
        return sum(values) / len(values)

    unseen = [mean_auc([len(trained) + 1 + number] * len(there)) for number in range(len(shadows))]
    guess, (_, some) = sum(unseen) / len(unseen), there[0]
    least = auc_error(int(some.sum()), int((~some).sum())) / math.sqrt(len(there))
    error = max(least, statistics.stdev(unseen) if len(unseen) > 1 else 0.0)
    goal = "which tokens occur, of those in no public text"
    return [
        Finding("the server", sees, goal, "AUC", mean_auc(columns), guess, error)
        for sees, columns in (
            ("single updates", [place for place, _ in there]),
            ("sums", [len(trained)] * len(there)),
        )
    ]


def _change(model: nn.Module, start: Adapter, adapter: Adapter) -> Tensor:
    """What a training made of A in all those projections, (M R, D) float64."""
    names = [name for path in projections(model) for name in start if name.startswith(f"{path}.lora_A.")]
    return torch.cat([(adapter[name] - start[name]).double() for name in names])


# --- whole texts ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Trial:
    """An update of one step. basis: (Q, D) orthonormal; texts: tokens of each row that it was trained on."""

    basis: Tensor
    texts: list[Tensor]


def spans(
    learner: Learner, config: SimulationConfig, observed: Observed, rows: Samples, count: int, scratch: Path
) -> list[Finding]:
    """Of so many silos with TRIAL_ROWS short texts each: as they are sent, and if they were plain gradients.

    With a silo's order of its rows, which derives from the federation's seed and its name, as the truth.
    """
    sent, plain = [], []
    for number in range(count):
        dataset = _short(learner, config, rows, number)
        if int(dataset.lengths.min()) >= 3:  # more than what begins and ends a text
            sent.append(_sent(learner, config, observed, dataset, f"small-{number}", scratch))
            plain.append(_plain(learner, observed.start, dataset))
    findings = []
    titles = {"an update of one step": sent, "the same, were it a plain gradient": plain}
    for sees, trials in titles.items():
        if trials:
            whole, right, every, texts = _recovered(learner, trials)
            goal = "texts, token by token"
            chance = max(len(trial.texts) for trial in trials) / _size(learner.proxy.model)
            findings.append(Finding("the server", sees, goal, "tokens in their places", right / every, chance))
            findings.append(Finding("the server", sees, goal, "whole texts", whole / texts, 0.0))
    return findings


def _size(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _short(learner: Learner, config: SimulationConfig, rows: Samples, number: int) -> EncodedDataset:
    """TRIAL_ROWS rows, of two classes if there are any, each cut to few tokens."""
    generator = torch.Generator().manual_seed(derive_seed(config.seed, "small", number))
    order = torch.randperm(len(rows), generator=generator)
    if has_classes(rows):
        classes = torch.tensor(rows.targets)[order]
        order = torch.cat([order[:1], order[classes != classes[0]]])
    model, rank = learner.proxy.model, config.adapter.rank
    in_step = round_window(TRIAL_ROWS, config.training.local_epochs, 0)[1]
    length = max(4, int(ROOM * rank * len(projections(model)) / min(TRIAL_ROWS, in_step)))
    part = rows.subset(order[:TRIAL_ROWS])
    return learner.task.encode(part, learner.proxy.processor, min(length, learner.proxy.max_tokens))


def _sent(
    learner: Learner, config: SimulationConfig, observed: Observed, dataset: EncodedDataset, name: str, scratch: Path
) -> _Trial:
    trained = fit(learner, config, observed, dataset, name, scratch)
    training, begun_with, model = config.training, observed.start, learner.proxy.model
    done = (observed.number - 1) / training.rounds
    rate = training.learning_rate * rate_share(training.schedule, done)
    gradients = []
    for path in projections(model):
        for key in (key for key in begun_with if key.startswith(f"{path}.lora_A.")):
            before, after = begun_with[key].double(), trained[key].double()
            moved = before * (1.0 - rate * training.weight_decay) - after
            step = moved.where(moved.abs() > ROUNDING * before.abs(), 0.0) / max(rate, 1e-30)
            left = (1.0 - step.abs()).clamp(min=1e-7)
            gradients.append(training.adam_epsilon * step / left)
    start, count = round_window(len(dataset), training.local_epochs, observed.number - 1)
    trained_on = training_order(len(dataset), start, count, derive_seed(config.seed, "order", name)).unique()
    tokens = int(dataset.lengths[trained_on].sum())
    return _Trial(_basis(torch.cat(gradients), tokens), _texts(dataset, trained_on))


def _plain(learner: Learner, start: Adapter, dataset: EncodedDataset) -> _Trial:
    """Of the first row alone."""
    model = learner.proxy.model
    adapters.load(model, start)
    batch = {
        name: value.to(next(model.parameters()).device) for name, value in dataset.batch(torch.tensor([0])).items()
    }
    named = dict(model.named_parameters())
    a = [named[key] for path in projections(model) for key in named if key.startswith(f"{path}.lora_A.")]
    with for_backward(model):
        loss = learner.task.loss(model, batch)
    gradients = torch.autograd.grad(loss, a)
    texts = _texts(dataset, torch.tensor([0]))
    return _Trial(_basis(torch.cat([each.cpu().double() for each in gradients]), len(texts[0])), texts)


def _basis(gradient: Tensor, tokens: int) -> Tensor:
    """Of the rows' span, which has no more dimensions than there are tokens."""
    _, sizes, directions = torch.linalg.svd(gradient, full_matrices=False)
    spanned: Tensor = directions[: min(tokens, int((sizes > 1e-9 * sizes[0]).sum()))]
    return spanned if sizes[0] > 0 else spanned[:0]


def _texts(dataset: EncodedDataset, rows: Tensor) -> list[Tensor]:
    return [dataset.batch(row[None])["input_ids"][0] for row in rows]


def _recovered(learner: Learner, trials: Sequence[_Trial]) -> tuple[int, int, int, int]:
    """How many whole texts and how many of their tokens are found, out of how many tokens and texts.

    At each position as many tokens are named as there are texts: those whose embeddings lie nearest to the span. What
    begins and ends every text does not count.
    """
    model, special = learner.proxy.model, set(learner.proxy.processor.all_special_ids)
    longest = max(len(text) for trial in trials for text in trial.texts)
    near = [torch.empty(0, longest, dtype=torch.float64) for _ in trials]
    for _, given in embedded(model, torch.arange(_size(model)), longest):
        x = given.cpu().double()
        x = x / x.norm(dim=2, keepdim=True).clamp(min=1e-12)
        near = [torch.cat([n, (x @ t.basis.t()).square().sum(2)]) for n, t in zip(near, trials, strict=True)]
    whole = right = every = texts = 0
    for trial, closeness in zip(trials, near, strict=True):
        named = closeness.topk(len(trial.texts), dim=0).indices if len(trial.basis) else None
        for text in trial.texts:
            hits = [
                named is not None and bool((named[:, p] == token).any())
                for p, token in enumerate(text)
                if int(token) not in special
            ]
            whole, right, every, texts = whole + all(hits), right + sum(hits), every + len(hits), texts + 1
    return whole, right, every, texts
