"""`python -m fedpft.silo`: takes part in a federation."""

import argparse
import sys
from pathlib import Path

import fedpft
from fedpft.command import run_command
from fedpft.config import load_silo_config
from fedpft.silo.run import run

DESCRIPTION = """\
Takes part in a federation as one institution: connects to the server named in silo.yaml, fetches the proxy, and in
each round trains an adapter on this institution's own data and sends the adapter back. The data never leaves. Ends
when the server says that the federation is finished.

Run it again after an interruption: it enrols anew and goes on with the round that is on.
"""

EPILOG = """\
Exit codes: 0 the federation is finished; 2 wrong command line; 3 silo.yaml; 4 the data; 5 the proxy; 6 a key or a
certificate; 7 the server cannot be reached; 8 to 10 the server refused; 13 broken transfers; 130 interrupted.
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
    parser.add_argument("--version", action="version", version=f"fedpft {fedpft.__version__}")
    options = parser.parse_args(arguments)
    return run_command(lambda: run(load_silo_config(options.config)))


if __name__ == "__main__":
    sys.exit(main())
