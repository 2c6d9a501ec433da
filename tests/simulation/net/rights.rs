//! The rights of the proxy's NATS user. Pure.

use std::collections::BTreeSet;

use fetch_proxy::broker::ConsumerName;

use super::carried::Up;

/// A right to publish on subjects of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Right {
    /// `$JS.ACK.>`
    Ack,
    /// `$JS.API.CONSUMER.MSG.NEXT.>`
    Pull,
    /// `$JS.API.CONSUMER.INFO.>`
    Info,
}

/// The rights that the user lacks.
#[derive(Default)]
pub(super) struct Rights(BTreeSet<Right>);

impl Rights {
    pub(super) fn refuse(&mut self, right: Right) {
        self.0.insert(right);
    }

    pub(super) fn grant(&mut self, right: Right) {
        self.0.remove(&right);
    }

    /// The subject of a frame, if the user has no right to it.
    pub(super) fn refused(&self, what: &Up) -> Option<String> {
        let api = |call: &str, name: &ConsumerName| {
            format!("$JS.API.CONSUMER.{call}.{}.{}", name.stream, name.consumer)
        };
        Some(match what {
            Up::Ack(ack) if self.0.contains(&Right::Ack) => ack.subject.0.as_ref().to_owned(),
            Up::Pull { name, .. } if self.0.contains(&Right::Pull) => api("MSG.NEXT", name),
            Up::Info { name, .. } | Up::Look { name, .. } if self.0.contains(&Right::Info) => {
                api("INFO", name)
            }
            _ => return None,
        })
    }
}
