//! The desk of a worker against a naive proxy, which leases, settles, ends streams and forgets leases at random.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

use fetch_proxy::{
    client::Refused,
    pb::{
        ConsumeEnded, ConsumeRequest, ConsumeResponse, ConsumeResult, Delivery, Outcome,
        SettleError, SettleResult, settlement::Action,
    },
    work::{
        desk::{Desk, DeskPlan, DeskStep, WorkOutcome},
        verdict::WorkVerdict,
    },
};
use testkit::{dice::Dice, millis};

/// A stream as the proxy sees it.
#[derive(Default)]
struct Served {
    credit: u32,
    credit_id: u64,
    last_number: u64,
    /// The sequence of each unsettled number.
    leases: BTreeMap<u64, u64>,
    frame: ConsumeResponse,
    is_half_closed: bool,
}

/// The naive proxy, and what has become of each message.
struct World {
    dice: Dice,
    now: Instant,
    desk: Desk,
    jobs: u32,
    max: Option<u64>,
    next_sequence: u64,
    streams: BTreeMap<u64, Served>,
    /// The sequences of all leases that live, by token.
    leases: BTreeMap<String, u64>,
    begun: BTreeSet<u64>,
    at_work: BTreeMap<u64, u64>,
    is_ending: BTreeSet<u64>,
    ends: BTreeMap<u64, WorkOutcome>,
    settled: BTreeSet<u64>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut dice = Dice::new(seed, 0);
        let jobs = 1 + u32::try_from(dice.within(0..4)).unwrap();
        let max = (dice.within(0..3) == 0).then(|| 1 + dice.within(0..12));
        let plan = DeskPlan {
            stream: "S".to_owned(),
            consumer: "c".to_owned(),
            worker: "model".to_owned(),
            jobs,
            max,
            until_empty: false,
            grace: Duration::from_secs(6),
            lease: None,
            seed,
        };
        let now = Instant::now();
        Self {
            dice,
            now,
            desk: Desk::new(plan, now),
            jobs,
            max,
            next_sequence: 0,
            streams: BTreeMap::new(),
            leases: BTreeMap::new(),
            begun: BTreeSet::new(),
            at_work: BTreeMap::new(),
            is_ending: BTreeSet::new(),
            ends: BTreeMap::new(),
            settled: BTreeSet::new(),
        }
    }

    /// Performs the steps of the desk, and checks them.
    fn perform(&mut self) {
        for step in self.desk.steps(self.now) {
            match step {
                DeskStep::Open(id) => _ = self.streams.insert(id, Served::default()),
                DeskStep::Send(id, frame) => self.receive(id, frame),
                DeskStep::HalfClose(id) => {
                    let stream = self.streams.get_mut(&id).unwrap();
                    assert!(stream.leases.is_empty(), "half-closed with leases");
                    stream.is_half_closed = true;
                }
                DeskStep::Drop(id) => self.end_leases_of(id),
                DeskStep::Begin(key, message) => {
                    let sequence = message.stream_sequence;
                    assert!(self.begun.insert(sequence), "{sequence} begins twice");
                    assert!(!self.ends.contains_key(&sequence), "{sequence} begins after its end");
                    self.at_work.insert(key, sequence);
                }
                DeskStep::EndWork(key) => {
                    assert!(self.at_work.contains_key(&key), "nobody works on {key}");
                    self.is_ending.insert(key);
                }
                DeskStep::Settled(message) => {
                    let before = self.ends.insert(message.sequence, message.outcome);
                    assert_eq!(before, None, "{} ends twice", message.sequence);
                }
                DeskStep::Note(_) => {}
            }
            assert!(self.at_work.len() <= self.jobs as usize, "too much is at work");
        }
        assert!(self.max.is_none_or(|max| self.begun.len() as u64 <= max), "more than --max");
    }

    fn receive(&mut self, id: u64, frame: ConsumeRequest) {
        let stream = self.streams.get_mut(&id).expect("a frame on a stream that is gone");
        assert!(!stream.is_half_closed, "a frame after the half-close");
        let start = frame.start.and_then(|start| start.credit);
        if let Some(credit) = start.or(frame.credit) {
            stream.credit = credit.max_leases.unwrap_or(stream.credit);
            (stream.credit_id, stream.frame.credit_id) = (credit.id, credit.id);
        }
        let Some(settle) = frame.settle else { return };
        let mut results = Vec::new();
        for settlement in settle.settlements {
            let token = match settlement.number {
                0 => settlement.token,
                number => format!("{id}-{number}"),
            };
            let outcome = match settlement.action {
                Some(Action::Extend(_)) => Outcome::Extended,
                _ => Outcome::Confirmed,
            };
            let error = |reason: &str, wait| SettleError {
                reason: reason.to_owned(),
                retry_delay: wait,
                ..SettleError::default()
            };
            let mut result = SettleResult::default();
            if !self.leases.contains_key(&token) {
                result.error = Some(error("LEASE_EXPIRED", None));
            } else if self.dice.within(0..5) == 0 {
                result.error = Some(error("NATS_UNAVAILABLE", millis(300)));
            } else {
                result.set_outcome(outcome);
                result.lease = millis(6000);
                if outcome == Outcome::Confirmed {
                    let sequence = self.leases.remove(&token).unwrap();
                    assert!(self.settled.insert(sequence), "{sequence} is settled twice");
                    stream.leases.remove(&settlement.number);
                }
            }
            results.push(result);
        }
        stream.frame.results.push(ConsumeResult { id: settle.id, results, ..Default::default() });
    }

    /// A stream has gone. Its leases live on, each or none of them.
    fn end_leases_of(&mut self, id: u64) {
        let Some(stream) = self.streams.remove(&id) else { return };
        for number in stream.leases.keys() {
            if self.dice.within(0..4) == 0 {
                self.leases.remove(&format!("{id}-{number}"));
            }
        }
    }

    fn any_stream(&mut self) -> Option<u64> {
        let ids: Vec<u64> = self.streams.keys().copied().collect();
        (!ids.is_empty()).then(|| ids[self.dice.within(0..ids.len() as u64) as usize])
    }

    /// Something happens.
    fn happen(&mut self, calm: bool) {
        match self.dice.within(0..if calm { 5 } else { 9 }) {
            0 | 1 => {
                let Some(id) = self.any_stream() else { return };
                let stream = self.streams.get_mut(&id).unwrap();
                while (stream.leases.len() as u32) < stream.credit && self.dice.within(0..3) > 0 {
                    stream.last_number += 1;
                    self.next_sequence += 1;
                    let (number, stream_sequence) = (stream.last_number, self.next_sequence);
                    let token = format!("{id}-{number}");
                    stream.leases.insert(number, stream_sequence);
                    self.leases.insert(token.clone(), stream_sequence);
                    let delivery = Delivery {
                        number,
                        stream_sequence,
                        token,
                        lease: millis(3_600_000),
                        delivery_count: 1,
                        max_deliver: u32::try_from(self.dice.within(0..3)).unwrap(),
                        ..Delivery::default()
                    };
                    stream.frame.messages.push(delivery);
                }
                let frame = std::mem::take(&mut stream.frame);
                let is_over = stream.is_half_closed;
                self.desk.frame(self.now, id, frame);
                if is_over {
                    self.streams.remove(&id);
                    self.desk.ended(self.now, id, None);
                }
            }
            2 | 3 => {
                let keys: Vec<u64> = self.at_work.keys().copied().collect();
                if keys.is_empty() {
                    return;
                }
                let key = keys[self.dice.within(0..keys.len() as u64) as usize];
                self.at_work.remove(&key);
                self.is_ending.remove(&key);
                let nak = WorkVerdict::Nak { delay: Duration::ZERO, why: "busy".to_owned() };
                let all = [WorkVerdict::Ack, nak, WorkVerdict::Term("no".to_owned())];
                let verdict = all[self.dice.within(0..3) as usize].clone();
                self.desk.done(self.now, key, verdict, None);
            }
            4 => self.now += Duration::from_millis(100 * (1 + self.dice.within(0..5))),
            5 => {
                let Some(id) = self.any_stream() else { return };
                let stream = self.streams.get_mut(&id).unwrap();
                let Some((number, _)) = stream.leases.pop_first() else { return };
                self.leases.remove(&format!("{id}-{number}"));
                let ended = ConsumeEnded { number, why: Some(SettleError::default()) };
                stream.frame.ended.push(ended);
            }
            6 => {
                let Some(id) = self.any_stream() else { return };
                if let Some(stream) = self.streams.get_mut(&id) {
                    stream.frame.draining = Some(Default::default());
                }
            }
            7 => {
                let Some(id) = self.any_stream() else { return };
                self.end_leases_of(id);
                let refused = Refused {
                    reason: "UNAVAILABLE".to_owned(),
                    message: String::new(),
                    retry_delay: Some(Duration::ZERO),
                };
                let refused = (self.dice.within(0..2) == 0).then_some(refused);
                self.desk.ended(self.now, id, refused);
            }
            _ => self.now = self.desk.wake(self.now).max(self.now),
        }
    }
}

#[test]
fn desk_keeps_its_promises_in_any_order_of_events() {
    let (mut lost, mut acked, mut stopped) = (0, 0, 0);
    for seed in 0..1000 {
        let mut world = World::new(seed);
        world.perform();
        for _ in 0..world.dice.within(0..300) {
            world.happen(false);
            world.perform();
        }
        world.desk.stop(world.now);
        if seed % 3 == 0 {
            world.desk.give_back(world.now);
            stopped += 1;
        }
        world.perform();
        let mut left = 3000;
        while !world.desk.is_over() {
            world.happen(true);
            world.perform();
            left -= 1;
            assert!(left > 0, "seed {seed}: the desk is never over: {:?}", world.desk);
        }
        assert!(world.at_work.is_empty(), "seed {seed}: over, and work continues");
        assert!(world.desk.failure().is_none(), "seed {seed}: {:?}", world.desk.failure());
        for sequence in &world.begun {
            assert!(world.ends.contains_key(sequence), "seed {seed}: {sequence} has no end");
        }
        for (sequence, outcome) in &world.ends {
            let is_settled = world.settled.contains(sequence);
            // A settlement whose result was lost may have counted.
            assert!(is_settled || *outcome == WorkOutcome::Lost, "seed {seed}: {sequence}");
            lost += usize::from(*outcome == WorkOutcome::Lost);
            acked += usize::from(*outcome == WorkOutcome::Acked);
        }
    }
    assert!(lost > 300 && acked > 300 && stopped > 200, "{lost} {acked} {stopped}");
}
