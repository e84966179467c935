"""`python -m bench.scale`: what size costs, in seconds and in memory. Each part stands in the JSON by its name.

`--part silo`: steps of a silo against `transformers.Trainer` with peft, each with and without gradient checkpointing,
on the same proxy of a model of random weights: ours as it is sent, theirs as plain modules of transformers. Batches and
settings are the same, dropout is LoRA's alone, and nobody counts inactive neurons. Without dropout the losses must be
the same too, packed or not, or the run ends there; weights in 8 or 4 bits have losses of their own. Memory is the
highest of two steps above the loaded proxy and its data, each loop in a process of its own; times are interleaved.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from bench.measure import Run, peak_bytes, provenance
from bench.training import step_times
from fedpft.command import run_command
from fedpft.config import AdapterSection, FewBits, LimitsSection, ProxySection, RoundSettings, TaskName, TrainingSection
from fedpft.data.batches import EncodedDataset, batches
from fedpft.data.language import LanguageDataset
from fedpft.data.text import TextDataset
from fedpft.errors import FedPFTError
from fedpft.model import adapters, loading
from fedpft.model.architectures import architecture_of, layers_of
from fedpft.model.packing import Way, way_to_pack
from fedpft.model.quantized import held_bytes, quantizable, quantized
from fedpft.proxy.cut import cut
from fedpft.proxy.selection import Selection, select
from fedpft.seeding import derive_seed
from fedpft.tasks import TASKS
from fedpft.training import LocalResult, train_round

SILO, SEED, CLASSES = "north", 0, tuple(f"class {number}" for number in range(20))

# --- a silo's step ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A model's shape, what it learns, and the batches of one round."""

    config: str
    shape: tuple[tuple[str, Any], ...]
    task: TaskName
    max_tokens: int
    batch: int
    steps: int

    def model_config(self) -> Any:
        return getattr(transformers, self.config)(**dict(self.shape))


_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "pad_token_id": 2,
}
_TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
CASES = {
    "smollm2-135m": Case("LlamaConfig", tuple(_SMOLLM2.items()), "causal-lm", 128, 4, 3),
    "mpnet-base": Case("MPNetConfig", (("vocab_size", 30527),), "sequence-classification", 128, 4, 3),
}
QUICK = {
    "llama": Case("LlamaConfig", tuple({**_SMOLLM2, **_TINY, "num_key_value_heads": 2}.items()), "causal-lm", 24, 4, 2),
    "mpnet": Case("MPNetConfig", tuple(_TINY.items()), "sequence-classification", 24, 4, 2),
}
OURS = {
    "fedpft": LimitsSection(),
    "fedpft, compact": LimitsSection(compact=True),
    "fedpft, int8": LimitsSection(weights="int8"),
    "fedpft, int4": LimitsSection(weights="int4"),
    "fedpft, checkpointing": LimitsSection(checkpointing=True),
    "fedpft, int4, checkpointing": LimitsSection(weights="int4", checkpointing=True),
    "fedpft, packed": LimitsSection(),
    "fedpft, int4, packed": LimitsSection(weights="int4"),
}
PLAIN = "Trainer + peft"
# The Trainer's name for it, the newer first.
SPARING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in transformers.TrainingArguments.__dataclass_fields__
)
THEIRS = (PLAIN, f"{PLAIN}, checkpointing", f"{PLAIN}, packed")
LOOPS = (*OURS, *THEIRS)
# float32 rounding through some steps; AdamW's first steps divide by the size of a gradient, however small it is
TOLERANCES = {"loss": 1e-4, "adapter": 0.02}


class Proxy:
    """The FM with an adapter, the selection of its neurons, and a round's batches; all of it from seeds."""

    def __init__(self, case: Case, directory: Path, dropout: float) -> None:
        self.case, self.dataset = case, _synthetic(case)
        labels = CLASSES if TASKS[case.task].label_list else ()
        self.fm = loading.load_model(directory, case.task, labels, seed=SEED)
        self.selection: Selection = select(self.fm, ProxySection(importance="weights"))
        epochs = case.batch * case.steps / len(self.dataset)
        self.settings = RoundSettings(
            seed=SEED,
            adapter=AdapterSection(dropout=dropout),
            training=TrainingSection(rounds=1, batch=case.batch, weight_decay=0.0, local_epochs=epochs),
            inactive_below=0.0,
        )

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """As train_round takes them."""
        order = derive_seed(SEED, "order", SILO)
        return batches(self.dataset, batch=self.case.batch, start=0, count=len(self.dataset), seed=order)


class OurSteps:
    """`fedpft.training`. losses: of the last round's parts of steps, each with the number of what it is the mean of."""

    def __init__(self, proxy: Proxy, device: str, limits: LimitsSection, packed: bool) -> None:
        self.losses: list[tuple[float, int]] = []
        self._dataset, self._settings, self._limits = proxy.dataset, proxy.settings, limits
        self._task: Any = _Heard(TASKS[proxy.case.task], self.losses)
        self.model = cut(proxy.fm, proxy.selection).to(device)
        if limits.weights != "full":
            _quantize(self.model, limits.weights)
        adapters.attach(self.model, proxy.settings.adapter, seed=SEED)
        self.model.to(device)
        self._packing = _way_to_pack(self.model, self._dataset) if packed else None

    def __call__(self) -> LocalResult:
        self.losses.clear()
        return train_round(
            self._task,
            self.model,
            self._dataset,
            self._settings,
            silo=SILO,
            round=1,
            compressed=(),
            count_inactivity=False,
            limits=self._limits,
            packing=self._packing,
        )


class TheirSteps:
    """`transformers.Trainer` on plain modules with peft's LoRA. losses: of the last round's steps, as of OurSteps."""

    def __init__(self, proxy: Proxy, device: str, checkpointing: bool, packed: bool) -> None:
        self.losses: list[tuple[float, int]] = []
        self._task = TASKS[proxy.case.task]
        self.model, training = proxy.fm, proxy.settings.training
        for layer, neurons in zip(layers_of(self.model), proxy.selection.neurons, strict=True):
            _prune(self.model, layer, neurons)
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        adapters.attach(self.model, proxy.settings.adapter, seed=SEED)
        self.model.to(device).register_forward_hook(self._note, with_kwargs=True)
        self._directory = tempfile.TemporaryDirectory()
        arguments = transformers.TrainingArguments(
            output_dir=self._directory.name,
            per_device_train_batch_size=proxy.case.batch if packed else 1,  # a batch is one row of the dataset
            learning_rate=training.learning_rate,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            **({SPARING: True, f"{SPARING}_kwargs": {"use_reentrant": False}} if checkpointing else {}),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        rows: Any = list(proxy.batches())
        collate: Any = _the_row
        if packed:  # its batches are made of rows without padding
            rows, collate = list(_unpadded(rows)), transformers.DataCollatorWithFlattening()
        self.trainer = transformers.Trainer(self.model, arguments, train_dataset=rows, data_collator=collate)
        self.trainer.remove_callback(transformers.PrinterCallback)

    def __call__(self) -> None:
        self.losses.clear()
        self.trainer.optimizer = self.trainer.lr_scheduler = None  # ours starts afresh each round too
        self.trainer.train()

    def _note(self, _module: nn.Module, _inputs: Any, batch: dict[str, Tensor], output: Any) -> None:
        self.losses.append((float(output.loss.detach()), self._task.weight(batch)))


class _Heard:
    """A task whose losses are noted."""

    def __init__(self, task: Any, losses: list[tuple[float, int]]) -> None:
        self._task, self._losses = task, losses

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self._task.loss(model, batch)
        self._losses.append((float(loss.detach()), self._task.weight(batch)))
        return loss


def write_model(case: Case, directory: Path) -> bool:
    """Writes an FM of a case's shape; whether transformers has gradient checkpointing for it."""
    torch.manual_seed(SEED)
    fm = getattr(transformers, TASKS[case.task].model).from_config(case.model_config())
    fm.save_pretrained(directory)
    return bool(fm.supports_gradient_checkpointing)


def prepare_silo(name: str, case: Case, directory: Path, device: str, dropout: float = 0.1) -> Run:
    """A call that trains one round of a case by the loop of that name; a fresh model, nothing shared."""
    proxy = Proxy(case, directory, dropout)
    if name in OURS:
        return OurSteps(proxy, device, OURS[name], "packed" in name)
    return TheirSteps(proxy, device, "checkpointing" in name, "packed" in name)


def names_of(case: Case, spared: bool, wanted: Sequence[str] = LOOPS) -> list[str]:
    """Of a case, those that are wanted and what they are compared with.

    Packed are those of language models, theirs has checkpointing where transformers does.
    """
    names = [name for name in LOOPS if name in (*wanted, PLAIN) and ("packed" not in name or case.task == "causal-lm")]
    return [name for name in names if spared or name in OURS or "checkpointing" not in name]


def silo_agreement(case: Case, directory: Path, device: str, how: str = "") -> dict[str, float]:
    """How far the loops come apart without dropout; FedPFTError where that is more than rounding. how: ", packed"."""
    ours: Any = prepare_silo(f"fedpft{how}", case, directory, device, 0.0)
    theirs: Any = prepare_silo(f"{PLAIN}{how}", case, directory, device, 0.0)
    start = adapters.extract(ours.model)
    ours()
    theirs()
    one, other = adapters.extract(ours.model), adapters.extract(theirs.model)
    moved = sum((other[name] - start[name]).square().sum() for name in start)
    apart = sum((other[name] - one[name]).square().sum() for name in start)
    pairs = list(_side_by_side(ours.losses, theirs.losses))
    found = {"loss": max(abs(a - b) for a, b in pairs), "adapter": float((apart / moved) ** 0.5)}
    for what, value in found.items():
        if not value < TOLERANCES[what]:
            raise FedPFTError(f"{what} differs by {value:.1e}: {pairs}", "the loops do not compute the same: mend one")
    return found


def _side_by_side(parts: list[tuple[float, int]], steps: list[tuple[float, int]]) -> Iterator[tuple[float, float]]:
    """Of each step the mean loss by our parts of it, and theirs."""
    left = iter(parts)
    for loss, weight in steps:
        total, counted = 0.0, 0
        while counted < weight:
            own, count = next(left)
            total, counted = total + own * count, counted + count
        yield total / counted, loss


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure_silo(
    cases: dict[str, Case], device: str, turns: int, clock: str, wanted: Sequence[str] = LOOPS
) -> Iterator[dict[str, Any]]:
    """The part's results after each case: how far its loops come apart, and a row for each loop."""
    shapes = {key: asdict(case) for key, case in cases.items()}
    differences: dict[str, dict[str, float]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for key, case in cases.items():
        with tempfile.TemporaryDirectory(prefix="fedpft-bench-") as place:
            directory = Path(place)
            spared = write_model(case, directory)
            names = names_of(case, spared, wanted)
            for how in ("", ", packed"):
                if f"fedpft{how}" in names:
                    differences[f"{key}{how}"] = silo_agreement(case, directory, device, how)
            two = replace(case, steps=2)
            peaks = {name: peak_bytes(prepare_silo, name, two, directory, device, device=device) for name in names}
            loops: dict[str, Any] = {name: prepare_silo(name, case, directory, device) for name in names}
            weights = {name: held_bytes(loop.model.parameters()) for name, loop in loops.items()}
            times = step_times(loops, device, turns, CLOCKS[clock])
        tokens = float(_synthetic(case).lengths.sum()) / case.steps
        for name in names:
            rows[f"{key}: {name}"] = {
                "step": asdict(times[name]),
                "tokens_per_second": tokens / times[name].median_seconds,
                "weights_bytes": weights[name],
                "peak_bytes": peaks[name],
            }
        yield {"clock": clock, "cases": shapes, "differences": differences, "rows": rows}


def silo_table(found: dict[str, Any]) -> str:
    """Markdown. Ratios compare with the Trainer that does the same: packed, or with checkpointing if it has it."""
    lines = [
        "| case | loop | ms a step (quartiles) | tokens a second | weights, MiB | peak above them, MiB | its speed / "
        "Trainer's | its peak / Trainer's |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for key, row in found["rows"].items():
        case, name = key.split(": ")
        same = f"{case}: {PLAIN}, {name.rpartition(', ')[2]}"
        peer = found["rows"].get(same, found["rows"][f"{case}: {PLAIN}"])
        median, (low, high) = row["step"]["median_seconds"], row["step"]["quartiles_seconds"]
        cells = [
            case,
            name,
            f"{1e3 * median:.0f} ({1e3 * low:.0f} to {1e3 * high:.0f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['weights_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['tokens_per_second'] / peer['tokens_per_second']:.2f}",
            f"{row['peak_bytes'] / peer['peak_bytes']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _synthetic(case: Case) -> EncodedDataset:
    """Random tokens; lengths as sentences have them, log-normal with a median of half the most."""
    generator, samples = torch.Generator().manual_seed(SEED), case.batch * case.steps
    drawn = (0.6 * torch.randn(samples, generator=generator)).exp() * case.max_tokens / 2
    lengths = drawn.long().clamp(4, case.max_tokens)
    tokens = torch.randint(1000, 30000, (int(lengths.sum()),), generator=generator, dtype=torch.int32)
    if case.task == "causal-lm":
        learned = torch.ones(len(tokens), dtype=torch.bool)
        learned[lengths.cumsum(0) - lengths] = False  # the first of each row
        return LanguageDataset(tokens, learned, lengths, 2)
    return TextDataset(tokens, lengths, 1, torch.randint(len(CLASSES), (samples,), generator=generator))


def _prune(model: nn.Module, layer: nn.Module, neurons: Tensor) -> None:
    """Leaves only these neurons of a layer's FFN, which stays two or three `nn.Linear`."""
    row = architecture_of(model)
    for path, dimension in ((row.input, 0), (row.gate, 0), (row.output, 1)):
        if path is None:
            continue
        linear: Any = layer.get_submodule(path)
        weight, bias = linear.weight.index_select(dimension, neurons), linear.bias
        smaller = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        smaller.weight.data = weight
        if bias is not None:
            smaller.bias.data = bias[neurons] if dimension == 0 else bias
        layer.set_submodule(path, smaller)


def _quantize(model: nn.Module, form: FewBits) -> None:
    """Holds what a silo holds in few bits. In place."""
    for name in quantizable(model):
        owner, _, last = name.rpartition(".")
        held = quantized(model.get_parameter(name), form)
        setattr(model.get_submodule(owner), last, nn.Parameter(held, requires_grad=False))


def _way_to_pack(model: Any, dataset: EncodedDataset) -> Way:
    vocabulary, longest = len(model.get_input_embeddings().weight), int(dataset.lengths.max())
    way = way_to_pack(model.base_model, vocabulary=vocabulary, longest=longest, device=model.device)
    assert way is not None
    return way


def _unpadded(batched: list[dict[str, Tensor]]) -> Iterator[dict[str, list[int]]]:
    for batch in batched:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True):
            yield {"input_ids": ids[mask].tolist(), "labels": labels[mask].tolist()}


def _the_row(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (row,) = rows
    return row


# --- all parts --------------------------------------------------------------------------------------------------------

# name -> what measures it, case by case, and what prints it
PARTS: dict[str, tuple[Callable[[argparse.Namespace], Iterator[dict[str, Any]]], Callable[[dict[str, Any]], str]]] = {
    "silo": (
        lambda wanted: measure_silo(
            QUICK if wanted.quick else CASES, wanted.device, wanted.turns, wanted.clock, wanted.loop
        ),
        silo_table,
    ),
}


def main() -> int:
    """Measures the parts that were asked for and prints their tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--loop", nargs="+", choices=LOOPS, default=LOOPS, help="of --part silo, beside the plain Trainer; default: all"
    )
    parser.add_argument("--turns", type=int, default=3, help="timed rounds of each loop; default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; default: %(default)s")
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: of all threads, for a machine that is shared"
    )
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that all of it works")
    parser.add_argument("--json", type=Path, help="also write the results here; parts that are there stay")
    arguments = parser.parse_args()

    def command() -> None:
        torch.set_num_threads(arguments.threads)
        path = arguments.json
        results = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
        for part in arguments.part:
            measure, table = PARTS[part]
            for found in measure(arguments):
                results[part] = {**provenance(arguments.device), **found}
                if path:
                    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            print(f"## {part}\n\n{table(results[part])}\n", flush=True)

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())
