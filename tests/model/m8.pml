/* M8: changes of voters and acks (failover.md 3.5) beside elections. M2's words (logs durable at once, answers and acks late), and the
   cluster record {voters, acks, term}: a leader asks for both rules around one compare-and-swap, a candidate writes its term into the
   record after its claim and elects by what it finds there. A compare-and-swap of either may land at any later time.
   Switches (1 = rule on):                                                                                                       */
#ifndef MAXT
#define MAXT 3
#endif
#ifndef MAXC
#define MAXC 1
#endif
#ifndef MAXK
#define MAXK 0
#endif
#ifndef MAXG          /* changes */
#define MAXG 1
#endif
#ifndef V0            /* the first voters, as bits, and their acks */
#define V0 7
#endif
#ifndef Q0
#define Q0 1
#endif
#ifndef REACH         /* set to a term: finds a path on which it acks a commit under the changed rule */
#endif
#ifndef BOTH          /* from before the compare-and-swap until its outcome is known, a commit needs the acks of both rules */
#define BOTH 1
#endif
#ifndef COVER         /* before it is sent, all that was acknowledged is covered under the new rule */
#define COVER 1
#endif
#ifndef MARK          /* a candidate writes its term into the record after its claim, so that older compare-and-swaps fail */
#define MARK 1
#endif
#ifndef AFTER         /* a candidate takes voters and acks as they are after its claim (0: as they were at its claim; for MARK=0) */
#define AFTER 1
#endif
#ifndef KEEP          /* a change whose outcome is not known stays pending (0: it is forgotten) */
#define KEEP 1
#endif
#ifndef VOTER         /* only voters' acks and answers count (0: everybody's) */
#define VOTER 1
#endif
#ifndef SELF          /* the leader does not remove itself */
#define SELF 1
#endif
#ifndef TSACK         /* an acked position is one of the leader's own term */
#define TSACK 1
#endif
#define L (MAXC+MAXT+1)
#define E(t,c) ((t)*8+(c))
#define LT(x) (n[x].lg[n[x].ln-1]/8)
#define BIT(x) (1<<(x))
#define CNT(m) (((m)&1) + (((m)/2)&1) + (((m)/4)&1))
typedef Nd { byte lg[L]; byte ln, prom, role, term, got, best, bl, bt, v, q, pv, pq }   /* role 0 down 1 follower 2 claimed 3 knows the rule, seals
                     4 serving; v, q: the rule it elects or leads by; pv, pq: the rule of a change under way, 0 none */
typedef Tl { byte e[L]; byte n }
typedef Ak { byte a[MAXT+1] }
typedef Cs { byte st, v, q }                                  /* a change sent: 0 none 1 its version holds 2 the record has moved on */
Nd n[3]; Tl tl[MAXT+1]; Ak mack[3]; Ak sl[3]; Ak st[3]; Cs cs[3];
byte al[L], an, gterm = 1, holder = 0, cids = 0, crashes = 0, changes = 0;
byte rv = V0, rq = Q0, rt = 1;                                /* the cluster record */
hidden byte c, d, e, i, j, k, s;
#define common(A, a, B, b) c = 0; do :: c < (a) && c < (b) && A[c] == B[c] -> c++ :: else -> break od
inline trunc(x) { do :: n[x].ln > d -> n[x].ln--; n[x].lg[n[x].ln] = 0 :: else -> break od; skip }
inline push(x, w) { n[x].lg[n[x].ln] = w; n[x].ln++ }
inline fall(x, r) { n[x].role = r; n[x].term = 0; n[x].got = 0; n[x].best = 0; n[x].bl = 0; n[x].bt = 0; n[x].v = 0; n[x].q = 0; n[x].pv = 0; n[x].pq = 0 }
inline ship(x) { s = n[x].term; common(n[x].lg, n[x].ln, tl[s].e, tl[s].n); assert(c == tl[s].n);       /* one writer in a term */
                 do :: c < n[x].ln -> tl[s].e[c] = n[x].lg[c]; c++ :: else -> break od; tl[s].n = c }
inline moved() { j = 0; do :: j < 3 -> if :: cs[j].st == 1 -> cs[j].st = 2 :: else -> skip fi; j++ :: else -> break od; j = 0 }
#define LO(a, b) ((a) < (b) -> (a) : (b))
#define HI(a, b) ((a) < (b) -> (b) : (a))
#define A(x) mack[x].a[s]
/* e = the log length that rule (who, need) covers for leader x in term s: the q-th longest among the others that count */
inline cover(x, who, need) {
  e = 0; k = 0; j = 0;                                        /* e: the longest, k: the second, of two others */
  do :: j < 3 -> if :: j != x && ((who) & BIT(j) || !VOTER) -> if :: A(j) > e -> k = e; e = A(j) :: else -> if :: A(j) > k -> k = A(j) :: else -> skip fi fi :: else -> skip fi; j++
     :: else -> break od;
  if :: (need) == 2 -> e = k :: else -> skip fi;
  if :: e > n[x].ln || e == 0 || (TSACK && n[x].lg[e-1]/8 != s) -> e = 0 :: else -> skip fi; k = 0; j = 0 }
inline follow(f, t) { d_step {
  n[f].role > 0 && n[f].term < t && tl[t].n > 0 && t >= n[f].prom ->
  if :: n[f].role > 1 -> fall(f, 1) :: else -> skip fi; n[f].prom = t;
  common(n[f].lg, n[f].ln, tl[t].e, tl[t].n);
  if :: c < tl[t].n && c < n[f].ln -> d = c; trunc(f)
     :: c < tl[t].n && c == n[f].ln -> push(f, tl[t].e[c]); c++ :: else -> skip fi;
  if :: c == n[f].ln && c > mack[f].a[t] -> mack[f].a[t] = c :: else -> skip fi } }
inline seal(f, t) { d_step {                                  /* SEAL(t), once sent, arrives at any time: step down, promise, answer */
  t <= gterm && n[f].role > 0 && (n[f].prom < t || (n[f].prom == t && n[f].role == 1 && sl[f].a[t] == 0)) ->
  if :: n[f].role > 1 -> fall(f, 1) :: else -> skip fi; n[f].prom = t; sl[f].a[t] = n[f].ln; st[f].a[t] = LT(f) } }
proctype Pair(byte me, f) {
  end: do
  :: d_step { n[me].role == 3 && !(n[me].got & BIT(f)) && sl[f].a[n[me].term] > 0 && (n[me].v & BIT(f) || !VOTER) ->    /* an answer arrives */
       s = n[me].term; n[me].got = n[me].got | BIT(f);
       if :: st[f].a[s] > n[me].bt || (st[f].a[s] == n[me].bt && sl[f].a[s] > n[me].bl) -> n[me].best = f; n[me].bl = sl[f].a[s]; n[me].bt = st[f].a[s]
          :: else -> skip fi }
  :: d_step { n[me].role == 3 && n[me].best == f && n[f].role > 0 ->                                    /* E5: fetch from the best */
       common(n[me].lg, n[me].ln, n[f].lg, n[f].ln);
       if :: n[f].prom != n[me].term || c < n[me].ln -> fall(me, 1)
          :: else -> c = n[me].ln; do :: c < n[f].ln && c < n[me].bl -> push(me, n[f].lg[c]); c++ :: else -> break od; n[me].best = me fi }
  :: d_step { n[me].role == 4 && n[me].pv == 0 && cs[me].st == 0 && changes < MAXG && (n[me].v & BIT(f)) && CNT(n[me].v) > 2 ->   /* remove f */
       changes++; n[me].pv = n[me].v & (7 - BIT(f)); n[me].pq = 1 }
  :: d_step { n[me].role == 4 && n[me].pv == 0 && cs[me].st == 0 && changes < MAXG && !(n[me].v & BIT(f)) ->                      /* add f */
       changes++; n[me].pv = n[me].v | BIT(f); n[me].pq = n[me].q }
  od }
proctype Node(byte me) {
  end: do
  :: d_step { (n[me].role == 1 || n[me].role == 2) && gterm < MAXT && n[me].prom <= gterm ->            /* E2, E3 */
       gterm++; holder = me; fall(me, 2); n[me].prom = gterm; n[me].term = gterm;
       if :: !AFTER -> n[me].v = rv; n[me].q = rq :: else -> skip fi }
  :: d_step { n[me].role == 2 ->                                                                        /* the rule it elects by */
       if :: MARK && rt > n[me].term -> fall(me, 1)
          :: else -> if :: MARK -> rt = n[me].term; moved() :: else -> skip fi;
             if :: AFTER -> n[me].v = rv; n[me].q = rq :: else -> skip fi;
             if :: n[me].v & BIT(me) -> n[me].role = 3; n[me].got = BIT(me); n[me].best = me; n[me].bl = n[me].ln; n[me].bt = LT(me) :: else -> fall(me, 1) fi fi }
  :: d_step { n[me].role == 3 && CNT(n[me].got) >= CNT(n[me].v) - n[me].q && n[me].best == me ->        /* E4, E6, E7 */
       if :: gterm == n[me].term && holder == me ->
             common(al, an, n[me].lg, n[me].ln); assert(c == an);                                       /* nothing acknowledged is lost */
             n[me].role = 4; n[me].got = 0; n[me].best = 0; n[me].bl = 0; n[me].bt = 0; push(me, E(n[me].term, 0)); ship(me)
          :: else -> fall(me, 1) fi }
  :: d_step { n[me].role == 4 ->                                                                        /* acks */
       s = n[me].term; cover(me, n[me].v, n[me].q); d = e;
       if :: n[me].pv && BOTH -> cover(me, n[me].pv, n[me].pq); d = LO(d, e) :: else -> skip fi;
       if :: d > 0 -> common(al, an, n[me].lg, d); assert(c == an || c == d);
             do :: an < d -> al[an] = n[me].lg[an]; an++ :: else -> break od;
#ifdef REACH
             assert(!(changes == MAXG && n[me].pv == 0 && rv == n[me].v && n[me].term >= REACH && n[me].lg[d-1] % 8 > 0));
#endif
             j = s + 1; do :: j <= MAXT -> if :: tl[j].n > 0 -> common(n[me].lg, d, tl[j].e, tl[j].n); assert(c == d) :: else -> skip fi; j++ :: else -> break od
          :: else -> skip fi; d = 0; j = 0; s = 0 }
  :: d_step { n[me].role == 4 && cids < MAXC -> cids++; push(me, E(n[me].term, cids)); ship(me) }       /* commit */
  :: d_step { n[me].role == 4 && n[me].pv == 0 && cs[me].st == 0 && changes < MAXG && CNT(n[me].v) == 3 -> changes++; n[me].pv = n[me].v; n[me].pq = 3 - n[me].q }      /* acks */
  :: d_step { !SELF && n[me].role == 4 && n[me].pv == 0 && cs[me].st == 0 && changes < MAXG && CNT(n[me].v) == 3 -> changes++; n[me].pv = 7 - BIT(me); n[me].pq = 1 }
  :: d_step { n[me].role == 4 && n[me].pv && cs[me].st == 0 && !(rv == n[me].pv && rq == n[me].pq) ->   /* the change is sent */
       s = n[me].term; cover(me, n[me].pv, n[me].pq);
       if :: e >= an || !COVER -> cs[me].v = n[me].pv; cs[me].q = n[me].pq; cs[me].st = (rt == n[me].term || !MARK -> 1 : 2) :: else -> skip fi; e = 0; s = 0 }
  :: d_step { cs[me].st > 0 ->                                                                          /* and lands, whoever still lives */
       if :: cs[me].st == 1 -> moved(); rv = cs[me].v; rq = cs[me].q :: else -> skip fi; cs[me].st = 0; cs[me].v = 0; cs[me].q = 0 }
  :: d_step { n[me].role == 4 && n[me].pv && rt <= n[me].term && rv == n[me].pv && rq == n[me].pq -> n[me].v = n[me].pv; n[me].q = n[me].pq; n[me].pv = 0; n[me].pq = 0 }
  :: d_step { n[me].role == 4 && n[me].pv && (cs[me].st == 0 || !KEEP) && rv == n[me].v && rq == n[me].q && rt <= n[me].term -> n[me].pv = 0; n[me].pq = 0 }           /* given up */
  :: follow(me, 1) :: follow(me, 2) :: seal(me, 2)
#if MAXT > 2
  :: follow(me, 3) :: seal(me, 3)
#endif
  :: d_step { n[me].role > 0 && crashes < MAXK -> fall(me, 0); crashes++ }
  :: d_step { n[me].role == 0 -> n[me].role = 1 }
  od }
init { d_step { i = 0;
  do :: i < 3 -> n[i].lg[0] = E(1,0); n[i].ln = 1; n[i].prom = 1; n[i].role = 1; i++ :: else -> break od;
  tl[1].e[0] = E(1,0); tl[1].n = 1; al[0] = E(1,0); an = 1; n[0].role = 4; n[0].term = 1; n[0].v = V0; n[0].q = Q0 };
  atomic { run Node(0); run Node(1); run Node(2); run Pair(0,1); run Pair(0,2); run Pair(1,0); run Pair(1,2); run Pair(2,0); run Pair(2,1) } }
