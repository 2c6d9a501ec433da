//! Ends a connection on which nobody is accepted: a caller that guesses, or a client without a good credential
//! that repeats its call, begins again with a new connection.

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use crate::{api_error::ApiError, net::ClientConnection};

/// Refused credentials in a row, until the connection is asked to end.
const REFUSED_IN_A_ROW: u32 = 20;

/// The refused credentials of one connection in a row; see the [module](self).
#[derive(Debug)]
pub(super) struct StrangerLimit {
    connection: Arc<ClientConnection>,
    refused: AtomicU32,
}

impl StrangerLimit {
    pub(super) fn new(connection: &Arc<ClientConnection>) -> Self {
        Self { connection: connection.clone(), refused: AtomicU32::new(0) }
    }

    /// A call has shown its credential, or none. Only a refusal of the credential counts.
    pub(super) fn asked<T>(&self, caller: &Result<T, ApiError>) {
        if !matches!(caller, Err(ApiError::Unauthenticated(_))) {
            self.refused.store(0, Ordering::Relaxed);
        } else if self.refused.fetch_add(1, Ordering::Relaxed) + 1 >= REFUSED_IN_A_ROW {
            self.connection.end();
        }
    }
}
