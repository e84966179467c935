"""What an owner asks for beside a run: its proxy ahead of it; its model, and what that is worth, again afterwards."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpft import atomic
from fedpft.config import ServerConfig
from fedpft.digests import Digests
from fedpft.errors import ConfigError
from fedpft.evaluation import Gap
from fedpft.model import adapters
from fedpft.model.mapped import held
from fedpft.parallel import Ranks
from fedpft.proxy.bundle import apply_patch
from fedpft.proxy.cut import cut
from fedpft.proxy.holdings import holdings
from fedpft.server.construction import Built, Owner, build_proxy, help_build, load_built, load_owner, measure
from fedpft.server.identity import ADAPTER_FILE, PATCH_FILE, check_provenance, check_unchanged, kept_digests
from fedpft.server.ledger import has_begun
from fedpft.server.product import measure_worth, refine_product, save_product

Stages = list[tuple[str, Gap]]


def build(config: ServerConfig, out: Path | None, ranks: Ranks) -> tuple[Stages, dict[str, dict[str, int]]]:
    """Makes a proxy: its distance to the FM at each stage, and what of the FM it holds, part by part.

    A rank beside rank 0 only helps, and has neither.

    Args:
        out: where to, if not to where the run of this configuration looks for it.

    Raises:
        ConfigError: a run has begun with the proxy that is there.
        Others as of :func:`load_owner` and :func:`build_proxy`.
    """
    if ranks.rank:
        help_build(config, ranks)
        return [], {}
    own, wanted = config.out / "proxy", out or config.out / "proxy"
    if has_begun(config.out) and wanted.resolve() in (own.resolve(), (config.proxy_path or own).resolve()):
        raise ConfigError(f"{wanted}: is the proxy of the run in {config.out}", "give another directory with --out")
    with atomic.made(wanted, "--out" if out else "out") as directory:
        owner = load_owner(config, digests := kept_digests(config))
        built = build_proxy(config, owner, directory, ranks)
        if held(owner.model) is not None:  # it was what its files were
            check_unchanged(config, owner.contents, digests)
        return built.record.gaps, holdings(owner.model, built.proxy.model)


def plug_in(config: ServerConfig, adapter: Path | None, directory: Path) -> None:
    """Writes the product of a finished run again, or of another of its adapters.

    Raises:
        CheckpointError: the files are not of one run.
        Others as of :func:`load_owner`.
    """
    owner, built = _owner_and_proxy(config)
    path = adapter or config.out / ADAPTER_FILE
    if config.plug_in.is_on:
        _carry(config, owner, built, path)
        refine_product(config, owner, built)
    else:
        check_provenance(config, path, owner.contents, built.files)
        adapters.plug_in(owner.model, adapters.read(path), built.selection.layers, built.selection.neurons)
    save_product(owner, config, directory)


def evaluate(config: ServerConfig, adapter: Path | None) -> dict[str, Any]:
    """What a finished run, or another of its adapters, is worth on the test data, as `summary.json` has it."""
    owner, built = _owner_and_proxy(config)
    _carry(config, owner, built, adapter or config.out / ADAPTER_FILE)
    worth = measure_worth(config, owner, built, refine_product(config, owner, built))
    gain = None if worth.gain is None else asdict(worth.gain)
    return {"task": config.model.task, "metrics": worth.metrics, "gain": gain}


def gaps(config: ServerConfig) -> Stages:
    """The proxy as cut and as distilled, measured now, and what the run measured at its alignments."""
    owner, built = _owner_and_proxy(config)
    selection, model = built.selection, built.proxy.model
    stages = [("cut", measure(config, owner, cut(owner.model, selection), selection))]
    stages.append(("distilled", measure(config, owner, model, selection)))
    curves = config.out / "curves.json"
    if curves.exists():
        recorded: list[dict[str, Any]] = json.loads(curves.read_text(encoding="utf-8"))["alignment"]["stages"]
        stages += [
            (stage.pop("stage"), Gap.from_json(stage)) for stage in recorded if stage["stage"].startswith("round")
        ]
    return [(name, gap) for name, gap in stages if gap is not None]


def _owner_and_proxy(config: ServerConfig) -> tuple[Owner, Built]:
    digests = kept_digests(config)
    owner = load_owner(config, digests)
    return owner, load_built(config, owner, config.proxy_path or config.out / "proxy", digests)


def _carry(config: ServerConfig, owner: Owner, built: Built, path: Path) -> None:
    """Brings proxy and FM to where a run left them."""
    patch = config.out / PATCH_FILE
    check_provenance(config, path, owner.contents, built.files, Digests().of_file(patch))
    adapter = adapters.read(path)
    apply_patch(built.proxy.model, adapters.read(patch))
    adapters.load(built.proxy.model, adapter)
    adapters.plug_in(owner.model, adapter, built.selection.layers, built.selection.neurons)
