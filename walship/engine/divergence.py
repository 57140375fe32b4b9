"""Where a log parts from its leader's history, and what is kept of the commits beyond that point (R12).

`TermHistory` of a leader, as the welcome tells it, is of the terms that are in the leader's own log. A term is one
leadership, so a frame of a term that both logs hold is the same frame in both, up to where the leader's log went on
with the next term.
"""

from __future__ import annotations

from pathlib import Path

from walship.engine.log import Log
from walship.engine.orphans import Manifest, Reason, write_orphan
from walship.engine.replay import merge_frames
from walship.formats.position import Position, TermHistory, Tip

__all__ = ["base_of", "holds", "keep_orphan"]


def holds(history: TermHistory, at: Position, position: Position) -> bool:
    """True iff a leader at `at`, whose log has the terms in `history`, has `position` in its past.

    Of terms older than any it remembers it is taken to have had them: what it says of later ones must suffice.
    """
    if position.term > at.term:
        return False
    starts = history.starts()
    known = dict(starts)
    if starts and position.term not in known and position.term > starts[0][0]:
        return False
    ends = [start for term, start in starts if position.term < term <= at.term]
    return position.txid <= min([at.txid, *ends])


def base_of(log: Log, history: TermHistory, at: Position, *, differs: bool = False) -> Tip:
    """The newest state of `log` that the leader at `at` has in its past; the log's oldest one when there is none.

    differs: the leader says that the log's tip, though its position is in its past, is another state there (another
    checksum). Then nothing of the tip's term can be trusted.
    """
    last = log.tip.position.term
    found = log.newest_where(lambda position: holds(history, at, position) and not (differs and position.term == last))
    return found or log.base


def keep_orphan(
    directory: Path,
    log: Log,
    history: TermHistory,
    at: Position,
    *,
    differs: bool,
    node: str,
    led: int | None,
    acks: int,
) -> Manifest | None:
    """Keep the commits of `log` that the leader at `at` does not have, before they are replaced. None when it has all.

    Blocks. Raises StorageFailed, CorruptLtx: then nothing may be replaced.
    """
    tip = log.tip
    held = holds(history, at, tip.position)
    if held and not differs:
        return None
    base = base_of(log, history, at, differs=differs and held)
    refs = [ref for ref in log.frames_after(base.position) if not ref.header.is_term_start]
    batch = merge_frames(log, refs)
    if batch is None:
        return None  # a term that began and committed nothing
    last = refs[-1].header
    return write_orphan(
        directory,
        zip(batch.pgnos, batch.pages(), strict=True),
        cluster=log.cluster,
        node=node,
        reason=Reason.DEPOSED if led is not None and any(ref.header.term == led for ref in refs) else Reason.DIVERGED,
        base=base,
        tip=last.tip,
        page_size=last.page_size,
        acks_wanted=acks,
        first_time_ms=refs[0].header.time_ms,
        last_time_ms=last.time_ms,
    )
