"""Both distillations: what changes and what does not, the loss written out by hand, and the patch that is sent."""

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn

from fedpft import kernels
from fedpft.config import AdapterSection, AlignmentSection, DistillationSection
from fedpft.data.batches import EncodedDataset, batches
from fedpft.data.text import TextDataset
from fedpft.errors import ModelError
from fedpft.model.adapters import Probes, attach, extract, load
from fedpft.model.architectures import base_of, layer_outputs, layers_of
from fedpft.model.subffn import sub_ffns
from fedpft.model.walk import LayerWalk
from fedpft.proxy.bundle import apply_patch, patch
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import ffn_norms, layer_level, neuron_level
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed

K = 24
MATCHED = ((1, 1), (2, 2))
every_kind = pytest.mark.parametrize("model_type", tiny.KINDS)


def pair(make_fm: ModelFactory, model_type: str, **settings: object) -> tuple[nn.Module, nn.Module, Selection]:
    """A proxy and its FM."""
    fm = make_fm(model_type)
    selection = select(fm, tiny.by_weights(**(settings or {"neurons": K})))
    return cut(fm, selection), fm, selection


def distil(proxy: nn.Module, fm: nn.Module, public: EncodedDataset, **others: object) -> list[float]:
    given: dict[str, object] = {"steps": 3, "batch": 4, "learning_rate": 5e-3, "closed_form_samples": 0}
    matched, layers, seed = others.pop("matched", MATCHED), others.pop("layers", None), others.pop("seed", 0)
    settings = DistillationSection(**{**given, **others})
    return layer_level(
        proxy, fm, matched, public, settings, seed=seed, layers=layers, progress=lambda _step, _loss: None
    )


def align(
    proxy: nn.Module, fm: nn.Module, updated: dict[int, Tensor], public: EncodedDataset, **others: object
) -> list[float]:
    given: dict[str, object] = {"steps": 3, "batch": 4, "learning_rate": 5e-3}
    number = others.pop("round", 2)
    settings = AlignmentSection(**{**given, **others})
    return neuron_level(
        proxy, fm, MATCHED, updated, public, settings, seed=0, round=number, progress=lambda _step, _loss: None
    )


def ffn_parts(proxy: nn.Module, model_type: str) -> set[str]:
    """Names of all that belongs to the FFNs of layers 1 and 2: neurons, biases and norms."""
    names = tiny.NAMES[model_type]
    prefixes = [names.layer.format(layer) for layer in (1, 2)]
    norms = {f"{prefix}{norm}.{kind}" for prefix in prefixes for norm in names.norms for kind in ("weight", "bias")}
    inside = {f"{path}.{n}" for path, ffn in list(sub_ffns(proxy).items())[1:3] for n, _ in ffn.named_parameters()}
    return inside | (norms & proxy.state_dict().keys())


def alignment_by_hand(proxy: nn.Module, fm: nn.Module, inputs: dict[str, Tensor]) -> list[float]:
    """mean over real tokens of ((H - h) / rms(H))^2 after layers 1 and 2, from transformers' own hidden states."""
    with torch.no_grad():
        ours, theirs = (base_of(m)(**inputs, output_hidden_states=True).hidden_states for m in (proxy, fm))
    losses = []
    for layer in (1, 2):
        h, target = ours[layer + 1].double(), theirs[layer + 1].double()
        real = (
            inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.ones(h.shape[:2], dtype=torch.bool)
        )
        losses.append(float(((target[real] - h[real]) / target[real].square().mean().sqrt()).square().mean()))
    return losses


def product_by_hand(fm: nn.Module, model_type: str, layer: int, neurons: Tensor) -> Tensor:
    """Of each expert, if there are any."""
    ffns = tiny.ffns(fm.state_dict(), model_type, layer)
    kept = neurons.expand(len(ffns), -1)
    products = [ffn["w_out"][k].double().t() @ ffn["w_in"][k].double() for ffn, k in zip(ffns, kept, strict=True)]
    return torch.stack(products) if len(products) > 1 else products[0]


# --- layer-level ---


@every_kind
def test_layer_level_brings_proxy_and_fm_together(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    public, inputs = tiny.dataset(model_type, 24, labelled=False), tiny.batch(model_type)
    before = sum(alignment_by_hand(proxy, fm, inputs))
    losses = distil(proxy, fm, public, steps=30, batch=8, learning_rate=1e-2)
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert sum(alignment_by_hand(proxy, fm, inputs)) < 0.9 * before


@every_kind
def test_layer_level_changes_ffns_and_their_norms_in_compressed_layers_only(
    model_type: str, make_fm: ModelFactory
) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    attach(fm, AdapterSection(rank=2), seed=0)
    attach(proxy, AdapterSection(rank=2), seed=0)
    proxy_before, fm_before = tiny.snapshot(proxy), tiny.snapshot(fm)
    distil(proxy, fm, tiny.dataset(model_type, 12, labelled=False))
    assert tiny.changed(proxy_before, proxy.state_dict()) == ffn_parts(proxy, model_type)
    assert tiny.changed(fm_before, fm.state_dict()) == set()


def test_labels_of_public_data_play_no_part(make_fm: ModelFactory) -> None:
    states = []
    for labelled in (True, False):
        proxy, fm, _ = pair(make_fm, "bert")
        public = tiny.dataset("bert", 8, labelled=False)
        public.labels = torch.arange(8) % 3 if labelled else None
        distil(proxy, fm, public)
        states.append(proxy.state_dict())
    assert tiny.changed(*states) == set()


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit", "phi3", "gemma2", "mixtral"])
@pytest.mark.parametrize("weight_term", [0.0, 0.5])
def test_first_loss_is_the_formula(model_type: str, weight_term: float, make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, model_type)
    public = tiny.dataset(model_type, 5, labelled=False)
    wanted = sum(alignment_by_hand(proxy, fm, public.batch(torch.arange(5))))
    for layer in (1, 2):
        whole = product_by_hand(fm, model_type, layer, torch.arange(tiny.F))
        kept = product_by_hand(fm, model_type, layer, selection.neurons[layer])
        wanted = wanted + weight_term * float(((whole - kept) / whole.square().mean().sqrt()).square().mean())
    losses = distil(proxy, fm, public, steps=1, batch=5, weight_term=weight_term)
    assert losses == pytest.approx([wanted / 2], rel=1e-4)


def test_weight_term_draws_the_products_together(make_fm: ModelFactory) -> None:
    distances = []
    for weight_term in (0.0, 10.0):
        proxy, fm, _ = pair(make_fm, "bert")
        distil(proxy, fm, tiny.dataset("bert", 12, labelled=False), steps=20, weight_term=weight_term)
        whole = product_by_hand(fm, "bert", 1, torch.arange(tiny.F))
        distances.append(float((list(sub_ffns(proxy).values())[1].product() - whole).norm()))
    assert distances[1] < 0.95 * distances[0]


class Padded(EncodedDataset):
    """The same texts with more padding, of another id."""

    def __init__(self, inner: TextDataset) -> None:
        self.inner, self.labels, self.lengths = inner, inner.labels, inner.lengths

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        inputs = self.inner._inputs(indices, longest)
        mask = nn.functional.pad(inputs["attention_mask"], (0, 7))
        input_ids = nn.functional.pad(inputs["input_ids"], (0, 7)).where(mask.bool(), tiny.WORDS.index("fish"))
        return {"input_ids": input_ids, "attention_mask": mask}


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama"])
def test_padding_changes_neither_loss_nor_gradient(model_type: str, make_fm: ModelFactory) -> None:
    texts = tiny.dataset(model_type, 8, labelled=False)
    assert isinstance(texts, TextDataset)
    losses, states = [], []
    for public in (texts, Padded(texts)):
        proxy, fm, _ = pair(make_fm, model_type)
        before = tiny.snapshot(proxy)
        losses.append(distil(proxy, fm, public, steps=2, learning_rate=1e-3))
        states.append({name: proxy.state_dict()[name] - before[name] for name in ffn_parts(proxy, model_type)})
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, moved in states[0].items():
        assert (states[1][name] - moved).norm() <= 0.02 * moved.norm(), name


def test_dropped_layers_are_answered_for_by_the_kept_layer_before_them(make_fm: ModelFactory) -> None:
    proxy, fm, selection = pair(make_fm, "bert", keep="layers", layers=3)
    assert selection.matched == ((1, 2),)
    fm_of_two = copy.deepcopy(fm)
    public, inputs = tiny.dataset("bert", 12, labelled=False), tiny.batch("bert", 8)
    before = tiny.snapshot(proxy)
    distil(proxy, fm, public, matched=selection.matched)
    prefix = "bert.encoder.layer.1."
    assert {name for name in tiny.changed(before, proxy.state_dict()) if not name.startswith(prefix)} == set()
    assert tiny.changed(before, proxy.state_dict()) == ffn_parts(proxy, "bert") & {n for n in before if prefix in n}
    with torch.no_grad():
        wanted = layer_outputs(fm_of_two, [2], inputs)[0]
        proxy_after = layer_outputs(proxy, [1], inputs)[0]
        proxy.load_state_dict(before)
        proxy_before = layer_outputs(proxy, [1], inputs)[0]
    assert (proxy_after - wanted).norm() < (proxy_before - wanted).norm()


def test_same_seed_distils_to_the_same_bits(make_fm: ModelFactory) -> None:
    states = []
    for seed in (3, 3, 4):
        proxy, fm, _ = pair(make_fm, "gpt2")
        torch.manual_seed(len(states))
        distil(proxy, fm, tiny.dataset("gpt2", 12, labelled=False), seed=seed)
        states.append(proxy.state_dict())
    assert tiny.changed(states[0], states[1]) == set()
    assert tiny.changed(states[0], states[2])


def test_rate_warms_up_and_falls(make_fm: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: object, **others: object) -> object:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **others)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    proxy, fm, _ = pair(make_fm, "bert")
    distil(proxy, fm, tiny.dataset("bert", 8, labelled=False), steps=10, learning_rate=0.06, warmup_fraction=0.4)
    assert rates == pytest.approx([0.015, 0.03, 0.045, 0.06, 0.06, 0.05, 0.04, 0.03, 0.02, 0.01])


@pytest.mark.parametrize("wanted", [{"steps": 0}, {"matched": ()}], ids=["no steps", "no compressed layer"])
def test_nothing_to_do_changes_nothing(wanted: dict[str, object], make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    before = tiny.snapshot(proxy)
    assert distil(proxy, fm, tiny.dataset("bert", 8, labelled=False), **wanted) == []
    assert tiny.changed(before, proxy.state_dict()) == set()


def test_progress_hears_of_every_step(make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    heard: list[tuple[int, float]] = []
    losses = layer_level(
        proxy,
        fm,
        MATCHED,
        tiny.dataset("bert", 8, labelled=False),
        DistillationSection(steps=3, batch=4, closed_form_samples=0),
        seed=0,
        progress=lambda step, loss: heard.append((step, loss)),
    )
    assert heard == list(enumerate(losses, 1))


@pytest.mark.parametrize("level", ["layer", "neuron"])
def test_what_the_silos_train_can_be_trained_afterwards_and_nothing_else(level: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    for model in (proxy, fm):
        attach(model, AdapterSection(rank=2), seed=0)
    flags = {name: parameter.requires_grad for name, parameter in proxy.named_parameters()}
    public = tiny.dataset("bert", 8, labelled=False)
    if level == "layer":
        distil(proxy, fm, public)
    else:
        align(proxy, fm, {1: torch.tensor([0]), 2: torch.tensor([1])}, public)
    assert {name: parameter.requires_grad for name, parameter in proxy.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in proxy.parameters())
    assert all(parameter.grad is None for parameter in fm.parameters())


def test_flags_and_weights_are_put_back_after_an_error(make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    attach(proxy, AdapterSection(rank=2), seed=0)
    flags = {name: parameter.requires_grad for name, parameter in proxy.named_parameters()}
    before = tiny.snapshot(proxy)

    def stop(_step: int, _loss: float) -> None:
        raise KeyboardInterrupt

    settings = DistillationSection(steps=3, learning_rate=1e-30, warmup_fraction=0.0, closed_form_samples=0)
    with pytest.raises(KeyboardInterrupt):
        layer_level(proxy, fm, MATCHED, tiny.dataset("bert", 8), settings, seed=0, progress=stop)
    assert {name: parameter.requires_grad for name, parameter in proxy.named_parameters()} == flags
    assert tiny.changed(before, proxy.state_dict()) == set()  # every neuron is back in its place
    tiny.logits(proxy, tiny.batch("bert"))


def plain_steps(
    proxy: nn.Module, fm: nn.Module, public: EncodedDataset, settings: DistillationSection, seed: int
) -> list[float]:
    """Layer-level distillation with alignment and weight term, and nothing else."""
    ffns, losses = [list(sub_ffns(proxy).values())[layer] for layer in (1, 2)], []
    names = ffn_norms(proxy, [1, 2])
    products = [layer.output.dense.weight @ layer.intermediate.dense.weight for layer in layers_of(fm)[1:3]]
    with ExitStack() as stack:
        proxy.requires_grad_(False)
        parameters = [proxy.get_parameter(name).requires_grad_(True) for name in names]
        for ffn in ffns:
            parameters += stack.enter_context(ffn.training_neurons(None))

        optimizer, count = torch.optim.AdamW(parameters, weight_decay=0.0), settings.steps * settings.batch
        seed = derive_seed(seed, "layer-level distillation")
        for step, batch in enumerate(batches(public, batch=settings.batch, start=0, count=count, seed=seed)):
            optimizer.param_groups[0]["lr"] = settings.learning_rate * min(
                1.0, (settings.steps - step) / (settings.steps - 1)
            )
            mask, loss = batch["attention_mask"].flatten().bool(), torch.zeros(())
            with torch.no_grad():
                wanted = layer_outputs(fm, [1, 2], batch)
            for ffn, h, target, product in zip(
                ffns, layer_outputs(proxy, [1, 2], batch), wanted, products, strict=True
            ):
                loss = loss + kernels.alignment_loss(h.flatten(0, 1), target.flatten(0, 1), mask)
                off = (product.detach() - ffn.product()).square().mean() / product.detach().square().mean()
                loss = loss + settings.weight_term * off
            loss = loss / 2
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def test_without_probes_and_logits_the_steps_have_the_bits_of_the_plain_loop(make_fm: ModelFactory) -> None:
    settings = DistillationSection(steps=4, batch=5, learning_rate=5e-3, warmup_fraction=0.0, closed_form_samples=0)
    public, states, losses = tiny.dataset("bert", 12, labelled=False), [], []
    for plain in (True, False):
        proxy, fm, _ = pair(make_fm, "bert")
        attach(fm, AdapterSection(rank=2), seed=0)
        attach(proxy, AdapterSection(rank=2), seed=0)
        if plain:
            losses.append(plain_steps(proxy, fm, public, settings, seed=7))
        else:
            losses.append(layer_level(proxy, fm, MATCHED, public, settings, seed=7, progress=lambda _s, _l: None))
        states.append(proxy.state_dict())
    assert losses[0] == losses[1]
    assert tiny.changed(*states) == set()


# --- probes ---


def adapted_pair(make_fm: ModelFactory, model_type: str, **settings: object) -> tuple[nn.Module, nn.Module, Selection]:
    """A proxy and its FM, with one adapter in both that has been trained."""
    fm = make_fm(model_type)
    attach(fm, AdapterSection(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    load(fm, {n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(fm).items())})
    selection = select(fm, tiny.by_weights(**(settings or {"neurons": K})))
    return cut(fm, selection), fm, selection


def changes_by_hand(model: nn.Module, inputs: dict[str, Tensor], probe: AbstractContextManager[None]) -> list[Tensor]:
    """Of the hidden states after layers 1 and 2, at the tokens that are there."""
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.tensor(True)
    with torch.no_grad():
        before = base_of(model)(**inputs, output_hidden_states=True).hidden_states
        with probe:
            after = base_of(model)(**inputs, output_hidden_states=True).hidden_states
    return [(after[layer + 1] - before[layer + 1]).double()[real] for layer in (1, 2)]


def jacobian_error(proxy: nn.Module, fm: nn.Module, inputs: dict[str, Tensor], seeds: Sequence[int]) -> float:
    """The mean over layers and probes of the square of what the proxy's change lacks, over the FM's."""
    probes, errors = Probes(proxy, fm), []
    for seed in seeds:
        ours, theirs = (changes_by_hand(model, inputs, probes.drawn(seed)) for model in (proxy, fm))
        errors += [float((b - a).square().sum() / b.square().sum()) for a, b in zip(ours, theirs, strict=True)]
    return sum(errors) / len(errors)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit", "gemma2", "mixtral"])
@pytest.mark.parametrize("level", ["layer", "neuron"])
def test_first_loss_with_a_probe_is_the_formula(level: str, model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = adapted_pair(make_fm, model_type)
    public = tiny.dataset(model_type, 5, labelled=False)
    inputs = public.batch(torch.arange(5))
    labels = ("layer-level distillation",) if level == "layer" else ("neuron-level distillation", 2)
    seed = derive_seed(derive_seed(0, *labels), "probe", 0)
    wanted = sum(alignment_by_hand(proxy, fm, inputs)) / 2 + 0.7 * jacobian_error(proxy, fm, inputs, [seed])
    if level == "layer":
        losses = distil(proxy, fm, public, steps=1, batch=5, weight_term=0.0, probe_term=0.7)
    else:
        everything = {1: torch.arange(K), 2: torch.arange(K)}
        losses = align(proxy, fm, everything, public, steps=1, batch=5, probe_term=0.7)
    assert losses == pytest.approx([wanted], rel=1e-3)


def test_probe_term_brings_the_jacobian_nearer_to_the_fms(make_fm: ModelFactory) -> None:
    public, unseen = tiny.dataset("bert", 300, labelled=False), tiny.dataset("bert", 40, seed=9, labelled=False)
    errors = []
    for probe_term, seed in ((0.0, 0), (1.0, 0), (1.0, 1)):
        proxy, fm, _ = adapted_pair(make_fm, "bert", neurons=8)
        distil(proxy, fm, public, steps=40, batch=16, learning_rate=1e-2, seed=seed, probe_term=probe_term)
        errors.append(jacobian_error(proxy, fm, unseen.batch(torch.arange(40)), range(1000, 1004)))
    assert max(errors[1:]) < 0.95 * errors[0], errors


@pytest.mark.parametrize("level", ["layer", "neuron"])
@pytest.mark.parametrize("fails", [False, True])
def test_probes_leave_the_adapter_as_it_is(level: str, fails: bool, make_fm: ModelFactory) -> None:
    proxy, fm, _ = adapted_pair(make_fm, "bert")
    before, fm_before, looks = tiny.snapshot(proxy), tiny.snapshot(fm), []

    def stop(_module: nn.Module, _given: object) -> None:
        looks.append(1)
        if fails and len(looks) == 4:  # the second step's look under a probe
            raise KeyboardInterrupt

    layers_of(proxy)[2].register_forward_pre_hook(stop)
    public = tiny.dataset("bert", 12, labelled=False)
    with pytest.raises(KeyboardInterrupt) if fails else nullcontext():
        if level == "layer":
            distil(proxy, fm, public, probe_term=0.5)
        else:
            align(proxy, fm, {1: torch.tensor([0]), 2: torch.tensor([1])}, public, probe_term=0.5)
    assert len(looks) == (4 if fails else 6)
    assert tiny.changed(before, proxy.state_dict()) == ffn_parts(proxy, "bert")
    assert tiny.changed(fm_before, fm.state_dict()) == set()


def test_dropped_layers_are_probed_where_the_proxy_has_them(make_fm: ModelFactory) -> None:
    proxy, fm, selection = adapted_pair(make_fm, "bert", keep="layers", layers=3)
    public, given = tiny.dataset("bert", 12, labelled=False), {"matched": selection.matched, "probe_term": 0.5}
    assert len(distil(proxy, fm, public, layers=selection.layers, **given)) == 3
    with pytest.raises(ValueError, match="layers: must be"):
        distil(proxy, fm, public, **given)


# --- each layer by itself ---


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit", "deberta-v2"])
def test_local_layers_go_on_from_the_fms_states(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = adapted_pair(make_fm, model_type)
    public = tiny.dataset(model_type, 5, labelled=False)
    inputs, wanted = public.batch(torch.arange(5)), 0.0
    real = inputs["attention_mask"].bool() if "attention_mask" in inputs else torch.tensor(True)
    with torch.no_grad():
        states = layer_outputs(fm, [0, 1, 2], inputs)
        walk = LayerWalk(proxy, inputs)
        for layer in (1, 2):
            while walk.position < layer:
                walk.advance(states[walk.position])
            target, found = states[layer][real], walk.output()[real]
            wanted += float((target - found).square().mean() / target.square().mean())
    losses = distil(proxy, fm, public, steps=1, batch=5, weight_term=0.0, local=True)
    assert losses == pytest.approx([wanted / 2], rel=1e-4)


# --- neuron-level ---


@every_kind
def test_neuron_level_changes_the_updated_neurons_biases_and_norms_only(model_type: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    for model in (proxy, fm):
        attach(model, AdapterSection(rank=2), seed=0)
    before, adapter = tiny.snapshot(proxy), extract(proxy)
    updated = {1: torch.tensor([0, 5, 23]), 2: torch.tensor([7])}
    for layer in updated.keys() & set(tiny.MIXTURES.get(model_type, ())):  # some of each expert
        updated[layer] = torch.cat([updated[layer], torch.tensor([K, K + 3, 3 * K - 1])])
    losses = align(proxy, fm, updated, tiny.dataset(model_type, 12, labelled=False))
    assert len(losses) == 3
    after = proxy.state_dict()
    assert tiny.changed(before, after) == ffn_parts(proxy, model_type)
    assert tiny.changed(adapter, extract(proxy)) == set()
    for layer, (path, ffn) in enumerate(sub_ffns(proxy).items()):
        for index, (part, inner) in enumerate(tiny.parts(path, ffn) if layer in updated else ()):
            own = [neuron - index * K for neuron in updated[layer].tolist() if neuron // K == index]
            for name in {name for name, _ in inner.named_parameters()} - {"b_out"}:
                rows = (before[f"{part}.{name}"] != after[f"{part}.{name}"]).view(K, -1).any(1)
                assert rows.nonzero().flatten().tolist() == own, part


@every_kind
def test_refit_during_the_federation_changes_output_weights_of_the_updated_neurons_only(
    model_type: str, make_fm: ModelFactory
) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    before, updated = tiny.snapshot(proxy), {1: torch.arange(0, K, 2), 2: torch.tensor([7])}
    losses = align(proxy, fm, updated, tiny.dataset(model_type, 60), closed_form_samples=60, steps=0)
    assert losses == []
    after = proxy.state_dict()
    changed = tiny.changed(before, after)
    assert {name.rpartition(".")[2] for name in changed} <= {"w_out", "b_out"}
    ffns = list(sub_ffns(proxy).items())
    for layer, neurons in updated.items():
        part, inner = next(iter(tiny.parts(*ffns[layer])))
        rows = (before[f"{part}.w_out"] != after[f"{part}.w_out"]).any(1)
        assert rows.nonzero().flatten().tolist() == neurons.tolist()
        assert inner.b_out is None or f"{part}.b_out" in changed


def test_refit_follows_the_fm_that_carries_the_adapter(make_fm: ModelFactory) -> None:
    fm, public = make_fm("bert"), tiny.dataset("bert", 200, labelled=False)
    attach(fm, AdapterSection(rank=2), seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    attach(proxy, AdapterSection(rank=2), seed=0)
    generator = torch.Generator().manual_seed(1)
    adapter = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(fm).items())}
    everything = {1: torch.arange(K), 2: torch.arange(K)}
    inputs = tiny.dataset("bert", 30, labelled=False, seed=9).batch(torch.arange(30))
    align(proxy, fm, everything, public, closed_form_samples=200, steps=0)  # without the adapter
    load(proxy, adapter)
    load(fm, adapter)
    before = sum(alignment_by_hand(proxy, fm, inputs))
    align(proxy, fm, everything, public, closed_form_samples=200, steps=0)
    assert sum(alignment_by_hand(proxy, fm, inputs)) < 0.97 * before


@pytest.mark.parametrize("settings", [{}, {"closed_form_samples": 12, "steps": 0}], ids=["steps", "refit"])
@pytest.mark.parametrize("model_type", ["bert", "llama", "gemma2", "mixtral"])
def test_patch_of_an_alignment_makes_the_same_proxy_elsewhere(
    settings: dict[str, object], model_type: str, make_fm: ModelFactory
) -> None:
    proxy, fm, _ = pair(make_fm, model_type)
    silos = copy.deepcopy(proxy)
    attach(silos, AdapterSection(rank=2), seed=0)
    updated = {1: torch.tensor([2, 3]), 2: torch.tensor([0, 9, 20])}
    align(proxy, fm, updated, tiny.dataset(model_type, 12, labelled=False), **settings)
    tensors = patch(proxy, updated, ffn_norms(proxy, [1, 2]))
    assert sum(tensor.numel() for tensor in tensors.values()) < 0.1 * sum(p.numel() for p in proxy.parameters())
    apply_patch(silos, tensors)
    attach(proxy, AdapterSection(rank=2), seed=0)
    assert tiny.changed(proxy.state_dict(), silos.state_dict()) == set()


def test_patch_of_all_neurons_carries_a_layer_level_distillation(make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "gpt2")
    old = copy.deepcopy(proxy)
    distil(proxy, fm, tiny.dataset("gpt2", 8, labelled=False))
    apply_patch(old, patch(proxy, {1: torch.arange(K), 2: torch.arange(K)}, ffn_norms(proxy, [1, 2])))
    assert tiny.changed(proxy.state_dict(), old.state_dict()) == set()


def test_alignment_follows_the_fm_that_carries_the_adapter(make_fm: ModelFactory) -> None:
    fm = make_fm("bert")
    attach(fm, AdapterSection(rank=2), seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=K)))
    generator = torch.Generator().manual_seed(1)
    adapter = {n: t + 0.2 * torch.randn(t.shape, generator=generator) for n, t in sorted(extract(fm).items())}
    public = tiny.dataset("bert", 5, labelled=False)
    everything, inputs = {1: torch.arange(K), 2: torch.arange(K)}, public.batch(torch.arange(5))
    without = sum(alignment_by_hand(proxy, fm, inputs))
    load(proxy, adapter)
    load(fm, adapter)
    before = sum(alignment_by_hand(proxy, fm, inputs))
    assert before != pytest.approx(without, rel=1e-3)
    assert align(copy.deepcopy(proxy), fm, everything, public, steps=1, batch=5) == pytest.approx(
        [before / 2], rel=1e-4
    )
    align(proxy, fm, everything, public, steps=40, batch=5)
    assert sum(alignment_by_hand(proxy, fm, inputs)) < 0.9 * before


def test_rounds_align_on_samples_of_their_own(make_fm: ModelFactory) -> None:
    losses = []
    for number in (2, 2, 4):
        proxy, fm, _ = pair(make_fm, "bert")
        losses.append(
            align(proxy, fm, {1: torch.arange(3), 2: torch.arange(3)}, tiny.dataset("bert", 30), round=number)
        )
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]


def test_no_neuron_to_update_leaves_all_neurons_alone(make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    before, none = tiny.snapshot(proxy), torch.empty(0, dtype=torch.int64)
    align(proxy, fm, {1: none, 2: none}, tiny.dataset("bert", 8, labelled=False))
    names = tiny.changed(before, proxy.state_dict())
    assert names
    assert all(name.endswith("b_out") or "LayerNorm" in name for name in names)


def test_alignment_of_0_steps_changes_nothing(make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    before = tiny.snapshot(proxy)
    assert align(proxy, fm, {1: torch.arange(3), 2: torch.arange(3)}, tiny.dataset("bert", 8), steps=0) == []
    assert tiny.changed(before, proxy.state_dict()) == set()


# --- which norms ---


@every_kind
def test_ffn_norms_are_those_that_transformers_names(model_type: str, make_fm: ModelFactory) -> None:
    proxy, _, _ = pair(make_fm, model_type)
    names = tiny.NAMES[model_type]
    prefixes = [f"{names.layer.format(layer)}{norm}" for layer in (1, 2) for norm in names.norms]
    wanted = {f"{prefix}.{kind}" for prefix in prefixes for kind in ("weight", "bias")}
    assert set(ffn_norms(proxy, [1, 2])) == wanted & proxy.state_dict().keys()


@pytest.mark.parametrize("level", ["layer", "neuron"])
def test_distillation_that_diverges_ends_there(level: str, make_fm: ModelFactory) -> None:
    proxy, fm, _ = pair(make_fm, "bert")
    public = tiny.dataset("bert", 40, labelled=False)
    wild = {"steps": 40, "learning_rate": 0.99}
    with torch.no_grad():  # a first layer of such size overflows after a few steps of such a rate
        for model in (proxy, fm):
            layers_of(model)[0].output.LayerNorm.weight.fill_(1e19)
    updated = {layer: torch.arange(K) for layer, _ in MATCHED}
    with pytest.raises(ModelError, match=r"step \d+ of a distillation: the loss is (nan|inf)"):
        distil(proxy, fm, public, **wild) if level == "layer" else align(proxy, fm, updated, public, **wild)
