//! What `examples/conformance.json` may say. Does nothing of it.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// What a language does not do, and why: language, scenario, reason.
    pub skips: BTreeMap<String, BTreeMap<String, String>>,
    pub scenarios: Vec<Scenario>,
}

/// One promise, kept by a worker with a stream, a consumer, a proxy and a NATS of its own.
#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub name: String,
    #[expect(dead_code, reason = "for those who read the file")]
    pub promise: String,
    /// Of the consumer, in seconds.
    #[serde(default = "ack_wait")]
    pub ack_wait: f64,
    /// For the workers, besides address, stream and consumer.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// A server that keeps no copies may forget what it was doing when it stopped: attempts that it
    /// counted, and settlements that it confirmed.
    #[serde(default)]
    pub forgetful: bool,
    /// Workers of all languages at once, instead of each language by itself.
    #[serde(default)]
    pub together: bool,
    pub steps: Vec<Step>,
}

fn ack_wait() -> f64 {
    30.0
}

#[derive(Deserialize, Clone)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Step {
    Publish(Publish),
    /// Starts a worker, and calls it so; of each language, where it is about all of them.
    Start(String),
    /// Waits until every worker has said something.
    Ready {},
    /// Tells a worker to stop (SIGTERM), and waits for its end so many seconds.
    Stop {
        worker: String,
        within: f64,
    },
    /// Waits until a pull for the consumer is open, so that a Fetch waits.
    Pulled {},
    /// Waits until so many messages are leased and not settled.
    Held(usize),
    /// Lets work begin, of which workers say nothing: nothing may depend on its length.
    Pause(f64),
    /// Waits until the workers have said this so often.
    Seen {
        event: String,
        count: usize,
    },
    /// Waits until the consumer has nothing left to deliver and nothing to be settled.
    Settled {
        within: f64,
    },
    /// So often has the server delivered something, again or for the first time.
    Delivered(u64),
    /// So many terminations did the server announce, each with a reason.
    Terminated(usize),
    Proxy(Turn),
    Nats(Turn),
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// As by a crash.
    Kill,
    /// As by an operator.
    Stop,
    Start,
}

#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// A JSON object, which is given an `id`.
    pub payload: Option<serde_json::Map<String, serde_json::Value>>,
    /// Instead of a payload: this very text.
    pub text: Option<String>,
    /// So many bytes more in the payload.
    #[serde(default)]
    pub pad: usize,
    #[serde(default)]
    pub headers: BTreeMap<String, Vec<String>>,
    #[serde(default = "once")]
    pub count: usize,
    /// Exactly these events tell of each message.
    pub becomes: Option<Vec<String>>,
    /// Or: whatever happened to a message, one of these was the last event of it.
    #[serde(default)]
    pub ends: Vec<String>,
    /// The last event came not earlier than so many seconds after it was published.
    #[serde(default)]
    pub not_before: f64,
}

fn once() -> usize {
    1
}

impl Suite {
    pub fn read(examples: &Path) -> Result<Self, String> {
        let file = examples.join("conformance.json");
        let text = fs::read_to_string(&file).map_err(|error| format!("{file:?}: {error}"))?;
        serde_json::from_str(&text).map_err(|error| format!("{file:?}: {error}"))
    }
}
