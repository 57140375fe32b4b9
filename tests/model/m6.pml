/* M6: proxy floors (R18) under reads at level `session`. 3 voters, n=1, two proxies that never speak to each other; each writes, reads, and may
   start anew and forget its floor. An election (m1, m2) is one step and needs the old leader's lease to be over. A log entry is term*8 + commit;
   commit 0 is a term-start. A position is term*16 + txid. A read takes its floor, and is served by any node at any later time.
   Checked: a read sees every write acknowledged through its proxy (with SCOPE: through any proxy) and every write that a read through its
   proxy has shown, up to the moment when it began. Switches (1 = rule on):                                                               */
#ifndef MAXT
#define MAXT 2        /* terms */
#endif
#ifndef MAXC
#define MAXC 2        /* commits */
#endif
#ifndef MAXK
#define MAXK 1        /* crashes of machines */
#endif
#ifndef MAXR
#define MAXR 1        /* starts of a proxy */
#endif
#ifndef SCOPE         /* 1: several proxies in the record, so every read's floor is fetched from the leader; 0: one proxy, its own floor */
#define SCOPE 1
#endif
#ifndef FETCH         /* with SCOPE: the floor is fetched */
#define FETCH 1
#endif
#ifndef LEASE         /* a leader gives floors only while its lease is live (or after a heartbeat round, as for a read index) */
#define LEASE 1
#endif
#ifndef WFLOOR        /* the reply to a write raises the floor */
#define WFLOOR 1
#endif
#ifndef RFLOOR        /* the reply to a read raises the floor */
#define RFLOOR 1
#endif
#ifndef GATE          /* on the leader no read is answered before acked covers what it saw (R17) */
#define GATE 1
#endif
#ifndef JOIN          /* a node that led, or that starts, serves `session` only after it has followed a leader's stream */
#define JOIN 1
#endif
#ifndef APPLYDUR      /* a voter shows only frames that are durable in its log */
#define APPLYDUR 1
#endif
#ifndef START         /* a starting proxy takes a floor first */
#define START 1
#endif
#ifndef STARTPOS      /* that floor is all that the leader has, not only what is acked */
#define STARTPOS 1
#endif
#ifndef STARTQ        /* with no leader: the best of |V|-n voters (0: of any one voter) */
#define STARTQ 1
#endif
#ifndef NEWTERM       /* on a new term the floor becomes (t+1, start) */
#define NEWTERM 1
#endif
#ifndef TERMCMP       /* floors are compared by (term, txid), not by txid alone */
#define TERMCMP 1
#endif
#define L (MAXT+MAXC+1)
#define E(t,c) ((t)*8+(c))
#define LT(x) (n[x].lg[n[x].ln-1]/8)
#define BIT(k) (1<<(k))
#define COVERS(p, f) ((TERMCMP && (p) >= (f)) || (!TERMCMP && (p)%16 >= (f)%16))
typedef Nd { byte lg[L]; byte ln, dl, ap;              /* log, durable length, applied length */
             byte prom, role, term, mk; bit lease, joined }   /* role 0 down 1 follower 3 leading 4 serving */
typedef Px { byte fl, kt; bit up, rd;                  /* floor, highest term known; started; a read is under way */
             byte rf, rm; byte mine, seen }            /* its floor, what it must see (ghost); acked here, shown here (ghosts) */
Nd n[3]; Px p[2]; byte own[MAXC+1];                    /* which proxy sent a commit */
byte gterm = 1, cids = 0, crashes = 0, starts = 0, al = 0;
hidden byte c, i, j, h, q;
#define common(A, B) c = 0; do :: c < n[A].ln && c < n[B].ln && n[A].lg[c] == n[B].lg[c] -> c++ :: else -> break od
#define pos(x, k, r) r = 0; i = 0; do :: i < (k) -> if :: n[x].lg[i] % 8 -> r++ :: else -> skip fi; i++ :: else -> break od; r = r + 16 * (n[x].lg[(k)-1]/8)
#define view(x, k, r) r = 0; i = 0; do :: i < (k) -> r = r | (BIT(n[x].lg[i] % 8) & 254); i++ :: else -> break od
#define UP(r, v) if :: (v) > r -> r = v :: else -> skip fi
inline push(x, v) { n[x].lg[n[x].ln] = v; n[x].ln++ }
inline trunc(x, k) { do :: n[x].ln > k -> n[x].ln--; n[x].lg[n[x].ln] = 0 :: else -> break od;
                     if :: n[x].dl > k -> n[x].dl = k :: else -> skip fi; if :: n[x].ap > k -> n[x].ap = k :: else -> skip fi }
inline demote(x) { n[x].dl = n[x].ln; n[x].role = 1; n[x].term = 0; n[x].mk = 0; n[x].lease = 0; n[x].joined = 0 }
inline follow(f, x) { d_step {                         /* frames arrive; a diverging tail is rewound in the same step */
  n[x].role >= 3 && n[f].role > 0 && n[f].prom <= n[x].term && n[f].term < n[x].term ->
  if :: n[f].role > 1 -> demote(f) :: else -> skip fi; n[f].prom = n[x].term;
  common(f, x); trunc(f, c); if :: c < n[x].ln -> push(f, n[x].lg[c]) :: else -> skip fi; if :: LT(f) == n[x].term -> n[f].joined = 1 :: else -> skip fi } }
inline sync(f) { d_step { n[f].role == 1 && n[f].dl < n[f].ln -> n[f].dl = n[f].ln } }                   /* fsync of the log */
inline reply(f, x) { d_step {                          /* the ack, later */
  n[x].role >= 3 && n[f].role == 1 && n[f].prom == n[x].term && LT(f) == n[x].term && n[x].mk < n[f].dl -> n[x].mk = n[f].dl } }
inline elect(x, f) { d_step {
  n[x].role == 1 && n[f].role > 0 && gterm < MAXT && !n[0].lease && !n[1].lease && !n[2].lease ->
  gterm++; if :: n[f].role > 1 -> demote(f) :: else -> skip fi; n[x].prom = gterm; n[f].prom = gterm; n[f].dl = n[f].ln;
  common(x, f);
  if :: (LT(f) > LT(x) || (LT(f) == LT(x) && n[f].ln > n[x].ln)) && c < n[x].ln -> skip                 /* gives the claim up */
     :: else -> if :: LT(f) >= LT(x) -> do :: c < n[f].ln && c >= n[x].ln -> push(x, n[f].lg[c]); c++ :: else -> break od :: else -> skip fi;
                view(x, n[x].ln, h); assert((h & al) == al);
                push(x, E(gterm, 0)); n[x].dl = n[x].ln; n[x].ap = n[x].ln; n[x].role = 3; n[x].term = gterm; n[x].mk = 0 fi } }
proctype Node(byte me) {
  end: do
  :: d_step { n[me].role == 4 && cids < MAXC -> cids++; push(me, E(n[me].term, cids)); own[cids] = 0; n[me].dl = n[me].ln; n[me].ap = n[me].ln }  /* commits by proxy 0 */
  :: d_step { n[me].role == 4 && cids < MAXC -> cids++; push(me, E(n[me].term, cids)); own[cids] = 1; n[me].dl = n[me].ln; n[me].ap = n[me].ln }  /* and by proxy 1 */
  :: d_step { n[me].role >= 3 && n[me].mk > 0 && n[me].lg[n[me].mk-1]/8 == n[me].term ->                /* acks; replies to writes */
       if :: n[me].role == 3 && gterm == n[me].term -> n[me].role = 4; n[me].lease = 1 :: else -> skip fi;
       if :: n[me].role == 4 ->
             j = 0; do :: j < n[me].mk -> h = n[me].lg[j] % 8; j++;
                          if :: h && !(al & BIT(h)) -> al = al | BIT(h); p[own[h]].mine = p[own[h]].mine | BIT(h); pos(me, j, q);
                                if :: WFLOOR -> UP(p[own[h]].fl, q) :: else -> skip fi
                             :: else -> skip fi :: else -> break od
          :: else -> skip fi; j = 0; h = 0; q = 0 }
  :: d_step { n[me].lease -> n[me].lease = 0 }                                                          /* cut off or paused: it ends */
  :: d_step { n[me].role == 1 && n[me].ap < (APPLYDUR -> n[me].dl : n[me].ln) -> n[me].ap++ }
  :: elect(me, (me+1)%3) :: elect(me, (me+2)%3)
  :: follow(me, (me+1)%3) :: follow(me, (me+2)%3) :: sync(me)
  :: reply(me, (me+1)%3) :: reply(me, (me+2)%3)
  :: d_step { n[me].role > 0 && crashes < MAXK -> crashes++; i = n[me].dl; trunc(me, i); demote(me); n[me].role = 0 }
  :: d_step { n[me].role == 0 -> n[me].role = 1; n[me].ap = n[me].ln }
  od }
#define LEADS(x) (n[x].role == 4 && n[x].term >= p[me].kt && (n[x].lease || !LEASE))
#define NEW(x) if :: NEWTERM && n[x].term > p[me].kt && n[x].term > p[me].fl/16 -> i = 0; do :: n[x].lg[i]/8 < n[x].term -> i++ :: else -> break od; j = i + 1; pos(x, j, q); p[me].fl = q :: else -> skip fi; \
               if :: n[x].term > p[me].kt -> p[me].kt = n[x].term :: else -> skip fi
inline learn(x) { d_step { n[x].role == 4 && n[x].term > p[me].kt && p[me].up -> NEW(x); i = 0; j = 0; q = 0 } }
inline startup(x) { d_step { !p[me].up && LEADS(x) -> NEW(x); pos(x, (STARTPOS -> n[x].ln : n[x].mk), q); UP(p[me].fl, q); p[me].up = 1; q = 0 } }
inline orphaned(x, y) { d_step { !p[me].up && n[x].role > 0 && n[y].role > 0 -> pos(x, n[x].dl, q); UP(p[me].fl, q);
                       if :: STARTQ -> pos(y, n[y].dl, q); UP(p[me].fl, q) :: else -> skip fi; p[me].up = 1; q = 0 } }
inline begin(x) { d_step { p[me].up && !p[me].rd && (!SCOPE || !FETCH || LEADS(x)) ->
  p[me].rd = 1; p[me].rm = p[me].seen | (SCOPE -> al : p[me].mine); p[me].rf = p[me].fl;
  if :: SCOPE && FETCH -> pos(x, n[x].mk, q); UP(p[me].rf, q); q = 0 :: else -> skip fi } }
inline serve(x) { d_step { p[me].rd && n[x].role > 0 && n[x].ap > 0 && n[x].role != 3 && (n[x].role > 1 || n[x].joined || !JOIN) && (n[x].role == 1 || !GATE || n[x].mk >= n[x].ap) ->
  pos(x, n[x].ap, q);
  if :: COVERS(q, p[me].rf) -> view(x, n[x].ap, h); assert((h & p[me].rm) == p[me].rm);
        p[me].seen = p[me].seen | h; if :: RFLOOR -> UP(p[me].fl, q) :: else -> skip fi; p[me].rd = 0; p[me].rf = 0; p[me].rm = 0
     :: else -> skip fi; h = 0; q = 0 } }
proctype Proxy(byte me) {
  end: do
  :: learn(0) :: learn(1) :: learn(2)
  :: begin(0) :: begin(1) :: begin(2)
  :: serve(0) :: serve(1) :: serve(2)
  :: d_step { starts < MAXR && p[me].up -> starts++; p[me].fl = 0; p[me].kt = 0; p[me].rd = 0; p[me].rf = 0; p[me].rm = 0; p[me].up = 1 - START }
  :: startup(0) :: startup(1) :: startup(2)
  :: orphaned(0,1) :: orphaned(1,2) :: orphaned(2,0)
#if STARTQ == 0
  :: orphaned(1,0) :: orphaned(2,1) :: orphaned(0,2)
#endif
  od }
init { d_step { i = 0; do :: i < 3 -> n[i].lg[0] = E(1,0); n[i].ln = 1; n[i].dl = 1; n[i].ap = 1; n[i].prom = 1; n[i].role = 1; n[i].joined = 1; i++ :: else -> break od;
         n[0].role = 4; n[0].term = 1; n[0].mk = 1; n[0].lease = 1; p[0].up = 1; p[1].up = 1; p[0].fl = 16; p[1].fl = 16; p[0].kt = 1; p[1].kt = 1 };
  atomic { run Node(0); run Node(1); run Node(2); run Proxy(0); run Proxy(1) } }
