"""The bank checker: transfers keep the sum, so every read of all accounts at once must show that sum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

__all__ = ["judge_bank"]


def judge_bank(reads: Iterable[Mapping[int, int]], accounts: frozenset[int], total: int) -> list[str]:
    """Complaints about reads of all accounts, each a mapping of account to balance. Overdrafts are refused by the
    transfers themselves, so a balance below zero is one too."""
    complaints = []
    for number, read in enumerate(reads):
        if set(read) != accounts:
            complaints.append(f"read {number} shows accounts {sorted(read)}, not {sorted(accounts)}")
        elif sum(read.values()) != total:
            complaints.append(f"read {number} is torn: the sum is {sum(read.values())}, not {total}: {dict(read)}")
        elif any(balance < 0 for balance in read.values()):
            complaints.append(f"read {number} shows an overdraft: {dict(read)}")
    return complaints
