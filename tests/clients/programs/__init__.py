"""One program a client library: `python -m tests.clients.programs.NAME CLIENT URL` does the steps of `steps.py`."""
