//! How many files the process may have open. Raises its own limit to what the system allows, because
//! container runtimes like to start programs with 1024, and every connection is a file. Opens none.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Beside the connections of clients, and those that are turned away: operators, NATS, files.
const OTHERS: u64 = 356;

/// Fewer files may be open than could be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TooFew {
    /// So many may be open.
    pub allowed: u64,
    /// So many are open with all connections taken.
    pub needed: u64,
}

/// Raises the limit as far as it goes.
///
/// # Errors
/// See [`TooFew`], for so many connections of clients.
pub fn allow(connections: usize) -> Result<(), TooFew> {
    let limit = getrlimit(Resource::Nofile);
    // What is refused leaves the limit as it was.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok();
    let allowed = if raised { limit.maximum } else { limit.current };
    let connections = u64::try_from(connections).unwrap_or(u64::MAX);
    let needed = connections.saturating_add(connections / 8).saturating_add(OTHERS);
    // None is no limit.
    let allowed = allowed.unwrap_or(u64::MAX);
    if allowed < needed { Err(TooFew { allowed, needed }) } else { Ok(()) }
}
