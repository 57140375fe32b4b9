/* M7: the lease and the store's outage (failover.md 3.2, 3.8). One clock, NN nodes, no logs: this is about who may answer when, which
   matters where no follower's ack says so (n=0, and reads under the lease). The store may be down at any time; a request that was sent
   may land at any later time while it is up, its reply may come later still or never, and its sender may send again meanwhile.
   Promise: at no moment two nodes would answer. Switches (1 = rule on):                                                            */
#ifndef NN
#define NN 2
#endif
#ifndef MAXN
#define MAXN 3        /* the clock ends there */
#endif
#ifndef MAXD
#define MAXD 1        /* outages */
#endif
#ifndef MAXT
#define MAXT 2
#endif
#ifndef MAXB
#define MAXB 2        /* requests of one node */
#endif
#define T 2           /* of a lease, in ticks; a challenger waits as long from its own first sight of the version */
#ifndef REACH         /* set to a term: finds a path on which it answers after the outage, so the search is not empty */
#endif
#ifndef SENT          /* a lease is timed from before its request was sent (0: from the reply) */
#define SENT 1
#endif
#ifndef OWNWAIT       /* a challenger waits T from its own sight of this version (0: it claims over whatever is there by then) */
#define OWNWAIT 1
#endif
#ifndef CHECK         /* a leader looks at its lease before it answers */
#define CHECK 1
#endif
#ifndef WHICH         /* what is found in the record after an unknown outcome extends the lease from that request's own sending (0: the newest) */
#define WHICH 1
#endif
#ifndef VERSION       /* every compare-and-swap compares the version (0: only the term) */
#define VERSION 1
#endif
typedef Rq { byte use, ver, term, at, beat }      /* use 0 free 1 sent 2 landed, reply on its way; at: when it was sent; beat: its number */
typedef Nd { byte lead, until, sawv, sawt, beat, known }      /* lead: term it leads, 0 none; known: newest own beat whose landing it used */
Nd n[NN]; Rq r[NN*2];
byte now, ver = 1, gterm = 1, holder, beats, down, outages;            /* beats: beat of the record */
hidden byte i, j;
#define VALID(x) (n[x].lead > 0 && now < n[x].until)
inline alone(x) { i = 0; do :: i < NN -> assert(i == x || !VALID(i)); i++ :: else -> break od; i = 0 }
inline clear(x, k) { r[(x)*2+k].use = 0; r[(x)*2+k].ver = 0; r[(x)*2+k].term = 0; r[(x)*2+k].at = 0; r[(x)*2+k].beat = 0 }
inline send(x, k, vv, tt) { n[x].beat++; r[(x)*2+k].use = 1; r[(x)*2+k].ver = vv; r[(x)*2+k].term = tt; r[(x)*2+k].at = now; r[(x)*2+k].beat = n[x].beat }
inline extend(x, t0) { if :: t0 + T > n[x].until -> n[x].until = t0 + T :: else -> skip fi }
proctype Request(byte me, k) {
  end: do
  :: d_step { n[me].lead > 0 && n[me].lead == gterm && r[me*2+k].use == 0 && n[me].beat < MAXB && !down -> send(me, k, ver, n[me].lead) }   /* renew: read, then sent */
  :: d_step { n[me].lead == 0 && r[me*2+k].use == 0 && n[me].beat < MAXB && gterm < MAXT && n[me].sawv > 0 && now >= n[me].sawt + T ->        /* claim */
       if :: OWNWAIT -> j = n[me].sawv :: else -> j = ver fi; send(me, k, j, gterm + 1); j = 0 }
  :: d_step { r[me*2+k].use == 1 && !down ->                                                           /* it lands, or fails */
       if :: r[me*2+k].ver == ver || (!VERSION && r[me*2+k].term >= gterm) -> ver++; gterm = r[me*2+k].term; holder = me; beats = r[me*2+k].beat; r[me*2+k].use = 2
          :: else -> clear(me, k) fi }
  :: d_step { r[me*2+k].use == 2 ->                                                                    /* its reply comes */
       if :: r[me*2+k].term >= n[me].lead -> n[me].lead = r[me*2+k].term; if :: SENT -> extend(me, r[me*2+k].at) :: else -> extend(me, now) fi
          :: else -> skip fi;
       clear(me, k) }
  :: d_step { r[me*2+k].use == 2 -> clear(me, k) }                                                     /* it never comes */
  :: d_step { r[me*2+k].use > 0 && !down && holder == me && gterm >= n[me].lead && beats == r[me*2+k].beat && n[me].known < beats ->   /* read after an unknown outcome: mine */
       n[me].lead = gterm; n[me].known = beats;
       if :: WHICH -> extend(me, r[me*2+k].at) :: else -> j = r[me*2+1-k].at; if :: r[me*2+1-k].use > 0 && j > r[me*2+k].at -> extend(me, j) :: else -> extend(me, r[me*2+k].at) fi; j = 0 fi }
  od }
proctype Node(byte me) {
  end: do
  :: d_step { n[me].lead > 0 && (VALID(me) || !CHECK) -> alone(me);                                     /* answer a client */
#ifdef REACH
     assert(!(outages == MAXD && !down && n[me].lead >= REACH));
#endif
     }
  :: d_step { !down && n[me].sawv != ver -> n[me].sawv = ver; n[me].sawt = now }                        /* sight of the record */
  :: d_step { !down && n[me].lead > 0 && n[me].lead < gterm -> n[me].lead = 0; n[me].until = 0 }        /* deposed, and learns it */
  od }
proctype World() {
  end: do
  :: d_step { now < MAXN -> now++ }
  :: d_step { !down && outages < MAXD -> down = 1; outages++ }
  :: d_step { down -> down = 0 }
  od }
init { d_step { n[0].lead = 1; n[0].until = T };
  atomic { run World(); run Node(0); run Request(0, 0); run Request(0, 1); run Node(1); run Request(1, 0);
#if NN > 2
    run Node(2); run Request(2, 0);
#endif
  } }
