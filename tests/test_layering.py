"""Who may import whom: a room imports rooms of the rows above its own, and none beside it but those listed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest

from fedpft.config import TaskName
from fedpft.tasks import TASKS

PACKAGE = Path(__file__).parents[1] / "fedpft"

ROWS: list[set[str]] = [
    {"errors", "faults", "atomic", "progress"},
    {"config", "seeding", "command", "audit", "finite", "products", "digests", "machine", "parallel"},
    {"kernels", "federation", "aggregation", "data"},
    {"tasks"},
    {"model", "privacy"},
    {"proxy", "training", "gradients", "evaluation"},
    {"report", "wire"},
    {"server", "silo", "provision"},
    {"simulation"},
    {"leakage"},
    {"demo", "doctor", "cli"},
]
BESIDE = {
    ("faults", "errors"),
    ("atomic", "errors"),
    ("atomic", "faults"),
    ("training", "gradients"),
    ("cli", "demo"),
    ("cli", "doctor"),
}
# The files of a room, each of which imports of its own room only files that stand before it.
ORDER = {
    "data": ("rows", "batches", "cache", "images", "imagesets", "chat", "samples", "text", "language", "partition"),
    "aggregation": ("mean", "robust", "server_optimizer"),
    "tasks": (
        "vocabulary_loss",
        "task",
        "classification",
        "sequence_classification",
        "multi_label_classification",
        "regression",
        "token_classification",
        "image_classification",
        "causal_lm",
    ),
    "model": (
        "architectures",
        "precision",
        "subffn",
        "quantized",
        "lora",
        "checkpointing",
        "packing",
        "persample",
        "mapped",
        "sharding",
        "walk",
        "streaming",
        "loading",
        "compatibility",
        "adapters",
    ),
    "privacy": ("masking", "fixedpoint", "shares", "secagg", "noise", "clipping", "accounting", "wholesilo"),
    "proxy": (
        "journal",
        "parts",
        "closed_form",
        "importance",
        "selection",
        "cut",
        "holdings",
        "distillation",
        "updating",
        "refinement",
        "corrections",
        "bundle",
        "widths",
    ),
    "report": ("figures", "page"),
    "simulation": ("data", "crew", "silos", "run"),
    "leakage": (
        "rehearsal",
        "scores",
        "shadows",
        "membership",
        "labels",
        "tokens",
        "owner",
        "report",
        "run",
        "finished",
    ),
    "demo": ("corpora", "dialogues", "movies", "run"),
}
ROW_OF = {room: number for number, row in enumerate(ROWS) for room in row}

# Rooms, or files of one, that some packages are kept to, and packages that some rooms are kept from.
ONLY_IN: dict[str, set[str]] = {
    "transformers": {"model/loading"},
    "peft": {"model/adapters"},
    "bitsandbytes": {"model/quantized"},
    "grpc": {"wire", "server", "silo"},
    "matplotlib": {"report/figures"},
    "pyarrow": {"data/rows"},
    "ray": {"simulation/crew"},
    "dp_accounting": {"privacy/accounting"},
    "seqeval": {"tasks/token_classification"},
    "rouge_score": {"tasks/causal_lm"},
    "orangecontrib": set(),  # AGPL: the demo reads its data files, no code is imported
}
NEVER_IN = {
    "federation": {"torch", "numpy", "time", "datetime", "threading", "asyncio", "random", "os", "pathlib"},
    "command": {"torch", "grpc", "transformers"},
    "faults": {"torch", "grpc", "transformers"},
    "audit": {"torch", "grpc"},
}
ONLY_ROOMS = {
    "audit": {"errors"},
    "machine": {"errors", "faults"},
    "command": {"errors", "faults"},
    "federation": {"errors", "seeding"},
    "kernels": {"errors"},
}

Import = tuple[str, int, str]  # file, line, dotted name of what is imported


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a file, those inside functions too; `from fedpft import x` counts as fedpft.x.

    So does `from fedpft.room import x` for a room of ORDER.
    """
    package = ("fedpft", *path.relative_to(root).parent.parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            whole = module in ("fedpft", *(f"fedpft.{room}" for room in ORDER))
            names = [f"{module}.{alias.name}" for alias in node.names] if whole else [module]
        else:
            continue
        for name in names:
            yield str(path.relative_to(root.parent)), node.lineno, name


def room_of(dotted: str) -> str | None:
    """The room a dotted name of fedpft is in; None for the package itself and for its version."""
    parts = dotted.split(".")
    return None if len(parts) == 1 or parts[1].startswith("__") else parts[1]


FILES = sorted(PACKAGE.rglob("*.py"))
ROOM_OF_FILE = {path: path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}
IMPORTS = [(ROOM_OF_FILE[path], found) for path in FILES for found in imports_of(path, PACKAGE)]


def allowed(room: str, other: str) -> bool:
    return room == other or ROW_OF[other] < ROW_OF[room] or (room, other) in BESIDE


def test_every_room_has_a_row() -> None:
    rooms = set(ROOM_OF_FILE.values()) - {"__init__"}
    assert rooms <= ROW_OF.keys(), f"give these a row here: {sorted(rooms - ROW_OF.keys())}"


def test_rooms_import_only_rooms_above_them() -> None:
    wrong = [
        f"{file}:{line}: {room} imports {other}"
        for room, (file, line, name) in IMPORTS
        if name.split(".")[0] == "fedpft" and (other := room_of(name)) and not allowed(room, other)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("room", ORDER)
def test_files_of_a_room_import_only_those_before_them(room: str) -> None:
    order = (*ORDER[room], "__init__")
    assert {path.stem for path in (PACKAGE / room).glob("*.py")} == set(order)
    wrong = []
    for importer, (file, line, name) in IMPORTS:
        of, _, other = name.removeprefix("fedpft.").partition(".")
        if importer == room == of and other.partition(".")[0] not in order[: order.index(Path(file).stem)]:
            wrong.append(f"{file}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_the_package_itself_imports_nothing() -> None:
    assert [found for room, found in IMPORTS if room == "__init__"] == []


def test_exceptions_are_between_rooms_of_one_row() -> None:
    for room, other in BESIDE:
        assert ROW_OF[room] == ROW_OF[other], (room, other)
        assert (other, room) not in BESIDE


@pytest.mark.parametrize("package", ONLY_IN)
def test_a_package_is_kept_to_its_rooms(package: str) -> None:
    wrong = [
        f"{file}:{line}"
        for room, (file, line, name) in IMPORTS
        if name.split(".")[0] == package and not {room, file[len("fedpft/") : -len(".py")]} & ONLY_IN[package]
    ]
    assert not wrong, f"{package} is imported in {wrong}"


@pytest.mark.parametrize("room", NEVER_IN)
def test_a_room_is_kept_from_some_packages(room: str) -> None:
    wrong = {name for importer, (_, _, name) in IMPORTS if importer == room and name.split(".")[0] in NEVER_IN[room]}
    assert not wrong


@pytest.mark.parametrize("room", ONLY_ROOMS)
def test_a_room_imports_only_few_rooms(room: str) -> None:
    found = {room_of(name) for importer, (_, _, name) in IMPORTS if importer == room and name.startswith("fedpft")}
    assert found <= {*ONLY_ROOMS[room], room, None}


def test_the_walk_sees_every_form_of_import(tmp_path: Path) -> None:
    path = tmp_path / "fedpft" / "wire" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "import fedpft.silo\nfrom fedpft import server\nfrom fedpft.cli import main\nfrom . import b\n"
        "from ..demo import c\nfrom .. import proxy\ndef f():\n    import grpc.aio as g\n"
    )
    names = [name for _, _, name in imports_of(path, tmp_path / "fedpft")]
    assert names[:6] == [
        "fedpft.silo",
        "fedpft.server",
        "fedpft.cli",
        "fedpft.wire",
        "fedpft.demo.c",
        "fedpft.proxy",
    ]
    assert names[6] == "grpc.aio"
    assert not allowed("wire", "server")
    assert not allowed("training", "proxy")
    assert allowed("training", "data")
    assert allowed("server", "wire")


def test_a_command_line_is_read_before_what_takes_seconds_to_import() -> None:
    """Else `--help` and a typo in a YAML file are answered as late as a model is loaded."""
    program = "import sys, fedpft.cli, fedpft.server.__main__, fedpft.silo.__main__\n"
    program += "print(*{'torch', 'transformers', 'peft', 'matplotlib', 'grpc'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_only_the_room_of_tasks_compares_a_tasks_name() -> None:
    names = get_args(TaskName)
    assert TASKS.keys() == set(names)
    wrong = []
    for path in FILES:
        if "tasks" not in path.parts and path.name != "config.py":
            wrong += [f"{path}: {name}" for name in names if f'"{name}"' in path.read_text(encoding="utf-8")]
    assert not wrong, "\n".join(wrong)
