"""One silo's round of training against plain torch, and all that must not change while it runs."""

import contextlib
from typing import Any

import pytest
import tiny
import torch
from conftest import ModelFactory
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import AdapterSection, LimitsSection, RoundSettings, TrainingSection
from fedpft.data.batches import EncodedDataset, batches, round_window
from fedpft.data.images import ImageDataset
from fedpft.data.text import TextDataset
from fedpft.errors import DataError
from fedpft.model import adapters
from fedpft.model.adapters import attach, extract, frozen_state
from fedpft.model.subffn import SubFFN, sub_ffns
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS
from fedpft.training import LocalResult, train_round

TASK = TASKS["sequence-classification"]

K = 24
EPS = 0.05
every_kind = pytest.mark.parametrize("model_type", tiny.KINDS)


def settings(seed: int = 0, rank: int = 2, dropout: float = 0.0, **training: Any) -> RoundSettings:
    return RoundSettings(
        seed=seed,
        adapter=AdapterSection(rank=rank, alpha=6.0, dropout=dropout),
        training=TrainingSection(**{"rounds": 2, "batch": 4, "learning_rate": 1e-2, **training}),
        inactive_below=EPS,
    )


def proxy_for(
    make_fm: ModelFactory, model_type: str, wanted: RoundSettings, neurons: Any = K
) -> tuple[nn.Module, Selection]:
    fm = make_fm(model_type)
    attach(fm, wanted.adapter, seed=wanted.seed)
    selection = select(fm, tiny.by_weights(neurons=neurons))
    return cut(fm, selection), selection


def train(model: nn.Module, data: EncodedDataset, wanted: RoundSettings, **others: Any) -> LocalResult:
    given = {"silo": "north", "round": 1, "compressed": (1, 2), "count_inactivity": False, "limits": LimitsSection()}
    return train_round(TASK, model, data, wanted, **{**given, **others})


class Recorded(EncodedDataset):
    """A dataset that remembers which samples were taken from it."""

    def __init__(self, inner: EncodedDataset) -> None:
        self.inner, self.labels, self.lengths = inner, inner.labels, inner.lengths
        self.taken: list[int] = []

    def _inputs(self, indices: Tensor, longest: int) -> dict[str, Tensor]:
        self.taken += indices.tolist()
        return self.inner._inputs(indices, longest)


@pytest.mark.parametrize("model_type", ["bert", "llama", "vit"])
def test_same_seed_gives_the_same_adapter_bit_for_bit(model_type: str, make_fm: ModelFactory) -> None:
    data, results = tiny.dataset(model_type, 10), []
    for seed, silo, noise in ((0, "north", 1), (0, "north", 2), (0, "south", 3), (1, "north", 4)):
        wanted = settings(seed=seed, dropout=0.3)
        model, _ = proxy_for(make_fm, model_type, settings(dropout=0.3))
        torch.manual_seed(noise)  # the process's own random numbers play no part
        results.append(train(model, data, wanted, silo=silo).adapter)
    assert tiny.changed(results[0], results[1]) == set()
    assert tiny.changed(results[0], results[2])
    assert tiny.changed(results[0], results[3])


def test_training_leaves_the_callers_random_numbers_alone(make_fm: ModelFactory) -> None:
    wanted = settings(dropout=0.3)
    model, _ = proxy_for(make_fm, "bert", wanted)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, tiny.dataset("bert", 6), wanted)
    assert torch.equal(torch.rand(3), expected)


@every_kind
def test_frozen_part_of_the_proxy_stays_bit_for_bit(model_type: str, make_fm: ModelFactory) -> None:
    wanted = settings()
    model, _ = proxy_for(make_fm, model_type, wanted)
    before, adapter = {n: t.clone() for n, t in frozen_state(model).items()}, extract(model)
    result = train(model, tiny.dataset(model_type, 8), wanted, count_inactivity=True)
    head = tiny.head_names(before, model_type)
    assert tiny.changed(before, frozen_state(model)) == head
    assert tiny.changed(adapter, result.adapter) == set(adapter)  # every tensor learnt something
    assert tiny.changed(extract(model), result.adapter) == set()


@every_kind
def test_training_is_what_plain_torch_does_to_the_fm(model_type: str, make_fm: ModelFactory) -> None:
    """LoRA written out by hand on the FM's own classes, against a proxy that keeps every neuron."""
    wanted = settings(
        learning_rate=1e-3, head_learning_rate=5e-3, weight_decay=0.1, rounds=3, adam_epsilon=tiny.ADAM_EPSILON
    )
    model, _ = proxy_for(make_fm, model_type, wanted, neurons="all")
    untrained, data = extract(model), tiny.dataset(model_type, 10)

    fm = make_fm(model_type)
    parameters = {name: tensor.clone().requires_grad_() for name, tensor in untrained.items()}
    is_head = tuple(f"{module}." for module in tiny.HEADS[model_type])
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in parameters.items() if n.startswith(is_head)], "peak": 5e-3},
            {"params": [p for n, p in parameters.items() if not n.startswith(is_head)], "peak": 1e-3},
        ],
        weight_decay=0.1,
        eps=tiny.ADAM_EPSILON,
    )
    start, count = round_window(10, 1.0, 1)
    order = derive_seed(0, "order", "north")
    for step, batch in enumerate(batches(data, batch=4, start=start, count=count, seed=order)):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - (1 + step / 3) / 3)
        weights = dict(fm.state_dict())
        for name, tensor in parameters.items():
            if name.endswith("lora_A.weight"):
                projection = name.removesuffix("lora_A.weight") + "weight"
                change = 3.0 * parameters[name.replace("lora_A", "lora_B")] @ tensor
                weights[projection] = weights[projection] + (change.t() if model_type == "gpt2" else change)
            elif name.startswith(is_head):
                weights[name] = tensor
        torch.func.functional_call(fm, weights, kwargs=batch).loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    result = train(model, data, wanted, round=2)
    for name, tensor in parameters.items():
        moved = (tensor.detach() - untrained[name]).norm()
        assert (result.adapter[name] - tensor.detach()).norm() <= 0.01 * moved, name


@every_kind
@pytest.mark.parametrize("max_batch", [None, 3])
def test_losses_gradients_and_counts_are_those_of_pefts_own_layers(
    model_type: str, max_batch: int | None, make_fm: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same round twice, once by `lora_linear` and once by peft's modules, which torch differentiates."""
    wanted, data = settings(learning_rate=1e-4, batch=5), tiny.dataset(model_type, 10)
    results = []
    for fused in (True, False):
        model, _ = proxy_for(make_fm, model_type, wanted)
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # of 0, it would hide A's gradient and LoRA's part of the loss
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        start, gradients = extract(model), []
        monkeypatch.setattr(
            nn.utils,
            "clip_grad_norm_",
            lambda found, _most, kept=gradients: kept.extend(p.grad.clone() for p in found),
        )
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(adapters, "training", lambda _model, _dropout, **_: contextlib.nullcontext())
            limits = LimitsSection(max_batch=max_batch)
            results.append((train(model, data, wanted, count_inactivity=True, limits=limits), gradients))
    (ours, our_gradients), (plain, plain_gradients) = results
    assert ours.metrics["train_loss"] == pytest.approx(plain.metrics["train_loss"], rel=1e-6)
    assert len(our_gradients) == 2 * len(start)
    for found, expected in zip(our_gradients, plain_gradients, strict=True):
        assert (found - expected).norm() <= 1e-4 * expected.norm()
    for name, tensor in plain.adapter.items():
        moved = (tensor - start[name]).norm()
        assert (ours.adapter[name] - tensor).norm() <= 0.01 * moved, name
    assert ours.inactivity is not None
    assert plain.inactivity is not None
    for name, expected in plain.inactivity.items():
        assert (ours.inactivity[name] - expected).abs().max() <= 1  # a value within rounding of eps


@every_kind
def test_checkpointing_changes_no_bit_and_counts_nothing_twice(model_type: str, make_fm: ModelFactory) -> None:
    data, found = tiny.dataset(model_type, 10), []
    for checkpointing in (False, True):
        wanted = settings(dropout=0.3)
        model, _ = proxy_for(make_fm, model_type, wanted)
        limits = LimitsSection(max_batch=3, checkpointing=checkpointing)
        found.append(train(model, data, wanted, count_inactivity=True, limits=limits))
        assert not any("forward" in vars(module) for module in model.modules())
    plain, spared = found
    assert tiny.changed(plain.adapter, spared.adapter) == set()
    assert plain.metrics["train_loss"] == spared.metrics["train_loss"]
    assert plain.inactivity is not None
    assert spared.inactivity is not None
    assert tiny.changed(plain.inactivity, spared.inactivity) == set()


def test_checkpointing_of_lora_on_the_ffn_changes_no_bit(make_fm: ModelFactory) -> None:
    data, found = tiny.dataset("llama", 8), []
    for checkpointing in (False, True):
        wanted = settings(dropout=0.3)
        wanted = wanted.model_copy(update={"adapter": wanted.adapter.model_copy(update={"ffn": True})})
        model, _ = proxy_for(make_fm, "llama", wanted)
        limits = LimitsSection(checkpointing=checkpointing)
        found.append(train(model, data, wanted, count_inactivity=True, limits=limits))
    assert tiny.changed(found[0].adapter, found[1].adapter) == set()
    assert tiny.changed(found[0].inactivity or {}, found[1].inactivity or {}) == set()


def kept_bytes(model: nn.Module, limits: LimitsSection) -> int:
    """What autograd keeps for backward in one step, each memory once; parameters do not count."""
    kept = {parameter.untyped_storage().data_ptr(): 0 for parameter in model.parameters()}
    alive = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage.nbytes())
        alive.append(tensor)  # or another tensor could take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        train(model, tiny.dataset("llama", 4), settings(), limits=limits)
    return sum(kept.values())


def test_compact_ffns_keep_less_and_gradients_are_off_by_little(
    make_fm: ModelFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    gradients: list[list[Tensor]] = []
    monkeypatch.setattr(
        nn.utils, "clip_grad_norm_", lambda found, _most: gradients.append([p.grad.clone() for p in found])
    )
    wanted, sizes = settings(), []
    for compact in (False, True):
        limits = LimitsSection(compact=compact)
        sizes.append(kept_bytes(proxy_for(make_fm, "llama", wanted)[0], limits))
        gradients.clear()
        model, _ = proxy_for(make_fm, "bert", wanted)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # of 0, it would leave A without a gradient
                parameter.data.fill_(0.1)
        train(model, tiny.dataset("bert", 4), wanted, limits=limits)
        assert not any(ffn.compact for ffn in sub_ffns(model).values() if isinstance(ffn, SubFFN))
        if not compact:
            exact = gradients[0]
    assert sizes[1] < sizes[0]
    one, other = (torch.cat([gradient.flatten() for gradient in step]) for step in (exact, gradients[0]))
    assert 0.0 < (one - other).norm() / one.norm() < 0.01  # bfloat16 has 8 bits


def test_pefts_layers_are_their_own_again_after_an_error(make_fm: ModelFactory) -> None:
    model, _ = proxy_for(make_fm, "bert", settings())
    before = tiny.logits(model, tiny.batch("bert"))
    with pytest.raises(KeyError), adapters.training(model, 0.9):
        raise KeyError
    assert not any("forward" in vars(module) for module in model.modules())
    assert tiny.same_bits(tiny.logits(model, tiny.batch("bert")), before)


def test_dropout_of_lora_is_on_and_no_other(make_fm: ModelFactory) -> None:
    """With a rate of nearly 0 the training loss is the plain loss, although the FM's configuration has dropout."""
    data, losses = tiny.dataset("bert", 12), {}
    for dropout in (0.0, 0.9):
        wanted = settings(dropout=dropout, learning_rate=1e-12, weight_decay=0.0)
        model, _ = proxy_for(make_fm, "bert", wanted)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.5)
        losses[dropout] = train(model, data, wanted).metrics["train_loss"]
        assert not any(module.training for module in model.modules() if isinstance(module, nn.Dropout))
        plain = F.cross_entropy(tiny.logits(model, data.batch(torch.arange(12))), data.labels).item()
        assert (losses[dropout] == pytest.approx(plain, rel=1e-4)) == (dropout == 0.0)


def test_dropout_is_drawn_anew_for_each_silo_and_round(make_fm: ModelFactory) -> None:
    wanted, data, losses = settings(dropout=0.5), tiny.dataset("bert", 1), []  # one sample has but one order
    for silo, number in (("north", 1), ("north", 1), ("south", 1), ("north", 2)):
        model, _ = proxy_for(make_fm, "bert", wanted)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(0.5)
        losses.append(train(model, data, wanted, silo=silo, round=number).metrics["train_loss"])
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3


def test_metrics_are_means_over_samples_and_sums_over_tokens(make_fm: ModelFactory) -> None:
    wanted, data = settings(batch=5), tiny.dataset("bert", 12)  # the last batch is smaller
    model, _ = proxy_for(make_fm, "bert", wanted)
    result = train(model, data, wanted)
    assert result.samples == 12
    assert result.metrics["tokens"] == float(data.lengths.sum())
    assert result.metrics["seconds"] > 0
    assert result.inactivity is None
    images = tiny.dataset("vit", 6)
    model, _ = proxy_for(make_fm, "vit", wanted)
    assert train(model, images, wanted).metrics["tokens"] == 6.0


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("max_batch", [None, 2])
def test_inactivity_is_what_a_hook_on_the_dense_ffn_counts(
    model_type: str, max_batch: int | None, make_fm: ModelFactory
) -> None:
    wanted, data = settings(), tiny.dataset(model_type, 9)
    model, selection = proxy_for(make_fm, model_type, wanted)
    fm, masks = make_fm(model_type), []
    model.register_forward_pre_hook(lambda _m, _a, inputs: masks.append(inputs.get("attention_mask")), with_kwargs=True)
    activation = {"bert": F.gelu, "vit": F.gelu, "llama": F.silu, "gpt2": lambda z: F.gelu(z, approximate="tanh")}
    counts: dict[int, Any] = {}
    tokens: dict[int, int] = {}

    def count(layer: int, x: Tensor) -> None:
        ffn = tiny.ffn(fm.state_dict(), model_type, layer)
        z = F.linear(x, ffn.get("w_gate", ffn["w_in"]), ffn.get("b_in"))
        inactive = activation[model_type](z)[..., selection.neurons[layer]].abs() <= EPS
        real = torch.ones(x.shape[:2], dtype=torch.bool) if masks[-1] is None else masks[-1].bool()
        counts[layer] = counts.get(layer, 0) + inactive[real].sum(0)
        tokens[layer] = tokens.get(layer, 0) + int(real.sum())

    for layer, ffn in enumerate(sub_ffns(model).values()):
        ffn.register_forward_pre_hook(lambda _m, inputs, layer=layer: count(layer, inputs[0].detach()))
    result = train(model, data, wanted, count_inactivity=True, limits=LimitsSection(max_batch=max_batch))
    assert result.inactivity is not None
    assert result.inactivity.keys() == {"1", "2", "1.tokens", "2.tokens"}
    if model_type == "vit":
        assert tokens[1] == 9 * 5  # 4 patches and the class token
    else:
        assert tokens[1] == int(data.lengths.sum())
    for layer in (1, 2):
        found, denominator = result.inactivity[str(layer)], result.inactivity[f"{layer}.tokens"]
        assert (found.dtype, denominator.dtype) == (torch.int64, torch.int64)
        assert denominator.item() == tokens[layer]
        # a value within rounding of eps may fall to either side
        assert (found - counts[layer]).abs().max() <= 1
        assert 0 < int(found.sum()) < tokens[layer] * K
    assert all(ffn.inactivity is None for ffn in sub_ffns(model).values())


def test_counting_inactivity_does_not_change_the_training(make_fm: ModelFactory) -> None:
    wanted, data, adapters = settings(dropout=0.3), tiny.dataset("bert", 8), []
    for counting in (False, True):
        model, _ = proxy_for(make_fm, "bert", wanted)
        adapters.append(train(model, data, wanted, count_inactivity=counting).adapter)
    assert tiny.changed(*adapters) == set()


@pytest.mark.parametrize("model_type", ["bert", "vit"])
def test_small_memory_accumulates_the_same_gradient(model_type: str, make_fm: ModelFactory) -> None:
    wanted, data, results = settings(batch=8, learning_rate=1e-3), tiny.dataset(model_type, 11), []
    for limit in (None, 3):
        model, _ = proxy_for(make_fm, model_type, wanted)
        results.append(train(model, data, wanted, limits=LimitsSection(max_batch=limit)))
    whole, parts = results
    assert parts.samples == whole.samples
    assert parts.metrics["train_loss"] == pytest.approx(whole.metrics["train_loss"], rel=1e-5)
    assert parts.metrics["tokens"] == whole.metrics["tokens"]
    model, _ = proxy_for(make_fm, model_type, wanted)
    for name, start in extract(model).items():
        moved = (whole.adapter[name] - start).norm()
        assert (parts.adapter[name] - whole.adapter[name]).norm() <= 0.01 * moved, name


def test_part_of_an_epoch_goes_on_in_the_next_round(make_fm: ModelFactory) -> None:
    wanted = settings(local_epochs=0.5, rounds=4, batch=3)
    model, _ = proxy_for(make_fm, "bert", wanted)
    rounds = []
    for number in (1, 2, 3, 4):
        data = Recorded(tiny.dataset("bert", 10))
        assert train(model, data, wanted, round=number).samples == 5
        rounds.append(data.taken)
    assert sorted(rounds[0] + rounds[1]) == list(range(10))
    assert sorted(rounds[2] + rounds[3]) == list(range(10))
    assert rounds[0] != rounds[2]


def test_silo_may_do_less_than_an_epoch_but_never_more(make_fm: ModelFactory) -> None:
    wanted = settings(local_epochs=1.0)
    model, _ = proxy_for(make_fm, "bert", wanted)
    for most, samples in ((0.3, 3), (2.0, 10)):
        data = Recorded(tiny.dataset("bert", 10))
        assert train(model, data, wanted, limits=LimitsSection(max_local_epochs=most)).samples == samples
        assert len(data.taken) == samples


def test_rate_falls_to_0_over_all_rounds(make_fm: ModelFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *args: Any, **others: Any) -> Any:
        rates.append([group["lr"] for group in self.param_groups])
        return step(self, *args, **others)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    wanted = settings(rounds=3, batch=4, learning_rate=0.09, head_learning_rate=0.9)
    model, _ = proxy_for(make_fm, "bert", wanted)
    for number in (1, 2, 3):
        train(model, tiny.dataset("bert", 10), wanted, round=number)  # 3 steps each
    expected = [1 - step / 9 for step in range(9)]
    assert [lora for lora, _ in rates] == pytest.approx([0.09 * share for share in expected])
    assert [head for _, head in rates] == pytest.approx([0.9 * share for share in expected])


def test_head_learns_at_loras_rate_unless_it_has_its_own(make_fm: ModelFactory) -> None:
    data, adapters = tiny.dataset("bert", 8), []
    for rate in (None, 1e-2, 1e-3):
        wanted = settings(learning_rate=1e-2, head_learning_rate=rate)
        model, _ = proxy_for(make_fm, "bert", wanted)
        adapters.append(train(model, data, wanted).adapter)
    assert tiny.changed(adapters[0], adapters[1]) == set()
    assert "classifier.weight" in tiny.changed(adapters[0], adapters[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_ends_the_round_and_says_where(value: float, make_fm: ModelFactory) -> None:
    wanted = settings(batch=2)
    model, _ = proxy_for(make_fm, "vit", wanted)
    images = tiny.dataset("vit", 4)
    assert isinstance(images, ImageDataset)
    images.pixel_values[:, 0, 0, 0] = value
    before = extract(model)
    with pytest.raises(DataError, match="round 1, step 1: the training loss is not finite"):
        train(model, images, wanted)
    assert tiny.changed(before, extract(model)) == set()


def test_round_that_failed_leaves_nothing_to_the_next_one_on_its_model(make_fm: ModelFactory) -> None:
    wanted, images = settings(batch=2), tiny.dataset("vit", 4)
    model, _ = proxy_for(make_fm, "vit", wanted)
    begun = extract(model)
    alone = train(model, images, wanted).adapter
    adapters.load(model, begun)
    broken = tiny.dataset("vit", 4)
    assert isinstance(broken, ImageDataset)
    broken.pixel_values[:, 0, 0, 0] = float("nan")
    with pytest.raises(DataError, match="not finite"):
        train(model, broken, wanted, count_inactivity=True)
    assert all(ffn.inactivity is None for ffn in sub_ffns(model).values())
    assert tiny.changed(alone, train(model, images, wanted).adapter) == set()


@every_kind
def test_rank_0_trains_the_head_alone(model_type: str, make_fm: ModelFactory) -> None:
    wanted = settings(rank=0)
    model, _ = proxy_for(make_fm, model_type, wanted)
    before = tiny.snapshot(model)
    result = train(model, tiny.dataset(model_type, 8), wanted)
    head = tiny.head_names(before, model_type)
    assert result.adapter.keys() == head
    assert tiny.changed(before, model.state_dict()) == head


def test_training_learns_what_there_is_to_learn(make_fm: ModelFactory) -> None:
    words = torch.tensor([tiny.WORDS.index(word) for word in ("stone", "water", "cloud")], dtype=torch.int32)
    labels = torch.arange(24) % 3
    tokens = torch.stack([torch.randint(4, 10, (24,), dtype=torch.int32), words[labels]], dim=1).flatten()
    data = TextDataset(tokens, torch.full((24,), 2), tiny.PADDING, labels)
    wanted = settings(learning_rate=1e-2, rounds=20)
    model, _ = proxy_for(make_fm, "bert", wanted)
    losses = [train(model, data, wanted, round=number).metrics["train_loss"] for number in range(1, 9)]
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.cuda
@pytest.mark.parametrize("model_type", ["bert", "llama", "mixtral"])
def test_checkpointing_on_a_gpu_draws_the_same_dropout_again(model_type: str, make_fm: ModelFactory) -> None:
    """What was drawn anew would change the gradient by as much as the dropout drops."""
    data, found = tiny.dataset(model_type, 8), []
    for checkpointing in (False, True):
        wanted = settings(dropout=0.5, batch=8, adam_epsilon=1e-3)
        model, _ = proxy_for(make_fm, model_type, wanted)
        start = extract(model)
        limits = LimitsSection(checkpointing=checkpointing)
        found.append(train(model.cuda(), data, wanted, count_inactivity=True, limits=limits))
    plain, spared = found
    for name, tensor in plain.adapter.items():
        assert (spared.adapter[name] - tensor).norm() <= 1e-3 * (tensor - start[name]).norm(), name
    assert plain.inactivity is not None
    assert tiny.changed(plain.inactivity, spared.inactivity or {}) == set()
