"""What makes a run the run that was begun: settings, and the content of every file that its result depends on.

Files are known by their content (digests.py) and may lie elsewhere when a run goes on. The ledger holds what a run was
begun with, a proxy's record.json which FM it was cut from, the metadata of an adapter.safetensors what made it.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedpft.config import ServerConfig, SimulationConfig, dump
from fedpft.data.samples import data_digest, image_paths, read_label_list, silo_files
from fedpft.digests import Digests, combined, differences
from fedpft.errors import CheckpointError, ConfigError, DataError, ModelError
from fedpft.tasks import TASKS

log = logging.getLogger(__name__)

# In OUT.
ADAPTER_FILE = "adapter.safetensors"
PATCH_FILE = "patch.safetensors"
DIGESTS_FILE = "digests.json"

# Keys of server.yaml, or sections of it, that nothing depends on which a run goes on from: they may change between a
# stop and going on. Of `federation`, sample_fraction, secure_aggregation and silo_privacy may not. What `plug_in` does
# comes after all that is kept.
CHANGEABLE = (
    "out",
    "listen",
    "tls",
    "insecure_loopback",
    "threads",
    "model.hold",
    "federation",
    "secure_aggregation.threshold_fraction",
    "secure_aggregation.stage_deadline_seconds",
    "plug_in",
    "product",
    "proxy.allow_whole",
)
# These are known by what they lead to; a proxy by the ledger's record of it (run.py).
BY_CONTENT = (
    "model.path",
    "model.labels",
    "model.chat_template",
    "public_data",
    "test_data",
    "proxy_path",
    "simulation.data",
)

JOURNAL = "construction"  # in a proxy directory, until the proxy is there
FOR_PEOPLE = (".md", ".yaml", ".yml", ".log")  # no file of an FM that loading reads is called so

Contents = dict[str, dict[str, str]]  # key of server.yaml -> name of a file from there -> digest

UNKNOWN_FM = "does not say which FM it was cut from: made by an earlier version, not checked"

_METADATA = "fedpft"  # one key: safetensors writes several in any order, and a file is to be the same each time
_IMAGES = "an image that it names"


def settings(config: ServerConfig) -> dict[str, Any]:
    """The part of server.yaml that a run's result depends on, without paths."""
    values = dump(config)
    for key in (*CHANGEABLE, *BY_CONTENT):
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place = place.get(section, {})  # a server.yaml has no simulation
        place.pop(name, None)
    if isinstance(config, SimulationConfig):
        values["silos"] = list(config.federation.silos)
    federation = config.federation
    if federation.silo_privacy is not None:
        values["silo_privacy"] = dump(federation.silo_privacy)
    return values | {"sample_fraction": federation.sample_fraction, "secure": federation.secure_aggregation}


def kept_digests(config: ServerConfig) -> Digests:
    """With those that an earlier process of the run kept."""
    return Digests(config.out / DIGESTS_FILE)


def label_list(config: ServerConfig) -> tuple[str, ...]:
    """The names of the classes; none if the task has none.

    Raises:
        ConfigError: `model.labels` is not there, or is and has no meaning.
        DataError: the file cannot be used.
    """
    section = config.model
    if TASKS[section.task].label_list == (section.labels is None):
        fault, remedy = ("needs", "name the file") if section.labels is None else ("has no use for", "remove the key")
        raise ConfigError(f"model.task {section.task} {fault} model.labels", remedy)
    return () if section.labels is None else read_label_list(section.labels, config.encoding)


def contents(config: ServerConfig, digests: Digests) -> Contents:
    """What the owner's files hold now. An FM that is missing has no files; loading says so in better words.

    Raises:
        ConfigError, DataError: as of :func:`label_list`; or a data file that names images cannot be read.
    """
    labels, template = "\n".join(label_list(config)), config.model.chat_template
    return {
        "model.path": model_files(config, digests),
        "model.labels": {"": hashlib.sha256(labels.encode()).hexdigest()},
        "model.chat_template": {} if template is None else {"": digests.of_file(template)},
        "public_data": _data(config, config.public_data, digests),
        "test_data": {} if config.test_data is None else _data(config, config.test_data, digests),
        **({"simulation.data": _silos_data(config, digests)} if isinstance(config, SimulationConfig) else {}),
    }


def model_files(config: ServerConfig, digests: Digests) -> dict[str, str]:
    """What loading the FM can read: neither hidden nor for people, and not the run itself, if it lies in there."""
    path, out = config.model.path, config.out.resolve()

    def is_loaded(name: Path) -> bool:
        hidden = any(part.startswith(".") for part in name.parts)
        return not hidden and name.suffix.lower() not in FOR_PEOPLE and not (path / name).resolve().is_relative_to(out)

    return digests.of_directory(path, is_loaded)


def difference(config: ServerConfig, before: Contents, after: Contents) -> str:
    """Which keys lead to something else now, and which files there; empty if none does."""
    section, none = config.model, Path("not in server.yaml")
    paths = {"model.path": section.path, "model.labels": section.labels or none}
    paths |= {"model.chat_template": section.chat_template or none}
    paths |= {"public_data": config.public_data, "test_data": config.test_data or none}
    if isinstance(config, SimulationConfig):
        paths["simulation.data"] = config.simulation.data
    found = {key: differences(before.get(key, {}), after[key], whole="it") for key in after}
    return "; ".join(f"{key} ({paths[key]}): {what}" for key, what in found.items() if what)


def check_begun(config: ServerConfig, before: Contents, after: Contents) -> None:
    """Raises CheckpointError if the run in OUT was begun with other files."""
    if what := difference(config, before, after):
        raise CheckpointError(
            f"{config.out}: holds a run that was begun with other files: {what}",
            "put them back as they were, or start a new run in another `out`",
        )


def check_unchanged(config: ServerConfig, before: Contents, digests: Digests) -> None:
    """Raises ModelError or DataError if the owner's files were written to while they were loaded."""
    after = contents(config, digests)
    if what := difference(config, before, after):
        kind = ModelError if after["model.path"] != before["model.path"] else DataError
        raise kind(f"changed while it was read: {what}", "start again when nothing writes there")


def check_cut_from(
    config: ServerConfig, directory: Path, cut_from: Mapping[str, str], model: Mapping[str, str]
) -> None:
    """Raises ModelError if a proxy was cut from another FM than the one of server.yaml.

    Args:
        cut_from: the FM's files as the proxy's record.json has them; empty in one that an earlier version made.
        model: the FM's files now.
    """
    if not cut_from:
        log.warning("%s: %s", directory, UNKNOWN_FM)
    elif what := differences(cut_from, model):
        raise ModelError(
            f"{directory}: was cut from another FM than {config.model.path}: {what}",
            "name that FM in model.path, or build the proxy again",
        )


def proxy_files(directory: Path, digests: Digests) -> dict[str, str]:
    """All files of a proxy directory but record.json, which is written when they are there, and what led to them."""
    return digests.of_directory(directory, lambda name: name.parts[0] not in ("record.json", JOURNAL))


def proxy_digest(directory: Path, digests: Digests) -> str:
    """One for a whole proxy directory."""
    return combined(digests.of_directory(directory, lambda name: name.parts[0] != JOURNAL))


def check_proxy(directory: Path, digests: Digests, recorded: Sequence[str]) -> bool:
    """Whether the ledger has a proxy; CheckpointError if it is another.

    Args:
        recorded: what the ledger has, at most one digest.
    """
    if recorded and proxy_digest(directory, digests) not in recorded:
        raise CheckpointError(
            f"{directory}: is not the proxy that this run began with", "restore it from a backup, or start a new run"
        )
    return bool(recorded)


def provenance(config: ServerConfig, found: Contents, proxy: Mapping[str, str], patch: str) -> dict[str, str]:
    """The metadata of a run's adapter.safetensors; the same for the same files and settings.

    Args:
        proxy: the files of its proxy directory.
        patch: digest of its patch.safetensors.
    """
    made = {"contents": _owners(found), "proxy": combined(proxy), "patch": patch, "adapter": _scale(config)}
    return {_METADATA: json.dumps(made, sort_keys=True)}


def check_provenance(
    config: ServerConfig, adapter: Path, found: Contents, proxy: Mapping[str, str], patch: str | None = None
) -> None:
    """Looks at whether an adapter is of a run on this FM, these labels and this proxy.

    Other public or test data than the run's own is logged: what is measured on it does not compare with its figures.

    Args:
        adapter: an adapter.safetensors; one of an earlier version, without metadata, is logged and goes.
        found: what the owner's files hold now.
        proxy: the files of the proxy directory that is used with it.
        patch: digest of the patch that is used with it.

    Raises:
        ModelError: it is of another, or cannot be read.
    """
    made = _metadata(adapter)
    if made is None:
        log.warning("%s: does not say which run it is of: made by an earlier version, not checked", adapter)
        return
    before: Contents = made["contents"]
    essential = {key: found[key] for key in ("model.path", "model.labels", "model.chat_template")}
    wrong = [difference(config, before, essential)]
    wrong += [
        f"adapter.{key} was {json.dumps(value)}"
        for key, value in made["adapter"].items()
        if _scale(config)[key] != value
    ]
    wrong += ["it was made with another proxy"] * (made["proxy"] != combined(proxy))
    wrong += [f"{config.out / PATCH_FILE} is not the one that goes with it"] * (patch not in (None, made["patch"]))
    if what := "; ".join(filter(None, wrong)):
        raise ModelError(f"{adapter}: is of another run: {what}", "use the server.yaml and the files of that run")
    if measured := difference(config, before, _owners(found)):
        log.warning("%s: its run had other data, so that figures do not compare: %s", adapter, measured)


def _scale(config: ServerConfig) -> dict[str, float]:
    """What an adapter's tensors mean only together with."""
    return {"rank": config.adapter.rank, "alpha": config.adapter.alpha, "ffn": config.adapter.ffn}


def _metadata(adapter: Path) -> Any:
    try:
        with safe_open(adapter, "pt") as file:
            written = (file.metadata() or {}).get(_METADATA)
        return written and json.loads(written)
    except (OSError, SafetensorError, ValueError) as error:
        raise ModelError(
            f"{adapter}: not an adapter ({error})", "give the adapter.safetensors of a finished run"
        ) from None


def _owners(found: Contents) -> Contents:
    """Without the data of simulated silos: an adapter is the same, whoever trained it where."""
    return {key: found[key] for key in found if not key.startswith("simulation.")}


def _data(config: ServerConfig, path: Path, digests: Digests) -> dict[str, str]:
    found = {"": data_digest(path, digests)}
    if TASKS[config.model.task].has_images:
        found[_IMAGES] = digests.of_files(image_paths(path, config.columns, config.encoding))
    return found


def _silos_data(config: SimulationConfig, digests: Digests) -> dict[str, str]:
    """Of the one file, or of each silo's by its name."""
    found: dict[str, str] = {}
    for path in silo_files(config.simulation.data):
        name = "" if path == config.simulation.data else path.name
        digested = _data(config, path, digests)
        found |= {": ".join(filter(None, (name, part))): digest for part, digest in digested.items()}
    return found
