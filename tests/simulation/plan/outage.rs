//! Accidents of NATS servers, of the routes between them, and of the rights that they give.

use testkit::dice::Dice;

use super::Victim;
use crate::net::{Right, Stop};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outage {
    /// One of three servers stops, is away for this time, and forgets the newest changes of that time.
    RestartOne { server: usize, how: Stop, away: u64, forgets: u64 },
    /// Two servers do not hear each other.
    PartServers { one: usize, other: usize, millis: u64 },
    /// A server does not hear the two others.
    PartFromOthers { server: usize, millis: u64 },
    /// A replica and one server do not hear each other.
    PartReplica { replica: usize, server: usize, millis: u64 },
    /// A route breaks with everything on it, and is made again after this time.
    CutRoute { one: usize, other: usize, millis: u64 },
    /// Frames of one server wait on their way to another.
    StallRoute { from: usize, to: usize, millis: u64 },
    /// The servers refuse subjects of this kind.
    Refuse { right: Right, millis: u64 },
}

impl Outage {
    pub(super) fn victim(&mut self) -> Victim<'_> {
        match self {
            Self::PartReplica { replica, .. } => Victim::Replica(replica),
            _ => Victim::World,
        }
    }

    pub(super) fn amounts(&mut self) -> Vec<&mut u64> {
        match self {
            Self::RestartOne { away, forgets, .. } => vec![away, forgets],
            Self::PartServers { millis, .. }
            | Self::PartFromOthers { millis, .. }
            | Self::PartReplica { millis, .. }
            | Self::CutRoute { millis, .. }
            | Self::StallRoute { millis, .. }
            | Self::Refuse { millis, .. } => vec![millis],
        }
    }

    /// Any outage of a cluster with this number of servers.
    pub(super) fn draw(servers: usize, replicas: usize, dice: &mut Dice) -> Self {
        let mut below = |count: usize| dice.within(0..count as u64) as usize;
        let (replica, one) = (below(replicas), below(servers));
        let other = (one + 1 + below(2)) % servers;
        let how = [Stop::Killed, Stop::Dark, Stop::Graceful][below(3)];
        let right = [Right::Ack, Right::Ack, Right::Pull, Right::Info][below(4)];
        let mut length = |most: u64| {
            let most = if dice.percent(40) { most.min(1_500) } else { most };
            dice.within(20..most)
        };
        match (servers, length(120)) {
            (1, 0..70) => Self::PartReplica { replica, server: 0, millis: length(15_000) },
            (1, _) => Self::Refuse { right, millis: length(8_000) },
            (_, 0..45) => {
                Self::RestartOne { server: one, how, away: length(15_000), forgets: length(250) }
            }
            (_, 45..60) => Self::PartServers { one, other, millis: length(25_000) },
            (_, 60..75) => Self::PartFromOthers { server: one, millis: length(30_000) },
            (_, 75..90) => Self::PartReplica { replica, server: one, millis: length(15_000) },
            (_, 90..100) => Self::CutRoute { one, other, millis: length(3_000) },
            (_, 100..110) => Self::StallRoute { from: one, to: other, millis: length(10_000) },
            (_, _) => Self::Refuse { right, millis: length(8_000) },
        }
    }
}
