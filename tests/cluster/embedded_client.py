"""The child process of test_embedded.py: PyPI `libsql` with a local copy. Words on stdin, JSON lines on stdout.

A process of its own, because libsql holds the GIL while it waits for the server.
"""

import json
import sys

import libsql

url, path = sys.argv[1:]
replica = libsql.connect(path, sync_url=url)
for line in sys.stdin:
    verb, _, sql = line.strip().partition(" ")
    try:
        if verb == "sync":
            replica.sync()
            answer = "synced"
        elif verb == "reopen":
            replica.close()
            replica = libsql.connect(path, sync_url=url)
            answer = "reopened"
        elif verb == "read":
            answer = replica.execute(sql).fetchall()
        else:
            replica.execute(sql)
            replica.commit()
            answer = "written"
    except ValueError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)  # noqa: T201
replica.close()
