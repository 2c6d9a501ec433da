//! The NATS server's account of a scenario's messages: how often it delivered each of them, and
//! what settled it. It must agree with the reports of the workers. Knows no worker and no proxy.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use async_nats::jetstream::consumer::pull;
use futures_util::StreamExt as _;
use serde::Deserialize;
use testkit::{
    jetstream::{Fixture, ack_wait},
    nats_server::NatsServer,
};
use tokio::task::JoinSet;

use testkit::{
    examples::{reports::Reports, scenario::Scenario},
    until,
};

/// For what was settled to be announced.
const ANNOUNCED: Duration = Duration::from_secs(20);
/// No more complaints than a person reads.
const MOST_COMPLAINTS: usize = 8;

pub type Info = async_nats::jetstream::consumer::Info;

pub struct Server {
    pub fixture: Fixture,
    heard: Arc<Mutex<Advisories>>,
    _listening: JoinSet<()>,
}

/// The settlement of each message, by its number in the stream.
#[derive(Default)]
struct Advisories {
    acks: BTreeMap<u64, usize>,
    terms: BTreeMap<u64, usize>,
    naks: BTreeMap<u64, usize>,
    wrong: Vec<String>,
}

/// An announcement of the server: of an Ack, a Term, a Nak, or of something else.
#[derive(Deserialize)]
struct Advisory {
    r#type: String,
    stream_seq: Option<u64>,
    reason: Option<String>,
}

impl Server {
    /// With a stream of its own for this scenario.
    pub async fn set(nats: &NatsServer, scenario: &Scenario) -> Self {
        let consumer = pull::Config {
            max_deliver: scenario.max_deliver,
            // In percent: every Ack is announced.
            sample_frequency: 100,
            ..ack_wait((scenario.ack_wait * 1000.0) as u64)
        };
        let fixture = Fixture::on(nats, consumer).await;
        // By the connection that publishes, too: when it has come back from a restart of the server,
        // it listens again before it publishes anything.
        let client = fixture.jetstream.client();
        let subject = format!("$JS.EVENT.*.CONSUMER.*.{}.{}", fixture.stream, fixture.consumer);
        let mut announced = client.subscribe(subject).await.unwrap();
        client.flush().await.unwrap();
        let heard: Arc<Mutex<Advisories>> = Arc::default();
        let mut listening = JoinSet::new();
        let to = heard.clone();
        listening.spawn(async move {
            while let Some(message) = announced.next().await {
                to.lock().unwrap().hear(&message.payload);
            }
        });
        Self { fixture, heard, _listening: listening }
    }

    /// Waits until INFO is so. `has_failed` ends the wait early.
    pub async fn until(
        &self,
        within: Duration,
        what: &str,
        mut is_so: impl FnMut(&Info) -> bool,
        mut has_failed: impl FnMut() -> bool,
    ) -> Result<(), String> {
        let (began, mut last) = (Instant::now(), None);
        loop {
            if let Some(info) = self.fixture.try_info().await {
                if is_so(&info) {
                    return Ok(());
                }
                last = Some(info);
            }
            let failed = has_failed();
            if failed || began.elapsed() > within {
                let why =
                    if failed { "a worker has ended".to_owned() } else { format!("{within:?}") };
                let last = last.as_ref().map(summary);
                return Err(format!("waited for {what}: {why}; server: {last:?}"));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits for Naks of so many messages.
    pub async fn given_back(&self, count: usize, within: Duration) -> Result<(), String> {
        let given_back = || self.heard.lock().unwrap().naks.len();
        let done = until(within, || async { (given_back() >= count).then_some(()) }).await;
        done.ok_or_else(|| format!("{} messages were given back, not {count}", given_back()))
    }

    /// Waits until the workers have told of each delivery, or the proxy has given it back, as it does
    /// where it reached no worker.
    pub async fn accounted(
        &self,
        reports: &Reports,
        within: Duration,
        has_failed: impl FnMut() -> bool,
    ) -> Result<(), String> {
        let is_so = |info: &Info| {
            let naks: usize = self.heard.lock().unwrap().naks.values().sum();
            let by_proxy = naks.saturating_sub(reports.count("nacked") + reports.count("returned"));
            let (told, delivered) =
                (reports.count_told(), info.delivered.consumer_sequence as usize);
            (told..=told + by_proxy).contains(&delivered)
        };
        let done = self.until(within, "all deliveries to be told of", is_so, has_failed).await;
        done.map_err(|wrong| format!("{wrong}; told of: {}", reports.count_told()))
    }

    /// Differences between the reports of the workers and the account of the server. A forgetful
    /// server may have stopped before it could announce what it did.
    pub async fn disagreements(&self, reports: &Reports, forgetful: bool) -> Vec<String> {
        let compare = || self.heard.lock().unwrap().disagreements(reports, forgetful);
        let agree = || async { compare().is_empty().then_some(()) };
        until(ANNOUNCED, agree).await;
        let mut all = compare();
        let more = all.len().saturating_sub(MOST_COMPLAINTS);
        all.truncate(MOST_COMPLAINTS);
        all.extend((more > 0).then(|| format!("and {more} more")));
        all
    }
}

impl Advisories {
    fn hear(&mut self, announced: &[u8]) {
        let announced: Advisory = serde_json::from_slice(announced).unwrap();
        let settled = match announced.r#type.rsplit('.').next().unwrap() {
            "consumer_ack" => &mut self.acks,
            "terminated" => &mut self.terms,
            "nak" => &mut self.naks,
            _ => return,
        };
        let sequence = announced.stream_seq.unwrap();
        *settled.entry(sequence).or_default() += 1;
        if announced.r#type.ends_with(".terminated") && announced.reason.unwrap_or_default() == "" {
            self.wrong.push(format!("message {sequence}: terminated without a reason"));
        }
    }

    fn disagreements(&self, reports: &Reports, forgetful: bool) -> Vec<String> {
        let mut wrong = self.wrong.clone();
        for (sequence, told) in reports.told() {
            let said =
                |events: &[&str]| told.iter().filter(|said| events.contains(&&***said)).count();
            // One that was not told in time what became of its settlement has lost a lease.
            let lost = said(&["lost"]);
            let mut differ = |what: &str, said: usize, done: &BTreeMap<u64, usize>| {
                let done = done.get(&sequence).copied().unwrap_or_default();
                if done < said || done > said + lost.min(1) {
                    wrong.push(format!(
                        "message {sequence}: {what} {done} times at the server, told {told:?}"
                    ));
                }
            };
            // A rejected message is terminated. A message that is too large for the worker is given
            // back by it.
            let terms: &[&str] = match self.naks.contains_key(&sequence) {
                true => &["termed"],
                false => &["termed", "rejected"],
            };
            differ("terminated", said(terms), &self.terms);
            if !forgetful {
                differ("acked", said(&["acked"]), &self.acks);
            }
        }
        wrong
    }
}

fn summary(info: &Info) -> String {
    format!(
        "{} to deliver, {} in hand, {} delivered",
        info.num_pending, info.num_ack_pending, info.delivered.consumer_sequence
    )
}
