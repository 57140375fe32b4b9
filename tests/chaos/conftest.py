"""Logs of the processes in the report of a test that failed, as in tests/cluster."""

from tests.cluster.conftest import pytest_runtest_makereport

__all__ = ["pytest_runtest_makereport"]
