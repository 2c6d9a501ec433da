//! Answers that are being written while their leases move. Their clients have the tokens once the answers are
//! written. If an answer is not written in the end, nobody has its messages, and the new owner of the leases does not
//! know that. So the sender asks the new owner to give them back.

use std::time::Duration;

use futures_util::future::join_all;
use prost::Message as _;

use super::wire::{STEP_TIMEOUT, millis};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    cluster::{replica::Replica, wire::settlement},
    lease::LeaseId,
    lessor::{Action, MovedAnswer},
    pb::{self, peer::v1::SettleRequest},
    token::InstanceId,
};

/// Most leases of one request: well below the smallest payload limit of NATS in use, like the error for each of them.
const MAX_LEASES: usize = 190;

/// Waits for the end of each answer. `receiver` has taken the leases over.
pub(super) async fn give_back<B: Broker + Bus>(
    replica: &Replica<B>,
    receiver: InstanceId,
    unwritten: Vec<MovedAnswer>,
) {
    let give_back = async |answer: MovedAnswer| {
        for leases in answer.nobodys().await.chunks(MAX_LEASES) {
            let request = release(replica.us, leases).encode_to_vec();
            let until = clock::now() + STEP_TIMEOUT;
            // Without an answer, the messages come back when their leases end.
            let told = replica.ask_to_settle(receiver, &request, until).await.is_ok();
            tracing::info!(leases = leases.len(), told, "an answer was not written: it goes back");
        }
    };
    join_all(unwritten.into_iter().map(give_back)).await;
}

/// Gives these leases of `owner` back. They may belong to any principal.
fn release(owner: InstanceId, leases: &[LeaseId]) -> SettleRequest {
    let nak = settlement(&Action::Nak(Duration::ZERO), Duration::ZERO);
    SettleRequest {
        owner: owner.0.to_vec().into(),
        leases: leases.iter().map(|lease| lease.get()).collect(),
        settlements: vec![nak; leases.len()],
        confirmation: pb::Confirmation::Sent.into(),
        budget: millis(STEP_TIMEOUT),
        any: true,
        ..SettleRequest::default()
    }
}
