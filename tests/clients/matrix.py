"""The client matrix: who is in it, how it is run, and how docs/clients.md prints it.

    make clients-table      # runs all clients on a cluster of its own and writes the table into docs/clients.md

The clients do their steps a few at a time, then all idle together, longer than an idle transaction may live.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from shutil import which

from tests.clients.steps import STEPS

__all__ = ["CLIENTS", "Client", "Outcome", "installed", "render", "replaced", "row", "run_all"]

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "clients.md"
JAVASCRIPT = Path(__file__).with_name("js")
BEGIN, END = "<!-- begin: make clients-table -->", "<!-- end: make clients-table -->"

IDLE_SECONDS = 15.0  # an idle open transaction ends after 10 (--stream-idle-seconds)
AT_ONCE = 3
LONGEST_SECONDS = 240.0  # for one client, its wait for the others included; 35 on a machine that does nothing else

TITLES = {
    "ddl": "DDL",
    "dml": "DML",
    "types": "values",
    "batch": "batch",
    "commit": "commit",
    "rollback": "rollback",
    "constraint": "constraint",
    "big": "10,000 rows",
    "concurrent": "concurrent",
    "idle": "15 s idle",
}


@dataclass(frozen=True)
class Client:
    """One row. `packages` are names at PyPI (`module` is set) or npm; `remarks` are what a user of it should know."""

    name: str
    over: str
    packages: tuple[str, ...]
    module: str = ""
    script: str = ""
    remarks: tuple[str, ...] = ()

    def command(self, url: str) -> list[str]:
        if self.module:
            return [sys.executable, "-W", "error", "-m", f"tests.clients.programs.{self.module}", self.name, url]
        return ["node", str(JAVASCRIPT / self.script), self.name, url]

    def versions(self) -> str:
        if self.module:
            return ", ".join(f"`{name}` {importlib.metadata.version(name)}" for name in self.packages)
        pinned = json.loads((JAVASCRIPT / "package.json").read_text("utf-8"))["dependencies"]
        return ", ".join(f"`{name}` {pinned[name]}" for name in self.packages)


_FLOATS = (
    "It sends an `int` of more than 32 bits as a float, so that above 2^53 digits are lost before they reach the "
    "server: write such a number into the SQL text. Reading is exact."
)

CLIENTS = (
    Client("libsql", "HTTP v3", ("libsql",), "dbapi", remarks=(_FLOATS, "All its errors are `ValueError`.")),
    Client("turso-serverless", "HTTP v3", ("turso-serverless",), "dbapi"),
    Client("libsql-client-http", "HTTP v1", ("libsql-client",), "old_client"),
    Client("libsql-client-ws", "WebSocket", ("libsql-client",), "old_client"),
    Client(
        "alchemy",
        "HTTP v3",
        ("sqlalchemy-libsql", "sqlalchemy", "libsql-experimental"),
        "alchemy",
        remarks=(
            _FLOATS,
            "`LargeBinary` parameters need `Binary`, which `libsql-experimental` lacks: bind blobs by `text()`.",
            "`begin_nested()` before the first write of a transaction fails in the client, which closes the stream "
            "that holds the savepoint; after a write it works.",
        ),
    ),
    Client(
        "django",
        "HTTP v1",
        ("django-libsql-backend", "django"),
        "django_project",
        remarks=(
            "The client keeps the writes of an atomic block and sends them as one batch at its end, or when something "
            "has to be read before (also for `create()`, which wants its key). What was sent is committed: a block "
            "that fails later does not undo it.",
            "It does not look at errors inside such a batch: a statement that violates a constraint there is left out, "
            "the others are committed, and nothing is raised. Outside of a block `IntegrityError` is raised as usual.",
        ),
    ),
    Client("npm-libsql-http", "HTTP v2", ("@libsql/client",), script="libsql.mjs"),
    Client("npm-libsql-ws", "WebSocket", ("@libsql/client",), script="libsql.mjs"),
    Client("npm-serverless", "HTTP v3", ("@tursodatabase/serverless",), script="serverless.mjs"),
    Client(
        "npm-serverless-compat",
        "HTTP v3, `/compat`",
        ("@tursodatabase/serverless",),
        script="libsql.mjs",
        remarks=("It has no `intMode`: integers are read as JavaScript numbers, exact up to 2^53.",),
    ),
    Client("drizzle", "HTTP v2", ("drizzle-orm", "@libsql/client"), script="drizzle.mjs"),
    Client("kysely", "HTTP v2", ("kysely", "@libsql/kysely-libsql"), script="kysely.mjs"),
)


def installed(client: Client) -> str:
    """Why the client cannot be run here, or nothing. PyPI's are development dependencies: they always can."""
    if client.module or (
        which("node") and all((JAVASCRIPT / "node_modules" / name).is_dir() for name in client.packages)
    ):
        return ""
    return "node or the npm packages are not installed: `make clients`"


@dataclass
class Outcome:
    """What became of each step: its result (`steps.py`) and its detail."""

    steps: dict[str, tuple[str, str]] = field(default_factory=dict)


class _Run:
    """One client process, read line by line in the thread that owns it."""

    def __init__(self, client: Client, url: str) -> None:
        pipe = subprocess.PIPE
        self._client = client
        self._popen = subprocess.Popen(
            client.command(url), stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, encoding="utf-8"
        )
        self._deadline = threading.Timer(LONGEST_SECONDS, self._popen.kill)  # nothing a client does may hang the test
        self._deadline.start()
        self._errors: list[str] = []
        assert self._popen.stderr is not None
        self._drain = threading.Thread(target=self._errors.extend, args=(self._popen.stderr,))
        self._drain.start()
        self.outcome = Outcome()

    def read(self, until: str) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            told = json.loads(line)
            if told["step"] in STEPS:
                self.outcome.steps[told["step"]] = (told["result"], told["detail"])
            if told["step"] == until:
                return
        self._popen.wait()
        self._drain.join()
        said = f"{self._client.name} ended with {self._popen.returncode} before '{until}':\n{''.join(self._errors)}"
        for step in STEPS:
            self.outcome.steps.setdefault(step, ("error", said))

    def go_on(self) -> None:
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; `read` finds out and says what it said
            self._popen.stdin.write("\n")
            self._popen.stdin.flush()

    def end(self) -> None:
        self._deadline.cancel()
        self._popen.kill()
        self._popen.wait()
        self._drain.join()
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):  # what could not be written is still in the buffer
                    pipe.close()


def run_all(url: str, clients: tuple[Client, ...] = CLIENTS) -> dict[str, Outcome]:
    """Each client's outcome by name. All share one proxy, database and pause."""
    runs: list[_Run] = []

    def until_pause(client: Client) -> _Run:
        run = _Run(client, url)
        runs.append(run)
        run.read("paused")
        return run

    try:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            started = dict(zip([client.name for client in clients], pool.map(until_pause, clients), strict=True))
        time.sleep(IDLE_SECONDS)  # the one thing under test is time passing
        for run in started.values():
            run.go_on()
        for run in started.values():
            run.read("idle")
    finally:
        for run in runs:
            run.end()
    return {name: run.outcome for name, run in started.items()}


_CELLS = {"ok": "yes", "absent": "no", "error": "**fails**"}


def row(client: Client, outcome: Outcome) -> str:
    """The client's line of the table."""
    cells = [_CELLS[outcome.steps[step][0]] for step in STEPS]
    return f"| {client.versions()} | {client.over} | {' | '.join(cells)} |"


def render(outcomes: dict[str, Outcome]) -> str:
    """The generated part of docs/clients.md: the table, and under it what to know about each client."""
    head = ["client", "over", *(TITLES[step] for step in STEPS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [row(client, outcomes[client.name]) for client in CLIENTS]
    notes = []
    for client in CLIENTS:
        steps = outcomes[client.name].steps
        reasons = dict.fromkeys(detail for result, detail in steps.values() if result == "absent")
        remarks = [f"{reason[0].upper()}{reason[1:]}." for reason in reasons] + list(client.remarks)
        notes += [f"- `{client.packages[0]}` ({client.over}): {remark}" for remark in remarks]
    return "\n".join([*lines, "", *notes])


def replaced(page: str, block: str) -> str:
    """The page with its generated part exchanged for `block`."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


@contextmanager
def own_cluster(directory: Path) -> Iterator[str]:
    from tests.cluster.harness import Up

    up = Up(directory / "data")
    try:
        yield up.start().url
    finally:
        up.end()


def main() -> int:
    missing = {client.name: why for client in CLIENTS if (why := installed(client))}
    if missing:
        sys.stderr.write(f"the table needs every client; missing: {missing}\n")
        return 1
    with tempfile.TemporaryDirectory(prefix="walship-clients-") as directory, own_cluster(Path(directory)) as url:
        outcomes = run_all(url)
    errors = [
        f"{name}: {step}: {detail}"
        for name, outcome in outcomes.items()
        for step, (result, detail) in outcome.steps.items()
        if result == "error"
    ]
    if errors:
        sys.stderr.write("\n".join([*errors, "not written: the table is for what works", ""]))
        return 1
    PAGE.write_text(replaced(PAGE.read_text("utf-8"), render(outcomes)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
