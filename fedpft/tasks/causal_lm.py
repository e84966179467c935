"""The next token of a text: instruction tuning of a decoder, whose own output layer is the head and stays as it is.

M rows in one batch, T tokens, D hidden size, V words of the vocabulary.
"""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedpft.config import BadRows, ColumnsSection
from fedpft.data.batches import EncodedDataset
from fedpft.data.cache import Add, keep, key_of
from fedpft.data.chat import Learnt, encode_completion, encode_messages, encode_text, shorten
from fedpft.data.language import NOT_LEARNED, TENSORS, LanguageDataset, learnt
from fedpft.data.rows import RowFaults, Unusable
from fedpft.data.samples import Samples
from fedpft.data.text import check_padding, in_chunks
from fedpft.errors import ConfigError
from fedpft.tasks.task import Batch, Metric, Task
from fedpft.tasks.vocabulary_loss import linear_cross_entropy, linear_divergence, token_losses

MOST_WRITTEN = 64  # tokens of one answer
_HARNESS = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {test}
test_split: test
doc_to_text: "{{{{prompt}}}}"
target_delimiter: ""
"""
_MEASURED = {
    "fedpft_loss": """\
doc_to_target: "{{completion}}"
output_type: loglikelihood
metric_list:
  - metric: perplexity # of a whole answer, not of a token
  - metric: acc
""",
    "fedpft_answers": """\
doc_to_target: '{{completion | replace(END, "")}}'
output_type: generate_until
generation_kwargs:
  until: [END]
  max_gen_toks: 64
  do_sample: false
metric_list:
  - metric: exact_match
""",
}


class CausalLM(Task):
    """Conversations, prompts with completions, or texts."""

    name = "causal-lm"
    model = "AutoModelForCausalLM"
    processor = "AutoTokenizer"
    peft = "CAUSAL_LM"
    peft_loader = "AutoPeftModelForCausalLM"
    forms = (("messages",), ("prompt", "completion"), ("text",))
    public_forms = forms
    label_list = False
    head = False
    metrics = (
        Metric("loss", "loss", more_is_better=False),
        Metric("loss_se", "s.e."),
        Metric("perplexity", "perplexity", more_is_better=False),
        Metric("token_accuracy", "token accuracy", percent=True),
        Metric("exact_match", "exact match", percent=True),
        Metric("rouge_l", "ROUGE-L"),
    )

    def encode(
        self,
        samples: Samples,
        processor: Any,
        max_tokens: int,
        *,
        bad_rows: BadRows = "refuse",
        way_out: str = "",
        cache: Path | None = None,
    ) -> EncodedDataset:
        """Token ids, and which of them are to be learned; see `fedpft.data.chat`."""
        check_padding(processor)

        def make(add: Add) -> dict[str, int]:
            faults, counts = RowFaults(samples.path), dict.fromkeys(("cut", "prompts_cut", "completions_cut"), 0)
            for numbers in in_chunks(len(samples)):
                rows: list[Learnt] = []
                for number in numbers:
                    try:
                        short = shorten(_encoded(samples, number, processor), max_tokens)
                    except Unusable as found:
                        faults.add(samples.lines[number], found.message, found.remedy)
                        continue
                    rows.append(short.learnt)
                    counts["cut"] += short.prompt_cut or short.completion_cut
                    counts["prompts_cut"] += short.prompt_cut
                    counts["completions_cut"] += short.completion_cut
                add(**learnt(rows))
            if (fault := faults.against(len(samples), bad_rows, way_out)) is not None:
                raise fault
            return counts | {"faults": len(faults)}

        def key() -> str:
            return key_of(samples.contents(), processor, task=self.name, max_tokens=max_tokens, bad_rows=bad_rows)

        found = keep(cache, key, TENSORS, make)
        dataset = LanguageDataset(found["tokens"], found["learned"], found["lengths"], processor.pad_token_id)
        dataset.cut, dataset.prompts_cut = found.counts["cut"], found.counts["prompts_cut"]
        dataset.completions_cut = found.counts["completions_cut"]
        dataset.skipped = samples.skipped + found.counts["faults"]
        return dataset

    def read_labelled(
        self, path: Path, columns: ColumnsSection, labels: Sequence[str], encoding: str | None = None
    ) -> Samples:
        """The owner reads so what will be measured; ConfigError if nothing is installed to measure it by."""
        _rouge()
        return super().read_labelled(path, columns, labels, encoding)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean cross-entropy, in nats, of the tokens that are learned."""
        hidden, targets = _predicting(model, batch)
        return linear_cross_entropy(hidden, targets=targets, **output_layer(model)) / self.weight(batch)

    def head_divergence(self, model: nn.Module, hidden: Tensor, teacher: Tensor) -> Tensor:
        """Of the next tokens."""
        every = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device)
        total = linear_divergence(hidden, targets=every, teacher=teacher.detach(), **output_layer(model))
        return total / max(1, len(hidden))

    def soft_loss(self, model: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
        """The mean KL of the next tokens that are learned; both have the same output layer, which no silo trains."""
        hidden, targets = _predicting(model, batch)
        with torch.no_grad():
            wanted, _ = _predicting(teacher, batch)
        total = linear_divergence(hidden, targets=targets, teacher=wanted, **output_layer(model))
        return total / max(1, self.weight(batch))

    def weight(self, batch: Batch) -> int:
        """The tokens that are learned."""
        return int((batch["labels"][:, 1:] != NOT_LEARNED).sum())

    def with_any_labels(self, inputs: Batch, classes: int, generator: torch.Generator) -> Batch:
        """As they are: a text has the next tokens in itself."""
        return inputs

    def answers(self, model: nn.Module, batch: Batch) -> list[tuple[float, int, int]]:
        """Of each row the sum of its tokens' losses, the tokens that are learned, and how many the model would say."""
        hidden, targets = _predicting(model, batch)
        losses, right = token_losses(hidden, targets=targets, **output_layer(model))
        sums = (losses.double().sum(-1), (targets != NOT_LEARNED).sum(-1), right.sum(-1))
        return list(zip(*(each.tolist() for each in sums), strict=True))

    def score(
        self, answers: Sequence[tuple[float, int, int]], dataset: EncodedDataset, chosen: Tensor
    ) -> dict[str, float]:
        """`loss` in nats a token, `loss_se` its standard error over rows, as of a ratio of two sums."""
        losses, tokens, right = (torch.tensor(each, dtype=torch.float64) for each in zip(*answers, strict=True))
        loss, rows = float(losses.sum() / tokens.sum()), len(answers)
        spread = float((losses - loss * tokens).square().sum())
        return {
            "loss": loss,
            "loss_se": math.sqrt(spread * rows / max(1, rows - 1)) / float(tokens.sum()),
            "perplexity": math.exp(min(loss, 700.0)),
            "token_accuracy": float(right.sum() / tokens.sum()),
        }

    def write(self, model: nn.Module, processor: Any, dataset: EncodedDataset, chosen: Tensor, batch: int) -> list[str]:
        """The likeliest token after the other, up to MOST_WRITTEN, until one that ends an answer."""
        assert isinstance(dataset, LanguageDataset)
        device, written = next(model.parameters()).device, dict[int, str]()
        asked = {index: dataset.question(index)[0] for index in chosen.tolist()}
        shortest_first = sorted(asked, key=lambda index: len(asked[index]))
        for start in range(0, len(shortest_first), batch):
            indices = shortest_first[start : start + batch]
            inputs = _padded_left([asked[index] for index in indices], processor.pad_token_id)
            with torch.no_grad():
                tokens = model.generate(  # type: ignore[operator]
                    **{name: value.to(device) for name, value in inputs.items()},
                    max_new_tokens=MOST_WRITTEN,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=processor.pad_token_id,
                    eos_token_id=sorted(_ends(model, processor, dataset)),
                )
            texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            written.update(zip(indices, texts, strict=True))
        return [written[index] for index in chosen.tolist()]

    def wanted(self, processor: Any, dataset: EncodedDataset, chosen: Tensor) -> list[tuple[str, str]]:
        """The context of the last answer, with the marks of the chat template, and that answer without."""
        assert isinstance(dataset, LanguageDataset)
        pairs = [dataset.question(index) for index in chosen.tolist()]
        return [
            (processor.decode(question), processor.decode(answer, skip_special_tokens=True))
            for question, answer in pairs
        ]

    def benchmark(self, directory: Path, processor: Any, dataset: EncodedDataset) -> dict[str, str]:
        """Two tasks of lm-evaluation-harness over test.jsonl: what an answer costs, and whether it is written."""
        assert isinstance(dataset, LanguageDataset)
        pairs = [dataset.question(index) for index in range(len(dataset))]
        rows = [{"prompt": processor.decode(asked), "completion": processor.decode(answer)} for asked, answer in pairs]
        test = json.dumps(str((directory / "test.jsonl").absolute()))
        end = json.dumps(processor.decode(pairs[0][1][-1:]))
        files = {"test.jsonl": "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)}
        for name, measured in _MEASURED.items():
            files[f"{name}.yaml"] = _HARNESS.format(name=name, test=test) + measured.replace("END", end)
        return files

    def score_written(self, written: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
        """Share of answers that are the wanted one but for white space at the ends, and ROUGE-L's F-measure."""
        scorer = _rouge().RougeScorer(["rougeL"])
        found = [scorer.score(target, text)["rougeL"].fmeasure for text, target in zip(written, wanted, strict=True)]
        same = [text.strip() == target.strip() for text, target in zip(written, wanted, strict=True)]
        return {"exact_match": sum(same) / len(same), "rouge_l": sum(found) / len(found)}


def output_layer(model: nn.Module) -> dict[str, Any]:
    """What makes logits of the last hidden states: weight (V, D), bias (V,) or None, and what bounds them."""
    layer = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(model.config, "final_logit_softcapping", None)
    return {"weight": layer.weight, "bias": getattr(layer, "bias", None), "softcap": softcap}


def _rouge() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError(
            f"what causal-lm writes is measured by rouge-score, which cannot be imported ({error.name})",
            "pip install 'fedpft[causal-lm]'",
        ) from None
    logging.getLogger("absl").setLevel(logging.WARNING)  # it says which tokenizer it takes, each time
    return rouge_scorer


def _predicting(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden states that predict, (M, T - 1, D), and the tokens that they are to predict, (M, T - 1)."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden: Tensor = model.base_model(**inputs).last_hidden_state  # type: ignore[operator]
    return hidden[:, :-1], batch["labels"][:, 1:]


def _encoded(samples: Samples, number: int, tokenizer: Any) -> Learnt:
    if "messages" in samples.values:
        return encode_messages(samples["messages"][number], tokenizer)
    if "prompt" in samples.values:
        return encode_completion(samples["prompt"][number], samples["completion"][number], tokenizer)
    return encode_text(samples["text"][number], tokenizer)


def _padded_left(rows: Sequence[Tensor], padding: int) -> dict[str, Tensor]:
    """input_ids, attention_mask: (M, T) int64. What is written goes on at the right."""
    longest = max(len(row) for row in rows)
    ids, real = (torch.full((len(rows), longest), value) for value in (padding, 0))
    for number, row in enumerate(rows):
        ids[number, longest - len(row) :], real[number, longest - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": real}


def _ends(model: nn.Module, tokenizer: Any, dataset: LanguageDataset) -> set[int]:
    """The tokens that end an answer: the tokenizer's, the model's own, and the control tokens that end the rows."""
    own = model.generation_config.eos_token_id  # type: ignore[union-attr]
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    control = set(tokenizer.all_special_ids) | {
        number for number, token in tokenizer.added_tokens_decoder.items() if token.special
    }
    last = dataset.tokens[dataset.starts + dataset.lengths - 1].unique().tolist()
    return {end for end in ends if end is not None} | (control.union(tokenizer.all_special_ids) & set(last))
