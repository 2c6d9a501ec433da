//! The open flows of a consumer: which queue belongs to which flow of the pump. Decides nothing.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use super::handle::Ticket;
use crate::{
    lessor::{
        Error,
        flow_queue::{FlowEnd, FlowQueue},
    },
    pump::FlowId,
};

/// See the [module](self).
#[derive(Default)]
pub(super) struct OpenFlows {
    open: BTreeMap<FlowId, OpenFlow>,
    tickets: HashMap<Ticket, FlowId>,
}

struct OpenFlow {
    ticket: Ticket,
    queue: Arc<FlowQueue>,
    came_at: Instant,
}

impl OpenFlows {
    pub(super) fn add(&mut self, id: FlowId, ticket: Ticket, queue: Arc<FlowQueue>, now: Instant) {
        self.tickets.insert(ticket, id);
        self.open.insert(id, OpenFlow { ticket, queue, came_at: now });
    }

    /// The flow of this ticket. `None`: it is over.
    pub(super) fn id(&self, ticket: Ticket) -> Option<FlowId> {
        self.tickets.get(&ticket).copied()
    }

    pub(super) fn queue(&self, id: FlowId) -> Option<&Arc<FlowQueue>> {
        self.open.get(&id).map(|flow| &flow.queue)
    }

    /// Removes a flow, and tells its call why.
    pub(super) fn end(&mut self, id: FlowId, end: FlowEnd) {
        if let Some(flow) = self.open.remove(&id) {
            self.tickets.remove(&flow.ticket);
            flow.queue.end(end);
        }
    }

    /// Removes flows that had come at such a time, and tells their calls of this error.
    pub(super) fn fail(&mut self, error: &Error, came: impl Fn(Instant) -> bool) -> Vec<FlowId> {
        let failed = self.open.iter().filter(|(_, flow)| came(flow.came_at));
        let failed: Vec<FlowId> = failed.map(|(id, _)| *id).collect();
        for id in &failed {
            self.end(*id, FlowEnd::Failed(error.clone()));
        }
        failed
    }

    /// Whether a flow has come since then.
    pub(super) fn any_since(&self, since: Instant) -> bool {
        self.open.values().any(|flow| flow.came_at >= since)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}
