"""Rows in batches and packed; packing is held to one row at a time, on models as transformers itself writes them."""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.data.chat import Learnt
from fedpft.data.language import NOT_LEARNED, LanguageDataset
from fedpft.model import packing
from fedpft.model.packing import block_mask, packed_inputs, row_ends, varlen_attention, way_to_pack

PADDING, WORDS, WINDOW = 0, 50, 4
LENGTHS = (9, 1, 7, 2, 12)

_COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
    "pad_token_id": PADDING,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FEWER = {name: value for name, value in _COMMON.items() if name != "num_key_value_heads"}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": WORDS, "n_positions": 64, "bos_token_id": 1}
_OPT = {"ffn_dim": 64, "word_embed_proj_dim": 32}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(**_COMMON),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=32),
    "mistral-window": lambda: transformers.MistralConfig(**_COMMON, sliding_window=WINDOW),  # shorter than the rows
    "gemma2": lambda: transformers.Gemma2Config(**_COMMON, head_dim=8, sliding_window=WINDOW),
    "gemma3": lambda: transformers.Gemma3TextConfig(**_COMMON, head_dim=8, sliding_window=WINDOW),
    "phi3": lambda: transformers.Phi3Config(**_COMMON),
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=4),
    "gpt2": lambda: transformers.GPT2Config(**_GPT2, eos_token_id=2, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**_FEWER),
    "opt": lambda: transformers.OPTConfig(**_FEWER, **_OPT),
}
WAYS = dict.fromkeys(CONFIGS, "positions") | {"opt": "mask"}


def sequences_of(data: LanguageDataset, rows: Iterable[int], most: int) -> list[dict[str, Tensor]]:
    return [data.sequence(each) for each in data.fitted(torch.tensor([*rows]), most)]


def model_of(config: Any, attention: str | None = None) -> Any:
    """Random, biases and norms included; in eval mode, without a cache, as an FM is loaded."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def rows_of(lengths: tuple[int, ...] = LENGTHS) -> list[Learnt]:
    generator = torch.Generator().manual_seed(1)
    return [
        Learnt(torch.randint(3, WORDS, (n,), generator=generator).tolist(), [at >= n // 2 for at in range(n)])
        for n in lengths
    ]


def loss_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The sum over the learned tokens."""
    labels = inputs["labels"]
    logits = model(**{name: value for name, value in inputs.items() if name != "labels"}).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def one_by_one(model: nn.Module, data: LanguageDataset) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = sum(loss_of(model, data.batch(torch.tensor([index]))) for index in range(len(data)))
    assert isinstance(loss, Tensor)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- the dataset ------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_and_has_labels_only_where_something_is_learned() -> None:
    rows = [Learnt([5, 6, 7], [False, False, True]), Learnt([8, 9], [True, True])]
    batch = LanguageDataset.of(rows, PADDING).batch(torch.tensor([1, 0]))
    none = NOT_LEARNED
    assert batch["input_ids"].tolist() == [[8, 9, PADDING], [5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[none, 9, none], [none, none, 7]]  # nothing predicts a row's first token
    assert all(value.dtype == torch.int64 for value in batch.values())


def test_padding_is_no_label_where_a_word_has_its_id() -> None:
    data = LanguageDataset.of([Learnt([5, PADDING], [False, True]), Learnt([5], [True])], PADDING)
    assert data.batch(torch.arange(2))["labels"].tolist() == [[NOT_LEARNED, PADDING], [NOT_LEARNED, NOT_LEARNED]]


def test_of_public_text_everything_is_learned() -> None:
    rows = [Learnt([5, 6, 7], [False, False, True]), Learnt([8, 9], [True, True])]
    data = LanguageDataset.of(rows, PADDING, everything=True)
    assert data.batch(torch.tensor([0]))["labels"].tolist() == [[NOT_LEARNED, 6, 7]]
    assert data.targets.tolist() == [2, 1]
    assert LanguageDataset.of(rows, PADDING).targets.tolist() == [row.targets for row in rows] == [1, 1]


def test_a_question_is_what_stands_before_the_last_answer() -> None:
    rows = [Learnt([4], [True]), Learnt([5, 6, 7, 8, 9], [False, True, False, True, True])]
    question, answer = LanguageDataset.of(rows, PADDING).question(1)
    assert (question.tolist(), answer.tolist()) == ([5, 6, 7], [8, 9])


@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(1, 30), st.randoms(use_true_random=False))
def test_packing_keeps_every_row_whole_and_once(lengths: list[int], most: int, random: Any) -> None:
    """Whatever the rows: each stands in one sequence, in one piece, with the labels that it has alone."""
    data = LanguageDataset.of(rows_of(tuple(lengths)), PADDING)
    chosen = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    sequences = sequences_of(data, chosen, most)
    found = []
    for sequence in sequences:
        tokens, labels, positions = (sequence[name][0] for name in ("input_ids", "labels", "position_ids"))
        begins = (positions == 0).nonzero().squeeze(1).tolist()
        for begin, end in zip(begins, [*begins[1:], len(tokens)], strict=True):
            assert positions[begin:end].tolist() == list(range(end - begin))
            found.append((tokens[begin:end].tolist(), labels[begin:end].tolist()))
        assert len(tokens) <= most or len(begins) == 1
    alone = [data.batch(torch.tensor([index])) for index in chosen]
    assert sorted(found) == sorted((one["input_ids"][0].tolist(), one["labels"][0].tolist()) for one in alone)
    if max(lengths) <= most:
        assert sum(sequence["input_ids"].shape[1] <= most // 2 for sequence in sequences) <= 1  # two would be one


def test_rows_that_fill_a_sequence_share_it() -> None:
    data = LanguageDataset.of(rows_of((5, 4, 6, 5)), PADDING)
    assert [one["input_ids"].shape[1] for one in sequences_of(data, range(4), 10)] == [10, 10]


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_rows_have_the_loss_and_gradients_they_have_alone(name: str) -> None:
    model, data = model_of(CONFIGS[name]()), LanguageDataset.of(rows_of(), PADDING)
    way = way_to_pack(model.base_model, vocabulary=WORDS, longest=max(LENGTHS), device=torch.device("cpu"))
    assert way == WAYS[name]
    loss, gradients = one_by_one(model, data)
    sequences = sequences_of(data, range(len(data)), 20)
    assert len(sequences) == 2
    model.zero_grad()
    packed = [loss_of(model, packed_inputs(sequence, way, torch.float32)) for sequence in sequences]
    sum(packed, torch.zeros(())).backward()
    assert sum(float(one.detach()) for one in packed) == pytest.approx(loss, rel=1e-5)
    for parameter, gradient in gradients.items():
        found = model.get_parameter(parameter).grad
        # a few hundred float32 sums in another order
        assert (found - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, parameter


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_mask_of_our_own_is_taken_by_every_attention(attention: str) -> None:
    model, data = model_of(CONFIGS["llama"](), attention), LanguageDataset.of(rows_of(), PADDING)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        (sequence,) = sequences_of(data, range(len(data)), 64)
        by_mask, by_positions = (loss_of(model, packed_inputs(sequence, way, dtype)) for way in ("mask", "positions"))
        assert by_mask.item() == pytest.approx(by_positions.item(), rel=1e-5 if dtype == torch.float32 else 0.02)


def test_the_mask_shows_each_token_those_before_it_in_its_row() -> None:
    mask = block_mask(torch.tensor([[0, 1, 0, 0, 1]]), torch.float32)
    assert mask.shape == (1, 1, 5, 5)
    seen = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert (mask[0, 0] == 0).long().tolist() == seen


# --- not exact --------------------------------------------------------------------------------------------------------


def decoder_of(hidden: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda **inputs: SimpleNamespace(last_hidden_state=hidden(**inputs))


@pytest.mark.parametrize(
    "config",
    [
        transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=WORDS),  # ALiBi, from the padding mask
        transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=WORDS, state_size=4),  # recurrent
    ],
    ids=["bloom", "mamba"],
)
def test_a_model_that_cannot_keep_rows_apart_is_found_out(config: Any) -> None:
    model = model_of(config)
    assert way_to_pack(model.base_model, vocabulary=WORDS, longest=9, device=torch.device("cpu")) is None


def test_a_window_shorter_than_the_rows_shows_in_rows_of_their_length() -> None:
    """A model that builds no mask from positions, and whose window a mask of ours would override."""
    model = model_of(CONFIGS["mistral-window"]())

    def hidden(input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        found: Tensor = model.base_model(input_ids, attention_mask=attention_mask).last_hidden_state
        return found

    ways = [
        way_to_pack(decoder_of(hidden), vocabulary=WORDS, longest=longest, device=torch.device("cpu"))
        for longest in (WINDOW, 12)
    ]
    assert ways == ["mask", None]


def test_positions_that_stretch_with_the_longest_row_are_found_out() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**{**_COMMON, "max_position_embeddings": 8}, rope_parameters=rope)
    ways = [
        way_to_pack(model_of(config).base_model, vocabulary=WORDS, longest=longest, device=torch.device("cpu"))
        for longest in (8, 24)
    ]
    assert ways == ["positions", None]


def test_memory_that_runs_out_is_not_taken_for_a_refusal() -> None:
    def hidden(**inputs: Any) -> Tensor:
        if "position_ids" in inputs:
            raise torch.OutOfMemoryError("full")
        return torch.ones(1, inputs["input_ids"].shape[1], 4)

    with pytest.raises(torch.OutOfMemoryError):
        way_to_pack(decoder_of(hidden), vocabulary=WORDS, longest=5, device=torch.device("cpu"))


# --- attention over rows of various lengths ---------------------------------------------------------------------------


def one_row_at_a_time(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    _: Tensor,
    longest: int,
    __: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What torch documents of varlen_attn, by plain attention over each row: (N, H, D)."""
    assert int(ends.diff().max()) == longest
    left, right = window_size
    assert right == 0
    parts = []
    for begin, end in zip(ends.tolist(), ends.tolist()[1:], strict=False):
        far = torch.arange(end - begin)[:, None] - torch.arange(end - begin)
        seen = (far >= 0) & ((far <= left) if left >= 0 else True)
        rows = (part[begin:end].transpose(0, 1)[None] for part in (query, key, value))
        parts.append(F.scaled_dot_product_attention(*rows, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)[0])
    return torch.cat(parts, 1).transpose(0, 1)


@pytest.fixture
def varlen() -> Iterator[str]:
    """The attention, registered as a model's; taken away again."""
    sdpa = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS["sdpa"]
    masks = transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    transformers.AttentionInterface.register("fedpft_varlen", varlen_attention(sdpa))
    transformers.AttentionMaskInterface.register("fedpft_varlen", masks["sdpa"])
    yield "fedpft_varlen"
    del transformers.AttentionInterface._global_mapping["fedpft_varlen"]
    del transformers.AttentionMaskInterface._global_mapping["fedpft_varlen"]


WITH_SDPA = [name for name in CONFIGS if name != "gemma2"]  # whose softcap flash attention of torch does not know


@pytest.mark.parametrize("name", WITH_SDPA)
def test_rows_end_where_the_attention_is_told_they_do(name: str, varlen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing.varlen, "varlen_attn", one_row_at_a_time)
    monkeypatch.setattr(packing, "_fits", lambda *_: True)
    model, data = model_of(CONFIGS[name](), varlen), LanguageDataset.of(rows_of(), PADDING)
    (sequence,) = sequences_of(data, range(len(data)), 64)
    told = {**sequence, **row_ends(sequence["position_ids"])}
    loss, gradients = one_by_one(model_of(CONFIGS[name](), "sdpa"), data)
    found = loss_of(model, told)
    found.backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-5)
    for parameter, gradient in gradients.items():
        ours = model.get_parameter(parameter).grad
        assert (ours - gradient).norm() <= 1e-4 * gradient.norm() + 1e-5, parameter


def test_where_flash_attention_does_not_serve_transformers_own_does(varlen: str) -> None:
    """Here: on a CPU; and for what is not packed, padding on the left included."""
    data = LanguageDataset.of(rows_of(), PADDING)
    ours, theirs = (model_of(CONFIGS["mistral-window"](), attention) for attention in (varlen, "sdpa"))
    (sequence,) = sequences_of(data, range(len(data)), 64)
    assert torch.equal(loss_of(ours, {**sequence, **row_ends(sequence["position_ids"])}), loss_of(theirs, sequence))
    batch = data.batch(torch.arange(len(data)))
    left = {name: value.flip(1) for name, value in batch.items()}
    for inputs in (batch, left):
        assert torch.equal(loss_of(ours, inputs), loss_of(theirs, inputs))


def test_row_ends_are_those_of_the_positions() -> None:
    ends = row_ends(torch.tensor([[0, 1, 2, 0, 0, 1]]))
    assert ends["cu_seq_lens_q"].tolist() == [0, 3, 4, 6]
    assert ends["cu_seq_lens_q"].dtype == torch.int32
    assert ends["max_length_q"] == 3


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral-window", "gpt2", "gpt-neox", "opt"])
def test_on_cuda_packed_rows_have_the_loss_and_gradients_they_have_alone(
    name: str, varlen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packing.has_varlen():
        pytest.skip("this torch has no varlen_attn for grouped queries and windows")
    calls = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        return real(*arguments, **named)

    real = packing.varlen.varlen_attn
    monkeypatch.setattr(packing.varlen, "varlen_attn", counted)
    model = model_of(CONFIGS[name](), varlen).to("cuda", torch.bfloat16)
    exact = model_of(CONFIGS[name](), "sdpa").to("cuda", torch.float32)
    exact.load_state_dict(model.state_dict())  # the same weights, rounded
    data = LanguageDataset.of(rows_of((23, 1, 40, 2, 31)), PADDING)

    def run(model: Any, sequences: list[dict[str, Tensor]]) -> tuple[float, Tensor]:
        model.zero_grad()
        losses = [loss_of(model, {key: value.cuda() for key, value in one.items()}) for one in sequences]
        sum(losses, torch.zeros((), device="cuda")).backward()
        return sum(float(one.detach()) for one in losses), torch.cat(
            [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        )

    alone = [data.batch(torch.tensor([index])) for index in range(len(data))]
    sequences = sequences_of(data, range(len(data)), 128)
    assert len(sequences) == 1
    loss, gradient = run(exact, alone)
    rounded_loss, rounded = run(model, alone)
    assert not calls
    packed_loss, packed = run(model, [{**one, **row_ends(one["position_ids"])} for one in sequences])
    assert len(calls) == 2  # once a layer
    # no further from float32 than bfloat16 takes the rows one by one
    assert abs(packed_loss - loss) <= 2 * abs(rounded_loss - loss) + 0.01 * loss
    assert (packed - gradient).norm() <= 2 * (rounded - gradient).norm() + 0.01 * gradient.norm()
