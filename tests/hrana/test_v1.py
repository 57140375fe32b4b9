"""Version 1 as the specification says it and as `django-libsql-backend` speaks it."""

from __future__ import annotations

import json

from walship.hrana import v1
from walship.hrana.http import Failure, Verb
from walship.hrana.json import sql_value
from walship.hrana.types import BatchRequest, ExecuteRequest


def test_arguments_may_be_in_either_dialect() -> None:
    args = [
        {"type": "float", "value": 1.5},
        {"type": "real", "value": 2.5},
        {"type": "blob", "base64": "AP8"},
        {"type": "blob", "value": "AP8="},
    ]
    named = [{"name": "a", "value": args[1]}]
    (execute, _) = v1.decode(Verb.EXECUTE, json.dumps({"stmt": {"sql": "x", "args": args}}).encode()).requests
    assert isinstance(execute, ExecuteRequest)
    assert [sql_value(value) for value in execute.stmt.args or ()] == [1.5, 2.5, b"\x00\xff", b"\x00\xff"]
    steps = [{"stmt": {"sql": "x", "named_args": named}}]
    (batch, _) = v1.decode(Verb.BATCH, json.dumps({"batch": {"steps": steps}}).encode()).requests
    assert isinstance(batch, BatchRequest)
    assert [sql_value(each.value) for each in batch.batch.steps[0].stmt.named_args or ()] == [2.5]


def test_a_blob_is_found_under_both_names_and_text_that_looks_like_one_stays() -> None:
    text = '{"type":"blob","base64":"AP8"}'
    row = [{"type": "blob", "base64": "AP8"}, {"type": "blob", "base64": ""}, {"type": "text", "value": text}]
    result = json.dumps({"rows": [row]}, separators=(",", ":"))
    answer = v1.answer(b'{"type":"ok","response":{"type":"execute","result":%b}}' % result.encode())
    assert isinstance(answer, bytes)
    assert json.loads(answer)["result"]["rows"] == [
        [{"type": "blob", "base64": "AP8", "value": "AP8="}, {"type": "blob", "base64": "", "value": ""}, row[2]]
    ]


def test_a_violated_constraint_is_the_clients_mistake() -> None:
    error = b'{"message":"UNIQUE constraint failed: t.a","code":"SQLITE_CONSTRAINT"}'
    answer = v1.answer(b'{"type":"error","error":%b}' % error)
    assert isinstance(answer, Failure)
    assert answer.status == 400
