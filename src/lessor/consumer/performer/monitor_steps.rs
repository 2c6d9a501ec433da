//! Performs the steps of the monitor. Decides nothing.

use super::{MonitorStep, Performer};
use crate::{
    broker::{Broker, ConsumerInfo},
    lessor::sighting::Sighting,
};

impl<B: Broker> Performer<B> {
    /// Does what the monitor says because of an event. `info`: what was just read. Returns whether the task
    /// is to end.
    pub(super) fn obey(&mut self, info: Option<&ConsumerInfo>) -> bool {
        let mut stop = false;
        while let Some(step) = self.monitor.next_step() {
            stop |= step == MonitorStep::Stop;
            self.do_step(step, info);
        }
        stop
    }

    pub(super) fn do_step(&mut self, step: MonitorStep, info: Option<&ConsumerInfo>) {
        match step {
            MonitorStep::Ask => self.info.ask(),
            MonitorStep::Cancel => self.info.cancel(),
            MonitorStep::Adopt => {
                let spec = info.map(|info| self.leases.adopt(info));
                if let Some(spec) = spec {
                    self.callers.pump.set_limits(spec.limits());
                    self.callers.known(&spec.meter);
                }
            }
            MonitorStep::MadeAgain => {
                tracing::info!(
                    consumer = %self.name,
                    "the consumer was made again: leases of the old consumer end"
                );
                self.leases.end();
                self.poison.forget();
            }
            MonitorStep::EndLeases => self.leases.end(),
            MonitorStep::Void => self.leases.void(),
            MonitorStep::Distrust { since, signs } => self.leases.distrust(since, signs),
            MonitorStep::LoseAfter(last) => self.leases.lose_after(last),
            MonitorStep::Lead(leader) => self.leases.pass_to(leader, self.info.asked_at()),
            MonitorStep::Doubt => self.leases.doubt(),
            MonitorStep::Trust => self.leases.trust(),
            MonitorStep::Announce { created, delivered, began, again, counting } => {
                let name = self.name.clone();
                let sighting = Sighting { name, created, delivered, began, again, counting };
                let told = self.core.tell_others(sighting);
                told.into_iter().for_each(|told| self.announcer.announce(told));
                if (began || again) && self.announcer.is_announcing() {
                    self.leases.announce(true);
                }
            }
            MonitorStep::ReadHere { missing_from } => self.poison.examine(missing_from),
            MonitorStep::AnswerReplicas => self.callers.answer_replicas(),
            // The answer that led to this step ends the task.
            MonitorStep::Stop => {}
        }
    }
}
