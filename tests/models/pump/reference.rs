//! The pump, written for ten waiters. Every question looks at all waiters, time is in milliseconds
//! since the start, and each promise is stated once, in its own words.

use std::collections::VecDeque;

use fetch_proxy::pump::{FlowId, PullOutcome, WaiterId, Why};

pub(super) const OVERHEAD: u64 = 600;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) id: u32,
    pub(super) size: u64,
    pub(super) last_attempt: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Want {
    pub(super) n: u32,
    pub(super) max_bytes: u64,
    pub(super) until: u64,
    pub(super) linger: u64,
    pub(super) no_wait: bool,
}

#[derive(Debug, Clone)]
pub(super) struct PullLimits {
    pub(super) max_batch: u32,
    pub(super) max_unsettled: u32,
    pub(super) max_expires: u64,
    pub(super) max_request_bytes: Option<u64>,
    pub(super) park: u64,
    pub(super) linger: u64,
}

/// The limits of a pull.
#[derive(Debug, Clone, Copy)]
pub(super) struct Allowed {
    pub(super) messages: u32,
    pub(super) bytes: u64,
    pub(super) wait: u64,
}

impl Allowed {
    pub(super) fn nothing(self) -> bool {
        self.messages == 0 || self.bytes == 0
    }
}

#[derive(Debug)]
pub(super) struct Waiter {
    pub(super) id: WaiterId,
    want: Want,
    /// Its place among all who come.
    turn: u64,
    joined: u64,
    end: u64,
    has: Vec<Message>,
}

#[derive(Debug)]
pub(super) struct Flow {
    pub(super) id: FlowId,
    /// Messages and bytes that it may hold, and those that it was handed and has not freed.
    pub(super) most: (u64, u64),
    pub(super) holds: Vec<Message>,
    /// The number of messages that are being settled.
    pub(super) settling: u64,
    pub(super) stalled: bool,
    turn: u64,
    /// Handed, and not yet delivered.
    pub(super) undelivered: Vec<Message>,
    /// The most messages that it may hold: its credit, or what it held when that was lowered.
    pub(super) bound: u64,
}

/// An answer that had to be given when its last message came.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Decided {
    pub(super) id: WaiterId,
    pub(super) messages: Vec<Message>,
    pub(super) too_large: Option<Message>,
}

#[derive(Debug)]
pub(super) struct Pull {
    pub(super) no: u64,
    pub(super) batch: u32,
    pub(super) expires: u64,
    pub(super) no_wait: bool,
    pub(super) max_bytes: Option<u64>,
    got: u32,
    issued_at: u64,
    last_activity: u64,
    waiters_before: Option<WaiterId>,
    plain: bool,
    for_flows: bool,
    whole: bool,
    /// It was allowed fewer bytes than wanted, or fewer messages.
    short_of_bytes: bool,
    short: bool,
    goes_on: bool,
}

#[derive(Debug)]
pub(super) struct Reference {
    pub(super) limits: PullLimits,
    pub(super) waiters: Vec<Waiter>,
    pub(super) flows: Vec<Flow>,
    turns: u64,
    /// Since when a flow has room and no pull has ended.
    room_since: Option<u64>,
    pub(super) decided: VecDeque<Decided>,
    pub(super) parked: VecDeque<(Message, u64)>,
    pub(super) pull: Option<Pull>,
    pub(super) up: bool,
    pub(super) draining: bool,
    issued: u64,
    /// The last waiter that a pull that ran its course was issued for.
    told: Option<WaiterId>,
    plain: bool,
    uncapped: bool,
    whole: bool,
    /// The last pull came to a limit that its waiters do not have; they wait for the next until then.
    more_by: Option<u64>,
    /// The next pull comes no earlier than the first and no later than the second.
    pause: (u64, u64),
}

impl Waiter {
    fn room(&self) -> u64 {
        self.want.max_bytes - self.has.iter().map(|message| message.size).sum::<u64>()
    }

    fn missing(&self) -> u64 {
        u64::from(self.want.n) - self.has.len() as u64
    }

    fn lingers(&self) -> bool {
        !self.want.no_wait && self.want.linger > 0
    }
}

impl Flow {
    pub(super) fn bytes(&self) -> u64 {
        self.holds.iter().map(|message| message.size).sum()
    }

    fn room(&self) -> u64 {
        self.room_for(self.holds.len() as u64)
    }

    fn room_for(&self, messages: u64) -> u64 {
        let full = self.stalled || messages >= self.most.0;
        if full { 0 } else { self.most.1.saturating_sub(self.bytes()) }
    }

    /// What it holds once the settlements under way have ended.
    fn keeps(&self) -> u64 {
        (self.holds.len() as u64).saturating_sub(self.settling)
    }

    fn missing(&self) -> u64 {
        let room = self.room_for(self.keeps());
        if room == 0 {
            return 0;
        }
        (self.most.0 - self.keeps()).min((room / 1200).max(1))
    }
}

impl Reference {
    pub(super) fn new(limits: PullLimits) -> Self {
        Self {
            limits,
            waiters: Vec::new(),
            flows: Vec::new(),
            turns: 0,
            room_since: None,
            decided: VecDeque::new(),
            parked: VecDeque::new(),
            pull: None,
            up: false,
            draining: false,
            issued: 0,
            told: None,
            plain: false,
            uncapped: false,
            whole: false,
            more_by: None,
            pause: (0, 0),
        }
    }

    pub(super) fn join(&mut self, id: WaiterId, want: Want, now: u64) {
        let (end, turn) = (want.until, self.turn());
        self.waiters.push(Waiter { id, want, turn, joined: now, end, has: Vec::new() });
    }

    fn turn(&mut self) -> u64 {
        self.turns += 1;
        self.turns
    }

    pub(super) fn open(&mut self, id: FlowId, most: (u64, u64), now: u64) {
        let (turn, bound) = (self.turn(), most.0);
        self.flows.push(Flow {
            id,
            most,
            holds: Vec::new(),
            settling: 0,
            stalled: false,
            turn,
            undelivered: Vec::new(),
            bound,
        });
        self.look_for_room(now);
    }

    pub(super) fn set_credit(&mut self, at: usize, most: (u64, u64), now: u64) {
        let flow = &mut self.flows[at];
        flow.most = most;
        flow.bound = most.0.max(flow.holds.len() as u64);
        self.look_for_room(now);
    }

    pub(super) fn stall(&mut self, at: usize, stalled: bool, now: u64) {
        self.flows[at].stalled = stalled;
        self.look_for_room(now);
    }

    /// Frees the first messages that were delivered.
    pub(super) fn free(&mut self, at: usize, count: usize, now: u64) -> Vec<Message> {
        let flow = &mut self.flows[at];
        let delivered = flow.holds.len() - flow.undelivered.len();
        let freed = flow.holds.drain(..count.min(delivered)).collect();
        self.look_for_room(now);
        freed
    }

    /// Returns what it still holds.
    pub(super) fn close(&mut self, at: usize, now: u64) -> usize {
        let Flow { holds, undelivered, .. } = self.flows.remove(at);
        let held = holds.len() - undelivered.len();
        self.back(undelivered, now);
        self.look_for_room(now);
        held
    }

    pub(super) fn settle_some(&mut self, at: usize, messages: u64, now: u64) {
        self.flows[at].settling = messages;
        self.look_for_room(now);
    }

    /// Whether a flow can be handed a message.
    pub(super) fn have_room(&self) -> bool {
        self.flows.iter().any(|flow| flow.room() > 0)
    }

    /// Messages for which flows have room, or will have soon.
    pub(super) fn free_credit(&self) -> u64 {
        self.flows.iter().map(Flow::missing).sum()
    }

    /// Bytes for which flows have room, or will have soon, besides what is parked.
    fn free_bytes(&self) -> u64 {
        let parked: u64 = self.parked.iter().map(|(message, _)| message.size).sum();
        let room: u64 = self.flows.iter().map(|flow| flow.room_for(flow.keeps())).sum();
        room.saturating_sub(parked)
    }

    /// Messages that are asked for flows: what is parked is there already.
    pub(super) fn asked_for_flows(&self) -> u64 {
        let more = self.free_credit().saturating_sub(self.parked.len() as u64);
        let bytes = self.free_bytes();
        if bytes == 0 { 0 } else { more.min((bytes / 1200).max(1)) }
    }

    fn look_for_room(&mut self, now: u64) {
        let since = self.room_since.unwrap_or(now);
        self.room_since = (self.free_credit() > 0).then_some(since);
    }

    /// A pull has ended, so the next one waits for a moment to become larger.
    fn pull_is_over(&mut self, now: u64) {
        self.room_since = self.room_since.map(|_| now);
    }

    /// Whether a pull for flows is worth its cost.
    fn is_ripe(&self, now: u64) -> bool {
        let usable = self.flows.iter().filter(|flow| !flow.stalled);
        let all: u64 = usable.map(|flow| flow.most.0).sum();
        let idle = |flow: &Flow| flow.keeps() == 0 && flow.missing() > 0;
        let waited = self.room_since.is_some_and(|since| now > since);
        self.flows.iter().any(idle) || 2 * self.asked_for_flows() >= all || waited
    }

    /// Whether a pull for the flows is due, or will be with the next millisecond.
    pub(super) fn flows_want(&self, now: u64, late: bool) -> bool {
        let pause = if late { self.pause.1 } else { self.pause.0 };
        let free = self.up && !self.draining && self.pull.is_none() && self.asked_for_flows() > 0;
        free && now >= pause && self.is_ripe(now)
    }

    pub(super) fn leave(&mut self, id: WaiterId, now: u64) {
        if let Some(at) = self.waiters.iter().position(|waiter| waiter.id == id) {
            let has = self.waiters.remove(at).has;
            self.back(has, now);
        }
    }

    pub(super) fn back(&mut self, messages: Vec<Message>, now: u64) {
        for message in messages.into_iter().rev() {
            self.parked.push_front((message, now + self.limits.park));
        }
    }

    pub(super) fn fail(&mut self, now: u64) -> Vec<WaiterId> {
        let waiters = std::mem::take(&mut self.waiters);
        let ids = waiters.iter().map(|waiter| waiter.id).collect();
        self.back(waiters.into_iter().flat_map(|waiter| waiter.has).collect(), now);
        ids
    }

    pub(super) fn arrived(&mut self, message: Message, now: u64) {
        if let Some(pull) = &mut self.pull {
            pull.got += 1;
            pull.last_activity = now;
            if pull.got == pull.batch {
                let short = pull.short;
                self.no_pull();
                self.pull_is_over(now);
                self.more_by = short.then_some(now + 5);
            }
        }
        self.parked.push_back((message, now + self.limits.park));
        self.serve(now);
    }

    /// The connection begins or ends, or the pull is full: nothing is asked of the next one.
    pub(super) fn no_pull(&mut self) {
        self.pull = None;
        (self.plain, self.uncapped, self.pause) = (false, false, (0, 0));
        (self.whole, self.more_by) = (false, None);
    }

    pub(super) fn ended(&mut self, no: u64, end: PullOutcome, now: u64) {
        let Some(pull) = self.pull.take_if(|pull| pull.no == no) else { return };
        self.pull_is_over(now);
        let was_uncapped = pull.max_bytes.is_none();
        let escalates = pull.got == 0 && pull.short_of_bytes && !pull.whole;
        let (plain, uncapped, pause) = match end {
            PullOutcome::Done => {
                self.told = pull.waiters_before;
                let early = pull.got == 0 && 2 * (now - pull.issued_at) < pull.expires;
                (false, false, if early { (100, 100) } else { (0, 0) })
            }
            PullOutcome::RequestsPending => (true, was_uncapped, (5, 50)),
            PullOutcome::Spent => (false, false, (0, 0)),
            PullOutcome::TooLarge if pull.got > 0 || escalates => (false, false, (0, 0)),
            PullOutcome::TooLarge if was_uncapped => (false, true, (100, 100)),
            PullOutcome::TooLarge => (false, true, (0, 0)),
            PullOutcome::Refused => (pull.plain, was_uncapped, (100, 100)),
        };
        let limit = end == PullOutcome::Spent || end == PullOutcome::TooLarge && !uncapped;
        self.more_by = (limit && pull.short).then_some(now + 5);
        self.whole = match end {
            PullOutcome::TooLarge => escalates,
            PullOutcome::RequestsPending | PullOutcome::Refused => pull.whole,
            PullOutcome::Done | PullOutcome::Spent => false,
        };
        self.pause = (now + pause.0, now + pause.1);
        (self.plain, self.uncapped) = (plain, uncapped);
    }

    /// Time passes for the pull and for what is parked.
    pub(super) fn settle(&mut self, now: u64) {
        if let Some(pull) = self.pull.as_ref().filter(|pull| now >= pull.ends_at()) {
            self.ended(pull.no, PullOutcome::Done, now);
        }
        self.serve(now);
    }

    fn serve(&mut self, now: u64) {
        while (!self.waiters.is_empty() || self.have_room())
            && let Some((message, until)) = self.parked.pop_front()
        {
            if let Some(message) = self.give(message, now) {
                self.parked.push_front((message, until));
                break;
            }
        }
    }

    /// To the first of those who have nothing to do: whom it fits, or an idle flow. Who has some, and no room for it,
    /// is answered on the way. If there is nobody, to the first flow that has room.
    fn give(&mut self, message: Message, now: u64) -> Option<Message> {
        let mut at = 0;
        let mut too_small = None;
        let idle = self.first_flow(true);
        while at < self.waiters.len() {
            let waiter = &self.waiters[at];
            if message.size <= waiter.want.max_bytes
                && let Some(idle) = idle.filter(|idle| self.flows[*idle].turn < waiter.turn)
            {
                self.hand(idle, message, now);
                return None;
            }
            let waiter = &mut self.waiters[at];
            if message.size <= waiter.room() {
                if waiter.has.is_empty() && waiter.lingers() {
                    let linger = waiter.want.linger.min(self.limits.linger);
                    waiter.end = waiter.end.min(now + linger);
                }
                waiter.has.push(message);
                if waiter.missing() == 0 || waiter.room() < OVERHEAD {
                    self.decide(at, None);
                }
                return None;
            }
            if message.size <= waiter.want.max_bytes {
                self.decide(at, None);
            } else {
                too_small = too_small.or(Some(at));
                at += 1;
            }
        }
        if let Some(flow) = idle.or_else(|| self.first_flow(false)) {
            self.hand(flow, message, now);
            return None;
        }
        match too_small {
            Some(at) => {
                self.decide(at, Some(message));
                None
            }
            None => Some(message),
        }
    }

    /// The flow with room that was handed a message before all others of its kind.
    fn first_flow(&self, idle: bool) -> Option<usize> {
        let fits = |flow: &Flow| flow.room() > 0 && flow.holds.is_empty() == idle;
        let all = self.flows.iter().enumerate().filter(|(_, flow)| fits(flow));
        all.min_by_key(|(_, flow)| flow.turn).map(|(at, _)| at)
    }

    fn hand(&mut self, at: usize, message: Message, now: u64) {
        let turn = self.turn();
        let flow = &mut self.flows[at];
        flow.turn = turn;
        flow.holds.push(message.clone());
        flow.undelivered.push(message);
        self.look_for_room(now);
    }

    fn decide(&mut self, at: usize, too_large: Option<Message>) {
        let Waiter { id, has, .. } = self.waiters.remove(at);
        self.decided.push_back(Decided { id, messages: has, too_large });
    }

    /// Messages that waiters have.
    pub(super) fn held(&self) -> usize {
        self.waiters.iter().map(|waiter| waiter.has.len()).sum()
    }

    /// Takes out a waiter that is answered by time, or by what happened around it.
    pub(super) fn take(&mut self, id: WaiterId) -> Vec<Message> {
        let at = self.waiters.iter().position(|waiter| waiter.id == id);
        self.waiters.remove(at.expect("it is answered once")).has
    }

    /// Why this waiter may be answered now; it must be if there is a reason.
    pub(super) fn reasons(&self, waiter: &Waiter, now: u64) -> Vec<Why> {
        let nothing = if self.up { Why::Waited } else { Why::Down };
        let has_some = !waiter.has.is_empty();
        let quiet = self.quiet_at().is_none_or(|at| now >= at);
        let told = waiter.want.no_wait && self.told.is_some_and(|told| waiter.id <= told);
        let mut reasons = Vec::new();
        if self.end(waiter) <= now || told {
            reasons.push(nothing);
        }
        if self.draining && self.pull.is_none() {
            reasons.push(Why::Draining);
        }
        if has_some && (!self.up || !waiter.lingers() && quiet) {
            reasons.push(Why::Filled);
        }
        if has_some && !reasons.is_empty() { vec![Why::Filled] } else { reasons }
    }

    /// When whoever has some takes it.
    fn quiet_at(&self) -> Option<u64> {
        self.pull.as_ref().map_or(self.more_by, |pull| {
            let travels = pull.goes_on && pull.got == 0;
            let quiet = if pull.for_flows { 1 } else { 5 };
            Some(pull.last_activity + if travels { 100 } else { quiet })
        })
    }

    /// When this waiter is answered if nothing happens.
    fn end(&self, waiter: &Waiter) -> u64 {
        if !waiter.want.no_wait {
            return waiter.end;
        }
        let silent = |pull: &Pull| pull.last_activity.max(waiter.joined) + 100;
        let end = waiter.joined + 1000;
        self.pull.as_ref().map_or(end, |pull| end.min(silent(pull)))
    }

    /// Whether a pull is due but for a permit; `late` is the latest that it may be put off to.
    pub(super) fn wants_to_pull(&self, now: u64, late: bool) -> bool {
        self.waiters_want(now, late) || self.flows_want(now, late)
    }

    fn waiters_want(&self, now: u64, late: bool) -> bool {
        let pause = if late { self.pause.1 } else { self.pause.0 };
        let fresh = |waiter: &Waiter| self.told.is_none_or(|told| waiter.id > told);
        let in_time = |waiter: &Waiter| !waiter.want.no_wait && waiter.end >= now + 100;
        let worth_it = |waiter: &Waiter| fresh(waiter) || in_time(waiter);
        let free = self.up && !self.draining && self.pull.is_none();
        free && now >= pause && self.waiters.iter().any(worth_it)
    }

    /// The pull that is due.
    pub(super) fn issue(&mut self, now: u64, allowed: Allowed) -> &Pull {
        let for_flows = !self.waiters_want(now, false);
        let single = self.plain && !for_flows || self.uncapped;
        let PullLimits { max_batch, max_unsettled, .. } = self.limits;
        let most = if for_flows { max_batch } else { max_batch.min(max_unsettled) };
        let most = if single { 1 } else { u64::from(most) };
        let usable = |waiter: &Waiter| waiter.missing().min((waiter.room() / 1200).max(1));
        let wanted: u64 = self.waiters.iter().map(usable).sum();
        let wanted = wanted + self.asked_for_flows();
        let demand = wanted.min(most);
        let batch = demand.min(u64::from(allowed.messages));
        let room: u64 = self.waiters.iter().map(Waiter::room).sum();
        let room = room + self.free_bytes();
        let bytes = |batch: u64| {
            let bytes = room.saturating_sub(batch * OVERHEAD);
            bytes.min(self.limits.max_request_bytes.unwrap_or(u64::MAX)).max(1)
        };
        let short_of_bytes = !self.uncapped && allowed.bytes < bytes(demand);
        let bytes = bytes(batch).min(allowed.bytes);
        let waits = self.waiters.iter().filter(|waiter| !waiter.want.no_wait);
        let left = waits.map(|waiter| waiter.end.saturating_sub(now)).max();
        let expires = left.map_or(50, |left| left.saturating_sub(50).clamp(100, 5000));
        let expires = if for_flows { 5000 } else { expires };
        self.issued += 1;
        self.pull.insert(Pull {
            no: self.issued,
            batch: u32::try_from(batch).expect("as many as are allowed"),
            expires: expires.min(self.limits.max_expires).min(allowed.wait),
            no_wait: !self.plain && !for_flows,
            plain: self.plain,
            for_flows,
            max_bytes: (!self.uncapped).then_some(bytes),
            got: 0,
            issued_at: now,
            last_activity: now,
            waiters_before: self.waiters.last().map(|waiter| waiter.id),
            whole: self.whole,
            short_of_bytes,
            short: short_of_bytes || batch < demand,
            goes_on: self.more_by.is_some(),
        })
    }

    pub(super) fn any_overdue(&self, now: u64) -> bool {
        self.parked.iter().any(|(message, until)| !message.last_attempt && *until <= now)
    }

    /// The latest that the pump must be asked again: then something is due. One that is starved has
    /// put the pull off for long enough.
    pub(super) fn next_deadline(&self, now: u64, starved: bool) -> Option<u64> {
        let brisk = |waiter: &Waiter| !waiter.has.is_empty() && !waiter.lingers();
        let quiet = self.quiet_at().filter(|_| self.waiters.iter().any(brisk));
        let ends = self.waiters.iter().map(|waiter| self.end(waiter));
        let parked = self.parked.iter().filter(|(message, _)| !message.last_attempt);
        let pull = self.pull.as_ref();
        let paused = |at: &u64| !starved && now < *at && self.wants_to_pull(*at, true);
        let ripe = self.room_since.map(|since| (since + 1).max(self.pause.1));
        ends.chain(parked.map(|(_, until)| *until))
            .chain(pull.map(Pull::ends_at))
            .chain(quiet)
            .chain(Some(self.pause.1).filter(paused))
            .chain(ripe.filter(paused))
            .min()
    }
}

impl Pull {
    fn ends_at(&self) -> u64 {
        self.issued_at + self.expires + 1000
    }
}
