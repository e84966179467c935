"""`python -m bench.large`: a federation with an FM that is larger than what its owner's process may hold.

Generates a LLaMA-shaped checkpoint of random weights in bfloat16, in shards, and public, silo's and test data for it;
then runs `fedpft server` and one silo as an owner and an institution would, over loopback, and watches both processes:

    OUT/large.json      for each phase seconds, peak of the resident memory, and bytes read from disk; large-cuda.json
                        if the server computes on a GPU, with what is used of it
    WORK/               the checkpoint and the run, some 4.5 times the checkpoint at most; --keep leaves it there

`--growth` instead builds proxies of small checkpoints, one of whose sizes is doubled, and doubled again:

    OUT/large-growth.json, large-growth.svg

The resident memory counts pages of mapped files too, which the system may take back at any time.
"""

import argparse
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from bench.measure import provenance
from fedpft import atomic
from fedpft.command import run_command
from fedpft.errors import ModelError
from fedpft.model.mapped import Shards

log = logging.getLogger(__name__)

SECONDS = 0.1  # between two looks at a process
LAST_WORDS_SECONDS = 60.0
BUILDING_SECONDS = 86_400.0  # a silo has more patience than the making of a proxy takes
WORDS, ROW_WORDS = 30_000, 24
SHOWN = ("peak_bytes", "anonymous_bytes", "read_bytes", "gpu_bytes")
# What a line of the log says has begun.
PHASES = {
    "the FM is held in": "load",
    "choosing neurons": "choosing neurons",
    "cutting the proxy": "cutting",
    "distance from the FM": "measuring the distance",
    "closed form": "closed form",
    "proxy written": "reading the proxy back",
    "the silos receive": "federation",
    "evaluation:": "evaluation",
    "writing the product": "product",
    "fetching": "fetching the proxy",
    "reading the proxy": "reading the proxy",
    "begins": "training",
}


@dataclass
class Phase:
    """Of one process."""

    name: str
    seconds: float = 0.0
    peak_bytes: int = 0
    anonymous_bytes: int = 0  # of the peak what is no page of a file
    read_bytes: int = 0  # from disk; what the system still had of a file is not in it
    gpu_bytes: int = 0  # used of the whole GPU, beyond what was when the process began


@dataclass
class Watched:
    """A process and its phases, as its log names them."""

    device: str = "cpu"
    phases: list[Phase] = field(default_factory=list)

    def follow(self, process: "subprocess.Popen[str]", echo: str) -> None:
        """Until it ends; its log goes to this one's."""
        self.phases.append(Phase("start"))
        reader = threading.Thread(target=self._read_log, args=(process, echo), daemon=True)
        reader.start()
        begun, read_before, phase, idle = time.monotonic(), 0, self.phases[0], self._gpu_bytes()
        while process.poll() is None:
            now = self.phases[-1]
            status, read = _status(process.pid)
            if now is not phase:
                begun, read_before, phase = time.monotonic(), read, now
            phase.seconds = time.monotonic() - begun
            phase.read_bytes = max(phase.read_bytes, read - read_before)
            phase.peak_bytes = max(phase.peak_bytes, status.get("VmHWM", 0))
            phase.anonymous_bytes = max(phase.anonymous_bytes, status.get("RssAnon", 0))
            phase.gpu_bytes = max(phase.gpu_bytes, self._gpu_bytes() - idle)
            time.sleep(SECONDS)
        reader.join()

    def _gpu_bytes(self) -> int:
        if self.device == "cpu":
            return 0
        free, whole = torch.cuda.mem_get_info(self.device)
        return whole - free

    def _read_log(self, process: "subprocess.Popen[str]", echo: str) -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.info("%s: %s", echo, line.rstrip())
            name = next((name for mark, name in PHASES.items() if mark in line), None)
            if name is not None and name != self.phases[-1].name:
                self.phases.append(Phase(name))


def _status(pid: int) -> tuple[dict[str, int], int]:
    """Bytes of the process's memory by the kernel's names, the peak since the last look, and bytes read from disk."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        read = re.search(r"^read_bytes: (\d+)$", Path(f"/proc/{pid}/io").read_text(encoding="ascii"), re.MULTILINE)
        Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="ascii")  # the peak begins anew
    except OSError:  # it has just ended
        return {}, 0
    found = {name: int(count) << 10 for name, count in re.findall(r"^(VmHWM|RssAnon):\s+(\d+) kB$", text, re.MULTILINE)}
    return found, int(read[1]) if read else 0


def write_checkpoint(
    directory: Path, *, layers: int, hidden: int, ffn: int, words: int = WORDS, device: str = "cpu"
) -> int:
    """A LLaMA of random weights, drawn on a device, with a tokenizer of so many words; returns its bytes."""
    config = transformers.LlamaConfig(
        vocab_size=words + 2,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512),
        pad_token_id=0,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model: Any = transformers.LlamaForCausalLM(config)
    shards, generator = Shards(directory), torch.Generator(device).manual_seed(0)
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in model.state_dict().items():
        parts.setdefault(name.split(".")[2] if ".layers." in name else "", {})[name] = tensor
    for part in parts.values():
        shards.put({name: _drawn(name, tensor, generator) for name, tensor in part.items()})
        shards.held.release()
    shards.finish()
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number + 2 for number in range(words)}
    by_word = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    by_word.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=by_word, pad_token="[PAD]", unk_token="[UNK]", eos_token="w0"
    )
    tokenizer.save_pretrained(directory)
    return shards.held.nbytes


def _drawn(name: str, like: Tensor, generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return torch.ones(like.shape, dtype=torch.bfloat16)
    drawn = torch.empty(like.shape, dtype=torch.bfloat16, device=generator.device)
    return drawn.normal_(std=0.02, generator=generator).cpu()


def write_data(directory: Path, rows: Mapping[str, int]) -> None:
    """A file of prompts and completions of random words for each name."""
    generator = torch.Generator().manual_seed(1)
    for name, count in rows.items():
        drawn = torch.randint(1, WORDS, (count, ROW_WORDS), generator=generator).tolist()
        lines = []
        for row in drawn:
            words = [f"w{number}" for number in row]
            lines.append(json.dumps({"prompt": " ".join(words[:8]), "completion": " " + " ".join(words[8:])}))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_settings(directory: Path, *, rows: int, neurons: int | str, port: int, device: str = "cpu") -> None:
    """server.yaml and silo.yaml, of which the server computes on the device."""
    server: dict[str, Any] = {
        "device": device,
        "out": "out",
        "listen": f"127.0.0.1:{port}",
        "insecure_loopback": True,
        "model": {"path": "fm", "task": "causal-lm", "max_tokens": ROW_WORDS + 1, "hold": "disk"},
        "proxy": {"importance": "variance", "importance_samples": rows, "neurons": neurons},
        "distillation": {"closed_form_samples": rows},
        "alignment": {"every_rounds": 0},
        "evaluation": {"every_rounds": 0, "gap_samples": 0, "batch": 4, "written_samples": 0},
        "training": {"rounds": 1, "batch": 4},
        "federation": {"silos": ["north"]},
        "public_data": "public.jsonl",
        "test_data": "test.jsonl",
    }
    silo: dict[str, Any] = {
        "server": f"127.0.0.1:{port}",
        "insecure_loopback": True,
        "insecure_name": "north",
        "work": "silo",
        "connect_timeout_seconds": BUILDING_SECONDS,
        "data": {"path": "north.jsonl"},
    }
    for name, settings in (("server", server), ("silo", silo)):
        (directory / f"{name}.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")


@contextmanager
def started(side: str, directory: Path, watched: Watched, *command: str) -> Iterator[threading.Thread]:
    """The process of one side, watched by a thread that ends with it."""
    command = command or ("-m", f"fedpft.{side}", "--config", str(directory / f"{side}.yaml"))
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    thread = threading.Thread(target=watched.follow, args=(process, side))
    thread.start()
    try:
        yield thread
    finally:
        thread.join(timeout=LAST_WORDS_SECONDS)
        process.kill()  # of a silo, if the server is gone
        thread.join()
    if process.returncode:
        raise ModelError(f"{side}: ended with {process.returncode}", "look at its log above")


def run(arguments: argparse.Namespace) -> None:
    """Measures, and writes OUT/large.json, or what it is called of the build alone or on a GPU."""
    work: Path = arguments.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(work / "out", ignore_errors=True)
    shutil.rmtree(work / "silo", ignore_errors=True)
    if not (work / "fm" / "tokenizer.json").exists():
        log.info("writing the checkpoint")
        shape = {name: getattr(arguments, name) for name in ("layers", "hidden", "ffn", "words", "device")}
        write_checkpoint(work / "fm", **shape)
    size = sum(file.stat().st_size for file in (work / "fm").glob("*.safetensors"))
    write_data(work, {"public": arguments.rows, "north": 8, "test": 8})
    write_settings(work, rows=arguments.rows, neurons=arguments.neurons, port=arguments.port, device=arguments.device)
    server, silo = Watched(arguments.device), Watched()
    if arguments.build:
        build(work, server)
    else:
        with started("server", work, server) as owners, started("silo", work, silo):
            owners.join()
    proxy = sum(file.stat().st_size for file in (work / "out" / "proxy" / "bundle").glob("*.safetensors"))
    found = {
        "checkpoint_bytes": size,
        "proxy_bytes": proxy,
        "layer_bytes": max(file.stat().st_size for file in (work / "fm").glob("*.safetensors")),
        "shape": {name: getattr(arguments, name) for name in ("layers", "hidden", "ffn", "words", "neurons", "rows")},
        "server": [asdict(phase) for phase in server.phases],
        "silo": [asdict(phase) for phase in silo.phases],
        "provenance": provenance(arguments.device),
    }
    if not arguments.build:
        found["metrics"] = json.loads((work / "out" / "summary.json").read_text(encoding="utf-8"))["metrics"]
    name = f"large{'-build' if arguments.build else ''}{'-cuda' if arguments.device != 'cpu' else ''}.json"
    atomic.write_text(arguments.out / name, json.dumps(found, indent=1) + "\n")
    print(markdown(found))
    if not arguments.keep:
        shutil.rmtree(work)


BASE = {"layers": 8, "hidden": 512, "ffn": 2048, "rows": 64}
BUILD = "import sys; from fedpft.cli import main; sys.exit(main())"


def build(work: Path, watched: Watched) -> None:
    """The proxy alone, as `fedpft build-proxy` builds it."""
    command = ("-c", BUILD, "build-proxy", "--config", str(work / "server.yaml"))
    with started("build-proxy", work, watched, *command) as thread:
        thread.join()


def grow(arguments: argparse.Namespace) -> None:
    """Builds a proxy for each size, and writes OUT/large-growth.json and its picture."""
    rows: list[dict[str, Any]] = []
    sizes = [("", 1), *((name, factor) for name in BASE for factor in (2, 4))]
    for name, factor in sizes:
        shape = BASE | ({name: factor * BASE[name]} if name else {})
        work = arguments.work.absolute() / f"{name}{factor}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        size = write_checkpoint(work / "fm", **{key: shape[key] for key in ("layers", "hidden", "ffn")})
        write_data(work, {"public": shape["rows"], "north": 8, "test": 8})
        write_settings(work, rows=shape["rows"], neurons=shape["ffn"] // 4, port=arguments.port)
        reading = _seconds_to_read(work / "fm")
        watched = Watched()
        build(work, watched)
        phases = [phase for phase in watched.phases if phase.name != "start"]
        rows.append(
            {
                "grown": name,
                "factor": factor,
                "shape": shape,
                "checkpoint_bytes": size,
                "seconds": sum(phase.seconds for phase in phases),
                "peak_bytes": max(phase.peak_bytes for phase in phases),
                "reading_seconds": reading,
            }
        )
        log.info("%s", rows[-1])
        shutil.rmtree(work)
    found = {"rows": rows, "provenance": provenance("cpu")}
    atomic.write_text(arguments.out / "large-growth.json", json.dumps(found, indent=1) + "\n")
    draw(rows, arguments.out / "large-growth.svg")


def _seconds_to_read(directory: Path) -> float:
    """Of all the weights once, from disk: what is not written yet or still in memory is sent there before."""
    files = sorted(directory.glob("*.safetensors"))
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.read(8 << 20):
                pass
    return time.perf_counter() - begun


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Seconds, and the peak of the memory, over how many times each size was grown."""
    import matplotlib  # not for those who only measure
    from matplotlib.figure import Figure

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "fedpft", "font.size": 9}
    names = {"layers": "layers", "hidden": "D", "ffn": "F, and K = F / 4 with it", "rows": "public rows"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.0, 3.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, unit, title in (
            (panels[0], "seconds", 1.0, "seconds of build-proxy, from load to the end"),
            (panels[1], "peak_bytes", 2.0**20, "peak of the resident memory, MiB"),
        ):
            for name, shown in names.items():
                own = [row for row in rows if row["grown"] in ("", name)]
                axes.plot([row["factor"] for row in own], [row[key] / unit for row in own], "o-", label=shown)
            grown = [row for row in rows if row["grown"] in ("", "layers")]
            if key == "seconds":
                reading = [row["reading_seconds"] for row in grown]
                axes.plot([row["factor"] for row in grown], reading, "k:", label="reading the FM, more layers")
            else:
                size = [row["checkpoint_bytes"] / unit for row in grown]
                axes.plot([row["factor"] for row in grown], size, "k:", label="the FM itself, more layers")
            axes.set_xscale("log", base=2)
            axes.set_xticks([1, 2, 4], ["1", "2", "4"])
            axes.set_xlabel("times as large")
            axes.set_ylim(bottom=0)
            axes.set_title(title, loc="left", fontsize=9)
            axes.grid(color="#dddddd", linewidth=0.5)
            axes.legend(frameon=False, fontsize=8)
        figure.savefig(path, facecolor="white", metadata={"Date": None, "Creator": None})


def markdown(found: Mapping[str, Any]) -> str:
    """The table of both processes."""
    sizes = ", ".join(f"{name} {found[f'{name}_bytes'] / 2**30:.2f} GiB" for name in ("checkpoint", "layer", "proxy"))
    head = "| process | phase | seconds | peak, GiB | of it no file, GiB | read from disk, GiB | GPU, GiB |"
    lines = [sizes, "", head, "| --- | --- | --- | --- | --- | --- | --- |"]
    for side in ("server", "silo"):
        for each in found[side]:
            memory = " | ".join(f"{each[name] / 2**30:.2f}" for name in SHOWN)
            lines.append(f"| {side} | {each['name']} | {each['seconds']:.0f} | {memory} |")
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.large", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--layers", type=int, default=32, help="default: %(default)s, 12 GB with the other defaults")
    add("--hidden", type=int, default=4096, help="default: %(default)s")
    add("--ffn", type=int, default=11008, help="default: %(default)s")
    add("--neurons", type=int, default=2048, help="K; default: %(default)s")
    add("--words", type=int, default=WORDS, help="of the vocabulary; default: %(default)s")
    add("--rows", type=int, default=32, help="public rows of 25 tokens that are looked at; default: %(default)s")
    add("--port", type=int, default=50551)
    add("--device", default="cpu", help="where the server computes; default: %(default)s")
    add("--out", type=Path, default=Path("bench/results"), help="default: %(default)s")
    add("--work", type=Path, default=Path("large-out"), help="default: %(default)s")
    add("--keep", action="store_true", help="leave WORK there; what lies there is used again")
    add("--build", action="store_true", help="build the proxy, and no more: OUT/large-build.json")
    add("--growth", action="store_true", help="how seconds and memory grow with each size")
    arguments = parser.parse_args()
    return run_command(lambda: (grow if arguments.growth else run)(arguments))


if __name__ == "__main__":
    sys.exit(main())
