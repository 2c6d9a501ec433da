//! The client of the command line: `fetch-proxy fetch`, `ack`, `nak`, `term` and `extend`, for images
//! without a shell. It is a client like any other and knows nothing of the server. `people` and
//! `programs` format the answers.

mod people;
mod programs;

use std::{
    borrow::Cow,
    time::{Duration, SystemTime},
};

use prost_types::{Duration as PbDuration, Timestamp};
use tonic::{
    Request, Status,
    transport::{Channel, Endpoint},
};
use tonic_types::StatusExt as _;

use crate::pb::{self, fetch_service_client::FetchServiceClient, settlement::Action};

/// Longest time for an answer, in addition to the time that the call may wait.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the fetch-proxy at `addr`. Its answers are text for people, or JSON.
#[derive(Debug)]
pub struct Client {
    /// Host and port, or a URL.
    pub addr: String,
    /// Whether to print JSON.
    pub json: bool,
}

/// The text to print, and whether everything succeeded.
type Shown = Result<(String, bool), String>;

impl Client {
    /// Fetches messages.
    ///
    /// # Errors
    /// Why there is no answer, for people.
    pub async fn fetch(&self, request: pb::FetchRequest, max_wait: Duration) -> Shown {
        let mut request = Request::new(pb::FetchRequest { max_wait: wire(max_wait)?, ..request });
        request.set_timeout(max_wait + ANSWER_TIMEOUT);
        let answer = self.client().await?.fetch(request).await;
        let answer = answer.map_err(|status| told(&status))?.into_inner();
        let shown = match self.json {
            true => programs::json("FetchResponse", &answer)?,
            false => people::fetched(&answer),
        };
        Ok((shown, true))
    }

    /// Does the same action with every token.
    ///
    /// # Errors
    /// Why there is no answer, for people. A refusal of one token is not an error of the call.
    pub async fn settle(&self, tokens: Vec<String>, action: Action) -> Shown {
        let tokens = tokens.iter().map(|token| pasted(token)).collect::<Result<Vec<_>, _>>()?;
        let settlement =
            |token: &String| pb::Settlement { token: token.clone(), action: Some(action.clone()) };
        let settlements = tokens.iter().map(settlement).collect();
        let mut request = Request::new(pb::SettleRequest { settlements, ..Default::default() });
        request.set_timeout(ANSWER_TIMEOUT);
        let answer = self.client().await?.settle(request).await;
        let answer = answer.map_err(|status| told(&status))?.into_inner();
        let shown = match self.json {
            true => programs::json("SettleResponse", &answer)?,
            false => people::settled(&tokens, &answer.results),
        };
        Ok((shown, answer.failed == 0))
    }

    async fn client(&self) -> Result<FetchServiceClient<Channel>, String> {
        let channel = connect(&self.addr, ANSWER_TIMEOUT).await?;
        Ok(FetchServiceClient::new(channel).max_decoding_message_size(usize::MAX))
    }
}

/// A connection to a host and port, or a URL.
///
/// # Errors
/// Why there is none, for people.
pub(super) async fn connect(addr: &str, patience: Duration) -> Result<Channel, String> {
    let addr = &*reachable(addr);
    let url = if addr.contains("://") { addr.to_owned() } else { format!("http://{addr}") };
    let wrong = |error| format!("cannot connect to {addr}: {}", chain(&error));
    let endpoint = Endpoint::from_shared(url).map_err(wrong)?.connect_timeout(patience);
    endpoint.connect().await.map_err(wrong)
}

/// A server can listen on all addresses, but a client connects to one: the address of this machine.
fn reachable(addr: &str) -> Cow<'_, str> {
    let port = ["0.0.0.0:", "[::]:", ":"].iter().find_map(|all| addr.strip_prefix(all));
    port.map_or(addr.into(), |port| format!("127.0.0.1:{port}").into())
}

/// A token without blanks, quotes and commas that were copied with it. No token has any of these.
fn pasted(token: &str) -> Result<String, String> {
    let around = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ',');
    match token.trim_matches(around) {
        "" => Err("a token is empty".to_owned()),
        token => Ok(token.to_owned()),
    }
}

/// A duration as a message of the contract.
///
/// # Errors
/// If the duration is too long.
pub fn wire(duration: Duration) -> Result<Option<PbDuration>, String> {
    PbDuration::try_from(duration).map(Some).map_err(|error| error.to_string())
}

/// An error with its causes. tonic's own text leaves the causes out.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(Some(error), |error| error.source());
    causes.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

fn told(status: &Status) -> String {
    let message = people::plain(status.message());
    match status.get_details_error_info() {
        Some(info) => format!("{}: {message}", people::plain(&info.reason)),
        None => format!("{:?}: {message}", status.code()),
    }
}

/// A time as text, in UTC. `None` if there is no time.
fn time(at: Option<&Timestamp>) -> Option<String> {
    let at = SystemTime::try_from(*at?).ok()?;
    Some(humantime::format_rfc3339_millis(at).to_string())
}

fn length(of: Option<&PbDuration>) -> Option<Duration> {
    Duration::try_from(*of?).ok()
}

fn word(outcome: pb::Outcome) -> &'static str {
    outcome.as_str_name().trim_start_matches("OUTCOME_")
}
