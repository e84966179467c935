"""Both distillations of the FM into the proxy: one loss, two choices of what trains.

Layer-level, before the federation (method.md, section 2): all neurons of the compressed layers. Neuron-level, during
the federation (section 4): those that updating.py chooses, towards the FM that carries the silos' aggregated adapter.

B batch, T sequence length, D hidden size, K neurons of a compressed layer, U of them updated.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import AlignmentSection, DistillationSection
from fedpft.data.batches import EncodedDataset, training_order
from fedpft.data.batches import lots as draws
from fedpft.errors import ModelError
from fedpft.model.adapters import Probes
from fedpft.model.architectures import architecture_of, layer_outputs, layers_of
from fedpft.model.mapped import held
from fedpft.model.precision import DISTILLATION_SCALE, Masters, loss_scaler, wide
from fedpft.model.streaming import at_hand
from fedpft.model.subffn import projections, sub_ffns
from fedpft.parallel import ALONE, Ranks
from fedpft.proxy.closed_form import Lot, fit_output_projections
from fedpft.proxy.journal import Found, Journal
from fedpft.seeding import derive_seed
from fedpft.tasks import Task

Matched = Sequence[tuple[int, int]]
Progress = Callable[[int, float], None]

STEPS, NOTED = "distillation", 50  # in the journal, and after how many steps


def layer_level(
    proxy: nn.Module,
    model: nn.Module,
    matched: Matched,
    public: EncodedDataset,
    settings: DistillationSection,
    *,
    seed: int,
    progress: Progress,
    layers: Sequence[int] | None = None,
    task: Task | None = None,
    journal: Journal | None = None,
    most: int | None = None,
    ranks: Ranks = ALONE,
) -> list[float]:
    """Distils every FFN neuron of the compressed layers, in place; returns the loss of each step.

    Args:
        proxy, model: student and teacher.
        matched: (proxy layer, FM layer) pairs whose outputs are brought together; the proxy's layers train.
        public: unlabelled samples.
        progress: called with (step, loss) after each step.
        layers: for each layer of the proxy, the FM's layer it was cut from; None: the proxy has every layer.
        task: with a `logit_term`, the one that knows the FM's own head.
        journal: keeps each layer's closed form, and the steps every NOTED of them.
        most: samples that are computed at once; a larger batch is made up of parts, each of which is relative to the
            size of its own hidden states. None: all of a batch, or a part for each rank.
        ranks: that distil together, all with the same arguments, each a proxy of its own.
    """
    journal, losses = journal or Journal(), list[float]()
    by_layer = is_by_layer(settings, model)
    then = None
    if by_layer and settings.steps:
        steps_seed = derive_seed(seed, "layer-level distillation")
        then = partial(_steps_of_layer, proxy, model, dict(matched), settings, steps_seed, journal, losses, ranks)
    _refit(
        proxy,
        model,
        matched,
        None,
        public,
        settings,
        seed=seed,
        layers=layers,
        journal=journal,
        then=then,
        most=most,
        ranks=ranks,
    )
    if by_layer:
        return losses
    everything: dict[int, Tensor | None] = {layer: None for layer, _ in matched}
    return _distil(
        proxy,
        model,
        matched,
        everything,
        public,
        settings,
        layers=layers,
        task=task,
        seed=derive_seed(seed, "layer-level distillation"),
        progress=progress,
        journal=journal,
        most=most,
        ranks=ranks,
    )


def is_by_layer(settings: DistillationSection, model: nn.Module) -> bool:
    """Whether each layer takes its steps by itself."""
    return settings.mode == "layers" or (settings.mode == "auto" and held(model) is not None)


def neuron_level(
    proxy: nn.Module,
    model: nn.Module,
    matched: Matched,
    updated: Mapping[int, Tensor],
    public: EncodedDataset,
    settings: AlignmentSection,
    *,
    seed: int,
    round: int,
    progress: Progress,
    layers: Sequence[int] | None = None,
) -> list[float]:
    """Distils the `updated` neurons of each compressed layer, in place; returns the loss of each step.

    Args:
        proxy, model: student and teacher, both with the same adapter, which stays as it is.
        updated: proxy layer -> (U,) int64 neurons that train.
        others: as in :func:`layer_level`.
    """
    schedule = DistillationSection(
        closed_form_samples=settings.closed_form_samples,
        closed_form_ridge="held_out",
        steps=settings.steps,
        batch=settings.batch,
        learning_rate=settings.learning_rate,
        weight_term=0.0,
        probe_term=settings.probe_term,
    )
    refit_seed = derive_seed(seed, "closed form during the federation", round)
    _refit(proxy, model, matched, updated, public, schedule, seed=refit_seed, layers=layers, journal=Journal())
    return _distil(
        proxy,
        model,
        matched,
        updated,
        public,
        schedule,
        layers=layers,
        task=None,
        seed=derive_seed(seed, "neuron-level distillation", round),
        progress=progress,
        journal=Journal(),
    )


def ffn_norms(proxy: nn.Module, layers: Sequence[int]) -> list[str]:
    """Names of the parameters of the norms that belong to the given layers' FFNs."""
    row, modules = architecture_of(proxy), layers_of(proxy)
    norms = [modules[layer].get_submodule(path) for layer in layers for path in (row.norm, row.output_norm) if path]
    wanted = {id(parameter) for norm in norms for parameter in norm.parameters()}
    return [name for name, parameter in proxy.named_parameters() if id(parameter) in wanted]


def _refit(
    proxy: nn.Module,
    model: nn.Module,
    matched: Matched,
    updated: Mapping[int, Tensor] | None,
    public: EncodedDataset,
    settings: DistillationSection,
    *,
    seed: int,
    layers: Sequence[int] | None,
    journal: Journal,
    then: Callable[[int, Sequence[Lot], Sequence[int]], None] | None = None,
    most: int | None = None,
    ranks: Ranks = ALONE,
) -> None:
    if settings.closed_form_samples:
        fit_output_projections(
            proxy,
            model,
            matched,
            public,
            samples=settings.closed_form_samples,
            batch=settings.batch,
            seed=seed,
            ridge=settings.closed_form_ridge,
            probes=settings.closed_form_probes,
            layers=layers,
            updated=updated,
            journal=journal,
            then=then,
            most=most,
            ranks=ranks,
        )


def _steps_of_layer(
    proxy: nn.Module,
    model: nn.Module,
    matched: Mapping[int, int],
    settings: DistillationSection,
    seed: int,
    journal: Journal,
    losses: list[float],
    ranks: Ranks,
    student: int,
    lots: Sequence[Lot],
    counts: Sequence[int],
) -> None:
    """The steps of one layer by itself, in place, on batches that stand before it.

    Args:
        lots: this rank's parts of them.
        counts: how many parts each has.
    """
    ffn, layer = list(sub_ffns(proxy).values())[student], layers_of(proxy)[student]
    norms = [proxy.get_parameter(name) for name in ffn_norms(proxy, [student])]
    trained = {str(number): parameter for number, parameter in enumerate((*ffn.parameters(), *norms))}
    step = f"steps-{student}"
    if (found := journal.recall(step)) is None:
        product = _product(model, matched[student]) if settings.weight_term else None
        order = training_order(len(counts), 0, settings.steps, derive_seed(seed, "layer", student)).tolist()

        def parts_of(number: int) -> tuple[list[Callable[[], Tensor]], int]:
            batch = order[number]
            return [partial(loss_of, lot) for lot in lots if lot.part.batch == batch], counts[batch]

        def loss_of(lot: Lot) -> Tensor:
            mask = lot.part.real if isinstance(lot.part.real, Tensor) else None
            ours, theirs = (states.flatten(0, 1) for states in (lot.ours.output(), lot.theirs.hidden))
            loss = kernels.alignment_loss(ours, theirs, mask)
            if product is not None:
                loss = loss + settings.weight_term * _relative(ffn.product(), product)
            return loss * lot.part.share

        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            stack.callback(_restore, {parameter: parameter.requires_grad for parameter in layer.parameters()})
            layer.requires_grad_(False)
            parameters = [norm.requires_grad_(True) for norm in norms]
            parameters += stack.enter_context(ffn.training_neurons(None))
            own: list[float] = []
            none = Journal()
            _descend(proxy, parameters, settings, parts_of, own, progress=lambda *_: None, journal=none, ranks=ranks)
        found = {name: parameter.detach() for name, parameter in trained.items()}
        journal.note(step, found | {"losses": torch.tensor(own, dtype=torch.float64)})
        losses += own
        return
    losses += found.pop("losses").tolist()
    for name, values in found.items():
        trained[name].data.copy_(values)


def _descend(
    proxy: nn.Module,
    parameters: Sequence[Tensor],
    settings: DistillationSection,
    parts_of: Callable[[int], tuple[Sequence[Callable[[], Tensor]], int]],
    losses: list[float],
    *,
    progress: Progress,
    journal: Journal,
    ranks: Ranks = ALONE,
) -> None:
    """Takes the steps that are still to be taken.

    Args:
        parts_of: by a step's number what makes the parts, each (), of which its loss is the sum: this rank's, and how
            many all ranks have. Steps are asked for one after the other.
        losses: of the steps so far, one of which is kept after NOTED of them.
    """
    ranks.share(parameters)
    masters, scaler = Masters(parameters), loss_scaler(proxy, DISTILLATION_SCALE)
    optimizer = torch.optim.AdamW(masters.wide, lr=settings.learning_rate, weight_decay=0.0)
    if (noted := journal.recall(STEPS)) is not None:
        losses += noted.pop("losses").tolist()
        _resume(optimizer, scaler, masters, noted)
    for step in range(len(losses), settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, settings.steps, settings.warmup_fraction)
        (parts, count), own = parts_of(step), list[float]()
        for number, first in enumerate(range(0, count, ranks.size)):
            with ranks.adding(parameters, min(ranks.size, count - first)):
                for part in parts[number : number + 1]:
                    loss = part()
                    scaler.scale(loss).backward()
                    own.append(float(loss.detach()))
        masters.take_gradients()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(masters.wide, settings.gradient_clip)
        scaler.step(optimizer)
        scaler.update()
        masters.round()
        losses.append(sum(ranks.in_order(own, count)))
        if not math.isfinite(losses[-1]):
            raise ModelError(
                f"step {step + 1} of a distillation: the loss is {losses[-1]}",
                "lower distillation.learning_rate (between rounds: alignment.learning_rate, in a new run)",
            )
        progress(step + 1, losses[-1])
        if (step + 1) % NOTED == 0:
            done = torch.tensor(losses, dtype=torch.float64)
            journal.note(STEPS, {"losses": done, **_state(optimizer, scaler, masters)})


def _distil(
    proxy: nn.Module,
    model: nn.Module,
    matched: Matched,
    updated: Mapping[int, Tensor | None],
    public: EncodedDataset,
    settings: DistillationSection,
    *,
    layers: Sequence[int] | None,
    task: Task | None,
    seed: int,
    progress: Progress,
    journal: Journal,
    most: int | None = None,
    ranks: Ranks = ALONE,
) -> list[float]:
    if settings.steps == 0 or not matched:
        return []
    students = [pair[0] for pair in matched]
    ffns = list(sub_ffns(proxy).values())
    device = next(proxy.parameters()).device
    losses: list[float] = []
    with ExitStack() as stack:
        stack.enter_context(at_hand(proxy, students, writing=True))
        stack.callback(_restore, {parameter: parameter.requires_grad for parameter in proxy.parameters()})
        proxy.requires_grad_(False)
        parameters = [proxy.get_parameter(name).requires_grad_(True) for name in ffn_norms(proxy, students)]
        for layer in students:
            parameters += stack.enter_context(ffns[layer].training_neurons(updated[layer]))
        lost = _Loss(proxy, model, matched, settings, layers=layers, task=task, seed=seed)
        count = settings.steps * settings.batch
        lots = list(draws(public, batch=settings.batch, start=0, count=count, seed=seed))
        parts = [lot.split(most or ranks.largest(settings.batch)) for lot in lots]
        own = [ranks.own(each) for each in parts]
        ahead = enumerate(public.ahead(torch.cat([lot[:0], *mine]) for lot, mine in zip(lots, own, strict=True)))

        def share(step: int, part: Tensor) -> Tensor:
            inputs = {name: value.to(device) for name, value in public.batch(part, lots[step]).items()}
            return lost(inputs, step) * (int(public.lengths[part].sum()) / int(public.lengths[lots[step]].sum()))

        def parts_of(step: int) -> tuple[list[Callable[[], Tensor]], int]:
            next(number for number, _ in ahead if number == step)
            return [partial(share, step, part) for part in own[step]], len(parts[step])

        _descend(proxy, parameters, settings, parts_of, losses, progress=progress, journal=journal, ranks=ranks)
    return losses


def _state(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, masters: Masters) -> Found:
    """What the next step of a distillation follows from, beside the data."""
    found = {f"{index}.value": value.detach() for index, value in enumerate(masters.wide)}
    for index, state in optimizer.state_dict()["state"].items():
        found |= {f"{index}.{name}": value for name, value in state.items()}
    scale = scaler.state_dict().values()
    return found | {"scaler": torch.tensor([float(value) for value in scale], dtype=torch.float64)}


def _resume(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, masters: Masters, noted: Mapping[str, Tensor]
) -> None:
    """Puts into place what :func:`_state` has returned."""
    own = scaler.state_dict()
    scale = noted["scaler"].tolist()
    scaler.load_state_dict({n: type(own[n])(value) for n, value in zip(own, scale, strict=True)})
    states: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(masters.wide))}
    for key, value in noted.items():
        index, _, name = key.partition(".")
        if name == "value":
            masters.wide[int(index)].data.copy_(value)
        elif name:
            states[int(index)][name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    masters.round()


class _Loss:
    """What the steps of a distillation bring down (method.md, section 2)."""

    def __init__(
        self,
        proxy: nn.Module,
        model: nn.Module,
        matched: Matched,
        settings: DistillationSection,
        *,
        layers: Sequence[int] | None,
        task: Task | None,
        seed: int,
    ) -> None:
        self.proxy, self.model, self.settings, self.task, self.seed = proxy, model, settings, task, seed
        self.students, self.teachers = [pair[0] for pair in matched], [pair[1] for pair in matched]
        self.ffns = list(sub_ffns(proxy).values())
        self.products = [_product(model, teacher) for teacher in self.teachers] if settings.weight_term else []
        self.probes = Probes(proxy, model, layers) if settings.probe_term else None
        # what each of the FM's layers is given is what the one before it leaves; the first is given the same in both
        origin = range(len(layers_of(proxy))) if layers is None else layers
        self.before = {student: origin[student] - 1 for student in self.students if student and settings.local}

    def __call__(self, inputs: Mapping[str, Tensor], step: int) -> Tensor:
        """(), differentiable in all of the proxy that trains."""
        settings, mask = self.settings, None
        if "attention_mask" in inputs:
            mask = inputs["attention_mask"].flatten().bool()
        found, wanted = self._states(inputs, to_the_end=settings.logit_term > 0)
        loss = torch.zeros((), device=found[0].device)
        for index, layer in enumerate(self.students):
            loss = loss + kernels.alignment_loss(found[index].flatten(0, 1), wanted[index].flatten(0, 1), mask)
            if settings.weight_term:
                loss = loss + settings.weight_term * _relative(self.ffns[layer].product(), self.products[index])
        if self.probes is not None:
            with self.probes.drawn(derive_seed(self.seed, "probe", step)):
                found_moved, wanted_moved = self._states(inputs)
            for index in range(len(self.students)):
                change = (wide(found_moved[index]) - wide(found[index])).flatten(0, 1)
                target = (wide(wanted_moved[index]) - wide(wanted[index])).flatten(0, 1)
                loss = loss + settings.probe_term * kernels.alignment_loss(change, target, mask)
        loss = loss / len(self.students)
        if settings.logit_term:
            assert self.task is not None
            real = slice(None) if mask is None else mask
            ends = (states[-1].flatten(0, 1)[real] for states in (found, wanted))
            loss = loss + settings.logit_term * self.task.head_divergence(self.proxy, *ends)
        return loss

    def _states(self, inputs: Mapping[str, Tensor], *, to_the_end: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Those of the proxy after its compressed layers, and those of the FM that they are to be like."""
        watched = [*self.teachers, *self.before.values()]
        with torch.no_grad():
            wanted = layer_outputs(self.model, watched, inputs, to_the_end=to_the_end)
        given = dict(zip(self.before, wanted[len(self.teachers) :], strict=False))
        return layer_outputs(self.proxy, self.students, inputs, to_the_end=to_the_end, given=given), wanted


def _schedule(step: int, steps: int, warmup_fraction: float) -> float:
    """Linear warm-up, then linear decay to 0."""
    warmup = max(1.0, warmup_fraction * steps)
    return min((step + 1) / warmup, (steps - step) / max(1.0, steps - warmup))


def _product(model: nn.Module, layer: int) -> Tensor:
    """As `product` of a SubFFN or of SubExperts, with all neurons."""
    with at_hand(model, [layer]):
        products = [ffn["w_out"].t() @ ffn["w_in"] for ffn in projections(model, layers_of(model)[layer])]
    return products[0] if len(products) == 1 else torch.stack(products)


def _relative(p: Tensor, target: Tensor) -> Tensor:
    """mean(((P - p) / rms(P))^2), float32 or wider."""
    p, target = wide(p), wide(target)
    return (target - p).square().mean() / target.square().mean()


def _restore(requires_grad: dict[nn.Parameter, bool]) -> None:
    for parameter, value in requires_grad.items():
        parameter.requires_grad_(value)
        if not value:
            parameter.grad = None
