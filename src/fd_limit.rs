//! How many files the process may have open, and for what. Raises its own limit to what the system
//! allows, because container runtimes like to start programs with 1024, and every connection is a file.
//! Where that is not enough, clients get fewer, so that NATS, key files and probes are left some. Opens
//! none.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::limits::turned_away;

/// Connections of operators and probes.
const PROBES: usize = 256;
/// For the process itself: the connections to NATS, 64 of them for consumers of their own, listeners,
/// key files, the log.
const OURSELVES: usize = 100;

/// The connections for which there are files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionRoom {
    /// Connections of clients, beside those that are turned away.
    pub connections: usize,
    /// Connections of operators and probes.
    pub probes: usize,
    /// There are fewer files than are needed for all.
    pub short: Option<FdLimitTooLow>,
}

/// Fewer files may be open than could be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdLimitTooLow {
    /// So many may be open.
    pub allowed: usize,
    /// So many are open with all connections taken.
    pub needed: usize,
}

/// Raises the limit as far as it goes, and says what there is room for, at most so many connections of
/// clients.
pub fn raise(connections: usize) -> ConnectionRoom {
    let limit = getrlimit(Resource::Nofile);
    // What is refused leaves the limit as it was.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok();
    let allowed = if raised { limit.maximum } else { limit.current };
    // None is no limit.
    room(
        allowed.map_or(usize::MAX, |allowed| allowed.try_into().unwrap_or(usize::MAX)),
        connections,
    )
}

fn room(allowed: usize, connections: usize) -> ConnectionRoom {
    let needed = connections.saturating_add(turned_away(connections)) + PROBES + OURSELVES;
    if needed <= allowed {
        return ConnectionRoom { connections, probes: PROBES, short: None };
    }
    // What we need comes first: at least half of what is little.
    let left = allowed - OURSELVES.min(allowed / 2);
    let probes = PROBES.min(left / 4).max(1);
    let left = left - probes.min(left);
    // As `turned_away` has it: an eighth more, and eight.
    let room = left.saturating_sub(turned_away(0)) * 8 / 9;
    let short = Some(FdLimitTooLow { allowed, needed });
    ConnectionRoom { connections: connections.min(room).max(1), probes, short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_enough_files_all_connections_are_taken() {
        let room = room(11_614, 10_000);
        assert_eq!(room, ConnectionRoom { connections: 10_000, probes: 256, short: None });
    }

    #[test]
    fn with_few_files_enough_is_left_for_ourselves() {
        for allowed in [40, 64, 100, 256, 1024, 4096, 11_613] {
            let room = room(allowed, 10_000);
            let clients = room.connections + turned_away(room.connections);
            let left = allowed - clients - room.probes;
            assert!(left >= OURSELVES.min(allowed / 2), "{allowed}: {left} of {room:?}");
            assert!(room.short.is_some() && room.connections < 10_000, "{allowed}: {room:?}");
        }
        assert_eq!((room(64, 10_000).connections, room(64, 10_000).probes), (14, 8));
    }
}
