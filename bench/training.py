"""`python -m bench.training`: one silo's steps by our loop, by the published loop's form, and by LoRA on the full FM.

The published form is `transformers.Trainer` with its defaults on the proxy as plain transformers modules, with peft's
LoRA on query, key, value and attention output, and a hook on each compressed layer's activation that counts the zeros
(`zeros`) or, as our loop does, the values of at most eps at the tokens that are no padding (`eps`). All loops take the
same batches. Without dropout both must come to the same losses, adapter and counts, or the run ends there.

K neurons of a compressed layer.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from bench.measure import Run, Times, peak_bytes, provenance
from fedpft.command import run_command
from fedpft.config import AdapterSection, ColumnsSection, LimitsSection, ProxySection, RoundSettings, TrainingSection
from fedpft.data.batches import EncodedDataset, batches
from fedpft.data.samples import read_label_list
from fedpft.data.text import TextDataset
from fedpft.demo import corpora
from fedpft.errors import FedPFTError
from fedpft.model import adapters, loading
from fedpft.model.architectures import layers_of
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS
from fedpft.training import LocalResult, train_round

TASK, SILO, SEED, EPS = "sequence-classification", "north", 0, 0.01
LABELS = tuple(f"class {number}" for number in range(20))


@dataclass(frozen=True)
class Case:
    """A model, its batch, and how many steps one turn takes."""

    model: str
    max_tokens: int
    batch: int
    steps: int

    @property
    def samples(self) -> int:
        return self.batch * self.steps


CASES = {
    "minilm-32": Case("MiniLM", 64, 32, 3),
    "minilm-4": Case("MiniLM", 64, 4, 16),
    "bert-8": Case("BERT-base", 128, 8, 3),
}
# loop, dropout
CANDIDATES = {
    "fedpft": ("fedpft", True),
    "published, zeros": ("zeros", True),
    "published, eps": ("eps", True),
    "full FM": ("full", True),
    "fedpft, no dropout": ("fedpft", False),
    "published, eps, no dropout": ("eps", False),
}


class Silo:
    """Everything a loop needs, made from seeds alone: the FM, its selection, the batches of one round."""

    def __init__(self, case: Case, dropout: bool, device: str) -> None:
        self.case, self.dropout, self.device = case, dropout, device
        if case.model == "MiniLM":
            self.processor = loading.load_processor(corpora.model_directory(), TASK)
            self.dataset = _newsgroups(case, self.processor)
        else:
            self.processor, self.dataset = _padder(), _synthetic(case)
        self.fm = loading.load_model(_model_directory(case.model), TASK, LABELS, seed=SEED)
        self.selection: Selection = select(self.fm, ProxySection(importance="weights"))
        self.compressed = [layer for layer, _ in self.selection.matched]
        self.settings = RoundSettings(
            seed=SEED,
            adapter=AdapterSection(dropout=0.1 if dropout else 0.0),
            training=TrainingSection(
                rounds=1, batch=case.batch, weight_decay=0.0, local_epochs=case.samples / len(self.dataset)
            ),
            inactive_below=EPS,
        )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """As train_round takes them."""
        order, samples = derive_seed(SEED, "order", SILO), self.case.samples
        return batches(self.dataset, batch=self.case.batch, start=0, count=samples, seed=order)


class OurLoop:
    """`fedpft.training` on the proxy."""

    def __init__(self, silo: Silo) -> None:
        self.silo = silo
        adapters.attach(silo.fm, silo.settings.adapter, seed=SEED)
        self.model = cut(silo.fm, silo.selection).to(silo.device)
        self.result: LocalResult | None = None

    def __call__(self) -> None:
        self.result = train_round(
            TASKS[TASK],
            self.model,
            self.silo.dataset,
            self.silo.settings,
            silo=SILO,
            round=1,
            compressed=tuple(self.silo.compressed),
            count_inactivity=True,
            limits=LimitsSection(),
        )

    def counts(self) -> list[Tensor]:
        assert self.result is not None
        assert self.result.inactivity is not None
        return [self.result.inactivity[str(layer)] for layer in self.silo.compressed]


class PublishedLoop:
    """`transformers.Trainer` on plain modules. count: "zeros", "eps", or "full", which is the FM without a hook."""

    def __init__(self, silo: Silo, count: str) -> None:
        self.silo, self.mask = silo, torch.empty(0)
        self.totals: dict[int, Tensor] = {}
        self.model = silo.fm
        if count != "full":
            for layer in silo.compressed:
                _prune(layers_of(self.model)[layer], silo.selection.neurons[layer])
                activation = layers_of(self.model)[layer].intermediate.intermediate_act_fn
                activation = layers_of(self.model)[layer].intermediate.intermediate_act_fn = copy.deepcopy(activation)
                activation.register_forward_hook(self._hook(layer, count))
        adapters.attach(self.model, silo.settings.adapter, seed=SEED)
        self.model.to(silo.device)
        if not silo.dropout:
            for module in self.model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self.model.register_forward_pre_hook(self._keep_mask, with_kwargs=True)
        rows = [row for batch in silo.batches() for row in _rows(batch)]
        self.directory = tempfile.TemporaryDirectory()
        training = silo.settings.training
        self.arguments = transformers.TrainingArguments(
            output_dir=self.directory.name,
            per_device_train_batch_size=training.batch,
            learning_rate=training.learning_rate,
            num_train_epochs=1,
            train_sampling_strategy="sequential",  # the batches of our loop, in its order
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=silo.device == "cpu",
        )
        self.trainer = transformers.Trainer(
            self.model,
            self.arguments,
            train_dataset=rows,
            data_collator=transformers.DataCollatorWithPadding(silo.processor),
        )
        self.trainer.remove_callback(transformers.PrinterCallback)

    def __call__(self) -> None:
        self.totals = {}
        self.trainer.train()

    def counts(self) -> list[Tensor]:
        return [self.totals[layer] for layer in self.silo.compressed]

    def _keep_mask(self, _module: nn.Module, _inputs: Any, named: dict[str, Tensor]) -> None:
        self.mask = named["attention_mask"].bool()

    def _hook(self, layer: int, count: str) -> Callable[..., None]:
        def zeros(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.totals[layer] = self.totals.get(layer, 0) + (output == 0).sum(dim=(0, 1))

        def eps(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            self.totals[layer] = self.totals.get(layer, 0) + (output.abs() <= EPS)[self.mask].sum(dim=0)

        return zeros if count == "zeros" else eps


def prepare(name: str, case: Case, device: str) -> Run:
    """A call that trains one round of a case by the loop of that name; a fresh model, nothing shared."""
    loop, dropout = CANDIDATES[name]
    silo = Silo(case, dropout, device)
    return OurLoop(silo) if loop == "fedpft" else PublishedLoop(silo, loop)


def agreement(case: str, device: str) -> dict[str, float]:
    """How far both loops come apart without dropout; FedPFTError where that is more than rounding."""
    ours, theirs = (prepare(name, CASES[case], device) for name in ("fedpft, no dropout", "published, eps, no dropout"))
    losses: dict[str, list[float]] = {}
    for name, loop in (("ours", ours), ("theirs", theirs)):
        losses[name] = []
        loop.model.register_forward_hook(lambda _m, _i, output, name=name: losses[name].append(output.loss.item()))
        start = adapters.extract(loop.model)
        loop()
    print("| step | loss, fedpft | loss, published |\n| --- | --- | --- |")
    for step, pair in enumerate(zip(losses["ours"], losses["theirs"], strict=True), 1):
        print(f"| {step} | {pair[0]:.6f} | {pair[1]:.6f} |")
    one, other = adapters.extract(ours.model), adapters.extract(theirs.model)
    moved = sum((other[name] - start[name]).square().sum() for name in start)
    apart = sum((other[name] - one[name]).square().sum() for name in start)
    counted = sum(counts.sum() for counts in ours.counts())
    miscounted = sum((a - b.cpu()).abs().sum() for a, b in zip(ours.counts(), theirs.counts(), strict=True))
    found = {
        "loss": max(abs(a - b) for a, b in zip(losses["ours"], losses["theirs"], strict=True)),
        "adapter": float((apart / moved).sqrt()),
        "counts": float(miscounted / counted),
    }
    print(
        f"\nlargest difference of a step's loss {found['loss']:.1e}; adapters apart by {found['adapter']:.1e} of the "
        f"way they went; counts differ in {found['counts']:.1e} of all\n"
    )
    for what, value in found.items():
        if not value < TOLERANCES[what]:
            raise FedPFTError(f"{case}: {what} differs by {value:.1e}", "the loops do not compute the same: mend one")
    return found


# float32 rounding through some steps; AdamW's first steps divide by the size of a gradient, however small it is
TOLERANCES = {"loss": 1e-4, "adapter": 0.02, "counts": 1e-3}


def step_times(
    loops: dict[str, Run], device: str, turns: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Times]:
    """Seconds of a step, loops in turns, one round each: from the end of the first step to the end of the round."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(turns + 1):  # the first warms up
        for name, loop in loops.items():
            with _first_step(clock) as ended:
                loop()
                _synchronize(device)
                last = clock()
            if turn:
                seconds[name].append((last - ended[0]) / (len(ended) - 1))
    return {name: Times.of(values) for name, values in seconds.items()}


@contextmanager
def _first_step(clock: Callable[[], float]) -> Iterator[list[float]]:
    """The times at which the optimizer's steps ended; only the first waits for the device."""
    ended: list[float] = []

    def note(*_: Any) -> None:
        if not ended and torch.cuda.is_available():
            torch.cuda.synchronize()
        ended.append(clock())

    handle = register_optimizer_step_post_hook(note)
    try:
        yield ended
    finally:
        handle.remove()


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _newsgroups(case: Case, processor: Any) -> EncodedDataset:
    with tempfile.TemporaryDirectory() as directory:
        data = corpora.prepare(
            Path(directory),
            corpus="20newsgroups",
            silos=[SILO],
            documents=case.samples,
            test_documents=1,
            public_documents=1,
            concentration=1.0,
            seed=SEED,
        )
        labels = read_label_list(data.labels)
        samples = TASKS[TASK].read_labelled(data.silos[SILO], ColumnsSection(), labels)
    return TASKS[TASK].encode(samples, processor, case.max_tokens)


def _padder() -> Any:
    """A tokenizer that can pad, and nothing else."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0}, "[PAD]"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")


def _synthetic(case: Case) -> EncodedDataset:
    """Random tokens; lengths as sentences have them, log-normal with a median of half the most."""
    generator = torch.Generator().manual_seed(SEED)
    drawn = (0.6 * torch.randn(case.samples, generator=generator)).exp() * case.max_tokens / 2
    lengths = drawn.long().clamp(4, case.max_tokens)
    tokens = torch.randint(1000, 30000, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    return TextDataset(tokens, lengths, 0, torch.randint(len(LABELS), (case.samples,), generator=generator))


@cache
def _model_directory(model: str) -> Path:
    if model == "MiniLM":
        return corpora.model_directory()
    directory = Path(tempfile.mkdtemp(prefix="fedpft-bench-"))
    torch.manual_seed(SEED)
    transformers.BertForSequenceClassification(transformers.BertConfig()).save_pretrained(directory)
    return directory


def _prune(layer: nn.Module, neurons: Tensor) -> None:
    """The layer's FFN with only these neurons, still two `nn.Linear`."""
    dense, output = layer.intermediate.dense, layer.output.dense
    smaller = nn.Linear(dense.in_features, len(neurons)), nn.Linear(len(neurons), output.out_features)
    smaller[0].load_state_dict({"weight": dense.weight[neurons], "bias": dense.bias[neurons]})
    smaller[1].load_state_dict({"weight": output.weight[:, neurons], "bias": output.bias})
    layer.intermediate.dense, layer.output.dense = smaller


def _rows(batch: dict[str, Tensor]) -> Iterator[dict[str, Any]]:
    for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        yield {"input_ids": ids[mask.bool()].tolist(), "labels": int(label)}


def measure_times(case: str, device: str, turns: int) -> dict[str, dict[str, Any]]:
    """For each candidate: seconds of a step, and tokens without padding a second."""
    loops = {name: prepare(name, CASES[case], device) for name in CANDIDATES}
    found = list(loops["fedpft"].silo.batches())
    real, padded = (sum(int(n) for n in ns) for ns in zip(*map(_tokens, found), strict=True))
    times = step_times(loops, device, turns)
    return {
        name: {
            "step": asdict(times[name]),
            "tokens_per_second": real / len(found) / times[name].median_seconds,
            "padding_fraction": 1 - real / padded,
        }
        for name in loops
    }


def measure_memory(case: str, device: str) -> dict[str, dict[str, Any]]:
    """For each candidate: the peak of two steps in a process of its own, above model, data and optimizer."""
    two = replace(CASES[case], steps=2)
    return {name: {"peak_bytes": peak_bytes(prepare, name, two, device, device=device)} for name in CANDIDATES}


def _tokens(batch: dict[str, Tensor]) -> tuple[int, int]:
    return int(batch["attention_mask"].sum()), batch["attention_mask"].numel()


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown. Ratios compare with our loop of the same dropout."""
    lines = [
        "| case | loop | ms a step (quartiles) | tokens a second | peak, MiB | its time / ours | our peak / its |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, row in rows.items():
        case, name = key.split(": ")
        ours = rows[f"{case}: {'fedpft' if CANDIDATES[name][1] else 'fedpft, no dropout'}"]
        cells = [case, name] + ["-"] * 5
        if "step" in row:
            low, high = (1e3 * value for value in row["step"]["quartiles_seconds"])
            median = row["step"]["median_seconds"]
            cells[2:4] = f"{1e3 * median:.0f} ({low:.0f} to {high:.0f})", f"{row['tokens_per_second']:.0f}"
            cells[5] = f"{median / ours['step']['median_seconds']:.2f}"
        if "peak_bytes" in row:
            cells[4] = f"{row['peak_bytes'] / 2**20:.0f}"
            cells[6] = f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Checks every case, measures what was asked for, prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.training", description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument("--case", nargs="+", choices=list(CASES), default=list(CASES), help="default: all")
    parts = ("agreement", "memory", "times")
    parser.add_argument("--part", nargs="+", choices=parts, default=list(parts), help="default: all")
    parser.add_argument("--turns", type=int, default=3, help="timed rounds of each loop; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: %(default)s")
    parser.add_argument("--json", type=Path, help="also write the results here, added to what is there")
    arguments = parser.parse_args()

    def command() -> None:
        torch.set_num_threads(arguments.threads)
        path, device = arguments.json, arguments.device
        earlier = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        rows, differences = earlier.get("rows", {}), earlier.get("differences", {})
        for case in arguments.case:
            print(f"## {case}: {CASES[case]}\n", flush=True)
            if "agreement" in arguments.part:
                differences[case] = agreement(case, device)
            found = [measure_memory(case, device)] if "memory" in arguments.part else []
            found += [measure_times(case, device, arguments.turns)] if "times" in arguments.part else []
            for name, values in ((name, values) for part in found for name, values in part.items()):
                rows[f"{case}: {name}"] = {**rows.get(f"{case}: {name}", {}), **values}
        print(table(rows))
        if path:
            results = {**provenance(device), "differences": differences, "rows": rows}
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
