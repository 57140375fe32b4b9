"""Cluster URLs of etcd: what they mean, and what is refused in words (design.md 6)."""

from __future__ import annotations

from pathlib import Path

import pytest

from walship.coordination.etcd_url import EtcdAddress, hide_password, parse_etcd_url
from walship.coordination.store import check_store_url, open_store
from walship.errors import UsageError


def test_hosts_get_the_default_port_and_the_name_its_own_keys() -> None:
    address = check_store_url("etcd://a,10.0.0.2:2380,[::1]:9/shop")
    assert address == EtcdAddress(("http://a:2379", "http://10.0.0.2:2380", "http://[::1]:9"), "shop")
    assert address.prefix == "walship/shop/"


def test_a_login_is_unescaped_and_not_shown() -> None:
    url = "etcds://me:p%40ss%2Fw@h/n?ca=/c&cert=/x&key=/k"
    address = parse_etcd_url(url)
    assert (address.user, address.password, address.endpoints) == ("me", "p@ss/w", ("https://h:2379",))
    assert (address.ca, address.cert, address.key) == (Path("/c"), Path("/x"), Path("/k"))
    assert "p@ss" not in repr(address) + str(address)
    assert hide_password(url) == "etcds://me:***@h/n?ca=/c&cert=/x&key=/k"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("etcd://h", "cluster's name"),
        ("etcd://h/", "cluster's name"),
        ("etcd://h/a/b", "cluster's name"),
        ("etcd:///n", "is no HOST:PORT"),
        ("etcd://h,/n", "is no HOST:PORT"),
        ("etcd://h:0/n", "is no HOST:PORT"),
        ("etcd://h:99999/n", "is no HOST:PORT"),
        ("etcd://h:x/n", "is no HOST:PORT"),
        ("etcd://h h/n", "is no HOST:PORT"),
        ("etcd://[::1/n", "not a cluster URL"),
        ("etcd://h,h:2379/n", "twice"),
        ("etcd://user@h/n", "USER:PASSWORD"),
        ("etcd://h/n#x", "no # part"),
        ("etcd://h/n?ca=/c", "etcds://"),
        ("etcds://h/n?ca=c", "absolute"),
        ("etcds://h/n?verify=no", "ca=, cert= and key="),
        ("etcds://h/n?cert=/c", "both"),
    ],
)
def test_urls_that_cannot_work_are_refused_in_words(url: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_store_url(url)


@pytest.mark.parametrize(
    "url", ["etcd://u:hush@h", "etcd://u:hu/sh@h/n", "etcd://u:hush@h,h/n", "etcd://u:hush@[::1/n"]
)
def test_no_refusal_shows_the_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_store_url(url)
    assert "hu" not in str(caught.value)


async def test_certificates_that_cannot_be_read_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be used .*absent.pem"):
        open_store(f"etcds://h/n?ca={tmp_path}/absent.pem")
