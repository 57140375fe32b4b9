/* M3: rewind (R12), crash after every step, the leader changing under it. One node X with a log and a database of two pages; a commit
   writes one page. X's log is history 1; the leader's is history 2, later perhaps 3; where they part, how long they are and which page
   each commit writes is chosen freely. The log is durable step by step; the database is what the -wal last had synced, or the newer state.
   Switches (1 = rule on):                                                                                                              */
#ifndef ORPHFIRST    /* the orphan file is fsynced before the log is cut */
#define ORPHFIRST 1
#endif
#ifndef RECFIRST     /* the record `rewinding` is durable before the log is cut */
#define RECFIRST 1
#endif
#ifndef ORPHPAGES    /* the orphans' pages are fetched, not only the pages of the new frames */
#define ORPHPAGES 1
#endif
#ifndef SYNCCLEAR    /* fdatasync of the -wal before `rewinding` is cleared */
#define SYNCCLEAR 1
#endif
#ifndef PIN          /* orphan pages come from a snapshot at the position P that the log has reached */
#define PIN 1
#endif
#ifndef NOSERVE      /* while `rewinding` is set: serve nothing, do not claim */
#define NOSERVE 1
#endif
#ifndef UNION        /* CORRECTION: a second divergence adds to the pages of the first and keeps the lower D */
#define UNION 1
#endif
#ifndef MARKP        /* CORRECTION: the record write that clears `rewinding` also sets the mark to P */
#define MARKP 1
#endif
#ifndef REDOCUT      /* as first written: redo cuts the log to the recorded D again. CORRECTION (0): it cuts only where the log parts
                        from the present leader's */
#define REDOCUT 0
#endif
#ifndef ACKREW       /* 1: X may ack frames of its log while rewinding */
#define ACKREW 1
#endif
#ifndef MAXK         /* crashes */
#define MAXK 3
#endif
#define LEN 3
typedef Hist { byte e[LEN]; byte n }
Hist H[4]; byte h = 1;          /* histories 1..3; h = the one whose leader X follows */
byte pg[10];                    /* page of each commit id */
byte lg[LEN], ln = LEN;         /* X's log */
byte db[2], ddb[2];             /* pages now; pages as last synced */
byte ap = LEN, mark = LEN;      /* applied (volatile), mark (durable) */
bit rew; byte D, pages;         /* the durable record `rewinding {D, pages}` */
byte st = 1, d0;                /* volatile: 0 down 1 running 2 parting found at d0 3 recorded 4 cut, fetching 5 applied 6 synced */
short gone, orph; byte ackd;    /* ids cut from the log; ids in the orphan file; furthest position of history h that X has acked */
byte crashes;
byte late;                      /* (without RECFIRST) pages remembered in memory only */
hidden byte c, i, k, s0, s1, v[2];

#define common() c = 0; do :: c < ln && c < H[h].n && lg[c] == H[h].e[c] -> c++ :: else -> break od
#define state(A, n) v[0] = 0; v[1] = 0; i = 0; do :: i < (n) -> v[pg[A[i]]] = A[i]; i++ :: else -> break od
#define good(n) state(lg, n); assert(db[0] == v[0] && db[1] == v[1])
#define cut(x) do :: ln > x -> ln--; gone = gone | (1 << lg[ln]); lg[ln] = 0 :: else -> break od
#define TIP (c < ln && c < H[h].n)               /* X's log goes past the point where the leader's parts from it */
inline orphans(d) { i = d; do :: i < ln -> orph = orph | (1 << lg[i]); i++ :: else -> break od }
inline record(d) {
  if :: !UNION || !rew -> D = d; pages = 0 :: UNION && rew && d < D -> D = d :: else -> skip fi;
  i = d; do :: i < ln -> pages = pages | (1 << pg[lg[i]]); i++ :: else -> break od;
  rew = 1 }

active proctype Env() {         /* choose the histories; then leaders change */
  atomic {
    H[1].n = LEN; k = 1;
    do :: k <= 3 ->
          if :: k == 1 -> i = 1; c = 0
             :: k > 1 -> if :: i = 1 :: k == 3 -> i = 2 fi;                     /* history k shares its first c entries with history i */
                         if :: c = 0 :: c = 1 :: c = 2 fi; if :: H[k].n = 2 :: H[k].n = 3 fi fi;
          s0 = 0;
          do :: s0 < H[k].n -> if :: s0 < c && s0 < H[i].n -> H[k].e[s0] = H[i].e[s0]
                                  :: else -> H[k].e[s0] = 3*(k-1) + s0 + 1; if :: pg[3*(k-1) + s0 + 1] = 0 :: k + s0 > 1 -> pg[3*(k-1) + s0 + 1] = 1 fi fi; s0++   /* pages are alike: the first commit writes page 0 */
             :: else -> break od;
          k++
       :: else -> break od;
    i = 0; do :: i < LEN -> lg[i] = H[1].e[i]; i++ :: else -> break od;
    if :: mark = LEN :: mark = 1 fi;
    state(lg, LEN); db[0] = v[0]; db[1] = v[1]; ddb[0] = v[0]; ddb[1] = v[1]; h = 2 }
  end: d_step { h == 2 -> h = 3; ackd = 0 }
}
active proctype X() {
  h > 1;
  end: do
  /* an ordinary follower: append, apply, sync and mark, ack */
  :: d_step { st == 1 && !rew -> common(); if :: c == ln && ln < H[h].n -> lg[ln] = H[h].e[ln]; ln++ :: else -> skip fi }
  :: d_step { st == 1 && !rew && ap < ln -> db[pg[lg[ap]]] = lg[ap]; ap++; good(ap) }
  :: d_step { st == 1 && !rew && mark < ap -> ddb[0] = db[0]; ddb[1] = db[1]; mark = ap }
  :: d_step { (st == 1 && !rew) || (ACKREW && rew && st >= 4) -> common(); if :: c == ln && c > ackd -> ackd = c :: else -> skip fi }
  /* R12, one durable step at a time; any step may find another leader than the last one did */
  :: d_step { st == 1 || st >= 4 -> common(); if :: TIP -> d0 = c; st = 2; if :: ORPHFIRST -> orphans(d0) :: else -> skip fi :: else -> skip fi }
  :: d_step { st == 2 && RECFIRST -> record(d0); st = 3 }
  :: d_step { st == 2 && !RECFIRST -> i = d0; s1 = 0; do :: i < ln -> s1 = s1 | (1 << pg[lg[i]]); i++ :: else -> break od; late = s1; cut(d0); st = 3 }
  :: d_step { st == 3 && RECFIRST -> cut(d0); d0 = 0; st = 4 }
  :: d_step { st == 3 && !RECFIRST -> record(d0); pages = pages | late; late = 0; d0 = 0; st = 4 }
  :: d_step { st >= 4 && (gone & orph) != gone -> orph = orph | gone }                                  /* only without ORPHFIRST */
  :: d_step { st == 4 -> common(); if :: c == ln && ln < H[h].n -> lg[ln] = H[h].e[ln]; ln++ :: else -> skip fi }      /* fetch (D,P] */
  :: d_step { st == 4 -> common(); if :: c == ln && (ln == H[h].n || ln == 2) ->                        /* pages at P, all as one commit */
         s1 = 0; k = D; do :: k < ln -> s1 = s1 | (1 << pg[lg[k]]); k++ :: else -> break od; if :: ORPHPAGES -> s1 = s1 | pages :: else -> skip fi;
         s0 = (PIN -> ln : H[h].n); state(H[h].e, s0);
         if :: s1 & 1 -> db[0] = v[0] :: else -> skip fi; if :: s1 & 2 -> db[1] = v[1] :: else -> skip fi; ap = ln; st = 5 :: else -> skip fi }
  :: d_step { st == 5 -> if :: SYNCCLEAR -> ddb[0] = db[0]; ddb[1] = db[1] :: else -> skip fi; st = 6 }
  :: d_step { st == 6 -> good(ap); assert((gone & orph) == gone || !ORPHFIRST); rew = 0; pages = 0; D = 0;          /* checksum, clear */
       if :: MARKP -> mark = ap :: else -> skip fi; st = 1 }
  :: d_step { !NOSERVE && st >= 3 -> good(ln) }
  /* crash: the database is the newer or the synced state; start */
  :: d_step { st > 0 && crashes < MAXK -> crashes++; st = 0; ap = 0; d0 = 0; late = 0 }
  :: d_step { st > 0 && crashes < MAXK -> crashes++; st = 0; ap = 0; d0 = 0; late = 0; db[0] = ddb[0]; db[1] = ddb[1] }
  :: d_step { st == 0 -> assert((gone & orph) == gone);                                                 /* nothing vanished silently */
       if :: !rew -> k = mark; do :: k < ln -> db[pg[lg[k]]] = lg[k]; k++ :: else -> break od; ap = ln; st = 1; good(ln)
          :: rew && REDOCUT -> if :: D < ln -> orphans(D); cut(D) :: else -> skip fi; st = 4
          :: else -> st = 4 fi;
       common(); assert(c >= ackd) }                                                                    /* what was acked is still here */
  od }
