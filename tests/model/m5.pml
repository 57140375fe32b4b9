/* M5: commit tokens (R19). One client write, tried at most twice (attempts 1 and 2, each with a token of its own) through one proxy; 3 voters,
   n=1. The proxy sends an attempt to a serving leader, where it may wait for any time; it may ask any serving leader for the outcome of the
   token, again over another connection. Answers: done, running (nothing changes), unknown, not done. After `not done` it tries once more.
   An election (m1, m2) is one step. A log entry is term*8 + attempt*2 + rebuilt; attempt 0 is a term-start frame.
   Checked: what was answered done, or acknowledged, is in the log of every later leader; what was answered not done is never acknowledged;
   the two attempts are never both acknowledged. Switches (1 = rule on):                                                                  */
#ifndef MAXT
#define MAXT 3        /* terms */
#endif
#ifndef MAXK
#define MAXK 1        /* crashes */
#endif
#ifndef ASK           /* a second attempt only after the first was answered `not done` (0: after a time-out) */
#define ASK 1
#endif
#ifndef BURN          /* `not done` burns the token: the leader that said so refuses the attempt, should it still arrive */
#define BURN 1
#endif
#ifndef TERMBIND      /* a leader runs an attempt only in the very term that it was sent in */
#define TERMBIND 1
#endif
#ifndef SERVING       /* only a leader whose term-start is acked answers */
#define SERVING 1
#endif
#ifndef MINTERM       /* a leader below the highest term that the proxy knows is not asked */
#define MINTERM 1
#endif
#ifndef DONEACK       /* `done` only when acked covers the commit */
#define DONEACK 1
#endif
#ifndef RUNNING       /* what is committed and not yet in the log counts as running */
#define RUNNING 1
#endif
#ifndef REBUILT       /* a rebuilt frame raises complete_since */
#define REBUILT 1
#endif
#ifndef EXPIRE        /* forgetting tokens raises complete_since */
#define EXPIRE 1
#endif
#ifndef SNAPTOK       /* a snapshot carries tokens and complete_since */
#define SNAPTOK 1
#endif
#define L (MAXT+3)
#define E(t,c) ((t)*8+(c)*2)
#define ID(e) (((e)/2)%4)
#define LT(x) (n[x].lg[n[x].ln-1]/8)
typedef Nd { byte lg[L]; byte ln, prom, role, term;   /* role 0 down 1 follower 3 leading 4 serving; prom durable */
             byte wl, mk, burn;                       /* commit in the -wal that is not in the log; furthest ack in this term; tokens burned */
             byte fp, since }                         /* tokens of entries below fp are forgotten; complete for attempts > since */
Nd n[3]; byte gterm = 1, crashes = 0, ak = 0;         /* ak: acknowledged attempts */
byte sent = 0, pterm = 1, to[3], rt[3], out[3];       /* an attempt on its way: node+1, term; answer 1 done 2 not done 3 unknown */
hidden byte c, i, j, h;
#define BIT(k) (1<<(k))
#define common(A, B) c = 0; do :: c < n[A].ln && c < n[B].ln && n[A].lg[c]/2 == n[B].lg[c]/2 -> c++ :: else -> break od
#define holds(x, r) r = 0; i = 0; do :: i < n[x].ln -> r = r | BIT(ID(n[x].lg[i])); i++ :: else -> break od
inline push(x, v) { n[x].lg[n[x].ln] = v; n[x].ln++ }
inline trunc(x, k) { do :: n[x].ln > k -> n[x].ln--; n[x].lg[n[x].ln] = 0 :: else -> break od;
                     if :: n[x].fp > n[x].ln -> n[x].fp = n[x].ln :: else -> skip fi }
inline demote(x) { if :: n[x].wl -> push(x, E(n[x].term, n[x].wl)) :: else -> skip fi;               /* capture, log, then follow (R2) */
                   n[x].role = 1; n[x].term = 0; n[x].wl = 0; n[x].mk = 0; n[x].burn = 0 }
inline follow(f, x) { d_step {                        /* all frames of leader x arrive, are fsynced and acked; rewind is one step */
  n[x].role >= 3 && n[f].role > 0 && n[f].prom <= n[x].term && n[f].term < n[x].term && !(n[f].prom == n[x].term && n[f].ln == n[x].ln && n[x].mk == n[f].ln) ->
  if :: n[f].role > 1 -> demote(f) :: else -> skip fi; n[f].prom = n[x].term;
  common(f, x); trunc(f, c); do :: c < n[x].ln -> push(f, n[x].lg[c]); c++ :: else -> break od;
  if :: c > n[x].mk -> n[x].mk = c :: else -> skip fi } }
inline seed(f, x) { d_step {                          /* the same by a snapshot: the log's past is the source's */
  n[x].role >= 3 && n[f].role == 1 && n[f].prom <= n[x].term && n[f].ln < n[x].ln && sent > 0 ->
  n[f].prom = n[x].term; common(f, x); trunc(f, c); do :: c < n[x].ln -> push(f, n[x].lg[c]); c++ :: else -> break od;
  n[f].fp = (SNAPTOK -> n[x].fp : n[x].ln); n[f].since = (SNAPTOK -> n[x].since : 0);
  if :: c > n[x].mk -> n[x].mk = c :: else -> skip fi } }
inline elect(x, f) { d_step {                         /* claim, SEAL of x and f, E5, term-start frame */
  n[x].role == 1 && n[f].role > 0 && gterm < MAXT ->
  gterm++; if :: n[f].role > 1 -> demote(f) :: else -> skip fi; n[x].prom = gterm; n[f].prom = gterm;
  common(x, f);
  if :: (LT(f) > LT(x) || (LT(f) == LT(x) && n[f].ln > n[x].ln)) && c < n[x].ln -> skip                /* gives the claim up */
     :: else -> if :: LT(f) >= LT(x) -> do :: c < n[f].ln && c >= n[x].ln -> push(x, n[f].lg[c]); c++ :: else -> break od :: else -> skip fi;
                holds(x, h); assert((h & ak) == ak);                                                    /* nothing acked is lost */
                j = 1; do :: j < 3 -> assert(out[j] != 1 || (h & BIT(j))); j++ :: else -> break od;     /* nothing answered done is lost */
                push(x, E(gterm, 0)); n[x].role = 3; n[x].term = gterm fi } }
inline ask(x, k) { d_step {                           /* what became of attempt k? */
  sent >= k && out[k] == 0 && (n[x].role == 4 || (n[x].role == 3 && !SERVING)) && (n[x].term >= pterm || !MINTERM) ->
  if :: n[x].term > pterm -> pterm = n[x].term :: else -> skip fi;
  j = 0; h = 0; i = 0;                                /* j: 1 named by a token, h: highest attempt in a rebuilt frame */
  do :: i < n[x].ln -> if :: n[x].lg[i]/2 % 4 == k && i >= n[x].fp && !(n[x].lg[i] & 1) -> j = i + 1
                          :: else -> if :: (n[x].lg[i] & 1) && ID(n[x].lg[i]) > h -> h = ID(n[x].lg[i]) :: else -> skip fi fi; i++ :: else -> break od;
  if :: j > 0 && (j <= n[x].mk || !DONEACK) -> out[k] = 1
     :: j > 0 && !(j <= n[x].mk || !DONEACK) -> skip                                                    /* running */
     :: j == 0 && n[x].wl == k && RUNNING -> skip                                                       /* running */
     :: j == 0 && !(n[x].wl == k && RUNNING) && (n[x].since >= k || (REBUILT && h >= k)) -> out[k] = 3
     :: else -> out[k] = 2; assert(!(ak & BIT(k))); n[x].burn = n[x].burn | BIT(k) fi } }
proctype Node(byte me) {
  end: do
  :: d_step { n[me].role == 4 && sent < 2 && n[me].term >= pterm && (sent == 0 || out[1] == 2 || (!ASK && out[1] == 0)) ->     /* the proxy sends */
       pterm = n[me].term; sent++; to[sent] = me + 1; rt[sent] = pterm }
#define RUN(k) d_step { to[k] == me + 1 && n[me].role == 4 && n[me].wl == 0 -> to[k] = 0; /* the attempt arrives: BEGIN .. COMMIT, or refused */ \
       if :: (n[me].term == rt[k] || !TERMBIND) && (!(n[me].burn & BIT(k)) || !BURN) -> n[me].wl = k :: else -> skip fi; rt[k] = 0 }
  :: RUN(1) :: RUN(2)
  :: d_step { n[me].wl > 0 && n[me].role == 4 -> push(me, E(n[me].term, n[me].wl)); n[me].wl = 0 }      /* its frame, token in the header */
  :: d_step { n[me].role >= 3 && n[me].mk > 0 && n[me].lg[n[me].mk-1]/8 == n[me].term ->                /* the acknowledgment rule */
       n[me].role = 4; i = 0;
       do :: i < n[me].mk -> ak = ak | (BIT(ID(n[me].lg[i])) & 6); i++ :: else -> break od;
       assert(ak < 6);                                                                                  /* never run twice */
       assert(!((ak & 2) && out[1] == 2) && !((ak & 4) && out[2] == 2)) }                               /* not done is for ever */
  :: ask(me, 1) :: ask(me, 2)
  :: d_step { n[me].role > 0 && sent > n[me].since && n[me].ln > n[me].fp -> n[me].fp = n[me].ln; if :: EXPIRE -> n[me].since = sent :: else -> skip fi }  /* 120 s pass */
  :: elect(me, (me+1)%3) :: elect(me, (me+2)%3)
  :: follow(me, (me+1)%3) :: follow(me, (me+2)%3) :: seed(me, (me+1)%3) :: seed(me, (me+2)%3)
  :: d_step { n[me].role > 0 && crashes < MAXK -> crashes++;                                            /* kill -9: the -wal has what the log lacks */
       if :: n[me].wl -> push(me, E(n[me].term, n[me].wl) + 1) :: else -> skip fi;
       n[me].wl = 0; demote(me); n[me].role = 0;
       i = 1; do :: i < 3 -> if :: to[i] == me + 1 -> to[i] = 0; rt[i] = 0 :: else -> skip fi; i++ :: else -> break od; skip }
  :: d_step { n[me].role > 1 && crashes < MAXK -> crashes++;                                            /* the machine dies: its log's own term is lost too */
       i = 0; do :: i < n[me].ln -> if :: n[me].lg[i]/8 == n[me].term && ID(n[me].lg[i]) -> n[me].lg[i] = n[me].lg[i] | 1 :: else -> skip fi; i++ :: else -> break od;
       n[me].wl = 0; demote(me); n[me].role = 0;
       i = 1; do :: i < 3 -> if :: to[i] == me + 1 -> to[i] = 0; rt[i] = 0 :: else -> skip fi; i++ :: else -> break od; skip }
  :: d_step { n[me].role == 0 -> n[me].role = 1 }
  od }
init { d_step { i = 0; do :: i < 3 -> n[i].lg[0] = E(1,0); n[i].ln = 1; n[i].prom = 1; n[i].role = 1; i++ :: else -> break od;
         n[0].role = 4; n[0].term = 1; n[0].mk = 1 };
  atomic { run Node(0); run Node(1); run Node(2) } }
