"""Which configurations of which models are run, and what each must find. docs/model.md has the results.

First those with all rules on (no error), then one rule dropped at a time (error found).
Bounds: MAXT terms, MAXC commits, MAXK crashes.
"""

from __future__ import annotations

from tests.model.spin import Run

ALL_ON = "all rules on"


def holds(model: str, switches: str, *, deep: bool = False) -> Run:
    return Run(model, switches, ALL_ON, error=False, deep=deep, optimise=1)


def breaks(model: str, switches: str, rule: str, *, deep: bool = False, optimise: int = 0) -> Run:
    return Run(model, switches, rule, error=True, deep=deep, optimise=optimise)


RUNS = (
    # m1: disks, crash and restart, election, recount
    holds("m1", "MAXT=2 MAXC=1 MAXK=2"),
    holds("m1", "MAXT=2 MAXC=2 MAXK=1"),
    holds("m1", "MAXT=3 MAXC=1 MAXK=1", deep=True),
    holds("m1", "MAXT=3 MAXC=1 MAXK=2", deep=True),
    holds("m1", "MAXT=2 MAXC=2 MAXK=3", deep=True),
    holds("m1", "FIG8 MAXT=4 MAXC=1 MAXK=1", deep=True),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=0 FENCE=0", "old terms are refused (3.4 E3)"),
    breaks("m1", "MAXT=3 MAXC=1 MAXK=0 STEP=0", "a sealed leader steps down before it answers (R2)"),
    breaks("m1", "MAXT=3 MAXC=1 MAXK=1 TRUTHLOG=0", "demoting makes truth=log durable (R2)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=2 STARTSYNC=0", "fsync before any position is reported (R2)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=2 ACKDUR=0", "only what is fsynced is acknowledged (3.5)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=1 SHIPSYNC=0", "nothing is shipped before the fdatasync of the -wal (R2)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=1 RECOUNT=0", "truth=wal: commits after base go to the log at start (R2)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=0 CHECKPOS=0", "never promote below the best answer (3.4 E5)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=0 QUORUM=1", "as many answers as voters minus n (3.4 E4)"),
    breaks("m1", "MAXT=2 MAXC=1 MAXK=1 TSDUR=0 PROMSYNC=0", "promotion fsyncs the log through base (R2)"),
    breaks("m1", "MAXT=3 MAXC=1 MAXK=2 PROMDUR=0", "promised is durable before the answer (3.4 E3)", deep=True),
    breaks("m1", "FIG8 MAXT=4 MAXC=1 MAXK=1 TSACK=0", "acked only by way of the present term (R11)", deep=True),
    breaks(
        "m1",
        "FIG8 MAXT=4 MAXC=1 MAXK=1 TSDUR=0",
        "the term-start frame is fsynced before it is announced (R2)",
        deep=True,
    ),
    # m2: the election in steps
    holds("m2", "MAXT=3 MAXC=1 MAXK=0"),
    holds("m2", "MAXT=2 MAXC=2 MAXK=1"),
    holds("m2", "MAXT=3 MAXC=1 MAXK=1", deep=True),
    holds("m2", "MAXT=3 MAXC=2 MAXK=0", deep=True),
    holds("m2", "HAND=1 MAXT=3 MAXC=1 MAXK=1", deep=True),
    holds("m2", "FIG8 MAXT=4 MAXC=2 MAXK=0", deep=True),
    holds("m2", "EARLY=1 MAXT=3 MAXC=1 MAXK=0"),
    holds("m2", "EARLY=1 MAXT=3 MAXC=1 MAXK=1", deep=True),
    breaks(
        "m2",
        "FIG8 EARLY=1 MAXT=4 MAXC=1 MAXK=0 TSACK=0",
        "the same, announced early: still not acked by txid alone",
        deep=True,
    ),
    breaks("m2", "MAXT=2 MAXC=1 MAXK=0 BEST=0", "never promote below the best answer (3.4 E5)"),
    breaks(
        "m2",
        "FIG8 MAXT=4 MAXC=1 MAXK=0 DIVERGE=0",
        "a candidate whose log parts from the best gives up (R12a)",
        optimise=1,
    ),
    breaks("m2", "HAND=1 MAXT=3 MAXC=1 MAXK=0 HANDOFF=0", "who hands a claim over stops first (R12a)"),
    breaks("m2", "MAXT=3 MAXC=1 MAXK=0 CASSERVE=0", "serving only by compare-and-swap on the own claim (3.4 E7)"),
    breaks("m2", "FIG8 MAXT=4 MAXC=1 MAXK=0 TSACK=0", "a term-start is acked as (term, txid) (R12a)", optimise=1),
    # m3: rewind
    holds("m3", "MAXK=1"),
    holds("m3", "MAXK=3", deep=True),
    holds("m3", "MAXK=4", deep=True),
    breaks("m3", "MAXK=2 ORPHFIRST=0", "the orphan file is fsynced before the log is cut (R12)"),
    breaks("m3", "MAXK=2 RECFIRST=0", "`rewinding` is durable before the log is cut (R12)"),
    breaks("m3", "MAXK=2 ORPHPAGES=0", "the orphans' pages are fetched too (R12)"),
    breaks("m3", "MAXK=2 SYNCCLEAR=0", "fdatasync before `rewinding` is cleared (R12)"),
    breaks("m3", "MAXK=2 PIN=0", "orphan pages come from a snapshot pinned at P (R12)"),
    breaks("m3", "MAXK=2 NOSERVE=0", "while `rewinding` is set: serve nothing (R12)"),
    breaks("m3", "MAXK=2 UNION=0", "a second divergence adds its pages and keeps the lower D (R12)"),
    breaks("m3", "MAXK=2 MARKP=0", "clearing `rewinding` sets the mark in the same write (R12)"),
    breaks("m3", "MAXK=2 REDOCUT=1", "redo never cuts to the recorded D (R12)"),
    breaks("m3", "MAXK=2 REDOCUT=1 ACKREW=0", "the same, with no acks while rewinding (R12)"),
    # m4: planned switchover
    holds("m4", "MAXT=2 MAXC=1 MAXK=1"),
    holds("m4", "MAXT=3 MAXC=1 MAXK=0", deep=True),
    breaks("m4", "MAXT=3 MAXC=1 MAXK=0 QUIET=0", "no write is admitted from P on (3.7 S3, S4)"),
    breaks("m4", "MAXT=3 MAXC=1 MAXK=0 S5=0", "the target acked P before the compare-and-swap (3.7 S5)"),
    breaks("m4", "MAXT=3 MAXC=1 MAXK=0 VERSION=0", "every compare-and-swap compares the version (R12a)"),
    breaks("m4", "MAXT=3 MAXC=1 MAXK=0 BUMP=0", "after an unknown handoff: a renewal first (R12a)"),
    # m5: commit tokens
    holds("m5", "MAXT=3 MAXK=0"),
    holds("m5", "MAXT=2 MAXK=1"),
    holds("m5", "MAXT=2 MAXK=2", deep=True),
    holds("m5", "MAXT=3 MAXK=1", deep=True),
    breaks("m5", "MAXT=2 MAXK=1 ASK=0", "a second attempt only after `not done` (R19)"),
    breaks("m5", "MAXT=2 MAXK=1 BURN=0", "`not done` burns the token (R19)"),
    breaks(
        "m5", "MAXT=3 MAXK=0 TERMBIND=0", "an attempt runs only in the term it was sent in (found here)", optimise=1
    ),
    breaks("m5", "MAXT=3 MAXK=0 SERVING=0", "only a leader whose term-start is acked answers (R19)", optimise=1),
    breaks("m5", "MAXT=2 MAXK=1 MINTERM=0", "no leader below the highest known term is asked (3.9)"),
    breaks("m5", "MAXT=2 MAXK=1 DONEACK=0", "`done` only when acked covers the commit (R19)"),
    breaks("m5", "MAXT=2 MAXK=1 RUNNING=0", "a commit not yet in the log is `running` (R19)"),
    breaks("m5", "MAXT=2 MAXK=1 REBUILT=0", "a rebuilt frame raises complete_since (R19)"),
    breaks("m5", "MAXT=2 MAXK=1 EXPIRE=0", "forgetting tokens raises complete_since (R19)"),
    breaks("m5", "MAXT=2 MAXK=1 SNAPTOK=0", "snapshots carry tokens and complete_since (R19)"),
    # m6: proxy floors
    holds("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=0"),
    holds("m6", "SCOPE=1 MAXC=1 MAXK=0 MAXR=0"),
    holds("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=1", deep=True),
    holds("m6", "SCOPE=0 MAXC=1 MAXK=1 MAXR=0", deep=True),
    breaks("m6", "SCOPE=1 MAXC=1 MAXK=0 MAXR=0 FETCH=0", "with several proxies the floor is fetched (R18)"),
    breaks("m6", "SCOPE=1 MAXC=1 MAXK=0 MAXR=0 LEASE=0", "a leader gives floors under a live lease only (found here)"),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=0 WFLOOR=0", "a write's reply raises the floor (R18)"),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=0 RFLOOR=0", "a read's reply raises the floor (R17)"),
    breaks("m6", "SCOPE=1 MAXC=1 MAXK=0 MAXR=0 GATE=0", "on the leader no read is answered before it is acked (R17)"),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=1 START=0", "a starting proxy takes a floor first (R18)", deep=True),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=1 STARTPOS=0", "and all that the leader has (R18)", optimise=1),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=0 MAXR=1 STARTQ=0", "or the best of all voters but n (R18)", deep=True),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=1 MAXR=0 JOIN=0", "a node that led serves after it follows (I21)", deep=True),
    breaks("m6", "SCOPE=0 MAXC=1 MAXK=1 MAXR=0 APPLYDUR=0", "a voter shows only what is durable in its log", deep=True),
    # m7: the lease and the store's outage; at most one node answers at any moment
    holds("m7", "MAXN=3"),
    holds("m7", "MAXN=4", deep=True),
    breaks("m7", "MAXN=3 REACH=1", "not a rule: the same leader answers again after the outage"),
    breaks("m7", "MAXN=3 REACH=2", "not a rule: another leader answers after the outage"),
    breaks("m7", "MAXN=3 SENT=0", "a lease is timed from before its request was sent (3.2)"),
    breaks("m7", "MAXN=3 OWNWAIT=0", "a challenger waits from its own sight of the version it claims over (3.2)"),
    breaks("m7", "MAXN=3 CHECK=0", "a leader looks at its lease before it answers (3.2, 3.8)"),
    breaks("m7", "MAXN=3 WHICH=0", "an unknown renewal found in the record counts from its own sending (found here)"),
    breaks("m7", "MAXN=3 VERSION=0", "every compare-and-swap compares the version (R12a)"),
    # m8: changes of voters and acks
    holds("m8", "MAXT=2 MAXC=2 MAXG=2 V0=3"),
    holds("m8", "MAXT=2 MAXC=1 Q0=2"),
    holds("m8", "MAXT=2 MAXC=2 MAXG=2", deep=True),
    holds("m8", "MAXT=3 MAXC=1", deep=True),
    holds("m8", "MAXT=2 MAXC=1 MAXK=1 MAXG=2 Q0=2", deep=True),
    breaks("m8", "MAXT=2 V0=3 REACH=2", "not a rule: a commit is acked under the changed rule after an election"),
    breaks("m8", "MAXT=2 BOTH=0", "around its compare-and-swap a change needs the acks of both rules (3.5)"),
    breaks("m8", "MAXT=2 COVER=0", "before it, all that was acked is covered under the new rule (3.5)"),
    breaks("m8", "MAXT=2 KEEP=0", "a change whose outcome is unknown stays pending (found here)"),
    breaks("m8", "MAXT=2 V0=3 MARK=0", "a candidate marks the cluster record with its term (found here)"),
    breaks("m8", "MAXT=2 Q0=2 MARK=0", "the same, with fewer acks instead of more voters (found here)"),
    breaks("m8", "MAXT=2 V0=3 AFTER=0", "a candidate takes the voters as they are after its claim (found here)"),
    breaks("m8", "MAXT=2 VOTER=0", "only voters' acks and answers count (3.5)"),
    breaks("m8", "MAXT=2 SELF=0", "the leader does not remove itself (3.5)"),
)
