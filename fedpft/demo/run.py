"""The demo: a federation of real processes over TLS on this machine, and rows that it is compared with.

Every row is the same federation with another configuration:

    OUT/data/            the silos' files, each in its own directory, and the server's
    OUT/kits/            the authority, and one kit of key and certificates for each party
    OUT/rows/ROW/        configurations, logs and results of one row's server and silos
    OUT/summary.json, OUT/report.html
"""

import json
import logging
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from fedpft import atomic
from fedpft.demo import corpora, dialogues, movies
from fedpft.demo.corpora import DemoData
from fedpft.errors import ConfigError, FedPFTError
from fedpft.provision import provision
from fedpft.report.page import write_report
from fedpft.tasks import TASKS
from fedpft.tasks.causal_lm import CausalLM

log = logging.getLogger(__name__)

SILOS = ("north", "south", "east")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Scale:
    """What a demo runs on.

    prepare: called with the data directory, `silos` and `seed`; writes everybody's files.
    model: the FM's directory.
    settings: sections of server.yaml.
    layer_drop_steps: of the distillation of the layer-drop proxy, for which a closed form alone is not enough.
    private: what differential privacy changes in `training`.
    head_only: whether the row without adapters is run without `compare` too.
    ablations: whether `compare` adds the rows without one or both distillations.
    """

    prepare: Callable[..., DemoData]
    model: Callable[[], Path]
    settings: Settings
    layer_drop_steps: int
    private: Settings = field(default_factory=dict)
    head_only: bool = True
    ablations: bool = True


MOVIES = Scale(
    prepare=partial(movies.prepare, sentences=480, test_sentences=800, public_sentences=1000, concentration=5.0),
    model=movies.model_directory,
    settings={
        "proxy": {"importance_samples": 96},
        "distillation": {"closed_form_samples": 192},
        "alignment": {"every_rounds": 2, "steps": 4, "batch": 16, "learning_rate": 6e-4},
        "training": {"rounds": 4, "local_epochs": 0.75, "batch": 8, "learning_rate": 8e-4},
        "evaluation": {"every_rounds": 0, "gap_samples": 0},
        "model": {"max_tokens": 32},
    },
    layer_drop_steps=30,
    head_only=False,
)
NEWS = Scale(
    prepare=partial(
        corpora.prepare,
        corpus="20newsgroups",
        documents=2600,
        test_documents=1000,
        public_documents=4000,
        concentration=1.0,
    ),
    model=corpora.model_directory,
    settings={
        "distillation": {"closed_form_samples": 256, "learning_rate": 1.5e-3},
        "alignment": {"every_rounds": 1, "steps": 15, "learning_rate": 5e-4},
        "training": {"rounds": 4, "local_epochs": 0.5, "batch": 16, "head_learning_rate": 0.02},
        "evaluation": {"samples_per_round": 300, "gap_samples": 8},
        "model": {"max_tokens": 40},
    },
    layer_drop_steps=60,
    private={  # ten steps of half a silo's samples each, at rates to match
        "batch": 440,
        "local_epochs": 1.25,
        "learning_rate": 4e-3,
        "head_learning_rate": 0.15,
        "frozen_a": True,
    },
)
QUICK = Scale(
    prepare=partial(
        corpora.prepare, corpus="r8", documents=360, test_documents=120, public_documents=200, concentration=1.0
    ),
    model=corpora.model_directory,
    settings={
        "proxy": {"importance_samples": 64},
        "distillation": {"closed_form_samples": 64, "batch": 8},
        "alignment": {"every_rounds": 1, "steps": 3, "batch": 8},
        "training": {"rounds": 2, "batch": 16, "head_learning_rate": 0.02},
        "evaluation": {"samples_per_round": 40},
        "model": {"max_tokens": 32},
    },
    layer_drop_steps=8,
)
LM_FULL = Scale(
    prepare=partial(dialogues.prepare, rows=120, test_rows=60, public_rows=400),
    model=dialogues.model_directory,
    settings={
        "proxy": {"importance_samples": 64},
        "distillation": {"closed_form_samples": 64, "batch": 8},
        "alignment": {"every_rounds": 1, "steps": 4, "batch": 8},
        "training": {"rounds": 3, "local_epochs": 0.4, "batch": 8, "learning_rate": 2e-3},
        "evaluation": {"every_rounds": 0, "batch": 16, "gap_samples": 2, "written_samples": 8},
        "model": {"task": CausalLM.name, "max_tokens": 128},
    },
    layer_drop_steps=16,
    private={"batch": 32, "local_epochs": 1.0},
    ablations=False,
)
LM_QUICK = Scale(
    prepare=partial(dialogues.prepare, rows=8, test_rows=8, public_rows=16),
    model=dialogues.model_directory,
    settings={
        "proxy": {"importance_samples": 16},
        "distillation": {"closed_form_samples": 16, "batch": 4},
        "alignment": {"every_rounds": 1, "steps": 1, "batch": 4},
        "training": {"rounds": 2, "batch": 4},
        "evaluation": {"every_rounds": 0, "batch": 8, "gap_samples": 0, "written_samples": 2},
        "model": {"task": CausalLM.name, "max_tokens": 48},
    },
    layer_drop_steps=2,
    ablations=False,
)

SECURE: Settings = {"federation": {"secure_aggregation": True}}
EPSILON, DELTA = 8.0, 1e-4
NO_DISTILLATION: Settings = {"distillation": {"steps": 0, "closed_form_samples": 0}}
NO_ALIGNMENT: Settings = {"alignment": {"every_rounds": 0}}
ABLATIONS: dict[str, Settings] = {
    "no_distillation": {**NO_DISTILLATION, **NO_ALIGNMENT},
    "before_only": NO_ALIGNMENT,
    "during_only": NO_DISTILLATION,
}
MAIN = "plugged_in"


def rows(
    layers: int,
    *,
    head: bool,
    compare: bool,
    ablations: bool,
    layer_drop_steps: int | None = None,
    private: Settings | None = None,
) -> dict[str, Settings]:
    """What each row changes in the product's server.yaml. `local_only` is one federation for each silo.

    Args:
        layers: whole layers of the layer-drop proxy.
        head: whether the row with a head alone is wanted.
        compare: whether others than that are wanted.
        ablations: whether those without distillation are among them.
        layer_drop_steps: of the layer-drop proxy's distillation; None: as many as the product's.
        private: as of :class:`Scale`, if the rows with secure aggregation are wanted, without and with differential
            privacy.
    """
    found: dict[str, Settings] = {"head_only": {"adapter": {"rank": 0}, **NO_ALIGNMENT}} if head else {}
    steps = {} if layer_drop_steps is None else {"steps": layer_drop_steps}
    if compare:
        found |= {
            "full_model": {"proxy": {"neurons": "all", "allow_whole": True}, **NO_DISTILLATION, **NO_ALIGNMENT},
            "layer_drop": {
                "proxy": {"keep": "layers", "layers": layers},
                "distillation": {"weight_term": 0.0, **steps},
                **NO_ALIGNMENT,
            },
            **(ABLATIONS if ablations else {}),
            **{f"local_only/{silo}": {"federation": {"silos": [silo]}} for silo in SILOS},
        }
    if private is not None:
        training = {**private, "privacy": {"epsilon": EPSILON, "delta": DELTA}}
        found |= {
            "secure_aggregation": SECURE,
            "private": {**SECURE, "training": training},
        }
    return found


def run_demo(
    out: Path,
    *,
    scale: Scale,
    seed: int,
    compare: bool,
    private: bool = False,
    more: Mapping[str, Settings] | None = None,
) -> dict[str, Any]:
    """Runs the demo into an empty or missing directory and returns what is in OUT/summary.json.

    Args:
        more: further rows, as of :func:`rows`.

    Raises:
        ConfigError: OUT holds something else than an earlier demo.
        FedPFTError: a server or silo process failed; its log is named.
    """
    out = out.absolute()  # the YAML files are written below it, and their relative paths would start there
    _clear(out)
    data = scale.prepare(out / "data", silos=SILOS, seed=seed)
    provision(out / "kits", SILOS)
    product = _product_settings(out, data, scale, seed)
    summary = _run_row(out, MAIN, product, data)
    summary["costs"] = {MAIN: summary.pop("cost")}
    curves = json.loads((out / "rows" / MAIN / "out" / "curves.json").read_text(encoding="utf-8"))
    model_layers = len(curves["saliency_kept"]["layers"])
    local: list[dict[str, float]] = []
    others = rows(
        _equal_layers(summary, model_layers),
        head=TASKS[summary["task"]].head and (compare or scale.head_only),
        compare=compare,
        ablations=scale.ablations,
        layer_drop_steps=scale.layer_drop_steps,
        private=scale.private if private else None,
    )
    for row, changes in {**others, **(more or {})}.items():
        settings = merged(product, changes)
        if not {"proxy", "distillation"} & changes.keys():
            settings["proxy_path"] = str(out / "rows" / MAIN / "out" / "proxy")
        found = _run_row(out, row, merged(settings, {"evaluation": {"every_rounds": 0}}), data)
        if row.startswith("local_only/"):
            local.append(found["metrics"]["plugged_in"])
        else:
            summary["metrics"][row] = found["metrics"]["plugged_in"]
            summary["costs"][row] = found["cost"]
    if local:
        summary["metrics"]["local_only"] = {name: statistics.fmean(m[name] for m in local) for name in local[0]}
    atomic.write_text(out / "summary.json", json.dumps(summary, indent=1))
    write_report(summary, curves, out / "report.html")
    return summary


def _product_settings(out: Path, data: DemoData, scale: Scale, seed: int) -> Settings:
    settings: Settings = {
        "seed": seed,
        "listen": "127.0.0.1:0",
        "tls": _certificates(out / "kits" / "server"),
        "model": {"path": str(scale.model()), **({"labels": str(data.labels)} if data.labels else {})},
        "federation": {"silos": list(SILOS)},
        "public_data": str(data.public),
        "test_data": str(data.test),
    }
    return merged(settings, scale.settings)


def _equal_layers(summary: dict[str, Any], layers: int) -> int:
    """The number of whole layers that comes nearest to the transformer parameters of the product's proxy.

    At the paper's setting both have the same weights; a layer that lost neurons keeps its other biases and norms.
    """
    parameters: dict[str, int] = summary["parameters"]
    return round(layers * parameters["proxy_transformer"] / parameters["model_transformer"])


def _run_row(out: Path, row: str, settings: Settings, data: DemoData) -> dict[str, Any]:
    silos = {}
    for name in settings["federation"]["silos"]:
        kit = out / "kits" / "silos" / name
        silos[name] = {"tls": _certificates(kit), "data": {"path": str(data.silos[name])}, "threads": 1}
    directory = out / "rows" / row
    log.info("row %s: configurations, logs and results in %s", row, directory)
    return run_federation(directory, settings, silos)


def run_federation(directory: Path, server: Settings, silos: Mapping[str, Settings]) -> dict[str, Any]:
    """Runs one federation of real processes on this machine; returns its summary, with what it took as `cost`:
    `seconds` from start to end, the largest silo's `silo_peak_bytes` of memory, and the `silo_bytes` that each moved.

    Args:
        directory: receives the YAML files, the silos' logs, their work directories, and the server's OUT.
        server: server.yaml without `out`; it has to listen on port 0.
        silos: for each name silo.yaml; `server` and `work` may be left out.

    Raises:
        FedPFTError: a process failed.
    """
    results, begun, peak = directory / "out", time.monotonic(), 0
    with ExitStack() as stack:
        server_yaml = _write_yaml(directory / "server.yaml", {**server, "out": str(results)})
        processes = [stack.enter_context(_process("fedpft.server", server_yaml, None))]
        while not (results / "address").exists():
            _all_ended(processes)
            time.sleep(0.1)
        address = (results / "address").read_text(encoding="utf-8").strip()
        for name, settings in silos.items():
            settings = {"server": address, "work": str(directory / f"work-{name}"), **settings}
            silo_yaml = _write_yaml(directory / f"silo-{name}.yaml", settings)
            processes.append(stack.enter_context(_process("fedpft.silo", silo_yaml, directory / f"silo-{name}.log")))
        while not _all_ended(processes):
            peak = max(peak, *(_peak_bytes(process) for process in processes[1:]))
            time.sleep(0.1)
    found: dict[str, Any] = json.loads((results / "summary.json").read_text(encoding="utf-8"))
    moved = sum(found["bytes"].values()) // len(silos)
    found["cost"] = {"seconds": time.monotonic() - begun, "silo_peak_bytes": peak, "silo_bytes": moved}
    return found


def _certificates(kit: Path) -> Settings:
    return {part: str(kit / f"{part}.pem") for part in ("ca", "certificate", "key")}


@contextmanager
def _process(module: str, config: Path, log_file: Path | None) -> Iterator[subprocess.Popen[bytes]]:
    """A process that does not outlive the block. Without a log file its progress goes to this process's stderr."""
    with ExitStack() as stack:
        sink = None if log_file is None else stack.enter_context(log_file.open("wb"))
        command = [sys.executable, "-m", module, "--config", str(config)]
        process = subprocess.Popen(command, stdout=sink or subprocess.DEVNULL, stderr=sink)
        try:
            yield process
        finally:
            process.terminate()
            process.wait()


def _peak_bytes(process: subprocess.Popen[bytes]) -> int:
    """The most memory that a process has had so far; 0 if it has ended, or the system does not say."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in status.splitlines() if line.startswith("VmHWM:")), 0)


def _all_ended(processes: Sequence[subprocess.Popen[bytes]]) -> bool:
    """Whether all processes ended well; FedPFTError as soon as one ended otherwise."""
    codes = [process.poll() for process in processes]
    for process, code in zip(processes, codes, strict=True):
        if code:
            command = " ".join(str(part) for part in process.args[2:])  # type: ignore[index]
            raise FedPFTError(f"{command} ended with exit code {code}", "see its message above, or its log there")
    return None not in codes


def _write_yaml(path: Path, settings: Settings) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return path


def merged(settings: Settings, changes: Settings) -> Settings:
    """`settings` with the given keys of its sections changed; `changes` are one section deep."""
    merged = dict(settings)
    for name, value in changes.items():
        merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    return merged


def _clear(out: Path) -> None:
    """Makes OUT, or removes an earlier demo from it, and nothing else; it may be a mounted directory."""
    ours = {"data", "kits", "rows", "summary.json", "report.html"}
    atomic.standing(out, "--out")
    out.mkdir(parents=True, exist_ok=True)
    found = {path.name: path for path in out.iterdir() if not path.name.startswith("traceback-")}
    if strange := found.keys() - ours:
        raise ConfigError(
            f"{out}: holds {min(strange)!r}, which is no demo's", "give an empty or a new directory with --out"
        )
    for path in found.values():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
