//! One bound, shared by many: how much each may have on its way at once. Counts any unit.
//!
//! ```text
//!           nobody before it, and enough is free
//!   ask ──────────────────────────────────────────▶ SHARE ──arrived, end──▶ free
//!    │                                               ▲  │
//!    └──▶ LINE ──its turn, and enough is free────────┘  └──keep──▶ KEPT ──release──▶ free
//! ```
//! A share that is *idle* belongs to somebody for whom nothing is known to be there: it can last long and
//! bring nothing. All other shares are *busy*: what they are for comes at once.
//!
//! 1. Everybody has one share at most.
//! 2. The shares and all that is kept make up `out`. It exceeds the bound in two cases alone: the bound has
//!    become lower; or the only busy share is a `least`, and something was free before it.
//! 3. Idle shares leave half of the bound to busy ones. They become smaller as they become more; below
//!    their `least` they do not go.
//! 4. Busy shares are granted in the order of asking. Each gets at least a fair part of half of the bound,
//!    or what it wants, if that is less. So nobody waits for ever while others end.
//! 5. Nobody has more than `each`, nor more than nine tenths of what is free and its own: for somebody new
//!    there is always something.
//!
//! Pure: no clock, no runtime, no lock, no log.

use std::collections::{BTreeMap, VecDeque};

/// Idle shares are at most this part of what other idle shares have left.
const IDLE_SHARE_DIVISOR: u64 = 16;

/// What somebody asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteRequest {
    /// The most that is of use.
    pub most: u64,
    /// Less is of no use. At least 1, at most `most`.
    pub least: u64,
    /// Nothing is known to be there.
    pub idle: bool,
}

/// One bound that many accounts share, in any unit. Accounts that ask in vain wait in line.
#[derive(Debug)]
pub struct PullBudget<K> {
    bound: u64,
    each: u64,
    out: u64,
    idle_out: u64,
    kept: u64,
    /// Busy shares.
    busy: u64,
    accounts: BTreeMap<K, Account>,
    line: VecDeque<(K, ByteRequest)>,
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
    /// Granted from the line; its owner does not know yet.
    called: bool,
}

impl<K: Ord + Clone> PullBudget<K> {
    /// A budget of `bound` units, of which nobody has more than `each`.
    pub fn new(bound: u64, each: u64) -> Self {
        Self {
            bound,
            each,
            out: 0,
            idle_out: 0,
            kept: 0,
            busy: 0,
            accounts: BTreeMap::new(),
            line: VecDeque::new(),
            called: Vec::new(),
        }
    }

    /// The bound is another one from now on. Shares that are out stay as they are.
    pub fn set_bound(&mut self, bound: u64) {
        self.bound = bound;
        self.serve();
    }

    /// Asks for a share: how large it is, or `None`: `who` stands in line, and is to ask again when
    /// [`PullBudget::called`] names it. Whoever has a share must end it first.
    pub fn ask(&mut self, who: &K, ask: ByteRequest) -> Option<u64> {
        if let Some(share) = self.accounts.get_mut(who).and_then(|account| account.share.as_mut()) {
            return std::mem::take(&mut share.called).then_some(share.left);
        }
        let ask = ByteRequest { least: ask.least.clamp(1, ask.most.max(1)), ..ask };
        if let Some((_, waiting)) = self.line.iter_mut().find(|(waiting, _)| waiting == who) {
            *waiting = ask;
            self.serve();
            let called = self.called.iter().position(|called| called == who);
            return called.and_then(|at| {
                self.called.remove(at);
                self.ask(who, ask)
            });
        }
        let granted = if self.line.is_empty() { self.size(who, ask, 1) } else { None };
        match granted {
            Some(share) => self.grant(who, share, ask.idle, false),
            None => self.line.push_back((who.clone(), ask)),
        }
        granted
    }

    /// Leaves the line. A share that was granted in the meantime, and not asked for again, ends.
    pub fn leave(&mut self, who: &K) {
        self.line.retain(|(waiting, _)| waiting != who);
        self.called.retain(|called| called != who);
        let share = self.accounts.get(who).and_then(|account| account.share.as_ref());
        if share.is_some_and(|share| share.called) {
            self.end(who);
        } else {
            self.serve();
        }
    }

    /// So much of a share has arrived, and is free again.
    pub fn arrived(&mut self, who: &K, count: u64) {
        self.take(who, count);
        self.serve();
    }

    /// So much of a share has arrived, or is in doubt, and is kept until [`PullBudget::release`]: how much
    /// of it the share still had.
    pub fn keep(&mut self, who: &K, count: u64) -> u64 {
        let kept = self.take(who, count);
        self.add_kept(who, kept);
        kept
    }

    /// Keeps so much without a share, if so much is free.
    pub fn keep_at_once(&mut self, who: &K, count: u64) -> bool {
        let fits = count <= self.free();
        if fits {
            self.add_kept(who, count);
        }
        fits
    }

    /// So much of what was kept is free again.
    pub fn release(&mut self, who: &K, count: u64) {
        if let Some(account) = self.accounts.get_mut(who) {
            let count = count.min(account.kept);
            account.kept -= count;
            self.kept -= count;
            self.out -= count;
        }
        self.tidy(who);
        self.serve();
    }

    /// A share is over: what is left of it is free again.
    pub fn end(&mut self, who: &K) {
        if let Some(share) = self.accounts.get_mut(who).and_then(|account| account.share.take()) {
            self.out -= share.left;
            if share.idle {
                self.idle_out -= share.left;
            } else {
                self.busy -= 1;
            }
        }
        self.tidy(who);
        self.serve();
    }

    /// Takes out who is to ask again, because its share was granted.
    pub fn called(&mut self) -> Vec<K> {
        std::mem::take(&mut self.called)
    }

    /// What is out now.
    pub fn out(&self) -> u64 {
        self.out
    }

    /// What is out of busy shares now.
    pub fn busy_out(&self) -> u64 {
        self.out - self.idle_out - self.kept
    }

    /// What is kept now, of all.
    pub fn kept(&self) -> u64 {
        self.kept
    }

    /// What is kept now, of one.
    pub fn kept_by(&self, who: &K) -> u64 {
        self.accounts.get(who).map_or(0, |account| account.kept)
    }

    /// What is free now.
    pub fn free(&self) -> u64 {
        self.bound.saturating_sub(self.out)
    }

    /// How much `who` may have of it, with what it has.
    pub fn limit(&self, who: &K) -> u64 {
        let within = self.kept_by(who).saturating_add(self.free());
        // Of a few the last one too: a tenth of them is none.
        self.each.min(within - within / 10)
    }

    /// How large a share is now. `more`: busy ones beside those that have a share or stand in line.
    fn size(&self, who: &K, ask: ByteRequest, more: u64) -> Option<u64> {
        let (free, pool) = (self.free(), self.bound.saturating_sub(self.kept));
        let allowed = self.limit(who).saturating_sub(self.kept_by(who));
        if allowed == 0 {
            return None;
        }
        // One message may pass what is allowed, never what is free.
        let most = ask.most.min(allowed).max(ask.least);
        if ask.idle {
            let left = (pool / 2).saturating_sub(self.idle_out);
            let share = most.min((left / IDLE_SHARE_DIVISOR).max(ask.least));
            return (share <= free || self.out == 0).then_some(share);
        }
        if self.busy == 0 {
            return Some(most.min(free).max(ask.least));
        }
        let waiting = self.line.iter().filter(|(_, ask)| !ask.idle).count() as u64;
        let fair = pool / (2 * (self.busy + waiting + more));
        let share = most.min((free / 2).max(fair)).max(ask.least);
        (share <= free).then_some(share)
    }

    fn grant(&mut self, who: &K, share: u64, idle: bool, called: bool) {
        self.out += share;
        if idle {
            self.idle_out += share;
        } else {
            self.busy += 1;
        }
        let account = self.accounts.entry(who.clone()).or_default();
        account.share = Some(Share { left: share, idle, called });
    }

    /// Grants to those at the head of the line for whom there is enough.
    fn serve(&mut self) {
        while let Some((who, ask)) = self.line.front()
            && let Some(share) = self.size(who, *ask, 0)
            && let Some((who, ask)) = self.line.pop_front()
        {
            self.grant(&who, share, ask.idle, true);
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

    /// Panics if an invariant does not hold: for tests.
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
