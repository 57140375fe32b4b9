"""The store on a real etcd that is killed, paused, compacted, protected: what it says; watches lose nothing."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.coordination.etcd import Etcd, free_ports
from tests.coordination.test_store import next_change
from walship.coordination import etcd_store as module
from walship.coordination.etcd_store import EtcdStore
from walship.coordination.etcd_url import parse_etcd_url
from walship.coordination.store import Change, Versioned
from walship.errors import StoreUnavailable


@pytest.fixture
def start_etcd(tmp_path: Path) -> Iterator[Callable[..., Etcd]]:
    """Makes a started etcd; ends it whatever happens."""
    started: list[Etcd] = []

    def start(members: int = 1, **settings: Any) -> Etcd:
        etcd = Etcd(tmp_path / "etcd", members, **settings)
        started.append(etcd)
        return etcd.start()

    yield start
    for each in started:
        each.end()


@contextlib.asynccontextmanager
async def opened(url: str, **settings: float) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(parse_etcd_url(url), **settings)
    try:
        yield store
    finally:
        await store.close()


async def test_a_call_rides_through_a_restart_and_versions_go_on(start_etcd: Callable[..., Etcd]) -> None:
    """Killed, not stopped: what was answered is there afterwards, and no version comes again."""
    etcd = start_etcd()
    async with opened(etcd.url(), deadline_seconds=30.0) as store:
        version = await store.put_if("k", b"1", version=None)
        etcd.kill()
        waiting = asyncio.create_task(store.put_if("k", b"2", version=version))
        await asyncio.sleep(0)
        etcd.start_member(0)
        newer = await waiting
        assert newer > version
        assert await store.get("k") == Versioned(b"2", newer)


async def test_an_etcd_that_is_away_is_unavailable_within_the_deadline_and_nothing_was_changed() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with opened(f"etcd://127.0.0.1:{free_ports(1)[0]}/n", deadline_seconds=0.3) as store:
        with pytest.raises(StoreUnavailable, match=r"cannot be reached.*Nothing was changed"):
            await store.put_if("k", b"", version=None)
    assert loop.time() - began < 5


async def test_a_change_without_an_answer_may_have_happened_and_a_read_says_so(start_etcd: Callable[..., Etcd]) -> None:
    """store.py: after StoreUnavailable read again. A stopped etcd takes the request from its socket when it goes on."""
    etcd = start_etcd()
    async with opened(etcd.url(), deadline_seconds=0.5) as store:
        version = await store.put_if("k", b"1", version=None)
        etcd.pause()
        with pytest.raises(StoreUnavailable, match="may or may not have happened: read it again"):
            await store.put_if("k", b"2", version=version)
        with pytest.raises(StoreUnavailable, match="Nothing was changed"):
            await store.get("k")
        etcd.resume()
        etcd.wait_ready()
        seen = await store.get("k")
        assert seen is not None
        assert seen.value in (b"1", b"2")


async def test_members_that_are_gone_or_hang_are_left_for_the_next(start_etcd: Callable[..., Etcd]) -> None:
    """Three members: first the one in use is killed, then, started anew, the next one hangs."""
    etcd = start_etcd(3)
    async with opened(etcd.url(), deadline_seconds=20.0) as store:
        version = await store.put_if("k", b"1", version=None)
        etcd.kill(0)
        await store.get("k")
        version = await settled(store, version, b"2")
        etcd.start_member(0)
        etcd.wait_ready(0)
        etcd.pause(1)
        seen = await store.get("k")
        assert seen is not None
        assert seen.value == b"2"
        await settled(store, version, b"3")
        etcd.resume(1)


async def streaming(store: EtcdStore) -> None:
    """Until a watch waits in its stream, no longer in its list."""
    async with asyncio.timeout(5):
        while not store._patience:  # noqa: ASYNC110  the set of those that wait is no event
            await asyncio.sleep(0.01)


async def settled(store: EtcdStore, version: int, value: bytes) -> int:
    """Change `k` as a caller has to: after no answer, look; an election may be going on."""
    while True:
        try:
            return await store.put_if("k", value, version=version)
        except StoreUnavailable:
            seen = await store.get("k")
            assert seen is not None
            if seen.value == value:
                return seen.version


async def test_a_watch_tells_what_happened_while_etcd_was_away(start_etcd: Callable[..., Etcd]) -> None:
    etcd = start_etcd()
    async with opened(etcd.url()) as store, opened(etcd.url(), deadline_seconds=30.0) as other:
        kept = await other.put_if("kept", b"1", version=None)
        gone = await other.put_if("gone", b"1", version=None)
        async with contextlib.aclosing(store.watch("")) as changes:
            assert {(await next_change(changes)).key for _ in range(2)} == {"kept", "gone"}
            waiting = asyncio.create_task(next_change(changes))
            etcd.kill()
            etcd.start_member(0)
            await other.delete("gone", version=gone)
            newer = await other.put_if("kept", b"2", version=kept)
            seen = [await waiting, await next_change(changes)]
            assert sorted(seen, key=lambda change: change.key) == [
                Change("gone", None),
                Change("kept", Versioned(b"2", newer)),
            ]


async def test_a_watch_goes_on_after_a_compaction_it_slept_through(start_etcd: Callable[..., Etcd]) -> None:
    """The reader does not come back before the revision it would go on from is compacted away, and etcd restarted."""
    etcd = start_etcd()
    async with opened(etcd.url()) as store, opened(etcd.url(), deadline_seconds=30.0) as other:
        version = await other.put_if("k", b"0", version=None)
        async with contextlib.aclosing(store.watch("")) as changes:
            await next_change(changes)
            etcd.kill()
            etcd.start_member(0)
            for number in range(1, 20):
                version = await other.put_if("k", str(number).encode(), version=version)
            etcd.compact()
            assert await next_change(changes) == Change("k", Versioned(b"19", version))


async def test_a_stream_from_a_compacted_revision_asks_for_a_new_list(start_etcd: Callable[..., Etcd]) -> None:
    """The compaction between a list and its stream: the stream ends at once, without an error and without a change."""
    etcd = start_etcd()
    async with opened(etcd.url()) as store:
        first = await store.put_if("k", b"0", version=None)
        await store.put_if("k", b"1", version=first)
        etcd.compact()
        async with asyncio.timeout(module.SILENCE_SECONDS / 2):
            assert [change async for change in store._events("", first)] == []


async def test_a_stream_that_does_not_begin_is_given_up(start_etcd: Callable[..., Etcd]) -> None:
    """A member that was stopped between the list and the stream takes the connection, and says nothing."""
    etcd = start_etcd()
    async with opened(etcd.url()) as store:
        etcd.pause()
        async with asyncio.timeout(module.READ_SECONDS * 5):
            with pytest.raises(StoreUnavailable, match="no watch within"):
                assert [change async for change in store._events("", 1)] == []
    etcd.resume()


async def test_a_watch_leaves_a_member_that_hangs(start_etcd: Callable[..., Etcd]) -> None:
    """A stream to a stopped member is silent and open; the belt looks elsewhere."""
    etcd = start_etcd(3)
    async with opened(etcd.url()) as store, opened(etcd.url(only=2), deadline_seconds=20.0) as other:
        version = await other.put_if("k", b"1", version=None)
        async with contextlib.aclosing(store.watch("")) as changes:
            await next_change(changes)
            waiting = asyncio.create_task(anext(changes))
            await streaming(store)
            etcd.pause(0)
            newer = await settled(other, version, b"2")
            async with asyncio.timeout(20):
                assert await waiting == Change("k", Versioned(b"2", newer))
        etcd.resume(0)


async def test_a_watch_that_waits_ends_when_the_store_closes(start_etcd: Callable[..., Etcd]) -> None:
    store = EtcdStore(parse_etcd_url(start_etcd().url()))
    changes = store.watch("")
    waiting = asyncio.create_task(anext(changes))
    await streaming(store)
    loop = asyncio.get_running_loop()
    began = loop.time()
    await store.close()
    with pytest.raises(StopAsyncIteration):
        await waiting
    assert loop.time() - began < module.SILENCE_SECONDS / 2
    await store.close()


# --- authentication and TLS -------------------------------------------------------------------------------------


def text(data: str) -> str:
    return base64.b64encode(data.encode()).decode()


def protect(etcd: Etcd) -> None:
    """Users `root` and `app`; app may use the keys of the cluster `test` only. Then authentication is on."""
    end = "walship/test0"  # "0" follows "/"
    permission = {"permType": "READWRITE", "key": text("walship/test/"), "range_end": text(end)}
    for path, body in (
        ("user/add", {"name": "root", "password": "root"}),
        ("role/add", {"name": "root"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("user/add", {"name": "app", "password": "s@cret/1"}),
        ("role/add", {"name": "app"}),
        ("role/grant", {"name": "app", "perm": permission}),
        ("user/grant", {"user": "app", "role": "app"}),
        ("enable", {}),
    ):
        done = etcd.call(f"/v3/auth/{path}", body)
        assert done.status_code == 200, done.text


async def test_a_user_works_under_its_own_prefix_and_gets_a_new_token_when_etcd_forgot_it(
    start_etcd: Callable[..., Etcd],
) -> None:
    etcd = start_etcd()
    protect(etcd)
    login = "app:s%40cret%2F1@"
    async with opened(etcd.url(login=login), deadline_seconds=30.0) as store:
        version = await store.put_if("k", b"1", version=None)
        async with contextlib.aclosing(store.watch("")) as changes:
            await next_change(changes)
            waiting = asyncio.create_task(next_change(changes))
            etcd.kill()
            etcd.start_member(0)
            store._token = "forgotten.7"  # a short restart replays logins; after five minutes without use it would not
            version = await store.put_if("k", b"2", version=version)
            assert await waiting == Change("k", Versioned(b"2", version))
    async with opened(etcd.url("other", login=login)) as store:
        with pytest.raises(StoreUnavailable, match="permission denied"):
            await store.list("")


@pytest.mark.parametrize("login", ["", "app:wrong@", "nobody:x@"])
async def test_a_wrong_login_is_told_at_once(start_etcd: Callable[..., Etcd], login: str) -> None:
    etcd = start_etcd()
    protect(etcd)
    async with opened(etcd.url(login=login), deadline_seconds=30.0) as store:
        async with asyncio.timeout(10):
            with pytest.raises(StoreUnavailable, match=r"refused.*check the user") as caught:
                await store.put_if("k", b"1", version=None)
        assert "wrong" not in str(caught.value)


def authority(root: Path) -> Path:
    """A new authority (ca.pem), and a certificate of 127.0.0.1 signed by it (cert.pem, key.pem)."""
    root.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    ca_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    ca_name, name = (x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, each)]) for each in ("ca", "etcd"))

    def sign(subject: x509.Name, public: ec.EllipticCurvePublicKey, *extensions: x509.ExtensionType) -> bytes:
        builder = x509.CertificateBuilder()
        builder = builder.issuer_name(ca_name).subject_name(subject).public_key(public)
        builder = builder.serial_number(x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        for each in extensions:
            builder = builder.add_extension(each, critical=isinstance(each, x509.BasicConstraints))
        return builder.sign(ca_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (root / "ca.pem").write_bytes(sign(ca_name, ca_key.public_key(), x509.BasicConstraints(ca=True, path_length=None)))
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    (root / "cert.pem").write_bytes(sign(name, key.public_key(), names))
    private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    (root / "key.pem").write_bytes(key.private_bytes(*private))
    return root


async def test_tls_with_a_client_certificate_and_nothing_less(start_etcd: Callable[..., Etcd], tmp_path: Path) -> None:
    at, stranger = authority(tmp_path / "tls"), authority(tmp_path / "stranger")
    words = ("--cert-file", f"{at}/cert.pem", "--key-file", f"{at}/key.pem")
    judge = ("--client-cert-auth", "--trusted-ca-file", f"{at}/ca.pem")
    url = start_etcd(words=(*words, *judge), web="https").url()
    async with opened(f"{url}?ca={at}/ca.pem&cert={at}/cert.pem&key={at}/key.pem", deadline_seconds=30.0) as store:
        version = await store.put_if("k", b"1", version=None)
        assert await store.get("k") == Versioned(b"1", version)
    for wrong in (f"{url}?ca={stranger}/ca.pem", url, f"{url}?ca={at}/ca.pem", url.replace("etcds:", "etcd:")):
        async with opened(wrong, deadline_seconds=0.3) as store:
            with pytest.raises(StoreUnavailable):
                await store.get("k")
