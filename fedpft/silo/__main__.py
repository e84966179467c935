"""`python -m fedpft.silo`: takes part in a federation."""

import argparse
import sys
from pathlib import Path

import fedpft
from fedpft.command import run_command
from fedpft.config import load_silo_config

DESCRIPTION = """\
Takes part in a federation as one institution: connects to the server named in silo.yaml, fetches the proxy, and in
each round trains an adapter on this institution's own data and sends the adapter back. The data never leaves. Ends
when the server says that the federation is finished.

Run it again after an interruption, whatever the reason: it goes on where it stopped, and sends an update that it has
trained already without training it again. While the server is away it waits for it, connect_timeout_seconds long.

Several processes of one machine train together, each on parts of every batch:

    torchrun --standalone --nproc-per-node N -m fedpft.silo --config silo.yaml
"""

EPILOG = """\
Exit codes: 0 the federation is finished; 1 the disk of the work directory; 2 wrong command line; 3 silo.yaml; 4 the
data; 5 the proxy; 6 a key or a certificate; 7 the server cannot be reached; 8 to 10 the server refused; 13 broken
transfers; 14 the audit log; 15 a fault of fedpft; 16 too little memory; 17 another of the silo's processes ended; 18
more would be shown than was agreed on; 130 and 143 stopped by Ctrl-C and SIGTERM.
docs/errors.md says more. Progress and errors go to stderr.
"""


def main(arguments: list[str] | None = None) -> int:
    """Parses the command line and runs; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedpft.silo",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="silo.yaml (docs/configuration.md)")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="only print what leaves this institution and where to; connects to nobody",
    )
    parser.add_argument("--version", action="version", version=f"fedpft {fedpft.__version__}")
    options = parser.parse_args(arguments)
    return run_command(lambda: take_part(options.config, only_explain=options.explain))


def take_part(path: Path, *, only_explain: bool) -> None:
    """Runs the silo of a silo.yaml, or only prints what would leave it."""
    config = load_silo_config(path)
    if only_explain:
        from fedpft.silo.explain import explain  # with torch and transformers: a fault of the file is told before

        print(explain(config))
    else:
        from fedpft.silo.run import run

        run(config)


if __name__ == "__main__":
    sys.exit(main())
