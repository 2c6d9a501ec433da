//! One Consume, on a connection of its own. The caller writes frames to a channel, and reads always.

use std::time::Duration;

use futures_util::stream::poll_fn;
use tokio::sync::mpsc::UnboundedReceiver;
use tonic::{Code, Request, Status, Streaming};
use tonic_types::StatusExt as _;

use super::{
    Client, bearer,
    connect::{chain, endpoint},
};
use crate::pb::{ConsumeRequest, ConsumeResponse, fetch_service_client::FetchServiceClient};

/// Longest wait for a connection, and then for the headers of the stream. A worker that is not served then asks
/// again, perhaps at another replica.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

/// The frames of one Consume. Dropping this ends the stream.
#[derive(Debug)]
pub struct ConsumeReader {
    client: Client,
    frames: Streaming<ConsumeResponse>,
}

/// Why there is no stream, or no more of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The reason of the proxy. Without such a reason, the code of the status.
    pub reason: String,
    /// A description for people.
    pub message: String,
    /// How long to wait before the next stream, at least. `None`: another stream does not help.
    pub retry_delay: Option<Duration>,
}

impl Client {
    /// Opens a Consume, which sends the frames of `requests`. The files of the client are read for each stream.
    ///
    /// # Errors
    /// See [`Refused`]. A file that cannot be used has the reason `CLIENT_FILE`.
    pub async fn consume(
        &self,
        mut requests: UnboundedReceiver<ConsumeRequest>,
    ) -> Result<ConsumeReader, Refused> {
        let mut request = Request::new(poll_fn(move |context| requests.poll_recv(context)));
        let added = bearer::add(&mut request, &self.addr, self.token_file.as_deref());
        let place = added.and_then(|()| endpoint(&self.addr, &self.tls, OPEN_TIMEOUT));
        let place = place.map_err(|message| Refused {
            reason: "CLIENT_FILE".to_owned(),
            message,
            retry_delay: None,
        })?;
        let opened = tokio::time::timeout(2 * OPEN_TIMEOUT, async {
            let channel = place.connect().await.map_err(|error| Refused {
                reason: "UNAVAILABLE".to_owned(),
                message: format!("cannot connect to {}: {}", self.addr, chain(&error)),
                retry_delay: Some(Duration::ZERO),
            })?;
            let mut client = FetchServiceClient::new(channel).max_decoding_message_size(usize::MAX);
            client.consume(request).await.map_err(|status| self.refused(&status))
        });
        let frames = opened.await.unwrap_or_else(|_| {
            Err(Refused {
                reason: "UNAVAILABLE".to_owned(),
                message: format!("{} does not answer", self.addr),
                retry_delay: Some(Duration::ZERO),
            })
        });
        Ok(ConsumeReader { client: self.clone(), frames: frames?.into_inner() })
    }

    fn refused(&self, status: &Status) -> Refused {
        use Code::{
            FailedPrecondition, InvalidArgument, NotFound, PermissionDenied, Unauthenticated,
            Unimplemented,
        };
        let info = status.get_details_error_info().filter(|info| info.domain == "fetchproxy");
        let retry = status.get_details_retry_info().and_then(|info| info.retry_delay);
        let is_final = matches!(
            status.code(),
            InvalidArgument
                | NotFound
                | FailedPrecondition
                | PermissionDenied
                | Unauthenticated
                | Unimplemented
        );
        Refused {
            message: match info {
                Some(_) => status.message().to_owned(),
                None => self.explained(status),
            },
            reason: info.map_or_else(|| format!("{:?}", status.code()), |info| info.reason),
            retry_delay: (!is_final).then(|| retry.unwrap_or_default()),
        }
    }
}

impl ConsumeReader {
    /// The next frame. `None`: the stream has ended in order.
    ///
    /// # Errors
    /// See [`Refused`].
    pub async fn next(&mut self) -> Result<Option<ConsumeResponse>, Refused> {
        self.frames.message().await.map_err(|status| self.client.refused(&status))
    }
}
