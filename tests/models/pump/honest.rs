//! The pump on a broker that keeps JetStream's rules. A one-shot waits for a first message and
//! brings what is there. A plain pull waits for its whole batch. A full batch ends without a status, `max_ack_pending` silences a pull, and
//! other pulls may be in the way. Available messages must then reach the waiters and the flows in
//! time.

use std::{
    collections::{BTreeMap, VecDeque},
    time::{Duration, Instant},
};

use fetch_proxy::pump::{
    Allowance, Appetite, Course, Credit, FlowId, PullLimits, PullOutcome, Pump, Step, WaiterId,
    Want,
};
use proptest::prelude::*;

/// While a waiter waits and a message is there, an arrival comes at least this often. At worst the
/// pull is refused as pending elsewhere (at most 50 ms). Then the message is too large for the
/// pull, and then for the waiters together. Each step takes a round trip of twice the longest
/// travel.
const SOON: u64 = 50 + 4 * 2 * 20 + 10;
/// The largest message, as the broker counts it.
const LARGEST: u64 = 30_000;

#[derive(Debug, Clone)]
enum Act {
    Publish {
        count: u32,
        size: u64,
    },
    Join {
        n: u32,
        max_bytes: u64,
        wait: u64,
        linger: u64,
        no_wait: bool,
    },
    /// This many of the messages that were handed over are settled.
    Settle(usize),
    /// A flow opens. Its workers settle up to the second number of messages in each millisecond.
    Open(Credit, usize),
    Close,
    /// The next one-shot learns that other pulls wait already.
    Rival,
    /// The next end of a pull is lost on its way.
    Mute,
}

fn act() -> impl Strategy<Value = Act> {
    let size = prop_oneof![4 => 601..2000_u64, 1 => 2000..30_000_u64];
    let n = prop_oneof![Just(1_u32), 1..20_u32];
    let bytes = prop_oneof![1500..20_000_u64, Just(4 << 20)];
    let linger = prop_oneof![3 => Just(0), 1 => 1..300_u64];
    let credit = (prop_oneof![Just(1_u64), 2..9_u64, Just(1000)], bytes.clone());
    let credit = credit.prop_map(|(messages, bytes)| Credit { messages, bytes });
    let join = (n, bytes, 1..3000_u64, linger, prop::bool::weighted(0.2));
    prop_oneof![
        4 => (1..12_u32, size).prop_map(|(count, size)| Act::Publish { count, size }),
        4 => join.prop_map(|(n, max_bytes, wait, linger, no_wait)| {
            Act::Join { n, max_bytes, wait, linger, no_wait }
        }),
        3 => (1..30_usize).prop_map(Act::Settle),
        2 => (credit, 0..3_usize).prop_map(|(most, pace)| Act::Open(most, pace)),
        1 => Just(Act::Close),
        1 => Just(Act::Rival),
        1 => Just(Act::Mute),
    ]
}

#[derive(Debug, Clone, Copy)]
struct Message {
    size: u64,
    since: u64,
}

enum News {
    Message(Message),
    End(u64, PullOutcome),
}

struct Open {
    no: u64,
    left: u32,
    got: u32,
    bytes: u64,
    one_shot: bool,
    until: u64,
}

struct Waiting {
    joined: u64,
    until: u64,
    max_bytes: u64,
}

struct Flow {
    id: FlowId,
    most: Credit,
    pace: usize,
    holds: VecDeque<u64>,
    /// The first messages, whose settlement takes until the next millisecond.
    settling: usize,
    /// Since when it has room.
    room_since: u64,
}

impl Flow {
    fn has_room(&self) -> bool {
        let bytes: u64 = self.holds.iter().sum();
        (self.holds.len() as u64) < self.most.messages && bytes < self.most.bytes
    }
}

struct World {
    pump: Pump<Message>,
    appetite: Appetite,
    /// The end of the last pull, until it is known.
    course: Option<(u64, Course, Option<PullOutcome>)>,
    /// Others leave no more than the least that a pull asks for.
    tight: bool,
    start: Instant,
    now: u64,
    travel: u64,
    max_ack_pending: usize,
    /// Messages on their way, in the pump or handed over.
    unsettled: usize,
    lent: usize,
    /// When a message had last arrived for anybody, `max_ack_pending` had held all up, or a pull of
    /// others was first.
    stirred_at: u64,
    stored: VecDeque<Message>,
    open: Option<Open>,
    rival: bool,
    mute: bool,
    /// Until then the pump may still believe in a pull whose end was lost.
    unheard_until: u64,
    requests: VecDeque<(u64, Open)>,
    news: VecDeque<(u64, News)>,
    waiting: BTreeMap<WaiterId, Waiting>,
    flows: Vec<Flow>,
    /// Pulls that were issued.
    pulls: usize,
    published: usize,
    answered: usize,
    released: usize,
}

impl World {
    fn new(travel: u64, max_ack_pending: usize, tight: bool) -> Self {
        let limits = PullLimits {
            max_batch: 1000,
            max_unsettled: u32::MAX,
            max_expires: Duration::MAX,
            max_request_bytes: None,
            park: Duration::from_millis(300),
            linger: Duration::from_millis(200),
        };
        let start = Instant::now();
        let mut pump = Pump::new(limits);
        pump.up(start);
        Self {
            pump,
            appetite: Appetite::idle(),
            course: None,
            tight,
            start,
            now: 0,
            travel,
            max_ack_pending,
            unsettled: 0,
            lent: 0,
            stirred_at: 0,
            stored: VecDeque::new(),
            open: None,
            rival: false,
            mute: false,
            unheard_until: 0,
            requests: VecDeque::new(),
            news: VecDeque::new(),
            waiting: BTreeMap::new(),
            flows: Vec::new(),
            pulls: 0,
            published: 0,
            answered: 0,
            released: 0,
        }
    }

    fn act(&mut self, act: Act) {
        match act {
            Act::Publish { count, size } => {
                self.published += count as usize;
                let message = Message { size, since: self.now };
                self.stored.extend((0..count).map(|_| message));
            }
            Act::Join { n, max_bytes, wait, linger, no_wait } => {
                let now = self.at(self.now);
                let wait = if no_wait { 0 } else { wait };
                let (until, linger) = (now + Duration::from_millis(wait), linger.min(wait));
                let linger = Duration::from_millis(linger);
                let want = Want { n, max_bytes, until, linger, no_wait };
                let id = self.pump.join(want, now);
                let until = self.now + if no_wait { 1000 } else { wait };
                self.waiting.insert(id, Waiting { joined: self.now, until, max_bytes });
            }
            Act::Settle(count) => {
                let count = count.min(self.lent);
                self.lent -= count;
                self.unsettled -= count;
            }
            Act::Open(most, pace) => {
                let id = self.pump.open_flow(most, self.at(self.now));
                let (holds, room_since) = (VecDeque::new(), self.now);
                self.flows.push(Flow { id, most, pace, holds, settling: 0, room_since });
            }
            Act::Close => {
                if let Some(flow) = self.flows.pop() {
                    self.pump.close_flow(flow.id, self.at(self.now));
                    self.lent += flow.holds.len();
                }
            }
            Act::Rival => self.rival = true,
            Act::Mute => self.mute = true,
        }
    }

    fn at(&self, ms: u64) -> Instant {
        self.start + Duration::from_millis(ms)
    }

    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.tick();
            self.now += 1;
        }
    }

    /// One millisecond of everybody's life. The pump is asked only when something has happened, or
    /// when it wants to be.
    fn tick(&mut self) {
        let now = self.at(self.now);
        self.serve();
        self.work();
        if self.unsettled >= self.max_ack_pending {
            self.stirred_at = self.now;
        }
        while let Some(news) = pop_due(&mut self.news, self.now) {
            match news {
                News::Message(message) => {
                    self.stirred_at = self.now;
                    if let Some((_, course, _)) = &mut self.course {
                        course.count(counted(message.size));
                    }
                    self.pump.arrived(message, message.size, false, now);
                }
                News::End(no, end) => {
                    if let Some(course) = self.course.as_mut().filter(|course| course.0 == no) {
                        course.2 = Some(end);
                    }
                    self.pump.ended(no, end, now);
                }
            }
        }
        for _ in 0..1000 {
            let allowed = self.allowed();
            match self.pump.step(now, allowed) {
                None => {
                    let late = self.waiting.values().any(|waiting| waiting.until <= self.now);
                    assert!(!late, "a waiter waited too long");
                    return self.check_flows();
                }
                Some(Step::Pull { no, batch, expires, no_wait, max_bytes }) => {
                    self.pulls += 1;
                    self.course = Some((no, Course::default(), None));
                    let at = self.now + self.travel;
                    let until = at + u64::try_from(expires.as_millis()).expect("a few seconds");
                    let bytes = max_bytes.unwrap_or(u64::MAX);
                    let open = Open { no, left: batch, got: 0, bytes, one_shot: no_wait, until };
                    self.requests.push_back((at, open));
                }
                Some(Step::Deliver { flow, messages }) => {
                    let open = self.flows.iter_mut().find(|open| open.id == flow);
                    let open = open.expect("it is open");
                    for (message, size) in messages {
                        assert!(open.has_room(), "{flow:?} has no room");
                        assert_eq!(message.size, size);
                        open.holds.push_back(size);
                        self.answered += 1;
                    }
                }
                Some(Step::Over { .. }) => panic!("nobody drains"),
                Some(Step::Overdue { message }) => {
                    self.released += 1;
                    self.unsettled -= 1;
                    self.stored.push_front(Message { since: self.now, ..message });
                }
                Some(Step::Answer { waiter, messages, too_large, .. }) => {
                    self.answered(waiter, &messages, too_large);
                }
            }
        }
        panic!("the pump does not come to an end");
    }

    /// The workers of the flows settle.
    fn work(&mut self) {
        let now = self.at(self.now);
        for flow in &mut self.flows {
            let had_room = flow.has_room();
            let settled: Vec<u64> = flow.holds.drain(..flow.settling).collect();
            let freed = Credit { messages: settled.len() as u64, bytes: settled.iter().sum() };
            if freed.messages > 0 {
                self.unsettled -= settled.len();
                self.pump.freed(flow.id, freed, now);
            }
            if !had_room && flow.has_room() {
                flow.room_since = self.now;
            }
            flow.settling = flow.pace.min(flow.holds.len());
            self.pump.settling(flow.id, flow.settling as u64, now);
        }
    }

    /// Nobody has room while a message that could be delivered is in store for long.
    fn check_flows(&self) {
        let Some(first) = self.stored.front() else { return };
        for flow in self.flows.iter().filter(|flow| flow.has_room()) {
            let since = first.since.max(flow.room_since).max(self.stirred_at);
            let late = since + SOON <= self.now && self.now >= self.unheard_until;
            assert!(!late, "a message of {} waits for a flow at {}", first.since, self.now);
        }
    }

    /// The size of the pull, and the part that others leave of it.
    fn allowed(&mut self) -> Allowance {
        let now = self.at(self.now);
        let Some(demand) = self.pump.demand(now) else { return Allowance::NONE };
        if let Some((_, course, end)) = self.course.take() {
            self.appetite.after(&course, end);
        }
        let messages = self.appetite.messages(&demand);
        let bytes = self.appetite.bytes(&demand, messages.most, LARGEST);
        let idle = messages.idle && bytes.idle;
        Allowance {
            messages: u32::try_from(messages.most).expect("a batch"),
            bytes: if self.tight { bytes.least } else { bytes.most },
            wait: if idle { Duration::MAX } else { Duration::from_millis(500) },
        }
    }

    fn answered(&mut self, id: WaiterId, messages: &[Message], too_large: Option<Message>) {
        let Waiting { joined, max_bytes, .. } = self.waiting.remove(&id).expect("it waits");
        let count = messages.len() + usize::from(too_large.is_some());
        self.answered += count;
        self.lent += count;
        assert!(messages.iter().map(|message| message.size).sum::<u64>() <= max_bytes);
        assert!(too_large.is_none_or(|message| message.size > max_bytes));
        let long = |since: u64| since.max(joined).max(self.stirred_at) + SOON <= self.now;
        if messages.is_empty() && too_large.is_none() {
            let missed = self.stored.front().filter(|message| long(message.since));
            assert!(
                missed.is_none() || self.now < self.unheard_until,
                "{missed:?} was there for {id:?}"
            );
        }
    }

    /// The broker's own millisecond.
    fn serve(&mut self) {
        while let Some(open) = pop_due(&mut self.requests, self.now) {
            assert!(self.open.is_none(), "one pull at a time");
            if open.one_shot && std::mem::take(&mut self.rival) {
                self.stirred_at = self.now;
                self.end(&open, PullOutcome::RequestsPending);
            } else {
                self.open = Some(open);
            }
        }
        let Some(mut open) = self.open.take() else { return };
        while open.left > 0
            && self.unsettled < self.max_ack_pending
            && let Some(message) = self.stored.pop_front()
        {
            let counted = counted(message.size);
            if counted > open.bytes {
                self.stored.push_front(message);
                return self.end(&open, PullOutcome::TooLarge);
            }
            open.bytes -= counted;
            open.left -= 1;
            open.got += 1;
            self.unsettled += 1;
            self.news.push_back((self.now + self.travel, News::Message(message)));
        }
        let brought = open.got > 0 && self.stored.is_empty();
        if open.left == 0 {
            // No waiter hears of it.
        } else if open.one_shot && brought || self.now >= open.until {
            self.end(&open, PullOutcome::Done);
        } else {
            self.open = Some(open);
        }
    }

    fn end(&mut self, open: &Open, end: PullOutcome) {
        if std::mem::take(&mut self.mute) {
            self.unheard_until = open.until + 1000 + SOON;
        } else {
            let no = open.no;
            self.news.push_back((self.now + self.travel, News::End(no, end)));
        }
    }
}

/// The size that the broker counts for a message: at least a subject and an ack subject. The answer
/// counts the rest.
fn counted(size: u64) -> u64 {
    size.saturating_sub(540)
}

/// All arrivals up to now.
fn pop_due<T>(line: &mut VecDeque<(u64, T)>, now: u64) -> Option<T> {
    line.front().filter(|(at, _)| *at <= now)?;
    line.pop_front().map(|(_, thing)| thing)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..Default::default() })]

    #[test]
    fn available_messages_reach_the_waiters_in_time(
        travel in 0..20_u64,
        tight in any::<bool>(),
        max_ack_pending in prop_oneof![Just(100_000_usize), 1..30_usize],
        script in prop::collection::vec((act(), prop_oneof![Just(0), 1..80_u64, 80..400_u64]), 1..60),
    ) {
        let mut world = World::new(travel, max_ack_pending, tight);
        for (act, then) in script {
            world.act(act);
            world.pass(then);
        }
        while !world.flows.is_empty() {
            world.act(Act::Close);
        }
        // The longest wait, or the longest pull and what is parked after it.
        world.pass(3000 + 7000);
        prop_assert!(world.waiting.is_empty());
        prop_assert!(world.pump.is_idle());
        prop_assert_eq!(world.published, world.answered + world.stored.len());
    }
}

/// One at a time, each settled at once: each needs a pull of a call, and no pull of its own for a flow.
#[test]
fn trickle_to_a_stream_needs_no_pull_for_each_message() {
    let mut world = World::new(1, 100_000, false);
    world.act(Act::Open(Credit { messages: 1000, bytes: 4 << 20 }, 1));
    for _ in 0..300 {
        world.act(Act::Publish { count: 1, size: 650 });
        world.pass(10);
    }
    assert_eq!(world.answered, 300);
    assert!(world.pulls <= 12, "{} pulls", world.pulls);
}
