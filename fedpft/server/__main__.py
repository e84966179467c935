"""`python -m fedpft.server --config server.yaml`: the process of the FM's owner."""

import argparse
import sys
from pathlib import Path

from fedpft.command import run_command
from fedpft.config import load_server_config


def main() -> int:
    """Parses the command line, runs a federation, returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m fedpft.server",
        description="The owner of the foundation model: builds the proxy, runs the rounds, plugs the adapter in.",
        epilog="docs/configuration.md describes server.yaml, docs/errors.md the exit codes.",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="server.yaml", help="the server's configuration")
    arguments = parser.parse_args()
    return run_command(lambda: serve(arguments.config))


def serve(path: Path) -> None:
    """Runs the federation of a server.yaml."""
    config = load_server_config(path)
    from fedpft.report.page import format_table  # with torch and transformers: a fault of the file is told before
    from fedpft.server.run import run

    print(format_table(run(config)))


if __name__ == "__main__":
    sys.exit(main())
