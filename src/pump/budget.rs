//! One bound that many accounts share: how much each may have on its way at once. Counts any unit.
//!
//! ```text
//!           nobody in the queue, and enough is free
//!   ask ──────────────────────────────────────────▶ SHARE ──arrived, end──▶ free
//!    │                                               ▲  │
//!    └──▶ QUEUE ──its turn, and enough is free───────┘  └──keep──▶ KEPT ──release──▶ free
//! ```
//! An *idle* share belongs to an account for which no message is known to be available: it can last long and
//! bring nothing. All other shares are *busy*: their messages come at once.
//!
//! 1. Each account has at most one share.
//! 2. `out` is the sum of all shares and of everything that is kept. It exceeds the bound in three cases only:
//!    the bound became lower, the only busy share is a `least` and something was free before it, or a share is
//!    a *probe*.
//! 3. Idle shares leave half of the bound to busy shares. With more idle shares each is smaller, but never
//!    below its `least`.
//! 4. Busy shares are granted in the order of asking. Each gets at least a fair part of half of the bound,
//!    or its whole wish if that is less. So nobody waits without end while other shares end.
//! 5. No account has more than `each`, nor more than nine tenths of its own and the free part. So a new
//!    account always finds something.
//! 6. If nothing but kept parts is out, and nobody can have a share, the next account gets its `least` as a
//!    probe. Its end may show that the kept parts have arrived. No probe follows a probe that was kept, until
//!    something is released.
//!
//! Pure: no clock, no runtime, no lock, no log.

use std::collections::{BTreeMap, VecDeque};

/// An idle share is at most this part of what other idle shares have left.
const IDLE_SHARE_DIVISOR: u64 = 16;

/// The wish of an account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRequest {
    /// The most that is useful.
    pub most: u64,
    /// The least that is useful: at least 1, at most `most`.
    pub least: u64,
    /// No message is known to be available.
    pub idle: bool,
}

/// One bound that many accounts share, in any unit. An account without a share waits in the queue.
#[derive(Debug)]
pub struct PullBudget<K> {
    bound: u64,
    each: u64,
    out: u64,
    idle_out: u64,
    kept: u64,
    /// A probe is out, or was kept.
    probed: bool,
    /// The number of busy shares.
    busy: u64,
    accounts: BTreeMap<K, Account>,
    queue: VecDeque<(K, ByteRequest)>,
    called: Vec<K>,
}

#[derive(Debug, Default)]
struct Account {
    share: Option<Share>,
    kept: u64,
}

#[derive(Debug)]
struct Share {
    left: u64,
    idle: bool,
    /// It finds out whether the kept parts are still on their way.
    probe: bool,
    /// Granted from the queue, and its owner does not know yet.
    called: bool,
}

/// The size of a share to come.
#[derive(Debug, Clone, Copy)]
struct Size {
    units: u64,
    probe: bool,
}

impl<K: Ord + Clone> PullBudget<K> {
    /// A budget of `bound` units. No account has more than `each`.
    pub fn new(bound: u64, each: u64) -> Self {
        Self {
            bound,
            each,
            out: 0,
            idle_out: 0,
            kept: 0,
            probed: false,
            busy: 0,
            accounts: BTreeMap::new(),
            queue: VecDeque::new(),
            called: Vec::new(),
        }
    }

    /// Sets a new bound. Shares that are out stay as they are.
    pub fn set_bound(&mut self, bound: u64) {
        self.bound = bound;
        self.serve();
    }

    /// Asks for a share, and returns its size. `None`: `who` is in the queue, and must ask again when
    /// [`PullBudget::called`] names it. An account with a share must end it first.
    pub fn ask(&mut self, who: &K, ask: ByteRequest) -> Option<u64> {
        if let Some(share) = self.accounts.get_mut(who).and_then(|account| account.share.as_mut()) {
            return std::mem::take(&mut share.called).then_some(share.left);
        }
        let ask = ByteRequest { least: ask.least.clamp(1, ask.most.max(1)), ..ask };
        if let Some((_, waiting)) = self.queue.iter_mut().find(|(waiting, _)| waiting == who) {
            *waiting = ask;
            self.serve();
            let called = self.called.iter().position(|called| called == who);
            return called.and_then(|at| {
                self.called.remove(at);
                self.ask(who, ask)
            });
        }
        let granted = if self.queue.is_empty() { self.size(who, ask, 1) } else { None };
        match granted {
            Some(size) => self.grant(who, size, ask.idle, false),
            None => self.queue.push_back((who.clone(), ask)),
        }
        granted.map(|size| size.units)
    }

    /// Leaves the queue. A share that was granted in the meantime, and not asked for again, ends.
    pub fn leave(&mut self, who: &K) {
        self.queue.retain(|(waiting, _)| waiting != who);
        self.called.retain(|called| called != who);
        let share = self.accounts.get(who).and_then(|account| account.share.as_ref());
        if share.is_some_and(|share| share.called) {
            self.end(who);
        } else {
            self.serve();
        }
    }

    /// Notes that `count` of a share has arrived, and frees it.
    pub fn arrived(&mut self, who: &K, count: u64) {
        self.take(who, count);
        self.serve();
    }

    /// Keeps `count` of a share until [`PullBudget::release`]: it has arrived, or is in doubt. Returns how much
    /// the share still had of it.
    pub fn keep(&mut self, who: &K, count: u64) -> u64 {
        let kept = self.take(who, count);
        self.add_kept(who, kept);
        if let Some(share) = self.accounts.get_mut(who).and_then(|account| account.share.as_mut()) {
            share.probe = false;
        }
        kept
    }

    /// Keeps `count` without a share, if so much is free.
    pub fn keep_at_once(&mut self, who: &K, count: u64) -> bool {
        let fits = count <= self.free();
        if fits {
            self.add_kept(who, count);
        }
        fits
    }

    /// Frees `count` of the kept part.
    pub fn release(&mut self, who: &K, count: u64) {
        if let Some(account) = self.accounts.get_mut(who) {
            let count = count.min(account.kept);
            account.kept -= count;
            self.kept -= count;
            self.out -= count;
            self.probed = false;
        }
        self.tidy(who);
        self.serve();
    }

    /// Ends a share, and frees the rest of it.
    pub fn end(&mut self, who: &K) {
        if let Some(share) = self.accounts.get_mut(who).and_then(|account| account.share.take()) {
            self.out -= share.left;
            self.probed &= !share.probe;
            if share.idle {
                self.idle_out -= share.left;
            } else {
                self.busy -= 1;
            }
        }
        self.tidy(who);
        self.serve();
    }

    /// Takes the accounts that must ask again, because their shares were granted.
    pub fn called(&mut self) -> Vec<K> {
        std::mem::take(&mut self.called)
    }

    /// The sum of all shares and kept parts.
    pub fn out(&self) -> u64 {
        self.out
    }

    /// The sum of the busy shares.
    pub fn busy_out(&self) -> u64 {
        self.out - self.idle_out - self.kept
    }

    /// The sum of the kept parts.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// The kept part of one account.
    pub fn kept_by(&self, who: &K) -> u64 {
        self.accounts.get(who).map_or(0, |account| account.kept)
    }

    /// The free part of the bound.
    pub fn free(&self) -> u64 {
        self.bound.saturating_sub(self.out)
    }

    /// The most that `who` may have, including what it has.
    pub fn limit(&self, who: &K) -> u64 {
        let within = self.kept_by(who).saturating_add(self.free());
        // A tenth of fewer than ten units is zero, so `who` may have the last unit, too.
        self.each.min(within - within / 10)
    }

    /// The size of a share now, by rules 1 to 6. `more`: as in [`PullBudget::fair`].
    fn size(&self, who: &K, ask: ByteRequest, more: u64) -> Option<Size> {
        let probes = self.kept > 0 && self.out == self.kept && !self.probed;
        let probe = || probes.then_some(Size { units: ask.least, probe: true });
        let fair = self.fair(who, ask, more).map(|units| Size { units, probe: false });
        fair.or_else(probe)
    }

    /// The size of a share that is no probe. `more`: the busy accounts that have no share and are not in the
    /// queue.
    fn fair(&self, who: &K, ask: ByteRequest, more: u64) -> Option<u64> {
        let (free, pool) = (self.free(), self.bound.saturating_sub(self.kept));
        let allowed = self.limit(who).saturating_sub(self.kept_by(who));
        if allowed == 0 {
            return None;
        }
        // One message may exceed the allowed part, but never the free part.
        let most = ask.most.min(allowed).max(ask.least);
        if ask.idle {
            let left = (pool / 2).saturating_sub(self.idle_out);
            let share = most.min((left / IDLE_SHARE_DIVISOR).max(ask.least));
            return (share <= free || self.out == 0).then_some(share);
        }
        if self.busy == 0 {
            return Some(most.min(free).max(ask.least));
        }
        let waiting = self.queue.iter().filter(|(_, ask)| !ask.idle).count() as u64;
        let fair = pool / (2 * (self.busy + waiting + more));
        let share = most.min((free / 2).max(fair)).max(ask.least);
        (share <= free).then_some(share)
    }

    fn grant(&mut self, who: &K, size: Size, idle: bool, called: bool) {
        let Size { units, probe } = size;
        self.out += units;
        self.probed |= probe;
        if idle {
            self.idle_out += units;
        } else {
            self.busy += 1;
        }
        let account = self.accounts.entry(who.clone()).or_default();
        account.share = Some(Share { left: units, idle, probe, called });
    }

    /// Grants shares from the head of the queue while enough is free.
    fn serve(&mut self) {
        while let Some((who, ask)) = self.queue.front()
            && let Some(size) = self.size(who, *ask, 0)
            && let Some((who, ask)) = self.queue.pop_front()
        {
            self.grant(&who, size, ask.idle, true);
            self.called.push(who);
        }
    }

    fn take(&mut self, who: &K, count: u64) -> u64 {
        let share = self.accounts.get_mut(who).and_then(|account| account.share.as_mut());
        let Some(share) = share else { return 0 };
        let count = count.min(share.left);
        share.left -= count;
        self.out -= count;
        if share.idle {
            self.idle_out -= count;
        }
        count
    }

    fn add_kept(&mut self, who: &K, count: u64) {
        if count > 0 {
            self.accounts.entry(who.clone()).or_default().kept += count;
            self.kept += count;
            self.out += count;
        }
    }

    fn tidy(&mut self, who: &K) {
        let gone = |account: &Account| account.share.is_none() && account.kept == 0;
        if self.accounts.get(who).is_some_and(gone) {
            self.accounts.remove(who);
        }
    }

    /// Panics if an invariant does not hold. For tests.
    #[doc(hidden)]
    pub fn check(&self) {
        let shares = || self.accounts.values().filter_map(|account| account.share.as_ref());
        let kept: u64 = self.accounts.values().map(|account| account.kept).sum();
        let left: u64 = shares().map(|share| share.left).sum();
        let idle: u64 = shares().filter(|share| share.idle).map(|share| share.left).sum();
        let busy = shares().filter(|share| !share.idle).count() as u64;
        assert_eq!((self.out, self.idle_out, self.kept), (left + kept, idle, kept));
        assert_eq!(self.busy, busy);
    }
}
