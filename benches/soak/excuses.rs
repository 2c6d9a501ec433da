//! Facts that all judges need: the faults at a time, and the settlement of a message. Judges
//! nothing by itself.

use testkit::delivery_log::{At, Fault, FaultKind, Holding, Kind, Outcome, Try};

/// After a fault the wire is not at once what it was.
pub const GRACE: At = 3_000_000;

/// A finding and its message.
pub type Wrong = Vec<(u64, String)>;

/// The settlement of a delivery, as far as its worker knows.
pub fn settlement(holding: &Holding) -> Option<&Try> {
    let told = |tried: &&Try| {
        tried.kind != Kind::Extend
            && (tried.outcome.accepted() || tried.outcome == Outcome::Duplicate)
    };
    holding.tries.iter().find(told)
}

#[derive(Debug, Clone, Copy)]
pub struct Faults<'l>(pub &'l [Fault]);

impl Faults<'_> {
    pub fn crashed(&self, from: At, to: At) -> bool {
        self.any(from, to, 0, |kind| kind == FaultKind::Crash)
    }

    /// NATS was out of order at some time in between, or had just been.
    pub fn nats(&self, from: At, to: At) -> bool {
        self.any(from, to, GRACE, |kind| kind != FaultKind::Workers)
    }

    pub fn workers(&self, from: At, to: At) -> bool {
        self.any(from, to, GRACE, |kind| kind == FaultKind::Workers)
    }

    fn any(&self, from: At, to: At, grace: At, of: impl Fn(FaultKind) -> bool) -> bool {
        let ends = |fault: &Fault| fault.to.unwrap_or(At::MAX - grace) + grace;
        self.0.iter().any(|fault| of(fault.kind) && fault.from <= to && ends(fault) >= from)
    }

    /// In the order in which JetStream delivered them: an answer may be late on its way to a
    /// worker. A crash sets the consumer's sequence back.
    pub fn sorted(&self, held: &[Holding]) -> Vec<Holding> {
        let age = |holding: &Holding| {
            let crashes = self.0.iter().filter(|fault| fault.kind == FaultKind::Crash);
            crashes.filter(|crash| crash.mended < holding.handed).count()
        };
        let mut sorted = held.to_vec();
        sorted.sort_by_key(|holding| (age(holding), holding.consumer_sequence));
        sorted
    }
}
