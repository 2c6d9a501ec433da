//! The six calls of FetchService: decode, ask the lessor, encode. Decides nothing itself.

use std::{sync::Arc, time::Duration, time::Instant};

use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{
    answer::Freight,
    decode,
    encode::{Clocks, Done, Seal},
    status::Refused,
};
use crate::{
    broker::{Broker, Confirmation},
    clock,
    lease::LeaseId,
    lessor::{Action, Ask, Lessor, Settled},
    pb::{self, fetch_service_server::FetchService},
    token::{InstanceId, OpenError, Sealer},
};

/// The service over one lessor.
pub struct Service<B: Broker> {
    lessor: Lessor<B>,
    sealer: Arc<Sealer>,
    owner: InstanceId,
    max_lease: Duration,
}

impl<B: Broker> Service<B> {
    /// `owner` names this process in the tokens that it seals; it must be new with every start.
    pub fn new(
        lessor: Lessor<B>,
        sealer: Arc<Sealer>,
        owner: InstanceId,
        max_lease: Duration,
    ) -> Self {
        Self { lessor, sealer, owner, max_lease }
    }

    /// The lease behind a token of ours.
    fn open(&self, token: &str) -> Result<LeaseId, Refused> {
        if token.is_empty() {
            return Err(Refused::Field { field: "token".into(), why: "must be set".into() });
        }
        let claims = self.sealer.open(token).map_err(|error| match error {
            OpenError::Invalid => Refused::TokenInvalid,
            OpenError::KeyUnknown => Refused::KeyUnknown,
        })?;
        if claims.owner != self.owner {
            // Granted by another replica, or by this one before a restart.
            let expired = clock::unix_time().as_millis() >= u128::from(claims.settle_by);
            return Err(if expired {
                crate::lessor::Error::LeaseExpired { forgotten: false }.into()
            } else {
                Refused::OwnerUnreachable
            });
        }
        LeaseId::new(claims.lease).ok_or(Refused::TokenInvalid)
    }

    /// Settles one token, for the unary calls.
    async fn settle(
        &self,
        metadata: &MetadataMap,
        token: &str,
        action: Action,
        confirmation: Confirmation,
    ) -> Result<Done, Status> {
        let lease = self.open(token).map_err(|refused| refused.status())?;
        let ask = vec![Ask { lease, action }];
        let result = self.lessor.settle(ask, confirmation, settle_until(metadata)).await.pop();
        match result.unwrap_or(Err(crate::lessor::Error::Unconfirmed)) {
            Ok(settled) => Ok(Done::new(settled, clocks())),
            Err(error) => Err(Refused::from(error).status()),
        }
    }
}

#[tonic::async_trait]
impl<B: Broker> FetchService for Service<B> {
    async fn fetch(
        &self,
        request: Request<pb::FetchRequest>,
    ) -> Result<Response<pb::FetchResponse>, Status> {
        let left = decode::time_left(request.metadata());
        let request = request.into_inner();
        let ask = decode::fetch(&request, self.max_lease, clock::now(), left)
            .map_err(|refused| refused.status())?;
        let (codec, max_bytes) = (ask.codec, ask.max_bytes);
        let fetched =
            self.lessor.fetch(ask).await.map_err(|error| Refused::from(error).status())?;
        let (messages, rejected) = (fetched.messages().len(), fetched.rejected().len());
        let nonces = nonces(messages + rejected)?;
        tracing::debug!(
            stream = request.stream,
            consumer = request.consumer,
            worker = request.worker,
            messages,
            rejected,
            "fetched"
        );
        let seal = Seal { sealer: &self.sealer, owner: self.owner, clocks: clocks() };
        let mut response = Response::new(seal.fetch(&fetched, codec, max_bytes, nonces));
        response.extensions_mut().insert(Freight::new(fetched));
        Ok(response)
    }

    async fn ack(
        &self,
        request: Request<pb::AckRequest>,
    ) -> Result<Response<pb::AckResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let done = self.settle(&metadata, &request.token, Action::Ack, confirmation).await?;
        Ok(Response::new(pb::AckResponse { outcome: done.outcome.into() }))
    }

    async fn nak(
        &self,
        request: Request<pb::NakRequest>,
    ) -> Result<Response<pb::NakResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let action = checked(decode::nak("", request.delay.as_ref()))?;
        let done = self.settle(&metadata, &request.token, action, confirmation).await?;
        let redeliver_time = done.redeliver_time;
        Ok(Response::new(pb::NakResponse { outcome: done.outcome.into(), redeliver_time }))
    }

    async fn term(
        &self,
        request: Request<pb::TermRequest>,
    ) -> Result<Response<pb::TermResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let action = decode::term(request.reason);
        let done = self.settle(&metadata, &request.token, action, confirmation).await?;
        Ok(Response::new(pb::TermResponse { outcome: done.outcome.into() }))
    }

    async fn extend(
        &self,
        request: Request<pb::ExtendRequest>,
    ) -> Result<Response<pb::ExtendResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let action = checked(decode::extend("", request.lease.as_ref(), self.max_lease))?;
        let done = self.settle(&metadata, &request.token, action, Confirmation::Confirmed).await?;
        let (lease_expire_time, lease) = (done.lease_expire_time, done.lease);
        Ok(Response::new(pb::ExtendResponse { lease_expire_time, lease }))
    }

    async fn settle(
        &self,
        request: Request<pb::SettleRequest>,
    ) -> Result<Response<pb::SettleResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let confirmation = checked(decode::confirmation(request.confirmation))?;
        let count = request.settlements.len();
        if !(1..=decode::MOST_SETTLEMENTS).contains(&count) {
            let why = format!("must be 1 to {}, not {count}", decode::MOST_SETTLEMENTS);
            return Err(Refused::Field { field: "settlements".into(), why }.status());
        }
        // All fields are checked before anything is settled.
        let wanted = request.settlements.into_iter().enumerate();
        let wanted = wanted.map(|(place, one)| decode::settlement(place, one, self.max_lease));
        let wanted = checked(wanted.collect::<Result<Vec<_>, _>>())?;

        let (mut places, mut asks) = (Vec::with_capacity(count), Vec::with_capacity(count));
        let mut results: Vec<Result<Settled, Refused>> = Vec::with_capacity(count);
        for (place, (token, action)) in wanted.into_iter().enumerate() {
            match self.open(&token) {
                Ok(lease) => {
                    places.push(place);
                    asks.push(Ask { lease, action });
                    results.push(Ok(Settled::Duplicate));
                }
                Err(refused) => results.push(Err(refused)),
            }
        }
        let settled = self.lessor.settle(asks, confirmation, settle_until(&metadata)).await;
        for (place, result) in places.into_iter().zip(settled) {
            results[place] = result.map_err(Refused::from);
        }
        Ok(Response::new(settle_response(results)))
    }
}

fn settle_response(results: Vec<Result<Settled, Refused>>) -> pb::SettleResponse {
    let clocks = clocks();
    let failed = results.iter().filter(|result| result.is_err()).count();
    let result = |result| match result {
        Ok(settled) => {
            let done = Done::new(settled, clocks);
            pb::SettleResult {
                outcome: done.outcome.into(),
                error: None,
                redeliver_time: done.redeliver_time,
                lease_expire_time: done.lease_expire_time,
                lease: done.lease,
            }
        }
        Err(refused) => pb::SettleResult {
            error: Some(Refused::settle_error(&refused)),
            ..pb::SettleResult::default()
        },
    };
    pb::SettleResponse {
        results: results.into_iter().map(result).collect(),
        // At most MOST_SETTLEMENTS.
        failed: u32::try_from(failed).unwrap_or(u32::MAX),
    }
}

fn checked<T>(decoded: Result<T, Refused>) -> Result<T, Status> {
    decoded.map_err(|refused| refused.status())
}

/// By when a settlement answers: before its caller's deadline. The lessor has a bound of its own.
fn settle_until(metadata: &MetadataMap) -> Instant {
    let left = decode::time_left(metadata).unwrap_or(Duration::from_secs(3600));
    clock::now() + left.saturating_sub(decode::slack(left))
}

fn clocks() -> Clocks {
    Clocks { now: clock::now(), unix: clock::unix_time() }
}

/// Fresh nonces: 192 bits each, so chance never repeats one.
fn nonces(count: usize) -> Result<impl Iterator<Item = [u8; 24]>, Status> {
    let mut bytes = vec![0; count * 24];
    getrandom::fill(&mut bytes).map_err(|error| {
        let why = format!("no randomness to seal tokens with: {error}");
        Refused::from(crate::lessor::Error::Unavailable(why)).status()
    })?;
    let nonces: Vec<[u8; 24]> = bytes.as_chunks().0.to_vec();
    Ok(nonces.into_iter())
}
