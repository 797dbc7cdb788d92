"""Runs steps that may hang, crash, overrun or lie, and keeps what every one of them found out until then.

A step is a command: a process group of its own with a limit, killed with all that it started and never waited for
without one. What it finds out it writes with ``emit``, a line of JSON per result, into a pipe; the runner checks every
line, adds the step's name and appends it to ``results.jsonl``, flushed and synced, so that nothing is lost whatever
comes after. What the steps print goes to ``steps.log``. There are no other files but a background step's log.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS, LOG = "results.jsonl", "steps.log"

CHANNEL, TOKEN = "IGVA_KERNELS_STEP_CHANNEL", "IGVA_KERNELS_STEP_TOKEN"
"""Environment variables of a step: the file descriptor that takes its results, and what all of its processes have."""

MOST_BYTES, MOST_ROWS, MOST_LOG_BYTES = 1 << 20, 1000, 1 << 18
"""Of one step: bytes and lines of results, beyond which it is killed, and bytes in the log, beyond which none is kept
but the last ``TAIL_BYTES``."""
TAIL_BYTES = 1 << 14
LEAST = 2.0
"""Seconds below which no further step is started."""
DYING = 5.0
"""Seconds that a killed process is given to end: one that waits for a driver may take them."""
DRAINING = 1.0
"""Seconds at the most in which what a step has written is read after its end."""
OWN_FIELDS = ("status", "seconds", "refused")
"""Fields of the lines that the runner writes itself."""


# ---- in a step -------------------------------------------------------------------------------------------------------


def emit(**row: Any) -> None:
    """Hands a result over; numbers that are not finite become None, and ``not_finite`` names them."""
    wrong = [name for name, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
    if wrong:
        row |= dict.fromkeys(wrong) | {"not_finite": wrong}
    line = json.dumps(row) + "\n"
    channel = os.environ.get(CHANNEL)
    if channel is None:
        print(line, end="", flush=True)
        return
    data = line.encode()
    while data:
        data = data[os.write(int(channel), data) :]


def figures(row: Mapping[str, Any], **makers: Callable[[], Any]) -> bool:
    """Hands a result over whose figures are computed one by one; one that cannot be had does not cost the others.

    Args:
        row: what is measured.
        makers: by name, what computes a figure. The reasons of those that fail are in the field ``errors``.

    Returns:
        Whether all could be had.
    """
    found: dict[str, Any] = dict(row)
    errors = {}
    for name, maker in makers.items():
        try:
            value = maker()
            found |= value if isinstance(value, dict) else {name: value}
        except Exception as error:
            traceback.print_exc()
            errors[name] = f"{type(error).__name__}: {error}"[:300]
    emit(**found, **({"errors": errors} if errors else {}))
    return not errors


# ---- the runner ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A command with a limit."""

    name: str
    limit: float
    """Seconds."""
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    needs_background: bool = False
    """Whether it cannot run unless the background step succeeded."""
    is_quiet: bool = False
    """Whether it is better run when the background step has ended, because it measures by the clock."""


class Runner:
    """Runs steps one after the other into a folder.

    Args:
        out: the folder, which is made if it does not exist.
        seconds: for everything.
    """

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.seconds = out, seconds
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        out.mkdir(parents=True, exist_ok=True)

    def record(self, step: str, row: Mapping[str, Any]) -> None:
        """Appends a line to the results; it is on the disk when this returns."""
        line = json.dumps({"step": step, **row}, allow_nan=False)
        with (self.out / RESULTS).open("a") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            print(line, flush=True)

    def run(self, steps: Sequence[Step], background: Step | None = None) -> None:
        """Runs all steps in their order; those that wait for the background step let others go first."""
        with _ended_by_a_signal():
            beside = None if background is None else _Background(self, background)
            try:
                waiting = list(steps)
                while waiting:
                    step = self._next(waiting, beside)
                    waiting.remove(step)
                    left = self.deadline - time.monotonic()
                    if left < LEAST:
                        self.record(step.name, {"status": "left out", "why": f"{max(left, 0.0):.0f} s are left"})
                    elif step.needs_background and beside is not None and beside.status != 0:
                        why = f"{beside.step.name} ended with {beside.status}"
                        self.record(step.name, {"status": "left out", "why": why})
                    else:
                        self._run(step, min(step.limit, left))
            finally:
                if beside is not None:
                    beside.kill("ended with the last step")
        self.record("end", {"seconds": round(time.monotonic() - self.start, 1)})

    def _next(self, waiting: Sequence[Step], beside: _Background | None) -> Step:
        """The first step that need not wait; where all must, the first one, as soon as the background has ended."""
        if beside is not None and beside.is_running():
            for step in waiting:
                if not (step.needs_background or step.is_quiet):
                    return step
            beside.wait()
        return waiting[0]

    def _run(self, step: Step, limit: float) -> None:
        start = time.monotonic()
        token = uuid.uuid4().hex
        with (self.out / LOG).open("ab") as log:
            log.write(f"\n==== {step.name}\n".encode())
            log.flush()
            results = _Results(step.name)
            printed = _Printed(log)
            read, write = os.pipe()
            try:
                process = _start(step, token, stdout=subprocess.PIPE, channel=write)
            except OSError as error:
                os.close(read)
                self.record(step.name, {"status": "not started", "why": str(error)})
                return
            finally:
                os.close(write)
            assert process.stdout is not None
            try:
                with selectors.DefaultSelector() as selector:
                    for stream, sink in ((read, results), (process.stdout.fileno(), printed)):
                        os.set_blocking(stream, False)
                        selector.register(stream, selectors.EVENT_READ, sink)
                    status = self._watch(process, selector, results, start + limit)
                    if not _kill(process, token):
                        status = f"{status}, and did not end when it was killed"
                    # What is in the pipes by now is all that there will be, unless some process did not end.
                    until = time.monotonic() + DRAINING
                    while self._read(selector, results, 0) and time.monotonic() < until:
                        pass
            except BaseException:
                _kill(process, token)
                raise
            finally:
                os.close(read)
                process.stdout.close()
                printed.close()
        for row in results.rest():
            self.record(step.name, row)
        if status == 0 and not results.accepted:
            status = "no results"
        seconds = round(time.monotonic() - start, 1)
        self.record(step.name, {"status": status, "rows": results.accepted, "seconds": seconds})

    def _watch(
        self, process: subprocess.Popen[bytes], selector: selectors.BaseSelector, results: _Results, deadline: float
    ) -> int | str:
        """Reads until the step ends or must be ended: its exit status, or the reason."""
        while (left := deadline - time.monotonic()) > 0:
            self._read(selector, results, min(left, 0.1))
            if results.is_flood:
                return "too many results"
            status = process.poll()
            if status is not None:
                return status
            if not selector.get_map():
                time.sleep(min(0.05, left))  # it closed what we read from, and runs on
        return "over its limit"

    def _read(self, selector: selectors.BaseSelector, results: _Results, seconds: float) -> bool:
        """Takes what is there, waiting ``seconds`` for it; whether there was anything."""
        ready = selector.select(seconds) if selector.get_map() else []
        for key, _ in ready:
            try:
                data = os.read(key.fd, 1 << 16)
            except BlockingIOError:
                continue
            if not data:
                selector.unregister(key.fileobj)
            for row in key.data.take(data):
                self.record(results.step, row)
        return bool(ready)


class _Results:
    """The lines of results that a step writes, as rows: its own, or what was wrong with a line."""

    def __init__(self, step: str) -> None:
        self.step = step
        self.accepted = self.refused = self.bytes = 0
        self.pending = b""

    @property
    def is_flood(self) -> bool:
        """Whether it is more than a step can have to say."""
        return self.bytes > MOST_BYTES or self.accepted + self.refused > MOST_ROWS

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The rows that are complete with this."""
        self.bytes += len(data)
        *lines, self.pending = (self.pending + data).split(b"\n")
        for line in lines:
            if not self.is_flood:
                yield self._row(line)

    def rest(self) -> Iterator[dict[str, Any]]:
        """What the last line lacks, if there is one."""
        if self.pending:
            yield self._refusal("the line has no end", self.pending)

    def _row(self, line: bytes) -> dict[str, Any]:
        try:
            row = json.loads(line)
            # Python's parser takes NaN and numbers beyond fp64, and a row may hold any number deep inside.
            json.dumps(row, allow_nan=False)
        except (ValueError, RecursionError) as error:
            return self._refusal(str(error), line)
        if not isinstance(row, dict):
            return self._refusal("it is no object", line)
        if row.pop("step", self.step) != self.step:
            return self._refusal("it has the name of another step", line)
        if not row or any(name in row for name in OWN_FIELDS):
            return self._refusal(f"it is empty, or has a field of the runner ({', '.join(OWN_FIELDS)})", line)
        self.accepted += 1
        return row

    def _refusal(self, why: str, line: bytes) -> dict[str, Any]:
        self.refused += 1
        return {"refused": why[:200], "text": line[:200].decode(errors="replace")}


class _Printed:
    """What a step prints: the beginning at once, and at its end the end."""

    def __init__(self, log: Any) -> None:
        self.log = log
        self.left = MOST_LOG_BYTES
        self.tail = b""

    def take(self, data: bytes) -> Iterator[dict[str, Any]]:
        """Keeps it."""
        self.log.write(data[: self.left])
        self.log.flush()
        self.tail = (self.tail + data[self.left :])[-TAIL_BYTES:]
        self.left = max(0, self.left - len(data))
        return iter(())

    def close(self) -> None:
        """Writes the end."""
        if self.tail:
            self.log.write(b"\n[...]\n" + self.tail)


class _Background:
    """A step that runs beside the others, with a log of its own."""

    def __init__(self, runner: Runner, step: Step) -> None:
        self.runner, self.step, self.token = runner, step, uuid.uuid4().hex
        self.start = time.monotonic()
        self.status: int | str | None = None
        with (runner.out / f"{step.name}.log").open("wb") as log:
            try:
                self.process = _start(step, self.token, stdout=log)
            except OSError as error:
                self._end("not started", str(error))

    def is_running(self) -> bool:
        """Whether it has neither ended nor been ended."""
        if self.status is None:
            ended = self.process.poll()
            if ended is not None:
                _kill(self.process, self.token)
                self._end(ended)
            elif time.monotonic() > self.start + self.step.limit:
                self.kill()
        return self.status is None

    def wait(self) -> None:
        """Returns when it has ended, which its limit or that of all steps may bring about."""
        until = min(self.start + self.step.limit, self.runner.deadline - LEAST)
        while self.is_running() and time.monotonic() < until:
            time.sleep(0.05)
        self.kill()

    def kill(self, why: str = "over its limit") -> None:
        """Ends it."""
        if self.status is None:
            _kill(self.process, self.token)
            self._end(why)

    def _end(self, status: int | str, why: str = "") -> None:
        self.status = status
        seconds = round(time.monotonic() - self.start, 1)
        self.runner.record(self.step.name, {"status": status, "seconds": seconds, **({"why": why} if why else {})})


def _start(step: Step, token: str, stdout: Any, channel: int | None = None) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **step.environment, TOKEN: token}
    if channel is not None:
        environment[CHANNEL] = str(channel)
    return subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.STDOUT,
        start_new_session=True, pass_fds=() if channel is None else (channel,),
    )  # fmt: skip


def _kill(process: subprocess.Popen[bytes], token: str) -> bool:
    """Kills a step's process group, and what left the group; whether its first process has ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process may start others while they are looked for.
    for _ in range(5):
        found = list(_processes_with(token, process.pid))
        for pid in found:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not found:
            break
        time.sleep(0.05)
    with suppress(subprocess.TimeoutExpired):
        process.wait(DYING)
    return process.returncode is not None


def _processes_with(token: str, group: int) -> Iterator[int]:
    """The processes in whose environment this token is, wherever they moved to, but for those of a group.

    Those of the group were killed, and to read the environment of one that hangs in a driver could take for ever.
    """
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        with suppress(OSError):
            if os.getpgid(pid) != group and token.encode() in (folder / "environ").read_bytes():
                yield pid


@contextmanager
def _ended_by_a_signal() -> Iterator[None]:
    """SIGTERM ends this process as an exception does, so that the steps end with it."""

    def end(*_: Any) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def chosen(steps: Sequence[Step], only: Sequence[str], skip: Sequence[str]) -> list[Step]:
    """The steps whose names begin with one of ``only``, if there are any, and with none of ``skip``."""
    return [
        step for step in steps
        if (not only or step.name.startswith(tuple(only))) and not step.name.startswith(tuple(skip))
    ]  # fmt: skip
