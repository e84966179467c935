"""`python -m bench.paper`: a table of the paper, cell by cell; what has been run is not run again.

    OUT/paper.jsonl                   one record for each cell that is done
    OUT/paper-TABLE-MODEL-TASK.svg    its drawing
    WORK/                             models, data, proxies, and the cell that is being run; of no use afterwards

It can be stopped at any time, and goes on where it stopped.
"""

import argparse
import logging
import shutil
import sys
from pathlib import Path

from bench.paper import cells, shown, worlds
from fedpft import atomic
from fedpft.command import run_command

log = logging.getLogger(__name__)


def run(arguments: argparse.Namespace) -> None:
    """Runs what is missing, and prints the table."""
    work = arguments.work.absolute()
    setting = worlds.QUICK if arguments.quick else None
    if not setting and not arguments.model:
        setting = worlds.PAPER_VISION if arguments.table == "vision" else worlds.PAPER_TEXT
    found = worlds.chosen(worlds.worlds(), setting=setting, model=arguments.model, task=arguments.task)
    out = arguments.out or (work / "quick" if arguments.quick else Path("bench/results"))
    records = cells.read_records(out / "paper.jsonl")
    for world in found:
        table = cells.cells(arguments.table, world, range(arguments.seeds))
        wanted = [cell for cell in table if arguments.method in (None, cell.method)]
        missing = [cell for cell in wanted if cell.key not in records]
        if missing and not arguments.show:
            files = world.files(work, arguments.packages or work / "packages", arguments.data)
            for number, cell in enumerate(missing, 1):
                log.info("cell %d of %d: %s", number, len(missing), cell.title)
                record = cells.run_cell(cell, files, work, device=arguments.device, threads=arguments.threads)
                records[cell.key] = record
                cells.add_record(out / "paper.jsonl", record)
                shutil.rmtree(cells.directory_of(cell, work), ignore_errors=True)  # a count leaves none
        print(f"\n{shown.markdown(arguments.table, table, records)}", flush=True)
        if not arguments.show and (drawing := shown.drawing(arguments.table, table, records)):
            atomic.write_text(out / f"paper-{arguments.table}-{world.model}-{world.task}.svg", drawing)


def parse(command_line: list[str] | None = None) -> argparse.Namespace:
    """What the user asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.paper", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("--table", choices=cells.TABLES, required=True)
    add("--model", help="default: those of the paper")
    add("--task", help="default: all")
    add("--method", choices=cells.methods(2), help="run only this one")
    add("--quick", action="store_true", help="minutes: whether it works here")
    add_options(parser)
    return parser.parse_args(command_line)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Where models and data come from, how cells run, and where results go."""
    add = parser.add_argument
    add("--seeds", type=int, default=1, help="how many; default: %(default)s")
    add("--data", type=Path, help="your own directory of models and data (docs/paper.md)")
    add("--packages", type=Path, help="where pip put packages with models and data; default: WORK/packages")
    add("--device", default="cpu", help="default: %(default)s")
    add("--threads", type=int, help="CPU threads; default: all cores, but one for a silo")
    add("--show", action="store_true", help="run nothing, print what there is")
    add("--out", type=Path, help="directory of the results; default: bench/results, with --quick WORK/quick")
    add("--work", type=Path, default=Path("paper-out"), help="default: %(default)s")


def main() -> int:
    """The command."""
    arguments = parse()
    return run_command(lambda: run(arguments))


if __name__ == "__main__":
    sys.exit(main())
