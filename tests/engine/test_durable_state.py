"""The durable state record: whole after every crash, never guessed at, and it never takes a promise back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.engine.durable_state import STATE_FILE, DurableState, StateFile, Truth, WalBase
from walship.errors import CorruptState, Fenced, StorageFailed, UsageError
from walship.formats.position import Position, Tip

ROOT = Path(__file__).parents[2]
NODE = "0123456789abcdef" * 2
FRESH = DurableState(node_id=NODE, name="a", cluster_id=None, database_path="/data/app.db")
U32, U64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
PAIRS = st.tuples(U32, U32)
MARKS = st.builds(Tip, st.builds(Position, U64, U64), U64, U32)
STATES = st.builds(
    DurableState,
    node_id=st.just(NODE),
    name=st.text(max_size=20),
    cluster_id=st.none() | st.just(NODE[::-1]),
    database_path=st.text(max_size=20),
    promised=U64,
    truth=st.sampled_from(Truth),
    led=st.none() | U64,
    base=st.none() | st.builds(WalBase, U64, PAIRS, U32, PAIRS),
    next_base=st.none() | U64,
    mark=st.none() | MARKS,
    installing=st.none() | st.just({"file": "x"}),
)


@given(state=STATES)
def test_a_record_comes_back_as_it_was_written(state: DurableState) -> None:
    assert DurableState.parse(state.to_bytes()) == state


@given(data=st.data())
def test_a_damaged_or_cut_record_is_never_read(data: st.DataObject) -> None:
    whole = replace(FRESH, mark=Tip(Position(1, 2), 3, 4)).to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    mask = data.draw(st.integers(0, 255))
    damaged = whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1 :] if mask else whole[:at]
    with pytest.raises(CorruptState):
        DurableState.parse(damaged)


@given(data=st.binary(max_size=200))
def test_any_other_bytes_are_refused_by_name(data: bytes) -> None:
    with pytest.raises(CorruptState):
        DurableState.parse(data)


def test_an_update_is_on_disk_when_it_returns(tmp_path: Path) -> None:
    file = StateFile.create(tmp_path, FRESH)
    base = WalBase(9, (1, 2), 3, (4, 5))
    changed = file.update(promised=3, truth=Truth.WAL, led=3, base=base, mark=Tip(Position(3, 9), 1 << 63, 2))
    assert file.state is changed
    assert StateFile.open(tmp_path).state == changed
    assert changed.base == base
    assert list(tmp_path.iterdir()) == [tmp_path / STATE_FILE]


def test_the_record_can_be_read_by_eye(tmp_path: Path) -> None:
    StateFile.create(tmp_path, FRESH).update(promised=12)
    assert '"promised": 12' in (tmp_path / STATE_FILE).read_text()


def test_a_promise_is_never_taken_back(tmp_path: Path) -> None:
    """Invariant I3: promised only grows."""
    file = StateFile.create(tmp_path, replace(FRESH, promised=5))
    with pytest.raises(Fenced, match="term 4 is over"):
        file.update(promised=4, truth=Truth.WAL)
    assert file.state == StateFile.open(tmp_path).state == replace(FRESH, promised=5)


def test_a_second_node_is_not_made_in_the_same_directory(tmp_path: Path) -> None:
    StateFile.create(tmp_path, FRESH)
    assert StateFile.exists(tmp_path)
    with pytest.raises(UsageError, match="belongs to a node already"):
        StateFile.create(tmp_path, FRESH)


def test_a_missing_or_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    assert not StateFile.exists(tmp_path)
    with pytest.raises(CorruptState, match="is missing"):
        StateFile.open(tmp_path)
    (tmp_path / STATE_FILE).write_bytes(FRESH.to_bytes()[:-5])
    with pytest.raises(CorruptState, match="move the directory away"):
        StateFile.open(tmp_path)


@pytest.mark.parametrize("wrong", ["", "0123", NODE.upper(), "g" * 32])
def test_an_id_that_is_no_id_is_refused(wrong: str) -> None:
    with pytest.raises(CorruptState, match="32 lower-case hex digits"):
        replace(FRESH, node_id=wrong)


def test_updates_of_several_threads_are_all_kept(tmp_path: Path) -> None:
    file = StateFile.create(tmp_path, FRESH)
    fields = ["led", "next_base", "name"]

    def work(field: str) -> None:
        for number in range(1, 21):
            file.update(**{field: str(number) if field == "name" else number})

    threads = [threading.Thread(target=work, args=(field,)) for field in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert StateFile.open(tmp_path).state == replace(FRESH, led=20, next_base=20, name="20")


@pytest.mark.parametrize(("failpoint", "promised"), [("state.temp_written:2", 0), ("state.renamed:2", 7)])
def test_a_death_in_between_leaves_the_old_record_or_the_new_one(tmp_path: Path, failpoint: str, promised: int) -> None:
    script = """
import sys
from pathlib import Path
from walship.engine.durable_state import DurableState, StateFile
state = DurableState(node_id=sys.argv[2], name="a", cluster_id=None, database_path="x")
StateFile.create(Path(sys.argv[1]), state).update(promised=7)
"""
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), NODE],
        env={**os.environ, "PYTHONPATH": str(ROOT), "WALSHIP_FAILPOINT": failpoint},
        check=False,
        timeout=20,
    )
    assert result.returncode == -signal.SIGKILL
    file = StateFile.open(tmp_path)
    assert file.state.promised == promised
    assert list(tmp_path.iterdir()) == [tmp_path / STATE_FILE]
    file.update(promised=8)
    assert StateFile.open(tmp_path).state.promised == 8


def test_a_full_disk_leaves_the_old_record_and_may_be_tried_again(tmp_path: Path) -> None:
    file = StateFile.create(tmp_path, FRESH)
    blocked = tmp_path / "state.new"
    blocked.mkdir()  # nothing can be written under that name
    with pytest.raises(StorageFailed, match="is unchanged"):
        file.update(promised=1)
    assert file.state == stored(tmp_path) == FRESH
    blocked.rmdir()
    assert file.update(promised=1).promised == 1


def test_a_failed_rename_is_final(tmp_path: Path) -> None:
    """Nobody knows any more which record a power cut would leave."""
    file = StateFile.create(tmp_path, FRESH)
    (tmp_path / STATE_FILE).unlink()
    (tmp_path / STATE_FILE).mkdir()  # a file cannot be renamed over a directory
    for _ in range(2):
        with pytest.raises(StorageFailed, match="process must end"):
            file.update(promised=1)
    assert file.state == FRESH


def stored(directory: Path) -> DurableState:
    return DurableState.parse((directory / STATE_FILE).read_bytes())
