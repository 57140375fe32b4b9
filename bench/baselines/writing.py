"""Somebody who writes: `python -m bench.baselines.writing DATABASE TRANSACTIONS_PER_SECOND`, until SIGTERM.

One row updated a transaction, as an ordinary program does it. Prints a line when it has begun.
"""

from __future__ import annotations

import random
import signal
import sys
import time

import apsw


def main() -> None:
    path, rate = sys.argv[1], float(sys.argv[2])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    connection = apsw.Connection(path)
    connection.set_busy_timeout(5000)
    connection.execute("PRAGMA synchronous=NORMAL")
    rows = int(connection.execute("SELECT max(id) FROM t").get)
    pick = random.Random(3)
    begin = time.monotonic()
    count = 0
    while True:
        blob = pick.randbytes(1500)
        connection.execute("UPDATE t SET value = ? WHERE id = ?", (blob + bytes(1500), pick.randint(1, rows)))
        if not count:
            print("writing", flush=True)
        count += 1
        time.sleep(max(0.0, begin + count / rate - time.monotonic()))


if __name__ == "__main__":
    main()
