//! The limit of open files. Raises it as far as the system allows: every connection is a file, and
//! container runtimes often start programs with a limit of 1024. If the limit is still too low, clients
//! get fewer connections, so that NATS, key files and probes have enough files. Opens no file.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::limits::turned_away;

/// Files for connections of operators and probes.
const PROBES: usize = 256;
/// Files for the process itself: connections to NATS (64 of them for single consumers), listeners, key
/// files, the log.
const OURSELVES: usize = 100;

/// The numbers of connections for which there are files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionRoom {
    /// Connections of clients, without those that are turned away.
    pub connections: usize,
    /// Connections of operators and probes.
    pub probes: usize,
    /// Set if there are fewer files than all connections need.
    pub short: Option<FdLimitTooLow>,
}

/// The limit of open files is lower than the most that could be needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdLimitTooLow {
    /// The number of files that may be open.
    pub allowed: usize,
    /// The number of files if all connections are in use.
    pub needed: usize,
}

/// Raises the limit as far as the system allows. Returns the connections for which there is room, at most
/// `connections` of clients.
pub fn raise(connections: usize) -> ConnectionRoom {
    let limit = getrlimit(Resource::Nofile);
    // If this is refused, the limit stays as it was.
    let raised = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok();
    let allowed = if raised { limit.maximum } else { limit.current };
    // `None` means that there is no limit.
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
    // The process itself comes first, and gets at least half of a low limit.
    let left = allowed - OURSELVES.min(allowed / 2);
    let probes = PROBES.min(left / 4).max(1);
    let left = left - probes.min(left);
    // `turned_away` needs an eighth more, and eight.
    let room = left.saturating_sub(turned_away(0)) * 8 / 9;
    let short = Some(FdLimitTooLow { allowed, needed });
    ConnectionRoom { connections: connections.min(room).max(1), probes, short }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_files_allow_all_connections() {
        let room = room(11_614, 10_000);
        assert_eq!(room, ConnectionRoom { connections: 10_000, probes: 256, short: None });
    }

    #[test]
    fn few_files_leave_enough_for_the_process_itself() {
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
