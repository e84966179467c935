"""Causal language models: loss, metrics and answers of the task, and a federation of real processes that tunes one."""

import json
import math
import random
from pathlib import Path
from typing import Any

import jinja2
import languages
import peft
import pytest
import tiny
import torch
import transformers
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

from fedpft.config import (
    AdapterSection,
    ColumnsSection,
    DistillationSection,
    LimitsSection,
    RoundSettings,
    ServerConfig,
    TrainingSection,
)
from fedpft.data.language import NOT_LEARNED, LanguageDataset
from fedpft.demo.run import run_federation
from fedpft.digests import Digests
from fedpft.errors import ConfigError, DataError, FedPFTError
from fedpft.evaluation import LogitOffset, evaluate
from fedpft.model import adapters, loading
from fedpft.model.packing import way_to_pack
from fedpft.proxy.bundle import load_proxy
from fedpft.proxy.cut import cut
from fedpft.proxy.distillation import layer_level
from fedpft.proxy.selection import select
from fedpft.server.construction import load_owner
from fedpft.tasks import TASKS
from fedpft.training import train_round

TASK = TASKS["causal-lm"]
COLORS = {"sea": "blue", "stone": "cold", "bird": "red", "fish": "green", "water": "warm"}


def question(thing: str) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": f"what is the colour of the {thing}?"},
        {"role": "assistant", "content": f"{COLORS[thing]}, as a rule."},
    ]
    return {"messages": messages}


def written(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def write_fm(directory: Path, *, tied: bool = True, template: str | None = languages.SMOL) -> Path:
    """A random LLaMA with grouped queries, and a byte-level tokenizer."""
    tokenizer = languages.tokenizer(template)
    config = transformers.LlamaConfig(
        hidden_size=tiny.D,
        intermediate_size=tiny.F,
        num_hidden_layers=tiny.L,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tiny.randomise(transformers.AutoModelForCausalLM.from_config(config)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def encoded(path: Path, tokenizer: Any, max_tokens: int = 64) -> LanguageDataset:
    dataset = TASK.encode(TASK.read_public(path, ColumnsSection()), tokenizer, max_tokens)
    assert isinstance(dataset, LanguageDataset)
    return dataset


@pytest.fixture
def fm(tmp_path: Path) -> nn.Module:
    return loading.load_model(write_fm(tmp_path / "fm"), "causal-lm", (), seed=0)


@pytest.fixture
def data(tmp_path: Path) -> LanguageDataset:
    rows = [question(thing) for thing in COLORS]
    return encoded(written(tmp_path / "a.jsonl", rows), languages.tokenizer(languages.SMOL))


def test_the_three_forms_of_a_row_are_read(tmp_path: Path) -> None:
    forms: dict[str, list[Any]] = {
        "messages": [question("sea")],
        "completion": [{"prompt": "what is the colour of the sea? ", "completion": "blue, as a rule."}],
        "text": [{"text": "blue, as a rule."}],
    }
    tokenizer = languages.tokenizer(languages.CHATML)
    ends = {"messages": "<|im_end|>", "completion": "</s>", "text": "</s>"}
    for form, rows in forms.items():
        dataset = encoded(written(tmp_path / f"{form}.jsonl", rows), tokenizer)
        learned = tokenizer.decode(dataset.tokens[dataset.learned])
        assert learned.endswith(f"as a rule.{ends[form]}")
        assert "colour" not in learned


def test_a_conversation_in_a_table_is_json(tmp_path: Path) -> None:
    messages = json.dumps(question("sea")["messages"]).replace('"', '""')
    path = tmp_path / "a.csv"
    path.write_text(f'id,messages\n1,"{messages}"\n', encoding="utf-8")
    assert len(encoded(path, languages.tokenizer(languages.CHATML))) == 1


BAD: dict[str, tuple[Any, str]] = {
    "no list": ({"messages": "hello"}, "'messages' is not JSON"),
    "an empty list": ({"messages": []}, "messages are not a list"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 lacks role or content"),
    "nobody answers": ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    "an answer that is blank": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
        "message 2: the assistant says nothing",
    ),
    "no completion": ({"prompt": "a", "completion": ""}, "the completion is empty"),
    "a text that is a number": ({"text": 3}, "'text' is int"),
    "none of the columns": ({"body": "a"}, "no column 'messages' nor 'prompt' nor 'text' among body"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_row_is_named_with_its_line(fault: str, tmp_path: Path) -> None:
    row, message = BAD[fault]
    with pytest.raises(DataError) as caught:
        TASK.read_labelled(written(tmp_path / "a.jsonl", [row]), ColumnsSection(), ())
    assert f"a.jsonl:1: {message}" in caught.value.message


def test_rows_that_the_template_refuses_are_named_together_or_left_out(tmp_path: Path) -> None:
    good = question("sea")
    system = {"messages": [{"role": "system", "content": "be brief"}, *good["messages"]]}
    path = written(tmp_path / "a.jsonl", [good, system, good, system])
    tokenizer, samples = languages.tokenizer(languages.GEMMA), TASK.read_labelled(path, ColumnsSection(), ())
    with pytest.raises(DataError, match=r"2 of 4 rows .*a\.jsonl:2: the chat template refuses .* a\.jsonl:4"):
        TASK.encode(samples, tokenizer, 64)
    dataset = TASK.encode(samples, tokenizer, 64, bad_rows="skip")
    assert (len(dataset), dataset.skipped) == (2, 2)


def test_what_is_cut_is_counted(tmp_path: Path) -> None:
    rows = [question("sea"), {"messages": [question("sea")["messages"][0], {"role": "assistant", "content": "no"}]}]
    tokenizer = languages.tokenizer(languages.CHATML)
    path = written(tmp_path / "a.jsonl", rows)
    lengths = encoded(path, tokenizer).lengths
    dataset = encoded(path, tokenizer, 6)
    assert dataset.counts == {"skipped_rows": 0, "cut_texts": 2, "cut_completions": 1}
    assert "2 lose the beginning of their context, and 1 the end" in dataset.describe_cut("a.jsonl", 6)
    assert int(lengths.min()) > 6


def test_the_samples_of_the_documentation_are_read(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text(encoding="utf-8")
    entry = page.partition("\n## causal-lm\n")[2].partition("\n## ")[0]
    rows = []
    for kind, suffix in (("json", "jsonl"), ("csv", "csv")):
        path = tmp_path / f"a.{suffix}"
        path.write_text(entry.partition(f"```{kind}\n")[2].partition("```")[0], encoding="utf-8")
        rows.append(len(encoded(path, languages.tokenizer(languages.CHATML))))
    assert rows == [2, 1]
    assert all(name in entry for name in (TASK.model, TASK.peft_loader, "task: causal-lm"))


# --- the loss, and what is measured -----------------------------------------------------------------------------------


def plain_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(M, T - 1), by transformers' own logits."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return F.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="none", ignore_index=NOT_LEARNED)


def test_the_loss_is_the_mean_over_the_tokens_that_are_learned(fm: nn.Module, data: LanguageDataset) -> None:
    batch = data.batch(torch.arange(5))
    wanted = plain_losses(fm, batch).sum() / (batch["labels"][:, 1:] != NOT_LEARNED).sum()
    torch.testing.assert_close(TASK.loss(fm, batch), wanted)
    theirs = fm(**batch).loss
    torch.testing.assert_close(TASK.loss(fm, batch), theirs)
    parts = [data.batch(torch.tensor(part)) for part in ([0, 3, 1], [2, 4])]
    weighed = sum(TASK.loss(fm, part) * TASK.weight(part) for part in parts) / TASK.weight(batch)
    torch.testing.assert_close(weighed, wanted)


def test_metrics_are_their_definitions(fm: nn.Module, data: LanguageDataset) -> None:
    batch, chosen = data.batch(torch.arange(5)), torch.tensor([0, 2, 3, 4])
    with torch.no_grad():
        losses = plain_losses(fm, batch)[chosen].double()
        logits = fm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[chosen, :-1]
        answers = TASK.answers(fm, batch)
    there = batch["labels"][chosen, 1:] != NOT_LEARNED
    found = TASK.score([answers[index] for index in chosen.tolist()], data, chosen)
    loss = float(losses.sum() / there.sum())
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    right = (logits.argmax(-1) == batch["labels"][chosen, 1:]) & there
    assert found["token_accuracy"] == pytest.approx(float(right.sum() / there.sum()))
    # of a ratio of two sums over rows, as a jackknife finds it, too
    sums, tokens = losses.sum(1), there.sum(1)
    without = [(sums.sum() - sums[i]) / (tokens.sum() - tokens[i]) for i in range(4)]
    jackknife = math.sqrt(3 / 4 * sum((float(each) - sum(map(float, without)) / 4) ** 2 for each in without))
    assert found["loss_se"] == pytest.approx(jackknife, rel=0.1)


def test_answers_are_written_greedily_and_end_where_the_template_ends_them(
    fm: nn.Module, data: LanguageDataset
) -> None:
    tokenizer, chosen = languages.tokenizer(languages.SMOL), torch.tensor([4, 0, 2])
    with torch.no_grad():  # says what the row before would have said, then ends
        fm.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>")] *= 3.0
    texts = TASK.write(fm, tokenizer, data, chosen, 2)
    for index, text in zip(chosen.tolist(), texts, strict=True):
        tokens = data.question(index)[0].tolist()
        asked = len(tokens)
        for _ in range(64):
            with torch.no_grad():
                tokens.append(int(fm(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
            if tokens[-1] in (tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")):
                break
        assert text == tokenizer.decode(tokens[asked:], skip_special_tokens=True)
    wanted = TASK.wanted(tokenizer, data, chosen)
    assert wanted[1][1] == "blue, as a rule."
    assert wanted[1][0].endswith("colour of the sea?<|im_end|>\n<|im_start|>assistant\n")


def test_written_answers_are_scored_by_match_and_rouge() -> None:
    found = TASK.score_written(
        ["blue, as a rule. ", "the sea is red", "x"], ["blue, as a rule.", "the sea is blue", "y"]
    )
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((1 + 0.75 + 0) / 3)


def divergence(proxy: nn.Module, fm: nn.Module, data: LanguageDataset) -> float:
    """KL of the next-token distributions, FM's first, over the tokens that are there, in nats."""
    batch = data.batch(torch.arange(len(data)))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        found, wanted = (model(**inputs).logits.double().log_softmax(-1) for model in (proxy, fm))
    each = (wanted.exp() * (wanted - found)).sum(-1)
    return float(each[inputs["attention_mask"].bool()].mean())


def distilled(fm: nn.Module, public: LanguageDataset, **others: Any) -> tuple[nn.Module, list[float]]:
    selection = select(fm, tiny.by_weights(neurons=16))
    proxy = cut(fm, selection)
    settings = DistillationSection(**{"closed_form_samples": 0, "weight_term": 0.0, "learning_rate": 5e-3, **others})
    losses = layer_level(
        proxy, fm, selection.matched, public, settings, seed=0, task=TASK, progress=lambda _step, _loss: None
    )
    return proxy, losses


def test_first_loss_with_the_logit_term_is_the_formula(fm: nn.Module, data: LanguageDataset) -> None:
    wanted = divergence(distilled(fm, data, steps=0)[0], fm, data)
    first = [distilled(fm, data, steps=1, batch=len(data), logit_term=term)[1][0] for term in (0.0, 0.5)]
    assert wanted > 1e-3
    assert first[1] - first[0] == pytest.approx(0.5 * wanted, rel=1e-3)


def test_logit_term_draws_the_next_tokens_to_the_fms(fm: nn.Module, tmp_path: Path) -> None:
    drawn = random.Random(0)
    rows = [{"text": " ".join(drawn.choices(tiny.WORDS[4:], k=8))} for _ in range(640)]
    tokenizer = languages.tokenizer(languages.SMOL)
    public = encoded(written(tmp_path / "public.jsonl", rows[:600]), tokenizer)
    unseen = encoded(written(tmp_path / "unseen.jsonl", rows[600:]), tokenizer)
    steps = {"steps": 80, "batch": 24, "learning_rate": 1e-2}
    found = [divergence(distilled(fm, public, **steps, logit_term=term)[0], fm, unseen) for term in (0.0, 1.0)]
    assert found[1] < 0.97 * found[0], found


def test_logit_term_is_for_heads_that_the_fm_has(tmp_path: Path) -> None:
    write_fm(tmp_path / "fm")
    (tmp_path / "labels.txt").write_text("a\nb\n", encoding="utf-8")
    model = {"task": "sequence-classification", "labels": str(tmp_path / "labels.txt")}
    values = settings_of(tmp_path, **model) | {"out": str(tmp_path / "out"), "distillation": {"logit_term": 0.1}}
    written(tmp_path / "public.jsonl", [{"text": "a"}])
    values["public_data"] = str(tmp_path / "public.jsonl")
    values.pop("test_data", None)
    with pytest.raises(ConfigError, match=r"distillation\.logit_term .* sequence-classification"):
        load_owner(ServerConfig.model_validate(values), Digests())


def one_round(adapter: AdapterSection) -> RoundSettings:
    training = TrainingSection(rounds=1, batch=3, learning_rate=0.01)
    return RoundSettings(seed=0, adapter=adapter, training=training, inactive_below=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_of_the_head_trains(tied: bool, tmp_path: Path, data: LanguageDataset) -> None:
    fm = loading.load_model(write_fm(tmp_path / "fm2", tied=tied), "causal-lm", (), seed=0)
    adapters.attach(fm, AdapterSection(rank=2), seed=0)
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=8)))
    before = tiny.snapshot(proxy)
    settings = one_round(AdapterSection(rank=2))
    result = train_round(
        TASK,
        proxy,
        data,
        settings,
        silo="north",
        round=1,
        compressed=(1, 2),
        count_inactivity=True,
        limits=LimitsSection(max_batch=2),
    )
    assert all(".lora_" in name for name in result.adapter)
    changed = tiny.changed(before, tiny.snapshot(proxy))
    assert changed
    assert all(".lora_" in name for name in changed)
    assert result.inactivity is not None
    assert int(result.inactivity["1.tokens"]) == int(data.lengths.sum())


@pytest.mark.parametrize("most", [None, 2])
def test_packed_rows_train_to_the_same_adapter(most: int | None, fm: nn.Module, data: LanguageDataset) -> None:
    adapters.attach(fm, AdapterSection(rank=2, dropout=0.0), seed=0)
    start = adapters.extract(fm)
    settings = one_round(AdapterSection(rank=2, dropout=0.0))
    proxy = cut(fm, select(fm, tiny.by_weights(neurons=8)))
    way = way_to_pack(proxy.base_model, vocabulary=20, longest=40, device=torch.device("cpu"))
    assert way is not None
    results = []
    for packing in (None, way):
        adapters.load(proxy, start)
        results.append(
            train_round(
                TASK,
                proxy,
                data,
                settings,
                silo="north",
                round=1,
                compressed=(1, 2),
                count_inactivity=True,
                limits=LimitsSection(max_batch=most),
                packing=packing,
            )
        )
    padded, packed = results
    assert packed.metrics["tokens"] == padded.metrics["tokens"] == int(data.lengths.sum())
    assert packed.metrics["train_loss"] == pytest.approx(padded.metrics["train_loss"], rel=1e-5)
    for name, tensor in padded.adapter.items():
        torch.testing.assert_close(packed.adapter[name], tensor, rtol=1e-3, atol=1e-5)
    assert packed.inactivity is not None
    assert padded.inactivity is not None
    assert torch.equal(packed.inactivity["1.tokens"], padded.inactivity["1.tokens"])


def tuned_pair(directory: Path, *, whole: bool) -> tuple[nn.Module, nn.Module]:
    """An FM and its proxy with the same adapter, which does something."""
    fm = loading.load_model(write_fm(directory / "tuned"), "causal-lm", (), seed=0)
    adapters.attach(fm, AdapterSection(rank=4, alpha=8), seed=0)
    with torch.no_grad():
        for name, parameter in fm.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return fm, cut(fm, select(fm, tiny.by_weights(neurons="all" if whole else 24)))


def test_a_model_is_as_far_from_a_teacher_as_their_next_tokens_diverge(tmp_path: Path, data: LanguageDataset) -> None:
    fm, proxy = tuned_pair(tmp_path, whole=False)
    batch = data.batch(torch.arange(len(data)))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    learned = batch["labels"][:, 1:] != NOT_LEARNED
    ours, theirs = (tiny.logits(model, inputs)[:, :-1][learned].log_softmax(-1) for model in (fm, proxy))
    wanted = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    assert float(wanted) > 1e-3
    loss = TASK.soft_loss(fm, proxy, batch)
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-4)
    loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in adapters.lora_parameters(fm))
    assert all(p.grad is None for p in proxy.parameters())


def test_with_a_whole_proxy_the_logit_offset_is_the_tuned_model(tmp_path: Path, data: LanguageDataset) -> None:
    fm, proxy = tuned_pair(tmp_path, whole=True)
    tuned, offset = (evaluate(TASK, model, data, 2) for model in (proxy, LogitOffset(fm, proxy)))
    assert offset == pytest.approx(tuned, rel=1e-4)
    with adapters.without_lora(proxy):
        assert evaluate(TASK, proxy, data, 2)["loss"] != pytest.approx(tuned["loss"], rel=1e-2)


def test_a_logit_offset_is_the_untuned_logits_and_what_tuning_did_to_the_proxys(
    tmp_path: Path, data: LanguageDataset
) -> None:
    fm, proxy = tuned_pair(tmp_path, whole=False)
    batch = data.batch(torch.arange(len(data)))
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    before = tiny.snapshot(fm)
    found = TASK.score(TASK.answers(LogitOffset(fm, proxy).eval(), batch), data, torch.arange(len(data)))
    tuned = tiny.logits(proxy, inputs)
    with adapters.without_lora(fm), adapters.without_lora(proxy):
        logits = tiny.logits(fm, inputs) + tuned - tiny.logits(proxy, inputs)
    wanted = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert found["loss"] == pytest.approx(float(wanted), rel=1e-4)
    assert tiny.changed(before, tiny.snapshot(fm)) == set()
    assert all(parameter.requires_grad for parameter in adapters.lora_parameters(fm))


# --- a federation -----------------------------------------------------------------------------------------------------


def settings_of(root: Path, **model: Any) -> dict[str, Any]:
    everything = [question(thing) for thing in COLORS]
    return {
        "seed": 3,
        "listen": "127.0.0.1:0",
        "insecure_loopback": True,
        "threads": 1,
        "model": {"path": str(root / "fm"), "task": "causal-lm", "max_tokens": 64, **model},
        "proxy": {"neurons": 40},
        "distillation": {"steps": 4, "batch": 4},
        "alignment": {"every_rounds": 1, "steps": 2, "batch": 4},
        "adapter": {"rank": 4, "alpha": 8},
        "training": {"rounds": 2, "local_epochs": 16, "batch": 2, "learning_rate": 0.02, "packing": True},
        "federation": {"silos": ["north", "south"]},
        "public_data": str(written(root / "public.jsonl", [{"text": line} for line in languages.SENTENCES[:5]])),
        "test_data": str(written(root / "test.jsonl", everything)),
        "evaluation": {"samples_per_round": 5, "written_samples": 5, "logit_offset": True},
        "plug_in": {"steps": 3, "batch": 4, "learning_rate": 1e-3, "towards": "proxy"},
    }


def silos_of(root: Path) -> dict[str, Any]:
    things = list(COLORS)
    rows = {
        "north": [question(thing) for thing in things[:3]],
        "south": [
            {"prompt": "what is the colour of the ", "completion": f"{thing}? {COLORS[thing]}"} for thing in things[2:]
        ],
    }
    return {
        name: {
            "insecure_loopback": True,
            "insecure_name": name,
            "data": {"path": str(written(root / name / "data.jsonl", rows[name]))},
            "threads": 1,
        }
        for name in rows
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """OUT of a federation whose silos have other forms of rows, and its summary."""
    root = tmp_path_factory.mktemp("lm")
    write_fm(root / "fm", template=None)
    template = root / "template.jinja"
    template.write_text(languages.CHATML, encoding="utf-8")
    summary = run_federation(root, settings_of(root, chat_template=str(template)), silos_of(root))
    return root / "out", summary


def test_a_federation_tunes_a_decoder(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    metrics = summary["metrics"]
    assert list(metrics) == ["zero_shot", "proxy_zero_shot", "proxy", "logit_offset", "plugged_in_raw", "plugged_in"]
    assert metrics["plugged_in_raw"]["loss"] != metrics["plugged_in"]["loss"]
    assert metrics["plugged_in_raw"]["loss"] == pytest.approx(summary["rounds"][-1]["score"]), "as the rounds left it"
    assert metrics["plugged_in"]["loss"] < metrics["zero_shot"]["loss"] - 0.5
    for row in metrics.values():
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        assert row["loss_se"] > 0
    assert metrics["logit_offset"].keys() == {"loss", "loss_se", "perplexity", "token_accuracy"}, "it writes nothing"
    assert all(
        0 <= row["rouge_l"] <= 1 for name, row in metrics.items() if name not in ("logit_offset", "proxy_zero_shot")
    )
    assert [entry["score"] is not None for entry in summary["rounds"]] == [True, True]
    assert summary["data"]["silos"]["north"] == {"samples": 3, "skipped_rows": 0, "cut_texts": 0, "cut_completions": 0}
    assert summary["holdings"]["embeddings"]["model"] == summary["holdings"]["embeddings"]["proxy"]
    assert len(summary["written"]) == 5
    rows = {"zero_shot", "proxy", "plugged_in_raw", "plugged_in"}
    assert summary["written"][0].keys() == {"asked", "wanted"} | rows
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "has a test loss of" in page
    assert "lower is better" in page
    assert "the FM as it was" in page


def test_the_product_loads_where_people_load_it(run: tuple[Path, dict[str, Any]]) -> None:
    out, summary = run
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    assert tokenizer.chat_template == languages.CHATML
    assert transformers.AutoTokenizer.from_pretrained(out / "adapter").chat_template == languages.CHATML
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    assert merged.config.use_cache
    assert merged.generation_config.eos_token_id == tokenizer.eos_token_id
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(out / "adapter")
    config = json.loads((out / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == summary["config"]["model"]["path"]
    dataset = encoded(Path(summary["config"]["test_data"]), tokenizer)
    batch = dataset.batch(torch.arange(5))
    assert torch.isfinite(tiny.logits(merged, batch)).all()
    torch.testing.assert_close(tiny.logits(adapted, batch), tiny.logits(merged, batch), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = TASK.score(TASK.answers(merged, batch), dataset, torch.arange(5))
    assert found["loss"] == pytest.approx(summary["metrics"]["plugged_in"]["loss"], rel=1e-4)


def test_the_test_data_is_written_as_others_measure_it(run: tuple[Path, dict[str, Any]]) -> None:
    directory = run[0] / "benchmark"
    rows = [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[0]["prompt"].endswith("colour of the sea?<|im_end|>\n<|im_start|>assistant\n")
    assert rows[0]["completion"] == "blue, as a rule.<|im_end|>"
    for name in ("fedpft_loss", "fedpft_answers"):
        task = yaml.safe_load((directory / f"{name}.yaml").read_text(encoding="utf-8"))
        assert task["task"] == name
        assert task["dataset_kwargs"]["data_files"]["test"] == str(directory / "test.jsonl")
        assert task["target_delimiter"] == ""
        template = jinja2.Template(task["doc_to_target"])
        assert template.render(rows[0]) in ("blue, as a rule.", "blue, as a rule.<|im_end|>")
        assert jinja2.Template(task["doc_to_text"]).render(rows[0]) == rows[0]["prompt"]
    assert task["generation_kwargs"]["until"] == ["<|im_end|>"]


def test_the_chat_template_travels_with_the_proxy(run: tuple[Path, dict[str, Any]]) -> None:
    proxy = load_proxy(run[0] / "proxy" / "bundle")
    assert proxy.processor.chat_template == languages.CHATML
    assert proxy.labels == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": "labels.txt"}, "model.task causal-lm has no use for model.labels"),
        ({}, "has no chat template"),
        ({"chat_template": "bad.jinja"}, "not a chat template"),
        ({"task": "sequence-classification"}, "model.task sequence-classification needs model.labels"),
        ({"rank": 0}, "adapter.rank is 0, and causal-lm has no head"),
    ],
)
def test_what_the_server_lacks_is_named_at_the_start(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_fm(tmp_path / "fm", template=None)
    (tmp_path / "labels.txt").write_text("a\nb\n", encoding="utf-8")
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}", encoding="utf-8")
    changes = {key: str(tmp_path / value) if "." in str(value) else value for key, value in changes.items()}
    rank = changes.pop("rank", 4)
    values = settings_of(tmp_path, **changes) | {"out": str(tmp_path / "out"), "adapter": {"rank": rank}}
    with pytest.raises(FedPFTError, match=message):
        load_owner(ServerConfig.model_validate(values), Digests())
