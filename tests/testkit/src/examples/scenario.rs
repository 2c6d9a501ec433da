//! The format of `examples/conformance.json`. This module only reads it.

use std::{collections::BTreeMap, fs, path::Path};

use serde::Deserialize;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Suite {
    /// Scenarios that a language leaves out, or a loop: language, scenario, reason.
    pub skips: BTreeMap<String, BTreeMap<String, String>>,
    pub scenarios: Vec<Scenario>,
}

/// One promise, kept by a worker with a stream, a consumer, a proxy and a NATS of its own.
#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    pub name: String,
    pub promise: String,
    /// The loops that keep it.
    #[serde(default = "both")]
    loops: Vec<Loop>,
    /// The loop of this run.
    #[serde(skip)]
    pub by: Loop,
    /// The ack wait of the consumer, in seconds.
    #[serde(default = "ack_wait")]
    pub ack_wait: f64,
    /// The number of attempts after which the consumer gives a message up. 0 means never.
    #[serde(default)]
    pub max_deliver: i64,
    /// For the workers, besides address, stream and consumer.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// A server that keeps no copies may forget what it was doing when it stopped: attempts that it
    /// counted, and settlements that it confirmed.
    #[serde(default)]
    pub forgetful: bool,
    /// The proxy speaks TLS and has a policy. Callers show who they are in one of these ways.
    pub door: Option<Ways>,
    /// Workers of all languages at once, instead of each language by itself.
    #[serde(default)]
    pub together: bool,
    pub steps: Vec<Step>,
}

/// How a worker takes its messages.
#[derive(Deserialize, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Loop {
    #[default]
    Fetch,
    Consume,
}

impl Loop {
    pub const ALL: [Self; 2] = [Self::Fetch, Self::Consume];

    pub fn name(self) -> &'static str {
        match self {
            Self::Fetch => "fetch",
            Self::Consume => "consume",
        }
    }
}

fn both() -> Vec<Loop> {
    Loop::ALL.to_vec()
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
    /// Tells a worker to stop (SIGTERM).
    Stop(String),
    /// Waits at most so many seconds until a stopped worker has ended.
    Ended {
        worker: String,
        within: f64,
    },
    /// Holds up a worker (SIGSTOP), as a machine does that is suspended.
    Freeze(String),
    Thaw(String),
    /// Ends a worker at once (SIGKILL), with all that it has started.
    Kill(String),
    /// Waits until a pull for the consumer is open, so that a Fetch waits.
    Pulled {},
    /// Waits until the server has delivered so many messages, settled or not.
    Taken(u64),
    /// Lets work begin, of which workers say nothing: nothing may depend on its length.
    Pause(f64),
    Seen(Seen),
    /// Waits until the consumer has nothing left to deliver and nothing to be settled.
    Settled {
        within: f64,
    },
    /// Waits until the workers have reported every delivery, each one once.
    Accounted {},
    /// Waits until the server has announced a Nak of so many messages.
    GivenBack(usize),
    /// Puts another credential into the files of the workers, also of those that run.
    Credential(Credential),
    /// From now on, the server with the keys of the issuer is there or not.
    Issuer(Presence),
    /// Takes a credential from those that the proxy accepts, and waits until it has noticed.
    Revoke(Credential),
    /// From now on, others use up the calls of the limited principal, or leave them to the workers.
    Quota(Quota),
    /// Waits until a worker has told a person of this reason.
    Told {
        worker: String,
        reason: String,
    },
    /// Waits until a worker has ended by itself because of this reason, without a repeat.
    Refused {
        worker: String,
        reason: String,
    },
    Proxy(Turn),
    Nats(Turn),
    Wire(Wire),
}

impl Step {
    /// It does something, and does not only wait.
    pub fn acts(&self) -> bool {
        let to_workers =
            matches!(self, Self::Start(_) | Self::Stop(_) | Self::Freeze(_) | Self::Thaw(_))
                || matches!(self, Self::Kill(_));
        let to_servers =
            matches!(self, Self::Proxy(_) | Self::Nats(_) | Self::Issuer(_) | Self::Wire(_));
        let to_files = matches!(self, Self::Credential(_) | Self::Revoke(_) | Self::Quota(_));
        to_workers || to_servers || to_files || matches!(self, Self::Publish(_))
    }
}

/// How callers show who they are.
#[derive(Deserialize, Clone, Copy, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Ways {
    /// By API keys.
    Keys,
    /// By certificates of clients, which the port demands.
    Certificates,
    /// By tokens of an issuer whose keys are at a URL.
    Tokens,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
pub enum Presence {
    Here,
    Away,
}

/// What a worker has in its files.
#[derive(Deserialize, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum Credential {
    Right,
    /// Another one of the same worker.
    Renewed,
    /// No file at all. Only for workers that start later.
    None,
    Expired,
    /// Of another principal, which may work at the same consumer.
    Neighbour,
    /// Of a principal that may not work there.
    Stranger,
    /// Of a principal that may make one call a second.
    Limited,
}

/// What becomes of the calls that the limited principal may make.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
pub enum Quota {
    /// Others make each call as soon as it is free.
    Spent,
    /// The workers alone make them.
    Left,
}

/// What becomes of the connections between the workers and their proxy.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
pub enum Wire {
    /// What the proxy writes arrives nowhere.
    Stall,
    /// They are closed. New connections are served.
    Cut,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// As by a crash.
    Kill,
    /// As by an operator (SIGTERM), waiting for its end.
    Stop,
    Start,
    /// Of a proxy: another replica takes its place first, for new connections.
    Replace,
    /// As on a machine that is suspended (SIGSTOP).
    Freeze,
    Thaw,
}

/// Waits until the workers have said this so often, since the last step that acts.
#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Seen {
    pub event: String,
    #[serde(default = "once")]
    pub count: usize,
    /// With this reason.
    pub reason: Option<String>,
    /// With a wait of so many seconds or more.
    #[serde(default)]
    pub least_in: f64,
    /// None of them waits for fewer seconds, and no worker says the next sooner.
    #[serde(default)]
    pub each_in: f64,
    /// Seconds.
    #[serde(default = "soon")]
    pub within: f64,
}

fn soon() -> f64 {
    60.0
}

#[derive(Deserialize, Clone)]
#[serde(deny_unknown_fields)]
pub struct Publish {
    /// A JSON object, which is given an `id`.
    pub payload: Option<serde_json::Map<String, serde_json::Value>>,
    /// Instead of a payload: this very text.
    pub text: Option<String>,
    /// Instead of a payload: so many JSON arrays, one within the other.
    pub nested: Option<usize>,
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
    /// The last event came at least so many seconds after that of the message before it.
    #[serde(default)]
    pub apart: f64,
}

fn once() -> usize {
    1
}

/// How many messages a worker with Consume handles at once.
const CONCURRENCY: &str = "16";

impl Suite {
    /// Each scenario is there once for each of its loops.
    pub fn read(examples: &Path) -> Result<Self, String> {
        let file = examples.join("conformance.json");
        let text = fs::read_to_string(&file).map_err(|error| format!("{file:?}: {error}"))?;
        let mut suite: Self =
            serde_json::from_str(&text).map_err(|error| format!("{file:?}: {error}"))?;
        let by = |each: Loop| suite.scenarios.iter().filter_map(move |one| one.by(each));
        suite.scenarios = Loop::ALL.into_iter().flat_map(by).collect();
        Ok(suite)
    }
}

impl Scenario {
    /// The scenario for workers with this loop, if it is for them.
    fn by(&self, by: Loop) -> Option<Self> {
        let mut scenario = Self { by, ..self.clone() };
        if by == Loop::Consume {
            scenario.name = format!("{} {}", by.name(), self.name);
            scenario.env.insert("CONCURRENCY".to_owned(), CONCURRENCY.to_owned());
        }
        self.loops.contains(&by).then_some(scenario)
    }

    /// Whether an argument of a person means it: its name, without or with its loop, or its loop.
    pub fn is_meant(&self, by: &str) -> bool {
        let plain = self.name.rsplit(' ').next();
        [Some(&*self.name), plain, Some(self.by.name())].contains(&Some(by))
    }

    /// Whether something between the workers and the proxies must do as the scenario says.
    pub fn needs_relay(&self) -> bool {
        self.steps.iter().any(|step| matches!(step, Step::Proxy(Turn::Replace) | Step::Wire(_)))
    }
}
