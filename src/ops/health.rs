//! Readiness as gRPC health: the names `""` and our service follow it. The name `liveness` only says that
//! the process answers.

use std::pin::Pin;

use futures_util::{Stream, StreamExt as _, stream};
use tokio::sync::watch;
use tonic::{Request, Response, Status};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_server::{Health as HealthService, HealthServer},
};

use crate::{grpc::SERVICE, readiness::Verdict};

/// The health name that does not depend on NATS: for liveness probes.
pub const LIVENESS: &str = "liveness";
/// Longest request, in bytes. A request is a name.
const LONGEST_REQUEST: usize = 4 * 1024;

/// The current verdict, which every health call sees.
pub struct Health {
    verdict: watch::Sender<Verdict>,
}

/// The kind of a health name.
#[derive(Debug, Clone, Copy)]
enum Named {
    /// It follows the verdict.
    Readiness,
    /// It is always serving.
    Liveness,
    /// There is no such name, and there will be none.
    Unknown,
}

/// The service of `grpc.health.v1`.
#[derive(Debug)]
struct HealthCalls {
    verdict: watch::Receiver<Verdict>,
}

impl Health {
    /// Health with a first verdict, and its service, which several listeners may share.
    pub fn new(verdict: Verdict) -> (Self, HealthServer<impl HealthService>) {
        let (verdict, receiver) = watch::channel(verdict);
        let server = HealthServer::new(HealthCalls { verdict: receiver });
        (Self { verdict }, server.max_decoding_message_size(LONGEST_REQUEST))
    }

    /// Sets the verdict.
    pub fn set(&self, verdict: Verdict) {
        self.verdict.send_replace(verdict);
    }

    /// Follows the verdict.
    pub fn watch(&self) -> watch::Receiver<Verdict> {
        self.verdict.subscribe()
    }
}

impl Named {
    fn of(name: &str) -> Self {
        match name {
            "" | SERVICE => Self::Readiness,
            LIVENESS => Self::Liveness,
            _ => Self::Unknown,
        }
    }

    fn status(self, verdict: &Verdict) -> ServingStatus {
        match (self, verdict) {
            (Self::Readiness, Verdict::NotServing(_)) => ServingStatus::NotServing,
            (Self::Readiness, Verdict::Serving) | (Self::Liveness, _) => ServingStatus::Serving,
            (Self::Unknown, _) => ServingStatus::ServiceUnknown,
        }
    }
}

#[tonic::async_trait]
impl HealthService for HealthCalls {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match Named::of(&request.get_ref().service) {
            Named::Unknown => Err(Status::not_found(
                "there is no such health service: ask for `liveness`, for `fetchproxy.v1.FetchService`, or for the \
                 empty name, which is readiness",
            )),
            named @ (Named::Readiness | Named::Liveness) => {
                Ok(Response::new(answer(named.status(&self.verdict.borrow()))))
            }
        }
    }

    type WatchStream = Pin<Box<dyn Stream<Item = Result<HealthCheckResponse, Status>> + Send>>;

    /// Streams the status of a name. An unknown name has the status SERVICE_UNKNOWN, and its stream stays
    /// open, as the protocol demands.
    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let named = Named::of(&request.get_ref().service);
        let mut verdict = self.verdict.clone();
        // The first status is sent at once.
        verdict.mark_changed();
        let changes = stream::unfold((verdict, None), move |(mut verdict, last)| async move {
            loop {
                // The sender lives as long as the process.
                verdict.changed().await.ok()?;
                let status = named.status(&verdict.borrow_and_update());
                if last != Some(status) {
                    return Some((status, (verdict, Some(status))));
                }
            }
        });
        Ok(Response::new(Box::pin(changes.map(|status| Ok(answer(status))))))
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}
