"""Settings: one meaning for flag, environment and file; every mistake named with what is allowed."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walship.config import (
    NODE,
    PROXY,
    STATUS,
    UP,
    NodeConfig,
    ProxyConfig,
    StatusConfig,
    UpConfig,
    build,
    environment_name,
)
from walship.errors import UsageError

NODE_FLAGS = {"name": "a", "data": "/d", "cluster": "file:///s"}


def node(**flags: object) -> NodeConfig:
    given = {name.replace("_", "-"): value for name, value in flags.items()}
    return build(NodeConfig, NODE_FLAGS | given, environ={})


def test_a_flag_beats_the_environment_which_beats_the_file(tmp_path: Path) -> None:
    file = tmp_path / "walship.toml"
    file.write_text('[up]\nfollowers = 3\nlisten = "127.0.0.1:1"\nack = 0\n[proxy]\nname = "p"\n')
    config = build(
        UpConfig,
        {"followers": "5", "listen": None},
        environ={"WALSHIP_FOLLOWERS": "4", "WALSHIP_LISTEN": "127.0.0.1:2"},
        config_file=file,
    )
    assert (config.followers, config.listen_port, config.ack) == (5, 2, 0)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UsageError) as caught:
        build(NodeConfig, {"cluster": "etcd://h", "priority": "high"}, environ={"WALSHIP_LOG_MAX": "lots"})
    words = str(caught.value)
    assert len(words.splitlines()) == 5
    for part in ("--name is missing", "--data is missing", "the cluster's name", "-100 to 100", "WALSHIP_LOG_MAX ="):
        assert part in words


@pytest.mark.parametrize(
    ("flag", "value", "field", "expected"),
    [
        ("log_max", "512MiB", "log_max_bytes", 512 << 20),
        ("log_max", "2g", "log_max_bytes", 2 << 30),
        ("log_max", 8388608, "log_max_bytes", 8 << 20),
        ("listen", ":0", "listen_host", "127.0.0.1"),
        ("listen", "9001", "listen_port", 9001),
        ("listen", "[::1]:9001", "listen_host", "::1"),
        ("listen", "example.org:9001", "listen_host", "example.org"),
        ("init", "true", "init", True),
        ("replace_local", "0", "replace_local", False),
        ("advertise", "http://h:1/", "advertise", "http://h:1"),
        ("drain_seconds", "2.5", "drain_seconds", 2.5),
        ("zone", "eu-1", "zone", "eu-1"),
    ],
)
def test_values_are_read(flag: str, value: object, field: str, expected: object) -> None:
    assert getattr(node(**{flag: value}), field) == expected


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("name", "-a"),
        ("name", "a/b"),
        ("name", "a" * 64),
        ("name", 7),
        ("log_max", "1MiB"),
        ("log_max", "-5"),
        ("log_max", "1e9"),
        ("log_max", True),
        ("listen", "h:65536"),
        ("listen", "http://h:1"),
        ("listen", "a:b:1"),
        ("listen", ""),
        ("advertise", "h:1"),
        ("advertise", "ftp://h"),
        ("drain_seconds", "nan"),
        ("drain_seconds", "inf"),
        ("drain_seconds", "soon"),
        ("priority", "101"),
        ("priority", "1.5"),
        ("init", "maybe"),
        ("log_level", "loud"),
        ("database", ""),
        ("data", "a\0b"),
    ],
)
def test_values_that_cannot_work_are_refused_with_key_and_allowed(flag: str, value: object) -> None:
    with pytest.raises(UsageError, match=rf"--{flag.replace('_', '-')} = .* is not allowed; allowed: "):
        node(**{flag: value})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "not TOML"),
        ("[nodes]\nname = 'a'", "unknown nodes; allowed: the tables node, order, proxy, status, up"),
        ("[node]\nnam = 'a'", r"\[node\] has nam; allowed: ack, admin-token, advertise"),
        ("node = 3", "a value where a table belongs"),
        ("[node]\npriority = 'x'", r"\[node\] priority in .* is not allowed"),
    ],
)
def test_a_file_is_checked_as_strictly_as_flags(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "walship.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=words):
        build(NodeConfig, NODE_FLAGS, environ={}, config_file=file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        build(ProxyConfig, {"cluster": "file:///s"}, environ={}, config_file=tmp_path / "absent.toml")


def test_a_founder_asks_for_one_acknowledgment_when_it_can_be_had() -> None:
    assert node(init=True).ack == 0
    assert node(init=True, voters="a,b,c").ack == 1
    assert node(init=True, voters=["a", "b", "c"], ack="2").ack == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"init": True, "ack": 1}, "--ack 1 can never be met"),
        ({"init": True, "voters": "a,b", "ack": 2}, "allowed: 0 to 1"),
        ({"init": True, "voters": "b,c"}, "lacks this node"),
        ({"init": True, "voters": "a,a"}, "each once"),
        ({"ack": 1}, "part of founding"),
        ({"voters": "a,b"}, "part of founding"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(flags: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        node(**flags)


def test_more_acknowledgments_than_followers_are_refused() -> None:
    with pytest.raises(UsageError, match="--ack 3 can never be met: of 3 voters"):
        build(UpConfig, {"ack": "3"}, environ={})
    assert build(UpConfig, {"followers": "0"}, environ={}).ack is None


TABLES = [(NodeConfig, setting.flag) for setting in NODE] + [(UpConfig, setting.flag) for setting in UP]
TABLES += [(ProxyConfig, setting.flag) for setting in PROXY] + [(StatusConfig, setting.flag) for setting in STATUS]


@given(
    st.sampled_from(TABLES),
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.lists(st.text()), st.binary()),
)
def test_no_value_of_any_type_gets_past_as_another_exception(key: tuple[type[NodeConfig], str], raw: object) -> None:
    """A TOML file can hold anything."""
    kind, flag = key
    with contextlib.suppress(UsageError):
        build(kind, NODE_FLAGS | {flag: raw}, environ={})


def test_environment_names_follow_the_flags() -> None:
    assert environment_name("log-keep-seconds") == "WALSHIP_LOG_KEEP_SECONDS"
