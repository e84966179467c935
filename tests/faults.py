"""A federation of real processes, whose links and processes a test holds in its hands.

    Link        the way from one silo to the server, through a TCP proxy: cut, hold, slow down, damage, count
    Party       one process: start, kill, pause, and halt at a moment that can be named
    Deployment  a server, its silos, and a link for each; `with` leaves no process behind

A moment is named by what a process does and anybody could see: a line of its log, a file that takes its place under
OUT or `work`, a row of the ledger, a step of an optimizer. The process is started by a fork of one that has imported
torch already, which spares seconds; then it is `python -m fedpft.server` or `python -m fedpft.silo` like any other,
but for the Observer, which halts it there until the test lets it go on.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import os
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import forks
import yaml

PATIENCE = 300.0  # seconds for whatever is awaited: far above what it takes, so that only a hang reaches it
TICK = 0.01
PIECE = 1 << 16


def await_(what: str, condition: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Waits for a condition to be true; AssertionError after some seconds."""
    end = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {patience:g} s for {what}"
        time.sleep(TICK)
    return found


# --- links ------------------------------------------------------------------------------------------------------------


class Direction:
    """The bytes of a link that go one way, over all of its connections; offsets are counted from the order on.

    passed: bytes let through so far.
    rate: bytes a second; None: as fast as it goes.
    """

    def __init__(self) -> None:
        self.passed = 0
        self.rate: float | None = None
        self._hold_at: int | None = None
        self._flip_at: int | None = None
        self._changed = asyncio.Event()
        self.held = threading.Event()  # a byte waits that may not pass
        self.flipped = threading.Event()

    def hold(self, after: int | None) -> None:
        """Lets so many bytes through, and no more until `release`, or all (None); whatever held before is over."""
        self.held.clear()
        self._hold_at = None if after is None else self.passed + after
        self._changed.set()

    def flip(self, after: int = 0) -> None:
        """Flips a bit of one byte, after so many."""
        self.flipped.clear()
        self._flip_at = self.passed + after

    async def forward(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        while data:
            if self._hold_at is not None and self.passed >= self._hold_at:
                self._changed.clear()
                self.held.set()
                await self._changed.wait()
                continue
            if writer.is_closing():
                return
            marks = [mark for mark in (self._hold_at, self._flip_at) if mark is not None and mark > self.passed]
            size = min([len(data), PIECE, *(mark - self.passed for mark in marks)])
            if self.rate is not None:
                size = min(size, max(1, int(self.rate / 20)))
            piece, data = data[:size], data[size:]
            if self._flip_at == self.passed:
                piece, self._flip_at = bytes([piece[0] ^ 0x10]) + piece[1:], None
                self.flipped.set()
            self.passed += size
            writer.write(piece)
            await writer.drain()
            if self.rate is not None:
                await asyncio.sleep(size / self.rate)

    def release(self) -> None:
        """Lets go what is held; a hold that lies ahead stays."""
        if self.held.is_set():
            self.held.clear()
            self._hold_at = None
            self._changed.set()


class Link:
    """A silo's way to the server: listens on `address` for the silo, dials what stands in a file then.

    up, down: to the server, to the silo. connections: made so far.
    """

    def __init__(self, server: Path) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.connections = 0
        self.up, self.down = self._do(self._directions())
        self._listener = self._do(asyncio.start_server(self._connect, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    def hold(self, *, up: int | None = None, down: int | None = None) -> None:
        """After so many more bytes a direction falls silent; connections stay. Takes the place of the last order."""
        for direction, after in ((self.up, up), (self.down, down)):
            self._call(direction.hold, after)

    def await_held(self) -> None:
        await_("the link to carry as many bytes", lambda: self.up.held.is_set() or self.down.held.is_set())

    def release(self) -> None:
        self._call(self.up.release)
        self._call(self.down.release)

    def flip(self, *, up: int | None = None, down: int | None = None) -> None:
        """Damages one byte, after so many more."""
        for direction, after in ((self.up, up), (self.down, down)):
            if after is not None:
                self._call(direction.flip, after)

    def slow(self, bytes_per_second: float | None) -> None:
        self.up.rate = self.down.rate = bytes_per_second

    def cut(self, *, reset: bool = True) -> None:
        """Ends all connections, by RST or else by FIN; new ones may come."""
        self._call(self._cut, reset)

    def close(self) -> None:
        async def end() -> None:
            self._listener.close()
            self._cut(True)
            for task in (*self._tasks,):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _cut(self, reset: bool) -> None:
        for writer in (*self._writers,):
            if reset:
                linger = struct.pack("ii", 1, 0)
                writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
            else:
                writer.close()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        self._writers.add(writer)
        try:
            host, _, port = self._server.read_text(encoding="utf-8").strip().rpartition(":")
            from_server, to_server = await asyncio.open_connection(host, int(port))
            writers.append(to_server)
            self._writers.add(to_server)
            pumps = (self._pump(reader, to_server, self.up), self._pump(from_server, writer, self.down))
            await asyncio.gather(*pumps)
        except (OSError, asyncio.CancelledError):
            pass  # no server there, or one side is gone: so is the other then
        finally:
            for each in writers:
                each.transport.abort()
                self._writers.discard(each)
            self._tasks.discard(task)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while data := await reader.read(PIECE):
            await direction.forward(data, writer)
        if not writer.is_closing():
            writer.write_eof()

    async def _directions(self) -> tuple[Direction, Direction]:
        return Direction(), Direction()

    def _call(self, function: Callable[..., None], *arguments: Any) -> None:
        async def call() -> None:
            function(*arguments)

        self._do(call())

    def _do(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)


# --- processes --------------------------------------------------------------------------------------------------------


class _Training(threading.local):
    """Of each thread: others log between the lines of the one that trains."""

    line = ""  # its last
    steps = 0  # of an optimizer since


class Observer:
    """Inside a process: notes its steps in `control/steps`, and halts it at the one that `control/halt-at` names.

    Steps are lines: `log MESSAGE`, `open FILE` (to write), `before replace FILE`, `after replace FILE`, the same with
    `unlink`, `before sql STATEMENT VALUES`, `after sql ...`, `optimizer step N after MESSAGE` of the
    same thread.
    """

    def __init__(self, control: Path, die_at: int | None) -> None:
        self._halt_at, self._halted = str(control / "halt-at"), str(control / "halted")
        self._steps = os.open(control / "steps", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        self._lock = threading.Lock()
        self._replace, self._unlink = os.replace, os.unlink
        self._lasting, self._root = itertools.count(1), str(control.parent.parent)
        self._die_at = die_at
        self._training = _Training()

    def install(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook

        for name in ("replace", "rename"):
            setattr(os, name, self._around(getattr(os, name), name="replace", file=1))
        for name in ("unlink", "remove"):
            setattr(os, name, self._around(getattr(os, name), name="unlink", file=0))
        handle = logging.Logger.callHandlers
        observer = self
        sys.addaudithook(self._opened)

        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            handle(logger, record)
            observer._training.line, observer._training.steps = record.getMessage(), 0
            observer._step(f"log {record.getMessage()}")

        logging.Logger.callHandlers = call_handlers  # type: ignore[method-assign]

        class Connection(sqlite3.Connection):
            def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
                if statement.lstrip().upper().startswith(("SELECT", "PRAGMA")):
                    return super().execute(statement, *values)
                with observer._lasting_step(f"sql {statement} {values}"):
                    return super().execute(statement, *values)

        connect = sqlite3.connect
        sqlite3.connect = lambda *a, **k: connect(*a, **k, factory=Connection)  # type: ignore[assignment]

        def optimizer_step(*_: object) -> None:
            training = observer._training
            training.steps += 1
            observer._step(f"optimizer step {training.steps} after {training.line}")

        register_optimizer_step_post_hook(optimizer_step)

    def _opened(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(mode := arguments[1], str) and set("wax+") & set(mode):
            path = str(arguments[0])
            if path.startswith(self._root) and "/control/" not in path:
                self._step(f"open {path}", lasting=True)

    def _around(self, function: Callable[..., None], *, name: str, file: int) -> Callable[..., None]:
        def observed(*arguments: Any, **options: Any) -> None:
            with self._lasting_step(f"{name} {os.fspath(arguments[file])}"):
                function(*arguments, **options)

        return observed

    @contextlib.contextmanager
    def _lasting_step(self, step: str) -> Iterator[None]:
        self._step(f"before {step}", lasting=True)
        yield
        self._step(f"after {step}", lasting=True)

    def _step(self, step: str, *, lasting: bool = False) -> None:
        os.write(self._steps, " ".join(step.split()).encode() + b"\n")
        if lasting and next(self._lasting) == self._die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        with self._lock:
            try:
                pattern = Path(self._halt_at).read_text(encoding="utf-8")
            except FileNotFoundError:
                return
            if not re.search(pattern, step):
                return
            self._unlink(self._halt_at)
            Path(self._halted + ".part").write_text(step, encoding="utf-8")
            self._replace(self._halted + ".part", self._halted)
        while os.path.exists(self._halted):
            time.sleep(TICK)


def _watch(control: str, die_at: int | None) -> None:
    """In the forked process, before all else."""
    os.chdir(control)
    Observer(Path(control), die_at).install()


class Party:
    """A server's or silo's process. It is restarted with the same command line, whatever became of it before."""

    def __init__(self, name: str, module: str, config: Path) -> None:
        self.name, self.module, self.config = name, module, config
        self.log_file = config.with_suffix(".log")
        self.log_file.touch()
        self._control = config.parent / "control" / name
        self._control.mkdir(parents=True, exist_ok=True)
        self._clock = self._control / "clock"
        self._process: Any = None

    def start(self, *, die_at: int | None = None, as_a_command: bool = False) -> "Party":
        """die_at: kills itself at this step of those that last. as_a_command: without the test's own hand in it."""
        assert not self.alive, f"{self.name} runs already"
        self.release()
        if as_a_command:
            command = [sys.executable, "-m", self.module, "--config", str(self.config)]
            self._process = _Command(command, self.log_file, self._clock if self._clock.exists() else None)
            return self
        watched = functools.partial(_watch, str(self._control), die_at)
        named, stdout = ("--config", self.config.absolute()), self._control / "stdout"
        self._process = forks.start(self.module, *named, stdout=stdout, stderr=self.log_file, before=watched)
        return self

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.exitcode is None

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    @property
    def stdout(self) -> str:
        return (self._control / "stdout").read_text(encoding="utf-8")

    @property
    def steps(self) -> list[str]:
        """All that the Observer saw, of all processes so far."""
        return (self._control / "steps").read_text(encoding="utf-8").splitlines()

    def signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def jump(self, days: float) -> None:
        """Sets the wall clock of a command off by this; the first time before it is started."""
        with self._clock.open("r+b" if self._clock.exists() else "wb") as file:  # in place: the process has it mapped
            file.write(struct.pack("l", int(days * 86_400)))

    def kill(self) -> None:
        if self.alive:
            self.signal(signal.SIGKILL)
        assert self.await_end() == -signal.SIGKILL
        self.release()

    def await_end(self) -> int:
        """Its exit code, negative for a signal."""
        await_(f"{self.name} to end", lambda: not self.alive)
        return int(self._process.exitcode)

    def await_log(self, pattern: str) -> None:
        """A line of the log of any process so far."""
        await_(f"{pattern!r} in the log of {self.name}", lambda: self._has(pattern))

    def halt_at(self, pattern: str) -> None:
        """The process stops at its next step that the pattern matches, and holds still until `release`."""
        part = self._control / "halt-at.part"
        part.write_text(pattern, encoding="utf-8")
        part.replace(self._control / "halt-at")

    def await_halt(self) -> str:
        halted = self._control / "halted"
        await_(f"{self.name} to come to its halt", lambda: halted.exists() or self.has_failed())
        return halted.read_text(encoding="utf-8")

    def release(self) -> None:
        """Lets it go on."""
        (self._control / "halted").unlink(missing_ok=True)

    def _has(self, pattern: str) -> bool:
        return re.search(pattern, self.log) is not None or self.has_failed()

    @property
    def was_killed(self) -> bool:
        """By kill -9; AssertionError if it ended badly otherwise."""
        code = self._process.exitcode
        assert code in (None, 0, -signal.SIGKILL), f"{self.name} ended with exit code {code}"
        return code == -signal.SIGKILL

    def has_ended_well(self) -> bool:
        """AssertionError if it has ended otherwise."""
        code = self._process.exitcode
        assert not code, f"{self.name} ended with exit code {code}"
        return code == 0

    def has_failed(self) -> bool:
        """Raises AssertionError if it ended otherwise than by the test's hand; else False."""
        if not self.alive and self._process is not None and self._process.exitcode != -signal.SIGKILL:
            raise AssertionError(f"{self.name} ended, with exit code {self._process.exitcode}")
        return False


class _Command:
    """A plain process, with the attributes of multiprocessing's that are used here."""

    def __init__(self, command: list[str], log_file: Path, clock: Path | None) -> None:
        environment = {**os.environ}
        if clock is not None:
            library, source = clock.with_suffix(".so"), Path(__file__).with_name("clock.c")
            subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, source], check=True)
            environment |= {"LD_PRELOAD": str(library), "CLOCK": str(clock)}
        with log_file.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment)
        self.pid = self._process.pid

    @property
    def exitcode(self) -> int | None:
        return self._process.poll()


class Deployment:
    """A server and its silos in a directory: out/, work-SILO/, a YAML and a log file for each."""

    def __init__(self, directory: Path, server: Mapping[str, Any], silos: Mapping[str, Mapping[str, Any]]) -> None:
        """`server` and `silos` are the YAML files' contents, but for out, work, and the addresses."""
        self.directory, self.out = directory, directory / "out"
        self.links = {name: Link(self.out / "address") for name in silos}
        self.server = Party("server", "fedpft.server", self._write("server", {**server, "out": str(self.out)}))
        self.silos: dict[str, Party] = {}
        for name, settings in silos.items():
            here = {"server": self.links[name].address, "work": str(self.work(name))}
            self.silos[name] = Party(name, "fedpft.silo", self._write(name, {**here, **settings}))

    def start(self, *, as_commands: bool = False) -> None:
        for party in self.parties:
            party.start(as_a_command=as_commands)

    @property
    def parties(self) -> tuple[Party, ...]:
        return (self.server, *self.silos.values())

    def work(self, silo: str) -> Path:
        return self.directory / f"work-{silo}"

    def await_end(self) -> None:
        """All end, and well."""
        await_("all to end", lambda: all(party.has_ended_well() for party in self.parties))

    def __enter__(self) -> "Deployment":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for party in self.parties:
            if party.alive:
                print(f"{party.name} still runs, and is killed")
                party.signal(signal.SIGKILL)
                party.await_end()
        for link in self.links.values():
            link.close()
        if error is not None:
            for party in self.parties:
                print(f"--- the log of {party.name} ---", *party.log.splitlines()[-40:], sep="\n")
        else:
            shutil.rmtree(self.directory / "out" / "merged", ignore_errors=True)  # the largest by far

    def _write(self, name: str, settings: Mapping[str, Any]) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump(dict(settings), sort_keys=False), encoding="utf-8")
        return path
