//! Calls of the JetStream API over the settling connection, and the meaning of their answers.

use std::{sync::Arc, time::Instant};

use async_nats::ServerInfo;
use bytes::Bytes;
use serde::Deserialize;

use super::{
    plan::{Request, RequestAnswer},
    request_mux::RequestMux,
    settings::Settings,
};
use crate::broker::{BrokerError, Denial, InfoError};

/// The JetStream API behind one settling connection.
pub(super) struct JetStreamApi<'s> {
    pub(super) requests: Arc<RequestMux>,
    pub(super) settings: &'s Settings,
}

/// An error that JetStream writes into an answer.
#[derive(Deserialize)]
pub(super) struct ErrorBody {
    /// The code in JetStream's `errors.json`.
    #[serde(default)]
    pub(super) err_code: u32,
    #[serde(default)]
    pub(super) description: String,
}

impl JetStreamApi<'_> {
    /// Calls the API on a whole subject, and waits for the answer until `until`.
    pub(super) async fn call(
        &self,
        subject: &str,
        until: Instant,
    ) -> Result<RequestAnswer, BrokerError> {
        self.requests.ask_one(Request::new(subject, Bytes::new()), until).await
    }

    /// The server of the connection, as it describes itself now.
    pub(super) fn server(&self) -> ServerInfo {
        self.requests.connection.server()
    }

    /// The body of an answer. `call` names the call in the error.
    pub(super) fn body(
        &self,
        answer: Result<RequestAnswer, BrokerError>,
        call: &str,
    ) -> Result<Bytes, InfoError> {
        match answer {
            Ok(RequestAnswer::Replied(body)) => Ok(body),
            Ok(RequestAnswer::NoResponder) => Err(InfoError::Unavailable(self.no_responder())),
            Err(BrokerError::Denied(Denial::Permission(subject))) => {
                Err(InfoError::Permission(subject))
            }
            Err(error) => Err(InfoError::Unavailable(format!("{call} was {error}"))),
        }
    }

    /// The reason why nobody listens on the subjects of the API, for people.
    pub(super) fn no_responder(&self) -> String {
        let Some(domain) = &self.settings.domain else {
            return "JetStream is not enabled: nobody answers at `$JS.API`".to_owned();
        };
        let own = match self.server().domain {
            Some(own) if own != *domain => {
                format!("; the domain of the connected server is `{own}`")
            }
            Some(_) | None => String::new(),
        };
        format!("nobody answers for JetStream domain `{domain}`, the value of --js-domain{own}")
    }
}
