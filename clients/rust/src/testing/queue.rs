//! The messages of the fake: who has them, and what has become of them. Has no clock and no network.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use tokio::time::Instant;

use crate::{
    Error, Headers,
    error::{code_of, duration_of, to_duration},
    message::WITHOUT_PAYLOAD,
    pb::{
        Codec, Delivery, HeaderValues, Outcome, Rejected, RejectedCause, SettleError, SettleResult,
        delivery::Payload, settlement::Action,
    },
};

/// How long the fake asks to wait before a repeat.
const HURRY: Duration = Duration::from_millis(10);

/// A settlement that the fake has carried out.
#[derive(Clone, Debug, PartialEq)]
pub enum Settled {
    /// An Ack.
    Ack,
    /// A Nak, with its delay.
    Nak(Duration),
    /// A Term, with its reason.
    Term(String),
}

/// A message of the fake. Its clones are the same message.
#[derive(Clone)]
pub struct Record(Arc<Published>);

struct Published {
    sequence: u64,
    payload: Bytes,
    subject: String,
    headers: Headers,
    timestamp: SystemTime,
    progress: Mutex<Progress>,
}

#[derive(Default)]
struct Progress {
    attempts: u32,
    settlements: Vec<Settled>,
    has_ended: bool,
}

impl Record {
    /// The number of the message in its stream, from 1.
    pub fn sequence(&self) -> u64 {
        self.0.sequence
    }

    /// When it was published.
    pub fn timestamp(&self) -> SystemTime {
        self.0.timestamp
    }

    /// How often it was delivered.
    pub fn attempts(&self) -> u32 {
        self.progress().attempts
    }

    /// All settlements, in order.
    pub fn settlements(&self) -> Vec<Settled> {
        self.progress().settlements.clone()
    }

    /// It is not delivered again.
    pub fn has_ended(&self) -> bool {
        self.progress().has_ended
    }

    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.0.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, by: Settled) {
        let mut progress = self.progress();
        progress.settlements.push(by);
        progress.has_ended = true;
    }

    /// Why the payload is not of the codec. `None`: it is.
    fn fault(&self, codec: Codec) -> Option<String> {
        let has_headers_alone =
            WITHOUT_PAYLOAD.iter().any(|name| self.0.headers.contains_key(*name));
        if self.0.payload.is_empty() && has_headers_alone {
            return None;
        }
        let text = || std::str::from_utf8(&self.0.payload).map_err(|error| error.to_string());
        let json = |text| serde_json::from_str::<serde::de::IgnoredAny>(text);
        match codec {
            Codec::Json => {
                text().and_then(|text| json(text).map_err(|e| format!("not JSON: {e}"))).err()
            }
            Codec::Text => text().err(),
            _ => None,
        }
    }
}

impl fmt::Debug for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message {} {:?}", self.sequence(), self.settlements())
    }
}

/// A delivery. It is leased until `ends`.
#[derive(Clone)]
pub(super) struct Lease {
    pub record: Record,
    pub token: String,
    attempt: u32,
    /// How long it was granted.
    length: Duration,
    /// `None`: as long as its stream lives.
    pub ends: Option<Instant>,
    /// The end at the latest, whatever extends it.
    pub latest: Option<Instant>,
    is_over: bool,
    /// How it was settled.
    settled: Option<Settled>,
}

pub(super) enum Taken {
    /// The token of its lease.
    Leased(String),
    /// The payload is not of the codec: it is terminated.
    Rejected(Box<Rejected>),
}

/// One stream with one consumer.
pub(super) struct Queue {
    pub records: Vec<Record>,
    ready: VecDeque<Record>,
    leases: BTreeMap<String, Lease>,
    max_deliver: u32,
    ack_wait: Duration,
}

impl Queue {
    pub fn new(max_deliver: u32, ack_wait: Duration) -> Self {
        let (records, ready, leases) = (Vec::new(), VecDeque::new(), BTreeMap::new());
        Self { records, ready, leases, max_deliver, ack_wait }
    }

    /// Every message has ended.
    pub fn is_idle(&self) -> bool {
        self.records.iter().all(Record::has_ended)
    }

    pub fn publish(&mut self, payload: Bytes, subject: &str, headers: Headers) -> Record {
        let record = Record(Arc::new(Published {
            sequence: self.records.len() as u64 + 1,
            payload,
            subject: subject.to_owned(),
            headers,
            timestamp: SystemTime::now(),
            progress: Mutex::default(),
        }));
        self.records.push(record.clone());
        self.ready.push_back(record.clone());
        record
    }

    /// The next message, leased for `length`.
    pub fn take(&mut self, now: Instant, length: Option<Duration>, codec: Codec) -> Option<Taken> {
        let record = self.ready.pop_front()?;
        record.progress().attempts += 1;
        let attempt = record.attempts();
        if let Some(detail) = record.fault(codec) {
            record.end(Settled::Term(detail.clone()));
            let data = record.0.payload.clone();
            let rejected = Rejected { detail, data, ..rejected(&record, RejectedCause::Codec) };
            return Some(Taken::Rejected(Box::new(rejected)));
        }
        let token = format!("fake-{}-{attempt}-{}", record.sequence(), self.leases.len());
        let length = length.unwrap_or(self.ack_wait);
        let lease = Lease {
            record,
            token: token.clone(),
            attempt,
            length,
            ends: Some(now + length),
            latest: None,
            is_over: false,
            settled: None,
        };
        self.leases.insert(token.clone(), lease);
        Some(Taken::Leased(token))
    }

    /// A delivery in the contract. An error is a message that has more than `most` bytes.
    pub fn delivery(
        &self,
        token: &str,
        codec: Codec,
        most: u32,
    ) -> Result<Delivery, Box<Rejected>> {
        let lease = &self.leases[token];
        let Published { payload, subject, headers, timestamp, .. } = &*lease.record.0;
        if payload.len() > most as usize {
            return Err(Box::new(Rejected {
                detail: format!("the message is larger than {most} bytes"),
                token: token.to_owned(),
                lease: Some(to_duration(lease.length)),
                ..rejected(&lease.record, RejectedCause::TooLarge)
            }));
        }
        let text = || String::from_utf8_lossy(payload).into_owned();
        let headers = headers
            .iter()
            .map(|(name, values)| (name.clone(), HeaderValues { values: values.clone() }));
        Ok(Delivery {
            token: token.to_owned(),
            subject: subject.clone(),
            stream_sequence: lease.record.sequence(),
            consumer_sequence: lease.record.sequence(),
            delivery_count: lease.attempt,
            max_deliver: self.max_deliver,
            publish_time: Some((*timestamp).into()),
            lease: Some(to_duration(lease.length)),
            headers: headers.collect(),
            payload: Some(match codec {
                Codec::Json | Codec::Text => Payload::Text(text()),
                _ => Payload::Data(payload.clone()),
            }),
            ..Delivery::default()
        })
    }

    pub fn lease(&mut self, token: &str) -> Option<&mut Lease> {
        self.leases.get_mut(token)
    }

    /// The lease is neither settled nor over.
    pub fn is_open(&self, token: &str) -> bool {
        self.leases.get(token).is_some_and(|lease| !lease.is_over && lease.settled.is_none())
    }

    /// Carries out a settlement.
    pub fn settle(&mut self, token: &str, action: Option<Action>, now: Instant) -> SettleResult {
        let (Some(lease), Some(action)) = (self.leases.get_mut(token), action) else {
            return failure("TOKEN_INVALID", "this is not a token of this fake");
        };
        let wanted = match action {
            Action::Ack(_) => Settled::Ack,
            Action::Nak(nak) => Settled::Nak(nak.delay.map(duration_of).unwrap_or_default()),
            Action::Term(term) => Settled::Term(term.reason),
            Action::Extend(extend) => {
                if lease.is_over || lease.settled.is_some() {
                    return failure("LEASE_EXPIRED", "the lease has ended");
                }
                let length = extend.lease.map_or(lease.length, duration_of);
                let ends = lease.latest.map_or(now + length, |latest| latest.min(now + length));
                lease.ends = Some(ends);
                let left = Some(to_duration(ends - now));
                let outcome = Outcome::Extended.into();
                return SettleResult { outcome, lease: left, ..SettleResult::default() };
            }
        };
        if lease.is_over {
            return failure("LEASE_EXPIRED", "the lease has ended");
        }
        let outcome = match &lease.settled {
            Some(settled) if *settled == wanted => Outcome::Duplicate,
            Some(_) => return failure("LEASE_SETTLED", "the message was settled in another way"),
            None => {
                lease.settled = Some(wanted.clone());
                let record = lease.record.clone();
                if matches!(wanted, Settled::Nak(_)) {
                    record.progress().settlements.push(wanted);
                    self.again(record);
                } else {
                    record.end(wanted);
                }
                Outcome::Confirmed
            }
        };
        SettleResult { outcome: outcome.into(), ..SettleResult::default() }
    }

    /// The leases that are over: their messages are delivered again.
    pub fn lapse(&mut self, now: Instant) -> Vec<String> {
        let is_due = |lease: &Lease| lease.ends.is_some_and(|ends| ends <= now);
        let is_open = |lease: &Lease| !lease.is_over && lease.settled.is_none();
        let over = self.leases.values().filter(|lease| is_open(lease) && is_due(lease));
        let over: Vec<String> = over.map(|lease| lease.token.clone()).collect();
        for token in &over {
            let Some(lease) = self.leases.get_mut(token) else { continue };
            lease.is_over = true;
            let record = lease.record.clone();
            self.again(record);
        }
        over
    }

    /// When the next lease ends.
    pub fn next_lapse(&self) -> Option<Instant> {
        let open = self.leases.values().filter(|lease| !lease.is_over && lease.settled.is_none());
        open.filter_map(|lease| lease.ends).min()
    }

    /// Ends the leases of a message.
    pub fn expire(&mut self, record: &Record) {
        let now = Instant::now();
        let mine = |lease: &&mut Lease| Arc::ptr_eq(&lease.record.0, &record.0);
        self.leases.values_mut().filter(mine).for_each(|lease| lease.ends = Some(now));
    }

    /// Takes back a delivery that nobody has seen. It costs no attempt.
    pub fn release(&mut self, token: &str) {
        let Some(lease) = self.leases.get_mut(token) else { return };
        lease.is_over = true;
        lease.record.progress().attempts -= 1;
        self.ready.push_front(lease.record.clone());
    }

    fn again(&mut self, record: Record) {
        if self.max_deliver > 0 && record.attempts() >= self.max_deliver {
            record.progress().has_ended = true;
        } else {
            self.ready.push_back(record);
        }
    }
}

fn rejected(record: &Record, cause: RejectedCause) -> Rejected {
    Rejected {
        cause: cause.into(),
        subject: record.0.subject.clone(),
        stream_sequence: record.sequence(),
        delivery_count: record.attempts(),
        size: record.0.payload.len() as u64,
        ..Rejected::default()
    }
}

/// The refusal of a part, with the wait of a proxy that is in a hurry.
pub(super) fn failure(reason: &str, message: &str) -> SettleResult {
    let code = code_of(reason).unwrap_or(tonic::Code::Unknown);
    let can_repeat = Error::new(reason, code, message).can_repeat();
    let error = SettleError {
        reason: reason.to_owned(),
        message: message.to_owned(),
        retry_delay: can_repeat.then(|| to_duration(HURRY)),
        ..SettleError::default()
    };
    SettleResult { error: Some(error), ..SettleResult::default() }
}
