"""The command line as a user meets it: exit codes, words instead of tracebacks, JSON and plain text."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import apsw
import pytest
import typer.main

from walship.cli import main
from walship.cli.app import app
from walship.cli.output import rich_table
from walship.config import NODE, ORDER, PROXY, STATUS, UP, Setting
from walship.coordination.file_store import HeldLock

STATUS_OF_PROXY = {
    "cluster": "ab" * 16,
    "term": 3,
    "leader": "node1",
    "ack": 1,
    "failover": "not in this version",
    "nodes": [
        {"name": "node1", "role": "leader", "healthy": True, "term": 3, "txid": 41, "durable_txid": 41, "pid": 7},
        {"name": "node2", "role": "follower", "healthy": False, "term": 3, "txid": 40, "lag_seconds": 0.25},
    ],
    "proxy": {"url": "http://127.0.0.1:8080"},
}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "walship", *arguments], check=False, capture_output=True, text=True, timeout=60
    )


@contextlib.contextmanager
def serving(body: bytes, status: int = 200) -> Iterator[str]:
    """A web server that answers everything with `body`; its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("name", "table", "more"),
    [("node", NODE, ""), ("proxy", PROXY, ""), ("up", UP, ""), ("status", STATUS, ""), ("switchover", ORDER, "to")],
)
def test_every_setting_is_a_flag_and_every_flag_a_setting(name: str, table: tuple[Setting, ...], more: str) -> None:
    """`more`: a flag that says what is to be done and is no setting."""
    parameters = typer.main.get_command(app).commands[name].params  # type: ignore[attr-defined]
    flags = {option.lstrip("-") for parameter in parameters for option in parameter.opts}
    assert flags - {"config", more} == {setting.flag for setting in table}


@pytest.mark.parametrize("name", ["up", "node", "proxy", "status", "switchover"])
def test_help_teaches_with_examples(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    assert f"walship {name}" in capsys.readouterr().out.split("Example")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "No such command"),
        (["up", "--followers"], "requires an argument"),
        (["up", "--followers", "many"], "--followers = 'many' is not allowed; allowed: 0 to 16"),
        (["node", "--name", "a"], "--cluster is missing"),
        (["proxy", "--cluster", "etcd://u:hush@host"], "u:***@host': after the hosts stands the cluster's name"),
        (["status", "ftp://host"], "is not allowed"),
        (["up", "--config", "/absent.toml"], "cannot be read"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2_and_no_traceback(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert words in output.err
    assert output.err.startswith("walship: ")
    assert "Traceback" not in output.err


def test_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(r"walship \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert main([]) == 2
    assert "Usage" in capsys.readouterr().out


def test_status_in_plain_text_for_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(json.dumps(STATUS_OF_PROXY).encode()) as url:
        assert main(["status", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "leader node1" in lines[0]
    assert lines[3].split()[:5] == ["node1", "leader", "yes", "3.41", "3.41"]
    assert lines[4].split()[:7] == ["node2", "follower", "no", "3.40", "-", "-", "0.250"]


def test_status_as_json_is_the_reply(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(json.dumps(STATUS_OF_PROXY).encode()) as url:
        assert main(["status", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == STATUS_OF_PROXY


def test_status_of_a_node_is_shown_key_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(b'{"name": "node1", "role": "leader", "term": 3}') as url:
        assert main(["status", url]) == 0
    assert ["role", "leader"] in [line.split() for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [(b"hello", 200, "is not JSON"), (b"[]", 200, "not an object"), (b"", 404, "answered 404")],
)
def test_status_of_something_else_is_said(
    body: bytes, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(body, code) as url:
        assert main(["status", url]) == 1
    assert words in capsys.readouterr().err


def test_status_of_nobody_is_exit_code_1_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert main(["status", f"http://127.0.0.1:{port}"]) == 1
    assert "Start it with: walship up" in capsys.readouterr().err


def test_up_on_a_busy_port_changes_nothing(tmp_path: Path) -> None:
    database = tmp_path / "app.db"
    with contextlib.closing(apsw.Connection(str(database))) as db:
        db.execute("CREATE TABLE t (x)")
    before = database.read_bytes()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        done = command("up", str(database), "--listen", listen, "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "Address already in use" in done.stderr
    assert database.read_bytes() == before
    assert not list((tmp_path / "data").glob("node*"))


def test_a_second_up_on_the_same_data_is_refused(tmp_path: Path) -> None:
    with HeldLock(tmp_path / "up.lock"):
        done = command("up", "--listen", "127.0.0.1:0", "--data", str(tmp_path))
    assert done.returncode == 2
    assert "in use by another live process" in done.stderr


def test_up_on_a_foreign_file_is_one_clear_paragraph(tmp_path: Path) -> None:
    (tmp_path / "app.db").write_text("not a database, however hard one looks at it\n" * 10)
    done = command("up", str(tmp_path / "app.db"), "--listen", "127.0.0.1:0", "--data", str(tmp_path / "data"))
    assert done.returncode == 2
    assert "is not a SQLite database" in done.stderr
    assert "The file was not changed." in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_up_where_nothing_can_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = command("up", "--listen", "127.0.0.1:0", "--data", str(tmp_path / "file" / "data"))
    assert done.returncode == 2
    assert "Name a directory this user can write" in done.stderr


def test_up_never_founds_a_cluster_over_a_nodes_data(tmp_path: Path) -> None:
    """R1: the store is gone, the nodes' data is not."""
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "state").write_text("{}")
    done = command("up", "--listen", "127.0.0.1:0", "--data", str(tmp_path))
    assert done.returncode == 2
    assert "the record was lost" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_modules_load_ends_it_without_a_traceback(tmp_path: Path, number: signal.Signals) -> None:
    """Not by the signal itself: that pid 1 of a container ends at all needs a handler. 0 if it had begun by then."""
    arguments = ["up", "--listen", "127.0.0.1:0", "--data", str(tmp_path)]
    with subprocess.Popen(
        [sys.executable, "-X", "importtime", "-m", "walship", *arguments], stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        said = next(line for line in process.stderr if line.endswith(" typer._click.exceptions\n"))
        process.send_signal(number)
        said += process.communicate(timeout=60)[1]
    assert process.returncode in (0, 128 + number)
    assert "Traceback" not in said


@pytest.mark.parametrize(("width", "columns"), [(200, ["node", "role", "url"]), (30, ["node", "role"])])
def test_a_table_leaves_out_what_is_empty_and_what_does_not_fit(width: int, columns: list[str]) -> None:
    rows = [("node1", "leader", "-", "http://127.0.0.1:40001")]
    table = rich_table("title", ("node", "role", "zone", "url"), rows, width=width)
    assert [column.header for column in table.columns] == columns
