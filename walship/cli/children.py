"""Child processes of `walship up`: started, watched, started again with backoff, stopped in order.

`CrashLoop` is the pure rule. `Child` is the shell around one process: its stderr goes to a log file by itself (so that
it survives us), its stdout is a pipe on which a node says that it is ready. Children are sessions of their own: a
Ctrl-C on the terminal reaches the parent only, which then stops them in the right order; should the parent die
instead, the kernel sends each of them SIGTERM (part.py).
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from walship.cli.part import PARENT
from walship.errors import Unavailable, UsageError

__all__ = ["Child", "CrashLoop"]

LOG_MAX_BYTES = 16 << 20  # at a start, a larger log becomes NAME.log.1
TAIL_BYTES = 8192
TAIL_LINES = 12


class CrashLoop:
    """When to start a dead child again: soon, then later and later; not at all after LIMIT deaths in WINDOW_SECONDS."""

    LIMIT = 5
    WINDOW_SECONDS = 30.0
    FIRST_SECONDS = 0.1
    LONGEST_SECONDS = 3.0  # five deaths then still fall into the window

    def __init__(self) -> None:
        self._deaths: collections.deque[float] = collections.deque(maxlen=self.LIMIT)

    def died(self, now: float) -> float | None:
        """Seconds to wait before the next start, or None to give up. `now` in monotonic seconds."""
        self._deaths.append(now)
        recent = sum(now - death < self.WINDOW_SECONDS for death in self._deaths)
        if recent >= self.LIMIT:
            return None
        return float(min(self.FIRST_SECONDS * 3 ** (recent - 1), self.LONGEST_SECONDS))


class _Ready(msgspec.Struct):
    ready: bool
    url: str
    name: str = ""
    pid: int = 0


class Child:
    """One part of the cluster as a process. `supervise` is its task; `stop` ends it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log_path: Path,
        say: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.log_path = log_path
        self.url: str | None = None  # a node's, once it said that it is ready
        self.restarts = 0
        self._command, self._say, self._clock = command, say, clock
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def supervise(self, environment: Mapping[str, str]) -> None:
        """Keep the process running until `stop`. Raises UsageError when the child says that its settings
        cannot work, Unavailable when it keeps dying."""
        crashes = CrashLoop()
        try:
            while not self._stopping.is_set():
                code = await self._run_once(environment)
                if self._stopping.is_set():
                    return
                if code == UsageError.exit_code:  # starting it again cannot help
                    raise UsageError(f"{self.name} cannot start. {self._last_words()}")
                if (delay := crashes.died(self._clock())) is None:
                    raise Unavailable(
                        f"{self.name} ended {crashes.LIMIT} times within {crashes.WINDOW_SECONDS:.0f} s "
                        f"(last time {_ending(code)}); everything is stopped, the data is kept. {self._last_words()}"
                    )
                self.restarts += 1
                self._say(f"{self.name} ended ({_ending(code)}); starting it again in {delay:.1f} s")
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(delay):
                        await self._stopping.wait()
        finally:
            self._kill()

    async def stop(self, deadline_seconds: float) -> bool:
        """SIGTERM, wait, SIGKILL after the deadline. True iff it ended by itself. Idempotent."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return True
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(deadline_seconds):
                await process.wait()
        except TimeoutError:
            self._say(f"{self.name} did not stop within {deadline_seconds:.0f} s and is killed")
            self._kill()
            await process.wait()
            return False
        return True

    async def _run_once(self, environment: Mapping[str, str]) -> int:
        if self.log_path.exists() and self.log_path.stat().st_size > LOG_MAX_BYTES:
            self.log_path.replace(self.log_path.with_name(self.log_path.name + ".1"))
        with self.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**environment, PARENT: str(os.getpid())},
                start_new_session=True,
            )
            self._process = process
            if self._stopping.is_set():  # stop() came while the process was being made
                process.terminate()
            assert process.stdout is not None
            async for line in process.stdout:
                self._heard(line, log.fileno())
        return await process.wait()

    def _heard(self, line: bytes, log_fd: int) -> None:
        """A line on stdout: the node's word that it is ready, or something for the log."""
        try:
            ready = msgspec.json.decode(line, type=_Ready)
        except (msgspec.DecodeError, UnicodeDecodeError):
            os.write(log_fd, line)
            return
        if ready.ready:
            self.url = ready.url

    def _kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _last_words(self) -> str:
        """The end of the child's log, for a message that explains itself."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
                lines = log.read().decode("utf-8", "replace").splitlines()[-TAIL_LINES:]
        except OSError:
            lines = []
        return f"Its last lines in {self.log_path}:\n" + "\n".join(f"    {line}" for line in lines)


def _ending(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
