"""The `fedpft` command: each sub-command is a few lines over the rooms.

They are imported when the command line and the YAML file have been read: with torch and transformers some take seconds,
and `--help`, a typo, and what needs no model are to be answered at once.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedpft import __version__, atomic, audit
from fedpft.command import run_command
from fedpft.config import (
    SimulationConfig,
    load_owner_config,
    load_silo_config,
    load_simulation_config,
)
from fedpft.errors import ConfigError
from fedpft.provision import (
    DEFAULT_DAYS,
    DEFAULT_PORT,
    drop_old_authority,
    provision,
    renew,
    replace_authority,
    revoke,
)
from fedpft.server.__main__ import serve
from fedpft.silo.__main__ import take_part

Command = Callable[[argparse.Namespace], None]


def main() -> int:
    """Runs one sub-command; returns its exit code (docs/errors.md)."""
    arguments = _parser().parse_args()
    command: Command = arguments.command
    return run_command(lambda: command(arguments))


def _demo(arguments: argparse.Namespace) -> None:
    from fedpft.demo import run
    from fedpft.report.page import format_table

    whole = run.LM_FULL if arguments.lm else run.NEWS if arguments.news or arguments.private else run.MOVIES
    quick = run.LM_QUICK if arguments.lm else run.QUICK
    with atomic.made(arguments.out, "--out") as directory:
        summary = run.run_demo(
            directory,
            scale=quick if arguments.quick else whole,
            seed=arguments.seed,
            compare=arguments.compare,
            private=arguments.private,
        )
    print(format_table(summary))
    print(f"\nreport: {arguments.out / 'report.html'}    numbers: {arguments.out / 'summary.json'}")


def _build_proxy(arguments: argparse.Namespace) -> None:
    config = load_owner_config(arguments.config)
    from fedpft import parallel
    from fedpft.evaluation import format_gaps
    from fedpft.proxy.holdings import format_holdings
    from fedpft.server import apart

    ranks = parallel.joined()
    config = config.model_copy(update={"device": ranks.device(config.device)})
    gaps, held = apart.build(config, arguments.out, ranks)
    if not ranks.rank:
        print(format_gaps(gaps))
        print(format_holdings(held))
    parallel.part(ranks)


def _server(arguments: argparse.Namespace) -> None:
    serve(arguments.config)


def _silo(arguments: argparse.Namespace) -> None:
    take_part(arguments.config, only_explain=arguments.explain)


def _simulate(arguments: argparse.Namespace) -> None:
    config = load_simulation_config(arguments.config)
    from fedpft.report.page import format_table
    from fedpft.simulation.data import SilosData
    from fedpft.simulation.run import simulate

    if arguments.write_split is not None:
        with atomic.made(arguments.write_split, "--write-split") as directory:
            SilosData(config).write(directory)
        print(f"a file for each silo: {arguments.write_split}")
        return
    summary = simulate(config, processes=arguments.processes, ray=arguments.ray)
    print(format_table(summary))
    print(f"\nreport: {config.out / 'report.html'}    numbers: {config.out / 'summary.json'}")


def _leakage(arguments: argparse.Namespace) -> None:
    config = load_owner_config(arguments.config)
    rehearsal = config if isinstance(config, SimulationConfig) and not arguments.finished else None
    if arguments.widths and rehearsal is None:
        raise ConfigError("--widths: a finished run has one proxy", "leave it out, or rehearse with a simulation.yaml")
    from fedpft.leakage.finished import leak_finished
    from fedpft.leakage.report import format_report
    from fedpft.leakage.run import FULL, QUICK, leak
    from fedpft.server.run import finished
    from fedpft.simulation.data import SilosData

    effort = QUICK if arguments.quick else FULL
    if arguments.widths:
        effort = replace(effort, widths=tuple(sorted({*arguments.widths})))
    if rehearsal is not None:
        attack = partial(leak, rehearsal)
    else:
        config = SilosData(config).config if isinstance(config, SimulationConfig) else config
        attack = partial(leak_finished, config, finished(config))
    out = arguments.out or config.out / "leakage"
    with atomic.made(out, "--out") as directory:
        found = attack(directory, effort)
    print(format_report(found))
    print(f"\nreport: {out / 'leakage.html'}    numbers: {out / 'leakage.json'}")


def _plug_in(arguments: argparse.Namespace) -> None:
    config = load_owner_config(arguments.config)
    from fedpft.server import apart

    with atomic.made(arguments.out, "--out") as directory:
        apart.plug_in(config, arguments.adapter, directory)
    print(f"PEFT adapter: {arguments.out / 'adapter'}    merged model: {arguments.out / 'merged'}")


def _evaluate(arguments: argparse.Namespace) -> None:
    config = load_owner_config(arguments.config)
    if config.test_data is None and not arguments.alignment:
        raise ConfigError(f"{arguments.config}: no test_data", "name a labelled file there, or ask for --alignment")
    from fedpft.evaluation import format_gaps
    from fedpft.report.page import format_table
    from fedpft.server import apart

    if arguments.alignment:
        print(format_gaps(apart.gaps(config)))
    else:
        print(format_table(apart.evaluate(config, arguments.adapter)))


def _provision(arguments: argparse.Namespace) -> None:
    with atomic.locked(arguments.out, "--out"):  # or a second command could write the register over this one's
        _change_kits(arguments)


def _change_kits(arguments: argparse.Namespace) -> None:
    out, hosts, days = arguments.out, arguments.host, arguments.days
    asked = arguments.revoke or arguments.renew or arguments.new_authority or arguments.drop_old_authority
    # Before the renewal: with both options a silo's new certificate is good and all its former ones are not.
    if arguments.revoke:
        path = revoke(out, arguments.revoke)
        print(f"revoked {', '.join(arguments.revoke)} in {path}: bring it to where tls.revoked of server.yaml points")
    if arguments.new_authority:
        print("\n".join(f"changed {directory}" for directory in replace_authority(out, days=days)))
    if arguments.renew:
        print("\n".join(f"renewed {kit}" for kit in renew(out, arguments.renew, hosts=hosts, days=days)))
        hosts = None
    if arguments.drop_old_authority:
        print("\n".join(f"changed {directory}" for directory in drop_old_authority(out, days=days)))
    if arguments.silos or not asked:
        made = provision(out, arguments.silos, hosts=hosts, port=arguments.port, days=days)
        print("\n".join(f"made {directory}" for directory in made))


def _doctor(arguments: argparse.Namespace) -> None:
    from fedpft import doctor

    doctor.examine(arguments.config)


def _audit(arguments: argparse.Namespace) -> None:
    summary = audit.Summary()
    print(audit.format_heading())
    for entry in audit.read(arguments.file):
        summary.add(entry)
        if entry.time >= arguments.since:
            print(audit.format_entry(entry))
    print(audit.format_summary(summary))


def _privacy(arguments: argparse.Namespace) -> None:
    config = load_silo_config(arguments.config)
    from fedpft.silo.explain import privacy_report

    print(privacy_report(config))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fedpft",
        description="Federated proxy fine-tuning: silos tune a proxy, the owner plugs the result into the model.",
        epilog="docs/configuration.md describes the YAML files, docs/errors.md the exit codes.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=command)
        return sub

    def with_server_yaml(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--config", type=Path, required=True, metavar="server.yaml", help="the server's configuration")
        return sub

    sub = add("demo", _demo, "Run a federation of real processes over TLS on this machine, and show what it was worth.")
    sub.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="directory for everything; default: %(default)s"
    )
    sub.add_argument("--seed", type=int, default=0, help="every random choice derives from it; default: %(default)s")
    what = sub.add_mutually_exclusive_group()
    what.add_argument("--lm", action="store_true", help="a decoder and dialogues in place of MPNet-base and sentences")
    what.add_argument("--news", action="store_true", help="a small encoder, MiniLM-L6, and 20 Newsgroups")
    sub.add_argument("--quick", action="store_true", help="a small corpus and few steps: does it run at all?")
    sub.add_argument(
        "--compare", action="store_true", help="add the rows of the paper: full model, layer drop, ablations"
    )
    sub.add_argument(
        "--private",
        action="store_true",
        help="add rows with secure aggregation, without and with differential privacy; implies --news without --lm",
    )

    sub = with_server_yaml(
        add("build-proxy", _build_proxy, "Cut a proxy from the FM and distil it; no silo is needed.")
    )
    sub.add_argument("--out", type=Path, help="proxy directory to write; default: OUT/proxy")

    with_server_yaml(add("server", _server, "Run the owner's side of a federation, from proxy to plugged-in model."))

    sub = add("silo", _silo, "Run an institution's side of a federation.")
    sub.add_argument("--config", type=Path, required=True, metavar="silo.yaml", help="the silo's configuration")
    sub.add_argument(
        "--explain",
        action="store_true",
        help="only print what leaves this institution and where to; connects to nobody",
    )

    sub = add("simulate", _simulate, "Run a whole federation on this machine alone: does the method suit this data?")
    sub.add_argument(
        "--config", type=Path, required=True, metavar="simulation.yaml", help="a server.yaml with a simulation section"
    )
    where = sub.add_mutually_exclusive_group()
    where.add_argument(
        "--processes", type=_count, default=1, metavar="N", help="train N silos at the same time; default: %(default)s"
    )
    where.add_argument("--ray", metavar="ADDRESS", help="train on an existing Ray cluster: its address, or auto")
    sub.add_argument(
        "--write-split", type=Path, metavar="DIR", help="only write what each silo gets, as a data file for a real one"
    )

    sub = add(
        "leakage",
        _leakage,
        "Rehearse a federation and attack it: what do silos and owner reveal? Of a finished run: what does the owner?",
    )
    sub.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="YAML",
        help="simulation.yaml, which is rehearsed, or server.yaml of a finished run; with test_data",
    )
    sub.add_argument(
        "--finished", action="store_true", help="with a simulation.yaml: rehearse nothing, measure its finished run"
    )
    sub.add_argument("--out", type=Path, help="directory for everything; default: OUT/leakage")
    sub.add_argument("--quick", action="store_true", help="few rows and few attacks: does it run at all?")
    sub.add_argument(
        "--widths",
        nargs="+",
        type=_width,
        metavar="W",
        help="proxies with W times the configured K, each a federation of its own; default: 0.5 1",
    )

    sub = with_server_yaml(add("plug-in", _plug_in, "Put an adapter into the FM and save the result."))
    sub.add_argument("--adapter", type=Path, help="adapter.safetensors of a run; default: the one in OUT")
    sub.add_argument("--out", type=Path, required=True, help="directory that receives adapter/ and merged/")

    sub = with_server_yaml(add("evaluate", _evaluate, "Measure proxy and plugged-in FM on the server's test data."))
    sub.add_argument("--adapter", type=Path, help="adapter.safetensors of a run; default: the one in OUT")
    sub.add_argument(
        "--alignment",
        action="store_true",
        help="instead, measure per compressed layer how far hidden states and adapter gradients of the proxy are from "
        "the FM's, before and after each distillation",
    )

    sub = add("privacy", _privacy, "Print what a silo has spent of its samples' privacy, and how many rounds are left.")
    sub.add_argument("--config", type=Path, required=True, metavar="silo.yaml", help="the silo's configuration")

    sub = add(
        "provision",
        _provision,
        "Make a federation's authority and one kit of key and certificates a party; renew, revoke and rotate them.",
    )
    sub.add_argument("--out", type=Path, required=True, help="directory of authority/ and the kits")
    sub.add_argument("--silos", nargs="+", default=[], metavar="NAME", help="make kits for these silos too")
    sub.add_argument(
        "--renew", nargs="+", metavar="NAME", help="new key and certificate for these silos' kits, or for `server`'s"
    )
    sub.add_argument(
        "--revoke", nargs="+", metavar="NAME", help="shut out all certificates that these silos have been given so far"
    )
    rotation = sub.add_mutually_exclusive_group()
    rotation.add_argument(
        "--new-authority", action="store_true", help="a new authority signs from now on, and renews every silo's kit"
    )
    rotation.add_argument(
        "--drop-old-authority",
        action="store_true",
        help="when every silo has its renewed kit: renew the server's, and trust the new authority alone",
    )
    sub.add_argument(
        "--host", nargs="+", help="names and addresses of the server; default: those it has, or this machine's loopback"
    )
    sub.add_argument("--port", type=int, default=DEFAULT_PORT, help="for silo.yaml; default: %(default)s")
    sub.add_argument(
        "--days", type=int, default=DEFAULT_DAYS, help="how long certificates are valid; default: %(default)s"
    )

    sub = add("doctor", _doctor, "Check this machine: versions, kernels against their references, and a kit if given.")
    sub.add_argument("--config", type=Path, metavar="YAML", help="a server.yaml or silo.yaml whose kit is checked too")

    sub = add("audit", _audit, "Verify an audit log and print it: what left, when, to whom, how large, which digest.")
    sub.add_argument("file", type=Path, help="audit.jsonl of a server (in OUT) or of a silo (in its work directory)")
    sub.add_argument(
        "--since", default="", metavar="TIME", help="print later lines only, such as 2026-01-31 or 2026-01-31T12; UTC"
    )
    return parser


def _count(text: str) -> int:
    """A whole number from 1; argparse says what is wrong with another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, not {text!r}")
    return int(text)


def _width(text: str) -> float:
    """A positive number; argparse says what is wrong with another."""
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 0.0 < width < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return width


if __name__ == "__main__":
    sys.exit(main())
