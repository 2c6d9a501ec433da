//! A Fetch that is repeated, and one that is given back. Both find the leases by the attempt that the caller has
//! named. A lease has no payload, so the messages are read again from their stream.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use super::{
    AttemptBegun, AttemptCall, AttemptFound, AttemptKey, Error, FetchCaller, FetchParams, Fetched,
    LeasedDelivery, LentAttempt, Lessor, Rejected, RejectedCause,
    codec::leave_payload_out,
    consumer::ConsumerCommand,
    core::release,
    delivery::GrantedDelivery,
    metered,
    spec::{ConsumerSpec, encoded_size},
    table::HeldDelivery,
};
use crate::{
    broker::{AckSubject, Broker, ConsumerName, Delivery, InfoError, Leader},
    clock,
    lease::{LeaseId, LeaseStage, LeaseTable, Revoked},
    metrics::{FetchResult, LeaseEnd, ReleaseCause},
};

/// A lease of an attempt, lent anew. Its message is not read yet.
#[derive(Debug, Clone)]
pub struct LentLease {
    /// The lease, at its owner.
    pub id: LeaseId,
    /// The ack subject of the delivery.
    pub ack: AckSubject,
    /// The consumer delivers headers alone.
    pub headers_only: bool,
    /// The end of the lease.
    pub deadline: Instant,
    /// As in [`LeasedDelivery`].
    pub settle_by: Instant,
    /// The consumer's leader.
    pub leader: Leader,
    /// The creation time of the consumer.
    pub created: Arc<str>,
    /// The consumer, if the lease is in the table of this replica.
    spec: Option<Arc<ConsumerSpec>>,
}

impl LentLease {
    /// A lease in the table of another replica.
    pub fn elsewhere(
        (id, ack, headers_only): (LeaseId, AckSubject, bool),
        (deadline, settle_by): (Instant, Instant),
        (leader, created): (Leader, Arc<str>),
    ) -> Self {
        Self { id, ack, headers_only, deadline, settle_by, leader, created, spec: None }
    }
}

/// A lease that is to be given back.
struct Returning {
    id: LeaseId,
    ack: AckSubject,
    headers_only: bool,
    last_attempt: bool,
}

impl<B: Broker> Lessor<B> {
    /// A call of this attempt begins; `again`: it is a repeat.
    pub fn begin_attempt(&self, key: AttemptKey, again: bool) -> AttemptBegun {
        self.core.attempts.begin(key, again)
    }

    /// What is known here of an attempt whose call has come to another replica. `None`: nothing. A call that waits here
    /// ends.
    pub fn find_attempt(&self, key: AttemptKey) -> Option<AttemptFound> {
        self.core.attempts.find(key)
    }

    /// Waits for messages and leases them, as [`Lessor::fetch`] does, in the place of an attempt. If the attempt is
    /// over meanwhile, the messages go to the next call.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn fetch_for(
        &self,
        ask: FetchParams,
        mut call: AttemptCall,
    ) -> Result<Fetched, Error> {
        let form = (ask.codec, ask.max_bytes);
        let over = || Fetched::again(Vec::new(), Vec::new(), form);
        let mut fetched = tokio::select! {
            biased;
            () = call.over() => return Ok(over()),
            answer = self.fetch(ask) => answer?,
        };
        let leases: Box<[LeaseId]> = fetched.deliveries.leases().collect();
        if leases.is_empty() {
            return Ok(fetched);
        }
        let key = Arc::new(call.key);
        self.core.table.with(|table| {
            for lease in &leases {
                table.update_payload(*lease, |hold| hold.attempt = Some(key.clone()));
            }
        });
        let first = call.lend(leases, &fetched.deliveries.end);
        if first.is_none() {
            return Ok(over());
        }
        fetched.deliveries.attempt = first;
        Ok(fetched)
    }

    /// The answer to a call whose attempt is over.
    pub fn attempt_over(&self, ask: &FetchParams) -> Fetched {
        self.count_fetch(&ask.name, FetchResult::AttemptOver);
        Fetched::again(Vec::new(), Vec::new(), (ask.codec, ask.max_bytes))
    }

    /// Lends the leases of an attempt anew, for `length` from now. None of them ends earlier by this. Leases that have
    /// ended, or are being settled, are left out.
    ///
    /// # Errors
    /// [`Error::Draining`]: the leases are being handed over.
    pub fn lend_again(
        &self,
        attempt: &LentAttempt,
        length: Option<Duration>,
        caller: &Arc<FetchCaller>,
    ) -> Result<Vec<LentLease>, Error> {
        let now = clock::now();
        let lent = self.core.table.with(|table| {
            let lend = |id: &LeaseId| {
                let hold = held_by(table, *id, attempt.key)?;
                let (spec, ack, headers_only) =
                    (hold.spec.clone(), hold.ack.clone(), hold.headers_only);
                let length = spec.lease_length(length, hold.delivery_count);
                let assigned = table.assign_again(*id, length, now).ok()?;
                table.update_payload(*id, |hold| {
                    // Somebody may have an earlier answer, so this answer returns nothing.
                    hold.answer = None;
                    hold.taken.iter_mut().for_each(|taken| taken.by = Some(caller.clone()));
                });
                Some(LentLease {
                    id: *id,
                    ack,
                    headers_only,
                    deadline: assigned.deadline,
                    settle_by: assigned.settle_by,
                    leader: spec.leadership.leader(),
                    created: spec.created.clone(),
                    spec: Some(spec),
                })
            };
            (!self.is_moving()).then(|| attempt.leases.iter().filter_map(lend).collect::<Vec<_>>())
        });
        let lent = lent.ok_or(Error::Draining)?;
        if lent.is_empty() {
            self.core.attempts.arrived(attempt.key);
        }
        Ok(lent)
    }

    /// Reads the messages of leases that were lent anew, and answers with them. A message that has left its stream is
    /// left out. Without any message, the attempt is over.
    ///
    /// # Errors
    /// The messages cannot be read. They stay leased to the attempt.
    pub async fn read_lent(
        &self,
        lent: Vec<LentLease>,
        ask: &FetchParams,
    ) -> Result<Fetched, Error> {
        let until = clock::now() + self.core.limits.settle_timeout;
        let until = ask.patience.map_or(until, |patience| patience.answer_by);
        let acks: Vec<AckSubject> = lent.iter().map(|lent| lent.ack.clone()).collect();
        let found = self.core.broker.read_again(&acks, until).await;
        let found = found.map_err(|error| Error::of_info(error, &ask.name))?;
        let (mut messages, mut rejected, mut room) = (Vec::new(), Vec::new(), ask.max_bytes);
        for (lent, delivery) in lent.into_iter().zip(found) {
            let Some(mut delivery) = delivery else {
                let (consumer, ack) = (&ask.name, lent.id.get());
                tracing::info!(%consumer, lease = ack, "the message of a repeated Fetch is gone");
                continue;
            };
            if lent.headers_only {
                leave_payload_out(&mut delivery);
            }
            let spec = match lent.spec {
                Some(spec) => spec,
                None => self.know(&ask.name, Some(lent.created), until).await?,
            };
            let (size, misfit) = (encoded_size(&delivery), ask.codec.check(&delivery).err());
            let granted = GrantedDelivery {
                id: lent.id,
                delivery: Box::new(delivery),
                spec,
                arrived_at: clock::now(),
            };
            let leased = LeasedDelivery {
                number: 0,
                id: lent.id,
                deadline: lent.deadline,
                settle_by: lent.settle_by,
                leader: lent.leader,
                granted,
            };
            let cause = misfit.map(RejectedCause::Codec);
            let cause = if size > room { Some(RejectedCause::TooLarge) } else { cause };
            match cause {
                Some(cause) => rejected.push(Rejected { leased, cause, held: true }),
                None => {
                    room -= size;
                    messages.push(leased);
                }
            }
        }
        let again = Fetched::again(messages, rejected, (ask.codec, ask.max_bytes));
        let over = again.messages().is_empty() && again.rejected().is_empty();
        let result = if over { FetchResult::AttemptOver } else { FetchResult::Repeated };
        self.count_fetch(&ask.name, result);
        Ok(again)
    }

    /// Gives an attempt back: its call ends, and its leases go to the next caller at once. Nobody can settle by their
    /// tokens any more. It costs no message an attempt, unless the messages cannot be read. Returns how many messages
    /// were given back. `None`: nothing was known of the attempt here. It is over for later calls all the same.
    ///
    /// # Errors
    /// Messages cannot be read, and a Nak would be the end of some of them. Or the leases are being handed over. What
    /// is not given back stays leased.
    pub async fn give_back_attempt(
        &self,
        name: &ConsumerName,
        key: AttemptKey,
        until: Instant,
    ) -> Result<Option<usize>, Error> {
        let until = until.min(clock::now() + self.core.limits.settle_timeout);
        let Some(leases) = self.core.attempts.give_back(key) else { return Ok(None) };
        let returning = self.returning(&leases, key);
        if returning.is_empty() {
            return Ok(Some(0));
        }
        let acks: Vec<AckSubject> = returning.iter().map(|lease| lease.ack.clone()).collect();
        let (found, error) = match self.core.broker.read_again(&acks, until).await {
            Ok(found) => (found, None),
            Err(error @ InfoError::Permission(_)) => (vec![None; acks.len()], Some(error)),
            Err(error) => return Err(Error::of_info(error, name)),
        };
        let (mut back, mut naks, mut kept) = (Vec::new(), Vec::new(), false);
        for (lease, delivery) in returning.into_iter().zip(found) {
            match delivery {
                Some(delivery) => back.push((lease, delivery)),
                None if lease.last_attempt && error.is_some() => kept = true,
                // Nothing is lost by a Nak of a message that is gone.
                None => naks.push(lease.id),
            }
        }
        let count = self.put_back(name, back, key).ok_or(Error::Draining)?;
        let count = count + self.nak(&naks, key);
        match error.filter(|_| kept) {
            Some(error) => Err(Error::of_info(error, name)),
            None => Ok(Some(count)),
        }
    }

    /// The leases of an attempt that its caller still has.
    fn returning(&self, leases: &[LeaseId], key: AttemptKey) -> Vec<Returning> {
        let now = clock::now();
        self.core.table.with(|table| {
            let returning = |id: &LeaseId| {
                let hold = held_by(table, *id, key)?;
                table.view(*id, now).filter(|lease| lease.stage == LeaseStage::Held)?;
                Some(Returning {
                    id: *id,
                    ack: hold.ack.clone(),
                    headers_only: hold.headers_only,
                    last_attempt: hold.spec.last_attempt(hold.delivery_count),
                })
            };
            leases.iter().filter_map(returning).collect()
        })
    }

    /// Puts messages to the front of the line, under new leases. `None`: the leases are being handed over.
    fn put_back(
        &self,
        name: &ConsumerName,
        back: Vec<(Returning, Delivery)>,
        key: AttemptKey,
    ) -> Option<usize> {
        let now = clock::now();
        let mut holders = Vec::new();
        let granted: Option<Vec<GrantedDelivery>> = self.core.table.with(|table| {
            if self.is_moving() {
                return None;
            }
            let reissue = |(lease, mut delivery): (Returning, Delivery)| {
                let spec = held_by(table, lease.id, key)?.spec.clone();
                let id = table.reissue(lease.id, now)?;
                table.update_payload(id, |hold| {
                    (hold.taken, hold.attempt, hold.answer) = (None, None, None);
                    holders.extend(hold.principal.take());
                });
                if lease.headers_only {
                    leave_payload_out(&mut delivery);
                }
                Some(GrantedDelivery { id, delivery: Box::new(delivery), spec, arrived_at: now })
            };
            Some(back.into_iter().filter_map(reissue).collect())
        });
        let granted = granted?;
        let count = granted.len();
        if count > 0 {
            self.tell(name, ConsumerCommand::Return(granted));
        }
        Some(count)
    }

    /// Ends leases, and asks JetStream to deliver their messages again.
    fn nak(&self, leases: &[LeaseId], key: AttemptKey) -> usize {
        let (now, mut naks, mut ended) = (clock::now(), Vec::new(), Vec::new());
        self.core.table.with(|table| {
            for id in leases {
                if self.is_moving() || held_by(table, *id, key).is_none() {
                    continue;
                }
                if let Revoked::Done(hold, by) = table.revoke(*id, true, now) {
                    match by {
                        Some(by) => naks.push((hold, by)),
                        None => ended.push(hold),
                    }
                }
            }
        });
        let holds = naks.iter().map(|(hold, _)| hold).chain(&ended);
        metered::ended(&self.core.metrics, LeaseEnd::GivenBack, holds, now);
        let count = naks.len() + ended.len();
        release(&self.core, naks, ReleaseCause::GivenBack, Duration::ZERO);
        count
    }

    /// Whether leases are being handed over. To be asked under the lock of the table.
    fn is_moving(&self) -> bool {
        *self.core.frozen.borrow() || self.core.pinned.load(Ordering::Relaxed)
    }
}

/// The lease with this id, if it belongs to this attempt.
fn held_by(
    table: &LeaseTable<HeldDelivery>,
    id: LeaseId,
    key: AttemptKey,
) -> Option<&HeldDelivery> {
    table.payload(id).filter(|hold| hold.attempt.as_deref() == Some(&key))
}
