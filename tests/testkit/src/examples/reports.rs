//! All that was published, and all that the workers reported of it. The two must agree. Knows no
//! process and no server.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard},
    time::{Duration, Instant},
};

use serde::Deserialize;

use super::scenario::{Publish, Seen};

/// Events of an attempt whose work was done.
const WORKED: &[&str] = &["acked", "lost"];
/// Events that must not happen twice for one message.
const FINAL: &[&str] = &["acked", "termed", "rejected"];
/// No more complaints than a person reads.
const MOST_COMPLAINTS: usize = 8;

#[derive(Default)]
pub struct Reports {
    ledger: Mutex<Records>,
}

#[derive(Default)]
struct Records {
    messages: BTreeMap<u64, Message>,
    /// Events that concern no message.
    others: Vec<TimedEvent>,
    wrong: Vec<String>,
}

struct Message {
    published: Instant,
    id: Option<u64>,
    promise: Publish,
    events: Vec<TimedEvent>,
}

struct TimedEvent {
    at: Instant,
    /// The worker, as `language/name`.
    by: String,
    event: Event,
}

/// The totals of a run that went as promised.
#[derive(Clone, Default)]
pub struct Tally {
    /// How often a message was tried again because a lease of it was lost.
    pub twice: usize,
    /// How many messages each language acked.
    pub acked: BTreeMap<String, usize>,
}

/// A line of a worker.
#[derive(Deserialize)]
struct Event {
    event: String,
    sequence: Option<u64>,
    deliveries: Option<u64>,
    id: Option<u64>,
    headers: Option<BTreeMap<String, Vec<String>>>,
    /// Why a call is repeated, and after how many seconds.
    reason: Option<String>,
    r#in: Option<f64>,
}

impl Reports {
    /// Before anybody can have it.
    pub fn published(&self, sequence: u64, id: Option<u64>, promise: &Publish) {
        let (published, promise) = (Instant::now(), promise.clone());
        let message = Message { published, id, promise, events: Vec::new() };
        self.lock().messages.insert(sequence, message);
    }

    pub fn note(&self, worker: &str, line: &str) {
        let mut ledger = self.lock();
        let event: Event = match serde_json::from_str(line) {
            Ok(event) => event,
            Err(error) => {
                ledger.wrong.push(format!("{worker} said {line:?}: {error}"));
                return;
            }
        };
        if event.event == "retry" && (event.reason.is_none() || event.r#in.is_none()) {
            ledger.wrong.push(format!("{worker} repeats, but not why or when: {line}"));
        }
        let sequence = event.sequence;
        let said = TimedEvent { at: Instant::now(), by: worker.to_owned(), event };
        let Some(sequence) = sequence else {
            ledger.others.push(said);
            return;
        };
        match ledger.messages.get_mut(&sequence) {
            Some(message) => message.events.push(said),
            None => ledger.wrong.push(format!("{worker} told of a message {sequence}: {line}")),
        }
    }

    /// How often the workers have said this.
    pub fn count(&self, event: &str) -> usize {
        self.count_of(|said| said.event.event == event)
    }

    /// How often they have said it since then, with this reason and wait.
    pub fn count_seen(&self, wanted: &Seen, since: Instant) -> usize {
        self.count_of(|TimedEvent { at, event, .. }| {
            let reason = wanted.reason.is_none() || wanted.reason == event.reason;
            let wait = event.r#in.unwrap_or(0.0) >= wanted.least_in;
            event.event == wanted.event && reason && wait && *at >= since
        })
    }

    /// The first repeat of this reason since then that came too soon, by what a worker said or by what it did. A line may
    /// be read late, so the time from then to each repeat counts, which is the longer for it.
    pub fn too_soon(&self, wanted: &Seen, since: Instant) -> Option<String> {
        let ledger = self.lock();
        let is_wanted = |said: &&TimedEvent| {
            said.event.event == wanted.event
                && said.event.reason == wanted.reason
                && said.at >= since
        };
        let mut repeats: BTreeMap<&str, u32> = BTreeMap::new();
        ledger.others.iter().filter(is_wanted).find_map(|said| {
            let TimedEvent { at, by, event } = said;
            let before = repeats.entry(by).or_default();
            let (told, took) = (event.r#in.unwrap_or(0.0), (*at - since).as_secs_f64());
            let is_soon = told < wanted.each_in || took < f64::from(*before) * wanted.each_in;
            *before += 1;
            let what =
                format!("{by} says {told} s for a {}, number {before} in {took} s", event.event);
            is_soon.then_some(what)
        })
    }

    /// Whether a worker has repeated a call for this reason.
    pub fn has_repeated(&self, worker: &str, reason: &str) -> bool {
        let for_it = |said: &TimedEvent| said.event.reason.as_deref() == Some(reason);
        self.count_of(|said| said.by == worker && said.event.event == "retry" && for_it(said)) > 0
    }

    /// How often the workers have told of a message.
    pub fn count_told(&self) -> usize {
        self.lock().messages.values().map(|message| message.events.len()).sum()
    }

    fn count_of(&self, is_wanted: impl Fn(&TimedEvent) -> bool) -> usize {
        let ledger = self.lock();
        let of_messages = ledger.messages.values().flat_map(|message| &message.events);
        of_messages.chain(&ledger.others).filter(|said| is_wanted(said)).count()
    }

    /// An event of a worker that concerns no message.
    pub fn last_word(&self, worker: &str) -> Option<String> {
        let ledger = self.lock();
        let said = ledger.others.iter().rev().find(|said| said.by == worker);
        said.map(|said| said.event.event.clone())
    }

    /// Whether something was said of every message.
    pub fn all_told(&self) -> bool {
        self.lock().messages.values().all(|message| !message.events.is_empty())
    }

    /// The events of each message, by its number in the stream.
    pub fn told(&self) -> Vec<(u64, Vec<String>)> {
        let ledger = self.lock();
        let told = |message: &Message| {
            message.events.iter().map(|said| said.event.event.clone()).collect()
        };
        ledger.messages.iter().map(|(sequence, message)| (*sequence, told(message))).collect()
    }

    pub fn tally(&self) -> Tally {
        let ledger = self.lock();
        let mut tally = Tally::default();
        for message in ledger.messages.values() {
            tally.twice += message.count(WORKED).saturating_sub(1);
            for said in message.events.iter().filter(|said| said.event.event == "acked") {
                let language = said.by.split('/').next().unwrap_or_default();
                *tally.acked.entry(language.to_owned()).or_default() += 1;
            }
        }
        tally
    }

    /// All broken promises. A forgetful server may deliver a settled message again.
    pub fn complaints(&self, forgetful: bool) -> Vec<String> {
        let ledger = self.lock();
        let of_messages = ledger.messages.iter().flat_map(|(sequence, message)| {
            let complaints = message.complaints(forgetful).into_iter();
            complaints.map(move |what| format!("message {sequence}: {what}"))
        });
        let apart = ledger.messages.iter().filter(|(_, message)| message.promise.apart > 0.0);
        let together = apart.filter_map(|(sequence, message)| {
            let before = ledger.messages.get(&(sequence - 1))?.ended()?;
            let earliest = before + Duration::from_secs_f64(message.promise.apart);
            let is_together = message.ended()? < earliest;
            is_together
                .then(|| format!("message {sequence}: settled together with the message before it"))
        });
        let of_messages = of_messages.chain(together);
        let mut all: Vec<_> = ledger.wrong.iter().cloned().chain(of_messages).collect();
        let more = all.len().saturating_sub(MOST_COMPLAINTS);
        all.truncate(MOST_COMPLAINTS);
        all.extend((more > 0).then(|| format!("and {more} more")));
        all
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        self.ledger.lock().unwrap()
    }
}

impl Message {
    fn ended(&self) -> Option<Instant> {
        self.events.last().map(|said| said.at)
    }

    fn complaints(&self, forgetful: bool) -> Vec<String> {
        let mut wrong = Vec::new();
        // A delayed worker reports an attempt late, after others have followed it.
        let mut by_attempt: Vec<&Event> = self.events.iter().map(|said| &said.event).collect();
        by_attempt.sort_by_key(|event| event.deliveries);
        let told: Vec<&str> = by_attempt.iter().map(|event| &*event.event).collect();
        let promise = &self.promise;
        if let Some(becomes) = &promise.becomes
            && told != *becomes
        {
            wrong.push(format!("{told:?} instead of {becomes:?}"));
        }
        let ends_well = |last: &&str| promise.ends.iter().any(|end| end == last);
        if !promise.ends.is_empty() && !told.last().is_some_and(ends_well) {
            wrong.push(format!("{told:?} should end as one of {:?}", promise.ends));
        }
        let earliest = self.published + Duration::from_secs_f64(promise.not_before);
        if let Some(last) = self.events.last()
            && last.at < earliest
        {
            wrong.push(format!("{} {:?} too early", last.event.event, earliest - last.at));
        }
        if !forgetful {
            wrong.extend(self.not_once().map(str::to_owned));
        }
        wrong.extend(self.events.iter().filter_map(|said| self.misread(&said.event)));
        wrong
    }

    fn not_once(&self) -> Option<&'static str> {
        if self.count(FINAL) > 1 {
            return Some("settled more than once");
        }
        let goes_up = |one: &u64, next: &u64| one < next;
        let attempts = |lost_too: bool| {
            let told =
                self.events.iter().filter(move |said| lost_too || said.event.event != "lost");
            told.map(|said| said.event.deliveries.unwrap_or_default()).collect::<Vec<_>>()
        };
        let mut all = attempts(true);
        all.sort_unstable();
        if !all.is_sorted_by(goes_up) {
            return Some("told of more than once for one attempt");
        }
        (!attempts(false).is_sorted_by(goes_up)).then_some("its attempts do not go up")
    }

    /// Returns how a received message differs from the published one.
    fn misread(&self, event: &Event) -> Option<String> {
        if event.id != self.id {
            return Some(format!("id {:?} instead of {:?}", event.id, self.id));
        }
        // A payload tells a worker to name its headers; some workers always do.
        if event.headers.is_none() && self.promise.payload.is_none() {
            return None;
        }
        let headers = event.headers.clone().unwrap_or_default();
        (headers != self.promise.headers).then(|| format!("headers {headers:?}"))
    }

    fn count(&self, events: &[&str]) -> usize {
        self.events.iter().filter(|said| events.contains(&&*said.event.event)).count()
    }
}
