//! The client behind `fetch-proxy fetch`, `give-back`, `ack`, `nak`, `term`, `extend`, `probe` and the commands for operators, for
//! images without a shell. It uses the contract alone, like any other client.
//!
//! `connect` makes a channel, `bearer` adds the credential. `text` and `json` render answers, with what they share in `format`.
//! `consume` is one stream. `operator` calls for operators, and renders rows by `table`.

mod bearer;
mod connect;
mod consume;
mod format;
mod json;
mod operator;
mod probe;
mod table;
mod text;

use std::{error::Error as _, path::PathBuf, time::Duration};

use prost_types::Duration as PbDuration;
use tonic::{Request, Status, transport::Channel};
use tonic_types::StatusExt as _;

pub(crate) use self::text::plain;
pub use self::{
    connect::ClientTls,
    consume::{ConsumeReader, Refused},
    operator::{OperatorClient, OperatorError, Rows},
    probe::{probe, probe_by},
};
use self::{
    connect::{chain, connect, connect_here},
    json::json,
};
use crate::pb::{
    self, admin_service_client::AdminServiceClient, fetch_service_client::FetchServiceClient,
    settlement::Action,
};

/// Longest time to an answer, in addition to the wait that the request asks for.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// A client of the fetch-proxy at `addr`. It renders answers as text or as JSON.
#[derive(Debug, Clone)]
pub struct Client {
    /// Host and port, or a URL.
    pub addr: String,
    /// The files for TLS.
    pub tls: ClientTls,
    /// The file with the credential.
    pub token_file: Option<PathBuf>,
    /// Whether to print JSON.
    pub json: bool,
}

/// The text to print, and whether everything succeeded.
type Shown = Result<(String, bool), String>;

impl Client {
    /// Settles the tokens of each action, then takes messages.
    ///
    /// # Errors
    /// The reason why there is no answer, as text. A refusal of one token is no error of the call.
    pub async fn fetch(
        &self,
        request: pb::FetchRequest,
        max_wait: Duration,
        first: impl IntoIterator<Item = (Vec<String>, Action)>,
    ) -> Shown {
        let (mut tokens, mut settlements) = (Vec::new(), Vec::new());
        for (named, action) in first {
            for token in &named {
                let token = pasted(token)?;
                tokens.push(token.clone());
                settlements.push(pb::Settlement { token, action: Some(action.clone()), number: 0 });
            }
        }
        let max_wait_of = pb_duration(max_wait)?;
        let mut request =
            Request::new(pb::FetchRequest { max_wait: max_wait_of, settlements, ..request });
        request.set_timeout(max_wait + ANSWER_TIMEOUT);
        bearer::add(&mut request, &self.addr, self.token_file.as_deref())?;
        let answer = self.client().await?.fetch(request).await;
        let answer = answer.map_err(|status| self.explained(&status))?.into_inner();
        let shown = match self.json {
            true => json("FetchResponse", &answer)?,
            false => text::settled_and_fetched(&tokens, &answer),
        };
        Ok((shown, answer.failed == 0 && answer.error.is_none()))
    }

    /// Settles every token by the same action.
    ///
    /// # Errors
    /// The reason why there is no answer, as text. A refusal of one token is no error of the call.
    pub async fn settle(&self, tokens: Vec<String>, action: Action) -> Shown {
        let tokens = tokens.iter().map(|token| pasted(token)).collect::<Result<Vec<_>, _>>()?;
        let settlement = |token: &String| pb::Settlement {
            token: token.clone(),
            action: Some(action.clone()),
            number: 0,
        };
        let settlements = tokens.iter().map(settlement).collect();
        let mut request = Request::new(pb::SettleRequest { settlements, ..Default::default() });
        request.set_timeout(ANSWER_TIMEOUT);
        bearer::add(&mut request, &self.addr, self.token_file.as_deref())?;
        let answer = self.client().await?.settle(request).await;
        let answer = answer.map_err(|status| self.explained(&status))?.into_inner();
        let shown = match self.json {
            true => json("SettleResponse", &answer)?,
            false => text::settled(&tokens, &answer.results),
        };
        Ok((shown, answer.failed == 0))
    }

    /// Gives back the messages of a fetch.
    ///
    /// # Errors
    /// The reason why there is no answer, as text.
    pub async fn give_back(&self, request: pb::GiveBackRequest) -> Shown {
        let mut request = Request::new(request);
        request.set_timeout(ANSWER_TIMEOUT);
        bearer::add(&mut request, &self.addr, self.token_file.as_deref())?;
        let answer = self.client().await?.give_back(request).await;
        let answer = answer.map_err(|status| self.explained(&status))?.into_inner();
        let shown = match self.json {
            true => json("GiveBackResponse", &answer)?,
            false => format!("messages given back: {}", answer.messages),
        };
        Ok((shown, true))
    }

    /// Shows a consumer. Not everything succeeded if it cannot be used.
    ///
    /// # Errors
    /// The reason why there is no answer, as text.
    pub async fn consumer(&self, request: pb::GetConsumerRequest) -> Shown {
        let mut request = Request::new(request);
        request.set_timeout(ANSWER_TIMEOUT);
        bearer::add(&mut request, &self.addr, self.token_file.as_deref())?;
        let answer = self.client().await?.get_consumer(request).await;
        let answer = answer.map_err(|status| self.explained(&status))?.into_inner();
        let shown = match self.json {
            true => json("GetConsumerResponse", &answer)?,
            false => text::consumer(&answer),
        };
        Ok((shown, answer.unsuitable.is_empty()))
    }

    /// Asks who the caller is, at the admin socket of this name or at the address.
    ///
    /// # Errors
    /// The reason why there is no answer, as text.
    pub async fn who_am_i(&self, socket: Option<&str>) -> Shown {
        let mut request = Request::new(pb::WhoAmIRequest {});
        request.set_timeout(ANSWER_TIMEOUT);
        let channel = match socket {
            Some(name) => connect_here(name, ANSWER_TIMEOUT).await?,
            None => {
                bearer::add(&mut request, &self.addr, self.token_file.as_deref())?;
                connect(&self.addr, &self.tls, ANSWER_TIMEOUT).await?
            }
        };
        let answer = AdminServiceClient::new(channel).who_am_i(request).await;
        let answer = answer.map_err(|status| self.explained(&status))?.into_inner();
        let shown = match self.json {
            true => json("WhoAmIResponse", &answer)?,
            false => text::caller(&answer),
        };
        Ok((shown, true))
    }

    /// A refusal as text. Without an answer of the server, the causes say why the connection is gone.
    fn explained(&self, status: &Status) -> String {
        let message = plain(status.message());
        if let Some(info) = status.get_details_error_info() {
            return format!("{}: {message}", plain(&info.reason));
        }
        let mut text = format!("{:?}: {message}", status.code());
        if let Some(cause) = status.source() {
            let cause = plain(&chain(cause));
            let cause = cause.strip_prefix(&format!("{message}: ")).unwrap_or(&cause);
            text = format!("{} has not answered: {text}: {cause}", self.addr);
            if self.addr.starts_with("https://") && self.tls.cert.is_none() {
                text.push_str(" (if the server asks for a certificate, give --cert and --key)");
            }
        }
        text
    }

    async fn client(&self) -> Result<FetchServiceClient<Channel>, String> {
        let channel = connect(&self.addr, &self.tls, ANSWER_TIMEOUT).await?;
        Ok(FetchServiceClient::new(channel).max_decoding_message_size(usize::MAX))
    }
}

/// Removes white space, quotes and commas around a token, which a copy may have included. No token
/// contains them.
fn pasted(token: &str) -> Result<String, String> {
    let around = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | ',');
    match token.trim_matches(around) {
        "" => Err("a token is empty".to_owned()),
        token => Ok(token.to_owned()),
    }
}

/// Converts a duration to the contract's type.
///
/// # Errors
/// The duration is too long for that type.
pub fn pb_duration(duration: Duration) -> Result<Option<PbDuration>, String> {
    PbDuration::try_from(duration).map(Some).map_err(|error| error.to_string())
}
