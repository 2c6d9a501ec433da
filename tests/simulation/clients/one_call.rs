//! Settles on the next Fetch: what is to be said of a message waits until its client fetches again. A settlement that
//! is not done then is said by a call of its own.

use std::sync::Arc;

use super::{
    Client, Errand, answers,
    fetching::{Fetched, First, Work, ask_for, fetch},
    settling::said,
};
use crate::{replica::Replica, signs::Sign};

impl Client {
    /// Keeps these for the next Fetch. They come back if they must be said at once.
    pub(super) fn defer(&mut self, errands: Vec<Errand>) -> Option<Vec<Errand>> {
        if !self.plan.one_call || self.world.calm() {
            return Some(errands);
        }
        self.next.extend(errands);
        None
    }

    /// Settles what was kept, and takes messages.
    pub(super) async fn fetch(&mut self, replica: &Arc<Replica>) -> Vec<Work> {
        let mut errands = std::mem::take(&mut self.next);
        let of = |errand: &Errand| said(errand.work.id, &errand.work.token, &errand.action);
        let all: Vec<_> = errands.iter().map(of).collect();
        if !all.is_empty() {
            self.world.count("settlements on a Fetch");
            self.world.sign(Sign::Settling, Some(replica.place));
        }
        let first = First { all: &all, sent: self.plan.sent && !self.world.calm() };
        let Fetched { work, heard, .. } = if self.plan.names && !self.world.calm() {
            self.fetch_named(replica, first).await
        } else {
            let loses = self.loses();
            let (who, dice) = ((&*self.world, &self.plan), &mut self.dice);
            let request = ask_for(who, dice);
            fetch(who, replica, request, first, loses, dice).await
        };
        for (errand, heard) in errands.iter_mut().zip(&heard) {
            errand.done = answers::is_final(heard);
        }
        if !errands.is_empty() {
            self.finish_now(errands, None, None).await;
        }
        work
    }
}
