"""Proxies on several machines: without proof of death a recorded proxy counts as alive (R18, witness.py)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tests.coordination.etcd import Etcd, free_ports
from walship.coordination import presence as presence_module
from walship.coordination.baton_key import BATON_KEY
from walship.coordination.etcd_store import EtcdStore
from walship.coordination.etcd_url import EtcdAddress
from walship.coordination.file_store import FileStore
from walship.coordination.presence import PROXIES, Presence
from walship.coordination.store import Store, open_store
from walship.coordination.witness import ProxyRecord, SpreadWitness
from walship.errors import StoreUnavailable, UsageError

CHILD = """
import asyncio, sys
from pathlib import Path
from walship.coordination.file_store import FileStore
from walship.coordination.witness import SpreadWitness

async def main(store, locks):
    witness = SpreadWitness(Path(locks))
    print(await witness.register(FileStore(Path(store)), "proxy", "http://127.0.0.1:2"), flush=True)
    await asyncio.sleep(60)

asyncio.run(main(*sys.argv[1:]))
"""


def locks(under: Path) -> list[Path]:
    return list(under.rglob("*.lock"))


def open_to_all(directory: Path) -> None:
    directory.mkdir()
    directory.chmod(0o777)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A machine's directory of locks."""
    return tmp_path / "machine"


async def names(store: Store, witness: SpreadWitness) -> tuple[str, ...]:
    found = await store.list(PROXIES)
    return await witness.living(store, {key.removeprefix(PROXIES): state for key, state in found.items()})


async def test_a_killed_proxy_is_proven_dead_on_its_own_machine_only(tmp_path: Path, machine: Path) -> None:
    store = FileStore(tmp_path / "store")
    words = [sys.executable, "-c", CHILD, str(tmp_path / "store"), str(machine)]
    child = await asyncio.create_subprocess_exec(*words, stdout=asyncio.subprocess.PIPE)
    here, elsewhere = SpreadWitness(machine), SpreadWitness(tmp_path / "another machine")
    try:
        assert child.stdout is not None
        assert await child.stdout.readline() == b"proxy\n"
        assert await here.register(store, "proxy", "http://127.0.0.1:1") == "proxy-2"
        assert await elsewhere.register(store, "proxy", "http://127.0.0.1:1") == "proxy-3"
        assert await names(store, here) == ("proxy", "proxy-2", "proxy-3")
        child.kill()
        await child.wait()
        assert await names(store, elsewhere) == ("proxy", "proxy-2", "proxy-3")
        assert await names(store, here) == ("proxy-2", "proxy-3")
        assert await names(store, elsewhere) == ("proxy-2", "proxy-3")  # the one with proof removed the record
        assert len(locks(machine)) == 1
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
        here.release()
        elsewhere.release()
        await store.close()


@pytest.mark.parametrize("change", [{"boot_id": "of another kernel"}, {"boot_nonce": "0" * 32}, {"boot_nonce": "../x"}])
async def test_a_record_of_elsewhere_is_alive(tmp_path: Path, machine: Path, change: dict[str, str]) -> None:
    """Another boot (a directory may be shared between machines), or a lock that is not here."""
    store = FileStore(tmp_path / "store")
    gone, here = SpreadWitness(machine), SpreadWitness(machine)
    await gone.register(store, "gone", "http://127.0.0.1:1")
    await here.register(store, "proxy", "http://127.0.0.1:2")
    gone.release()
    seen = await store.get(PROXIES + "gone")
    assert seen is not None
    record = msgspec.structs.replace(msgspec.json.decode(seen.value, type=ProxyRecord), **change)
    await store.put_if(PROXIES + "gone", msgspec.json.encode(record), version=seen.version)
    assert await names(store, here) == ("gone", "proxy")
    here.release()
    await store.close()


async def test_a_record_that_cannot_be_read_is_alive(tmp_path: Path, machine: Path) -> None:
    store = FileStore(tmp_path / "store")
    here = SpreadWitness(machine)
    await here.register(store, "proxy", "http://127.0.0.1:2")
    await store.put_if(PROXIES + "later", b"of a later version", version=None)
    assert await names(store, here) == ("later", "proxy")
    here.release()
    await store.close()


async def test_a_directory_that_others_write_proves_nothing(tmp_path: Path, machine: Path) -> None:
    """Anybody could put an unlocked file there."""
    open_to_all(machine)
    store = FileStore(tmp_path / "store")
    with pytest.raises(UsageError, match="only this user can write"):
        await SpreadWitness(machine).register(store, "proxy", "http://127.0.0.1:2")
    await store.close()


async def test_a_start_without_a_store_leaves_no_file(machine: Path) -> None:
    """A supervisor may try for hours."""
    witness = SpreadWitness(machine)
    store = EtcdStore(EtcdAddress((f"http://127.0.0.1:{free_ports(1)[0]}",), "n"), deadline_seconds=0.1)
    with pytest.raises(StoreUnavailable):
        await witness.register(store, "proxy", "http://127.0.0.1:1")
    witness.release()
    assert not locks(machine)
    await store.close()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    etcd = Etcd(tmp_path / "etcd")
    try:
        yield etcd.start()
    finally:
        etcd.end()


async def test_two_proxies_at_an_etcd_know_of_each_other_until_one_leaves(
    etcd: Etcd, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(presence_module, "JOIN_SECONDS", 0.0)  # nobody writes here
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = etcd.url()
    store = open_store(url)
    await store.put_if(BATON_KEY, b"k" * 32, version=None)
    one = await Presence.join(store, url, "proxy", "http://127.0.0.1:1")
    assert one.alone
    other = await Presence.join(store, url, "proxy", "http://127.0.0.1:2")
    assert (other.name, other.others, other.alone) == ("proxy-2", ("proxy",), False)
    await one.look()
    assert not one.alone
    await other.leave()
    await one.look()
    assert one.alone
    await one.leave()
    assert list(await store.list(PROXIES)) == [BATON_KEY]
    assert not locks(tmp_path)
    await store.close()
