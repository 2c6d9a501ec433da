//! A JetStream that keeps its own books, a monitor that watches it, and the promises between the two. The books
//! do not follow the rules of the monitor. They say when the leader changed and what it forgot, which leases
//! that concerns, and what the monitor could know by then.

use std::{
    hash::{Hash, Hasher},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use fetch_proxy::{
    broker::{ConsumerName, Leader, Server},
    lessor::{
        Sighting,
        monitor::{CallerWants, ConsumerView, InfoAnswer, Monitor, MonitorStep},
    },
};

/// One tick. It is longer than a retry, than half of the time in which the monitor is sure, and than the time
/// before a consumer counts as gone.
const TICK: u64 = 600;
/// A moment is longer than a retry, and shorter than the time before a consumer counts as gone.
const MOMENT: u64 = 300;
const ACK_WAIT: u64 = 30_000;
/// The monitor's own times, in milliseconds.
const SURE: u64 = 1000;
const RETRY: u64 = 250;
const TIMEOUT: u64 = 2000;
const GONE: u64 = 500;
/// Deliveries of one history.
const MOST_DELIVERIES: u8 = 2;
/// Resets of one consumer.
const MOST_RESETS: u8 = 2;
/// Changes of leader in one history.
const MOST_CHANGES: u8 = 2;
/// Lost connections in one history.
const MOST_CUTS: u64 = 2;

/// How JetStream keeps the consumer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Kept {
    pub replicated: bool,
    pub leader_shows: bool,
}

impl Kept {
    fn is_led_elsewhere(self) -> bool {
        self.replicated || !self.leader_shows
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Tick,
    Moment,
    Deliver,
    /// Another server leads. It knows all deliveries, or not the last one.
    Elected {
        forgets: bool,
    },
    /// The leader starts again. It knows all deliveries, or not the last one.
    Restarted {
        forgets: bool,
    },
    /// An operator resets the consumer.
    Reset,
    Deleted,
    Created,
    /// Our connection is lost, and comes back to the same server or to another one.
    Cut,
    Back {
        other_server: bool,
    },
    /// The open question is answered by the n-th state since it was asked.
    Answered(usize),
    Silence,
    Unanswered,
    LeaderGone,
    /// Another replica has read the consumer that is there now.
    HeardRead,
    /// Another replica has seen sequences go down, after a reset.
    HeardAgain,
    /// Another replica has got the delivery with sequence 1.
    HeardBegan,
    /// The same, and that replica is new: it does not know of the resets before.
    HeardNewcomer,
    /// Another replica gets a delivery, and says nothing of it, or is not heard.
    DeliverElsewhere,
    /// The oldest lease of another replica is settled there.
    SettleElsewhere,
    /// JetStream sends a delivery to here. It arrives later.
    Send,
    Arrive,
    /// Another replica hands all its leases over to this one.
    TakeOver,
    /// The same, and that replica has not heard of the last reset.
    TakeOverStale,
}

/// The state that INFO would tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Told {
    incarnation: Option<u8>,
    leader: u64,
    delivered: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Asked {
    at: u64,
    /// The highest delivery that had arrived or was read by then.
    known: u64,
    /// The states that INFO would have told since then, the oldest first.
    told: Vec<Told>,
    /// A sign has come since then.
    before_sign: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Lease {
    sequence: u64,
    incarnation: u8,
    /// The resets of the consumer before it was granted.
    generation: u8,
    /// Changes of leader since it was granted, after which it was still trusted: one bit each.
    unprotected: u8,
    granted_before_ask: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Change {
    at: u64,
    before_ask: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    kept: Kept,
    monitor: Monitor,
    now: u64,
    // JetStream.
    incarnation: Option<u8>,
    made: u8,
    leader: u64,
    starts: u64,
    delivered: u64,
    deliveries: u8,
    generation: u8,
    /// The last reset that the other replicas have noticed, and the number that they gave it.
    noticed_elsewhere: (u8, u64),
    changes: Vec<Change>,
    // Our side of it.
    epoch: u64,
    up: bool,
    server: u8,
    lost_at: u64,
    asked: Option<Asked>,
    pulling: bool,
    leases: Vec<Lease>,
    /// The sequences of leases of another replica.
    elsewhere: Vec<u64>,
    /// The same from before the last reset, at a replica that has not heard of the reset.
    stale: Vec<u64>,
    /// The sequence of a delivery that is on its way to here.
    under_way: Option<u64>,
    replicas_wait: bool,
    stopped: bool,
    // The knowledge that the monitor can have.
    known: Option<Told>,
    highest: u64,
    last_arrival: u64,
    in_doubt: bool,
    missed: bool,
    contradicted: Option<(u8, u64)>,
    proof_at: Option<u64>,
    fresh_from: u64,
    gone_since: Option<u64>,
    answered_at: Option<u64>,
    /// Something has happened since the last answer that the answer may not know.
    news: bool,
    /// JetStream has forgotten a delivery, by itself or by a reset.
    forgot: bool,
    /// Somebody may have forgotten promises: a server that leads, or that we are connected to.
    alarmed: bool,
}

/// All but the history that led here.
impl Hash for World {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.monitor.hash(state);
        (self.now, self.incarnation, self.made, self.leader, self.starts).hash(state);
        (self.delivered, self.deliveries, self.generation, self.noticed_elsewhere).hash(state);
        self.changes.hash(state);
        (self.epoch, self.up, self.server, self.lost_at, &self.asked, self.pulling).hash(state);
        (&self.leases, &self.elsewhere, &self.stale, self.under_way).hash(state);
        (self.replicas_wait, self.stopped, self.known, self.highest).hash(state);
        (self.last_arrival, self.in_doubt, self.missed, self.contradicted).hash(state);
        (self.proof_at, self.fresh_from, self.gone_since).hash(state);
        (self.answered_at, self.news, self.forgot, self.alarmed).hash(state);
    }
}

fn instant(ms: u64) -> Instant {
    static START: OnceLock<Instant> = OnceLock::new();
    // Earlier times than the start of a history are reckoned with.
    *START.get_or_init(|| Instant::now() + Duration::from_secs(60)) + Duration::from_millis(ms)
}

fn millis(at: Instant) -> u64 {
    u64::try_from((at - instant(0)).as_millis()).expect("a history is short")
}

fn created(incarnation: u8) -> Arc<str> {
    format!("2026-11-29T08:00:0{incarnation}Z").into()
}

type Check = Result<(), String>;

fn must(holds: bool, promise: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(promise()) }
}

impl World {
    /// A consumer that was read a moment ago, and two deliveries of it that are leased.
    pub fn new(kept: Kept) -> Result<Self, String> {
        let mut world = Self::fresh(kept)?;
        for event in [Event::Deliver, Event::Deliver] {
            world.happen(event)?;
        }
        world.deliveries = 0;
        Ok(world)
    }

    /// A consumer that was read a moment ago, and has delivered nothing.
    pub fn fresh(kept: Kept) -> Result<Self, String> {
        let mut world = Self {
            kept,
            monitor: Monitor::new(Some(&server(1, 0)), None, instant(0)),
            now: 0,
            incarnation: Some(0),
            made: 0,
            leader: 1,
            starts: 0,
            delivered: 0,
            deliveries: 0,
            generation: 0,
            noticed_elsewhere: (0, 0),
            changes: Vec::new(),
            epoch: 1,
            up: true,
            server: 0,
            lost_at: 0,
            asked: None,
            pulling: false,
            leases: Vec::new(),
            elsewhere: Vec::new(),
            stale: Vec::new(),
            under_way: None,
            replicas_wait: false,
            stopped: false,
            known: None,
            highest: 0,
            last_arrival: 0,
            in_doubt: false,
            missed: false,
            contradicted: None,
            proof_at: None,
            fresh_from: 0,
            gone_since: None,
            answered_at: None,
            news: true,
            forgot: false,
            alarmed: false,
        };
        world.settle_down()?;
        world.happen(Event::Answered(0))?;
        Ok(world)
    }

    /// The events of the alphabet that can happen now.
    pub fn possible(&self, alphabet: &[Event]) -> Vec<Event> {
        if self.stopped {
            return Vec::new();
        }
        let changes = self.changes_so_far() < MOST_CHANGES;
        let there = self.incarnation.is_some();
        // A server that is alone starts again behind a lost connection.
        let restarts = changes && there && (self.kept.is_led_elsewhere() || !self.up);
        let can = |event: &Event| match event {
            Event::Tick | Event::Moment => true,
            Event::Deliver | Event::Send => {
                let more = self.deliveries < MOST_DELIVERIES && self.under_way.is_none();
                self.pulling && there && more
            }
            Event::Elected { forgets } => {
                changes && there && self.kept.replicated && (!forgets || self.delivered > 0)
            }
            Event::Restarted { forgets } => restarts && (!forgets || self.delivered > 0),
            Event::Reset => there && self.generation < MOST_RESETS && self.delivered > 0,
            Event::Deleted => there,
            Event::Created => !there && self.made < 2,
            Event::Cut => self.up && self.epoch <= MOST_CUTS,
            Event::Back { other_server } => {
                !self.up && (self.kept.is_led_elsewhere() || *other_server == (self.starts > 0))
            }
            Event::Answered(_) | Event::Silence => self.asked.is_some(),
            // In doubt nothing is settled, and the one server that we are connected to does not matter.
            Event::Unanswered => {
                let settles = self.up && !self.in_doubt && !self.leases.is_empty();
                settles && self.kept.is_led_elsewhere()
            }
            Event::LeaderGone => self.pulling && there,
            Event::HeardRead => self.incarnation.is_some_and(|incarnation| incarnation > 0),
            Event::HeardAgain => there && self.generation > 0,
            Event::HeardBegan | Event::HeardNewcomer => there && self.delivered == 0,
            Event::DeliverElsewhere => there && self.deliveries < MOST_DELIVERIES,
            Event::Arrive => self.under_way.is_some(),
            Event::TakeOver | Event::SettleElsewhere => there && !self.elsewhere.is_empty(),
            Event::TakeOverStale => there && !self.stale.is_empty(),
        };
        let mut possible = Vec::new();
        for event in alphabet.iter().filter(|event| can(event)) {
            match (event, &self.asked) {
                (Event::Answered(_), Some(asked)) => {
                    possible.extend((0..asked.told.len()).map(Event::Answered));
                }
                (event, _) => possible.push(*event),
            }
        }
        possible
    }

    fn changes_so_far(&self) -> u8 {
        u8::try_from(self.leader - 1 + self.starts).expect("few")
    }

    /// # Errors
    /// The promise that was broken.
    pub fn happen(&mut self, event: Event) -> Check {
        let now = instant(self.now);
        match event {
            Event::Tick => self.now += TICK,
            Event::Moment => self.now += MOMENT,
            Event::Deliver => self.deliver()?,
            Event::Elected { forgets } => {
                self.leader += 1;
                self.change(forgets);
            }
            Event::Restarted { forgets } => {
                self.starts += 1;
                self.change(forgets);
            }
            Event::Reset => {
                (self.delivered, self.generation) = (0, self.generation + 1);
                self.stale = std::mem::take(&mut self.elsewhere);
                self.under_way = None;
                self.forgot = true;
                self.tell();
            }
            Event::Deleted => {
                self.incarnation = None;
                self.tell();
                // An open pull ends with its consumer.
                if std::mem::take(&mut self.pulling) {
                    self.monitor.missed(now);
                    self.miss();
                }
            }
            Event::Created => {
                self.made += 1;
                (self.incarnation, self.delivered, self.forgot) = (Some(self.made), 0, true);
                (self.generation, self.noticed_elsewhere) = (0, (0, 0));
                self.tell();
            }
            Event::Cut => {
                (self.up, self.pulling, self.lost_at) = (false, false, self.now);
                self.monitor.inbox_lost(false, now);
                self.monitor.linked(None, now);
                self.sign();
            }
            Event::Back { other_server } => self.back(other_server)?,
            Event::Answered(which) => self.answer(which)?,
            Event::Silence => {
                self.asked = None;
                self.answered_at = Some(self.now);
                self.news = false;
                self.monitor.answered(InfoAnswer::Silent, false, now);
                self.miss();
                self.news = false;
            }
            Event::Unanswered => {
                self.monitor.unanswered(true, now);
                self.miss();
            }
            Event::LeaderGone => {
                (self.pulling, self.alarmed) = (false, true);
                self.monitor.leader_gone(now);
                self.miss();
            }
            Event::HeardRead => self.hear(false, false)?,
            Event::HeardAgain => self.hear(false, true)?,
            Event::HeardBegan => {
                self.deliver_elsewhere();
                self.hear(true, self.generation > 0)?;
            }
            Event::HeardNewcomer => {
                self.deliver_elsewhere();
                self.hear_numbered(true, false, 0)?;
            }
            Event::DeliverElsewhere => {
                self.deliveries += 1;
                self.deliver_elsewhere();
            }
            Event::SettleElsewhere => _ = self.elsewhere.remove(0),
            Event::Send => {
                (self.delivered, self.deliveries) = (self.delivered + 1, self.deliveries + 1);
                self.under_way = Some(self.delivered);
                self.tell();
            }
            Event::Arrive => {
                let sequence = self.under_way.take();
                sequence.map_or(Ok(()), |sequence| self.arrive(sequence))?;
            }
            Event::TakeOver => {
                let sequences = std::mem::take(&mut self.elsewhere);
                self.take_over(sequences, self.generation)?;
            }
            Event::TakeOverStale => {
                let sequences = std::mem::take(&mut self.stale);
                self.take_over(sequences, self.generation - 1)?;
            }
        }
        self.settle_down()
    }

    fn change(&mut self, forgets: bool) {
        if forgets {
            self.delivered -= 1;
        }
        self.forgot |= forgets;
        self.alarmed = true;
        for lease in &mut self.leases {
            lease.unprotected |= 1 << self.changes.len();
        }
        self.changes.push(Change { at: self.now, before_ask: false });
        self.tell();
    }

    /// INFO says something else from now on.
    fn tell(&mut self) {
        let told = self.told();
        if let Some(asked) = &mut self.asked
            && asked.told.last() != Some(&told)
        {
            asked.told.push(told);
        }
    }

    fn told(&self) -> Told {
        let starts = if self.kept.leader_shows { self.starts } else { 0 };
        Told {
            incarnation: self.incarnation,
            leader: self.leader * 100 + starts,
            delivered: self.delivered,
        }
    }

    fn deliver_elsewhere(&mut self) {
        self.delivered += 1;
        self.elsewhere.push(self.delivered);
        self.tell();
    }

    fn take_over(&mut self, sequences: Vec<u64>, generation: u8) -> Check {
        let (Some(_), Some(incarnation)) = (self.known, self.incarnation) else { return Ok(()) };
        let (first, last) = (sequences[0], sequences[sequences.len() - 1]);
        self.leases.extend(sequences.into_iter().map(|sequence| Lease {
            sequence,
            incarnation,
            generation,
            unprotected: 0,
            granted_before_ask: false,
        }));
        self.highest = self.highest.max(last);
        self.news = true;
        self.monitor.adopted((first, last), instant(self.now));
        self.perform()
    }

    fn deliver(&mut self) -> Check {
        self.delivered += 1;
        self.deliveries += 1;
        self.tell();
        self.arrive(self.delivered)
    }

    fn arrive(&mut self, sequence: u64) -> Check {
        let lower = sequence <= self.last_arrival;
        let before = self.leases.len();
        self.monitor.arrived(&[(sequence, 10 + sequence)], instant(self.now));
        self.perform()?;
        let (Some(_), Some(incarnation)) = (self.known, self.incarnation) else { return Ok(()) };
        must(!lower || self.leases.is_empty(), || {
            format!("{before} leases outlive a sequence that went down")
        })?;
        if sequence == 1 && !self.leases.is_empty() {
            // All leases were taken over, and may be from before a reset.
            (self.in_doubt, self.news) = (true, true);
            self.asked.iter_mut().for_each(|asked| asked.before_sign = true);
        }
        self.proof_at = Some(self.now);
        self.last_arrival = sequence;
        self.highest = self.highest.max(sequence);
        self.leases.push(Lease {
            sequence,
            incarnation,
            generation: self.generation,
            unprotected: 0,
            granted_before_ask: false,
        });
        Ok(())
    }

    fn back(&mut self, other_server: bool) -> Check {
        self.up = true;
        self.epoch += 1;
        self.server += u8::from(other_server);
        self.alarmed |= other_server && !self.kept.replicated;
        self.monitor.linked(Some(&server(self.epoch, self.server)), instant(self.now));
        self.sign();
        self.news = true;
        self.perform()?;
        let lost_at = self.lost_at;
        let bare = |lease: &Lease| {
            let changes = self.changes.iter().enumerate();
            let since = changes.filter(|(_, change)| change.at >= lost_at);
            since.fold(0, |bits, (index, _)| bits | 1_u8 << index) & lease.unprotected != 0
        };
        let alone = !self.kept.replicated && other_server;
        must(!alone || !self.leases.iter().any(bare), || {
            "after another server connected, a lease is trusted that the old one granted".to_owned()
        })
    }

    /// Something that puts a consumer in doubt which is led elsewhere.
    fn sign(&mut self) {
        self.news = true;
        if self.known.is_some() && self.kept.is_led_elsewhere() {
            self.in_doubt = true;
            self.asked.iter_mut().for_each(|asked| asked.before_sign = true);
        }
    }

    /// A sign that nobody leads.
    fn miss(&mut self) {
        if self.known.is_some() {
            (self.missed, self.proof_at) = (true, None);
            self.alarmed |= !self.kept.leader_shows;
            self.asked.iter_mut().for_each(|asked| asked.before_sign = true);
        }
        self.sign();
    }

    fn hear(&mut self, began: bool, again: bool) -> Check {
        let (generation, number) = self.noticed_elsewhere;
        if (began || again) && generation < self.generation {
            self.noticed_elsewhere = (self.generation, number + 1);
        }
        self.hear_numbered(began, again, self.noticed_elsewhere.1)
    }

    fn hear_numbered(&mut self, began: bool, again: bool, counting: u64) -> Check {
        let incarnation = self.incarnation.expect("it is there");
        let sighting = Sighting {
            name: ConsumerName { stream: "S".into(), consumer: "c".into() },
            created: created(incarnation),
            delivered: self.delivered,
            began,
            again,
            counting,
        };
        let held = !self.leases.is_empty();
        let waits = self.monitor.heard(&sighting, held, instant(self.now));
        self.replicas_wait |= waits;
        self.news = true;
        if self.known.is_some_and(|known| known.incarnation != Some(incarnation)) {
            self.in_doubt = true;
            self.contradicted = Some((incarnation, self.now));
            self.proof_at = None;
            return Ok(());
        }
        self.perform()?;
        if self.known.is_some() && !began && self.delivered < self.highest && !held {
            self.proof_at = None;
        }
        let current = |lease: &Lease| lease.generation == self.generation;
        // If the delivery may have been on its way for long, that replica hands out nothing before INFO is read.
        must(!(began || again) || waits || self.leases.iter().all(current), || {
            "a lease outlives a reset that another replica has seen".to_owned()
        })
    }

    fn answer(&mut self, which: usize) -> Check {
        let Some(asked) = self.asked.take() else { return Ok(()) };
        let (told, now) = (asked.told[which], instant(self.now));
        self.answered_at = Some(self.now);
        self.news = false;
        let Some(incarnation) = told.incarnation else {
            self.monitor.answered(InfoAnswer::Gone, false, now);
            return self.gone();
        };
        let reading = ConsumerView {
            created: created(incarnation),
            leader: Leader(told.leader),
            leader_shows: self.kept.leader_shows,
            replicated: self.kept.replicated,
            ack_wait: Duration::from_millis(ACK_WAIT),
            delivered: told.delivered,
            delivered_stream: 10 + told.delivered,
        };
        self.monitor.answered(InfoAnswer::Read(reading), false, now);
        self.perform()?;
        let before = self.known.replace(told);
        let same = before.filter(|before| before.incarnation == told.incarnation);
        if let Some(before) = same {
            self.check_leader(before, told)?;
            self.check_forgotten(before, told, &asked)?;
        }
        must(self.leases.iter().all(|lease| lease.incarnation == incarnation), || {
            "a lease outlives the consumer that it is of".to_owned()
        })?;
        // The state that was read is known.
        if same.is_none() {
            (self.last_arrival, self.highest) = (0, 0);
        }
        let forgotten = told.delivered < asked.known;
        self.highest = if forgotten { told.delivered } else { self.highest.max(told.delivered) };
        (self.fresh_from, self.gone_since, self.missed) = (asked.at, None, false);
        self.changes_are_past();
        let newer = self
            .contradicted
            .filter(|(other, since)| *other > incarnation && self.now - since < TIMEOUT);
        if newer.is_some() {
            (self.in_doubt, self.proof_at) = (true, None);
            must(!self.replicas_wait || self.waits_still(), || {
                "a replica is answered by an INFO that is older than what it has read".to_owned()
            })?;
        } else {
            (self.in_doubt, self.proof_at, self.contradicted) = (false, Some(self.now), None);
            must(!self.replicas_wait, || "a replica is not answered after INFO".to_owned())?;
        }
        Ok(())
    }

    fn waits_still(&self) -> bool {
        self.replicas_wait
    }

    /// Changes from before the question are dealt with, or could not be seen.
    fn changes_are_past(&mut self) {
        for (index, change) in self.changes.iter().enumerate() {
            if change.before_ask {
                for lease in &mut self.leases {
                    lease.unprotected &= !(1 << index);
                }
            }
        }
    }

    /// After an answer to a question that was asked after a change of leader, no older lease is trusted from
    /// before the change on.
    fn check_leader(&self, before: Told, told: Told) -> Check {
        let shown = self.kept.leader_shows && self.kept.replicated;
        if !shown && !self.missed_and_hidden() && before.leader == told.leader {
            return Ok(());
        }
        if !self.kept.is_led_elsewhere() {
            // Its connection tells.
            return Ok(());
        }
        let past = self.changes.iter().enumerate().filter(|(_, change)| change.before_ask);
        let past = past.fold(0, |bits, (index, _)| bits | 1_u8 << index);
        must(self.leases.iter().all(|lease| lease.unprotected & past == 0), || {
            "a lease from before a change of leader is trusted".to_owned()
        })
    }

    fn missed_and_hidden(&self) -> bool {
        self.missed && !self.kept.leader_shows
    }

    /// Leases of deliveries that the consumer does not know of any more are over.
    fn check_forgotten(&self, before: Told, told: Told, asked: &Asked) -> Check {
        if told.delivered >= asked.known {
            return Ok(());
        }
        let older = self.leases.iter().filter(|lease| lease.granted_before_ask);
        let changed = before.leader != told.leader;
        let mut alive = older.filter(|lease| !changed || lease.sequence > told.delivered);
        must(alive.next().is_none(), || {
            format!("a lease outlives what JetStream forgot (change of leader: {changed})")
        })
    }

    fn gone(&mut self) -> Check {
        self.perform()?;
        must(self.leases.is_empty(), || "a lease outlives its consumer".to_owned())?;
        let since = *self.gone_since.get_or_insert(self.now);
        let long = self.known.is_none() && self.now - since >= GONE;
        must(self.stopped == long, || format!("gone for {} ms", self.now - since))?;
        (self.known, self.in_doubt, self.proof_at) = (None, false, None);
        Ok(())
    }

    /// Does what the monitor says because of what has happened.
    fn perform(&mut self) -> Check {
        while let Some(step) = self.monitor.next_step() {
            self.done(step)?;
        }
        Ok(())
    }

    /// Does all that the monitor says, and looks whether what always holds does hold.
    fn settle_down(&mut self) -> Check {
        self.perform()?;
        self.pulling |= self.monitor.may_pull(instant(self.now));
        let wants = CallerWants { waiting: true, pull: true };
        let (now, held) = (instant(self.now), !self.leases.is_empty());
        while let Some(step) = self.monitor.step(wants, || held, now) {
            self.done(step)?;
        }
        self.forget();
        self.check()
    }

    fn done(&mut self, step: MonitorStep) -> Check {
        match step {
            MonitorStep::Ask => self.ask(),
            MonitorStep::Cancel => {
                must(self.asked.take().is_some(), || "no question is open".to_owned())
            }
            MonitorStep::Distrust { since, .. } => {
                must(self.alarmed || self.forgot, || "a false alarm".to_owned())?;
                // Not every server is asked since the history began.
                let since = millis(since);
                for (index, change) in self.changes.iter().enumerate() {
                    if since <= change.at {
                        for lease in &mut self.leases {
                            lease.unprotected &= !(1 << index);
                        }
                    }
                }
                Ok(())
            }
            MonitorStep::LoseAfter(last) => {
                must(self.forgot, || "leases are lost, and nothing was forgotten".to_owned())?;
                self.leases.retain(|lease| lease.sequence <= last);
                self.last_arrival = self.last_arrival.min(last);
                Ok(())
            }
            MonitorStep::Void => {
                must(self.forgot, || "leases are void, and nothing was forgotten".to_owned())?;
                self.leases.clear();
                (self.in_doubt, self.highest, self.last_arrival) = (false, 0, 0);
                self.news = true;
                Ok(())
            }
            MonitorStep::MadeAgain | MonitorStep::EndLeases => {
                let there = self.made == 0 && self.incarnation.is_some();
                must(!there, || "leases end with a consumer that is there".to_owned())?;
                self.leases.clear();
                Ok(())
            }
            MonitorStep::Announce { again, counting, .. } => {
                let (generation, number) = self.noticed_elsewhere;
                let generation = if again { self.generation } else { generation };
                self.noticed_elsewhere = (generation, number.max(counting));
                Ok(())
            }
            MonitorStep::AnswerReplicas => {
                self.replicas_wait = false;
                Ok(())
            }
            MonitorStep::Stop => {
                self.stopped = true;
                Ok(())
            }
            MonitorStep::Doubt
            | MonitorStep::Trust
            | MonitorStep::Lead(_)
            | MonitorStep::Adopt
            | MonitorStep::ReadHere { .. } => Ok(()),
        }
    }

    fn ask(&mut self) -> Check {
        must(self.asked.is_none(), || "two questions are open".to_owned())?;
        must(self.up, || "a question without a connection".to_owned())?;
        let spaced = self.answered_at.is_none_or(|at| self.now - at >= RETRY);
        must(self.news || spaced, || "a question is repeated at once".to_owned())?;
        self.news = false;
        for change in &mut self.changes {
            change.before_ask = true;
        }
        for lease in &mut self.leases {
            lease.granted_before_ask = true;
        }
        let told = vec![self.told()];
        let (at, known) = (self.now, self.highest);
        self.asked = Some(Asked { at, known, told, before_sign: false });
        Ok(())
    }

    /// Forgets what does not matter any more, so that more states are equal.
    fn forget(&mut self) {
        if self.up {
            self.lost_at = 0;
        }
        if self.news || self.asked.is_some() {
            self.answered_at = None;
        }
        for (index, change) in self.changes.iter_mut().enumerate() {
            if self.leases.iter().all(|lease| lease.unprotected & 1 << index == 0) {
                *change = Change { at: 0, before_ask: true };
            }
        }
    }

    /// The promises that hold whenever the monitor has nothing more to do.
    fn check(&self) -> Check {
        if self.stopped {
            return Ok(());
        }
        let now = instant(self.now);
        must(self.monitor.in_doubt() == self.in_doubt, || {
            format!("in doubt: {}, and it should be {}", self.monitor.in_doubt(), self.in_doubt)
        })?;
        must(self.asked.as_ref().is_none_or(|asked| !asked.before_sign), || {
            "a question is open that was asked before the last sign".to_owned()
        })?;
        let refresh = if self.kept.is_led_elsewhere() { 1000 } else { ACK_WAIT / 3 };
        let sure = self.proof_at.is_some_and(|at| self.now - at < SURE);
        let fresh = self.now < self.fresh_from + 2 * refresh + TIMEOUT;
        let may_pull = self.up && self.known.is_some() && sure && fresh;
        must(self.monitor.may_pull(now) == may_pull, || {
            format!("may pull: {}, and it should be {may_pull}", self.monitor.may_pull(now))
        })?;
        let next = self.monitor.next_deadline(true).filter(|next| *next > now || self.up);
        must(!self.up || self.asked.is_some() || next.is_some(), || {
            "nobody looks at the consumer any more".to_owned()
        })?;
        let soon = next.is_some_and(|next| next <= now + Duration::from_millis(RETRY));
        must(!self.in_doubt || !self.up || self.asked.is_some() || soon, || {
            "nobody ends the doubt".to_owned()
        })
    }
}

fn server(epoch: u64, id: u8) -> Server {
    let (id, version) = (format!("server {id}"), "2.15.1".to_owned());
    Server { epoch, bus_epoch: 1, id, name: String::new(), version, max_payload: 1 << 20 }
}
