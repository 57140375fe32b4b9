"""Tokens in settings: said wrong they are refused in words that do not repeat them, and `up` hands them on unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hrana.tokens import Issuer
from walship.cli.up import _child_environment, _children, _Plan
from walship.config import NodeConfig, ProxyConfig, StatusConfig, UpConfig, build, open_gate
from walship.coordination.record import ClusterRecord
from walship.errors import AuthFailed, UsageError

SECRET = "hunter2"
RECORD = ClusterRecord(cluster_id="ab" * 16, created_ms=1, voters=("node1", "node2"), acks=1, secret="cd" * 32)


def test_a_token_comes_from_the_flag_or_the_environment() -> None:
    flags = {"cluster": "file:///srv/store"}
    assert build(ProxyConfig, flags | {"auth-token": SECRET}, environ={}).auth_token == SECRET
    assert build(ProxyConfig, flags, environ={"WALSHIP_AUTH_TOKEN": SECRET}).auth_token == SECRET
    assert build(StatusConfig, {}, environ={"WALSHIP_AUTH_TOKEN": SECRET}).auth_token == SECRET
    assert build(ProxyConfig, flags, environ={}).auth_token is None


@pytest.mark.parametrize("bad", ["", "hunter2 with blanks", "hünter2", "hunter2\n", "hunter2" * 1000])
def test_a_token_that_cannot_be_one_is_refused_and_not_repeated(bad: str) -> None:
    """Also the empty one: a variable that was not filled must not open the door."""
    with pytest.raises(UsageError, match="WALSHIP_AUTH_TOKEN is not allowed") as caught:
        build(UpConfig, {}, environ={"WALSHIP_AUTH_TOKEN": bad})
    assert SECRET not in str(caught.value)


def test_settings_do_not_show_their_token() -> None:
    assert SECRET not in repr(build(UpConfig, {"auth-token": SECRET}, environ={}))


def test_up_needs_a_token_to_ask_for_a_closed_status() -> None:
    with pytest.raises(UsageError, match="auth-token"):
        build(UpConfig, {"auth-jwt-key": "/keys.pem", "auth-status": True}, environ={})
    build(UpConfig, {"auth-jwt-key": "/keys.pem", "auth-status": True, "auth-token": SECRET}, environ={})


def test_a_key_file_is_read_at_the_start_and_its_faults_are_said(tmp_path: Path) -> None:
    path = tmp_path / "keys.pem"
    config = build(UpConfig, {"auth-jwt-key": str(path)}, environ={})
    with pytest.raises(UsageError, match=r"keys\.pem: No such file"):
        open_gate(config)
    path.write_text("hello")
    with pytest.raises(UsageError, match="no readable key"):
        open_gate(config)
    issuer = Issuer()
    path.write_bytes(issuer.pem)
    gate = open_gate(config)
    assert gate.authenticator.check_token(issuer.token()).may_write
    with pytest.raises(AuthFailed):
        gate.admit("POST", "/v2/pipeline", [])


def test_up_hands_settings_on_and_the_token_only_in_the_environment(tmp_path: Path) -> None:
    """Everybody on the machine can read a process's flags."""
    config = build(UpConfig, {"auth-jwt-key": "/keys.pem", "auth-status": True}, environ={"WALSHIP_AUTH_TOKEN": SECRET})
    children = _children(config, _Plan(RECORD, True, None, 8080, f"file://{tmp_path}"))
    assert len(children) == 3
    for child in children:
        assert SECRET not in " ".join(child._command)
        assert "--auth-jwt-key /keys.pem --auth-status" in " ".join(child._command)
    environment = _child_environment({"WALSHIP_LISTEN": "0.0.0.0:1", "WALSHIP_AUTH_TOKEN": "other"}, config)
    assert environment["WALSHIP_AUTH_TOKEN"] == SECRET
    assert "WALSHIP_LISTEN" not in environment
    without = build(UpConfig, {}, environ={})
    assert "WALSHIP_AUTH_TOKEN" not in _child_environment({}, without)


def test_records_of_before_have_no_secret_and_ask_for_nothing() -> None:
    old = ClusterRecord(cluster_id="ab" * 16, created_ms=1, voters=("node1",), acks=0)
    assert old.credential("link") == ""
    assert len({RECORD.credential("link"), RECORD.credential("replication"), RECORD.secret}) == 3


def test_a_node_takes_them_too() -> None:
    flags = {"name": "a", "data": "/srv/a", "cluster": "file:///srv/store", "auth-token": SECRET, "auth-status": "yes"}
    config = build(NodeConfig, flags, environ={})
    assert (config.auth_token, config.auth_status) == (SECRET, True)
