//! Limits the calls that run, in number and in bytes, and refuses calls beyond a limit before anything else
//! is done with them. A health Check is never refused for lack of permits for calls.
//!
//! ```text
//!  headers ─▶ permits ─▶ the whole request ─▶ the service ─▶ the answer is written ─▶ permits are free
//!               └ CALL_LIMIT  └ BYTE_LIMIT, REQUEST_TIMEOUT
//! ```

mod reading;

use std::{
    future::{Future, ready},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::future::Either;
use http::{HeaderMap, Request, Response};

use self::reading::{LimitedFrames, LimitedStream, RequestBounds, WholeRequest};
use super::held_body::HeldBody;
use crate::{
    api_error::{ApiError, BudgetKind, ExhaustedScope},
    grpc::{
        answer_memory::{AnswerBudget, AnswerMemory, RequestMemory},
        budget::{MemoryBudget, MemoryShare, Taken},
        call::Call,
        method::CallKind,
        to_status::to_status,
    },
    lessor::Error,
    limits::CallLimits,
    metrics::{FamilyId, Metrics},
    net::{InnerService, Middleware, Next},
};

/// Largest request of our service, in bytes.
const LARGEST_REQUEST: usize = 4 * 1024 * 1024;
/// Largest frame of a Consume, in bytes: a thousand settlements by token.
const LARGEST_FRAME: usize = 512 * 1024;
/// Largest request of health, in bytes. A request is a name.
const LARGEST_NAME: usize = 4 * 1024;
/// Checks of one connection whose requests are being read. A Check answers at once, so more checks do not
/// come from probes.
const CHECKS: usize = 64;
/// Health Watch streams of one connection. A client library opens one.
const WATCHES: usize = 16;
/// Reflection streams of one connection, and of all connections. A tool opens one for a moment.
const REFLECTIONS: usize = 4;
const ALL_REFLECTIONS: usize = 64;
/// Most bytes of all requests of one reflection stream: names of files and symbols.
const LARGEST_REFLECTION: usize = 256 * 1024;
/// Longest reflection stream.
const LONGEST_REFLECTION: Duration = Duration::from_secs(60);

/// The budgets of all calls of one listener.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct CallLimiter(Arc<Budgets>);

#[derive(Debug)]
struct Budgets {
    calls: MemoryBudget,
    fetches: MemoryBudget,
    checks: MemoryBudget,
    watches: MemoryBudget,
    reflections: MemoryBudget,
    requests: MemoryBudget,
    answers: MemoryBudget,
    max_connections: usize,
    /// Whether [`CallLimiter::idle`] waits for the last call.
    closing: AtomicBool,
}

impl CallLimiter {
    pub(in crate::grpc) fn new(limits: &CallLimits, max_connections: usize) -> Self {
        Self(Arc::new(Budgets {
            calls: MemoryBudget::new(limits.max_calls),
            fetches: MemoryBudget::new(limits.max_waiters),
            checks: MemoryBudget::new(max_connections.max(1000)),
            // 20,000 streams would fill a quarter of a gigabyte.
            watches: MemoryBudget::new(max_connections.div_ceil(2).clamp(WATCHES, 5000)),
            reflections: MemoryBudget::new(ALL_REFLECTIONS),
            requests: MemoryBudget::new(limits.max_request_bytes),
            answers: MemoryBudget::new(limits.max_answer_bytes),
            max_connections,
            closing: AtomicBool::new(false),
        }))
    }

    /// Shows the calls under way in the metrics.
    pub(in crate::grpc) fn show(&self, metrics: &Metrics) {
        let limiter = self.clone();
        metrics.ask(move |sheet| {
            let calls = &limiter.0.calls;
            sheet.set(FamilyId::CallsOpen, calls.taken() as f64);
            sheet.set(FamilyId::CallsLimit, calls.most() as f64);
        });
    }

    /// Waits until no call runs, and refuses new calls.
    pub(in crate::grpc) async fn idle(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
        self.0.calls.all_free().await;
    }

    /// The limits of one more connection. A connection that is `turned_away` may only ask for health.
    pub(in crate::grpc) fn connection(&self, turned_away: bool) -> ConnectionLimiter {
        let all = &self.0;
        ConnectionLimiter(Arc::new(Shares {
            turned_away,
            calls: all.calls.share(),
            fetches: all.fetches.share(),
            checks: all.checks.share().at_most(CHECKS),
            watches: all.watches.share().at_most(WATCHES),
            reflections: all.reflections.share().at_most(REFLECTIONS),
            requests: all.requests.share(),
            answers: all.answers.share(),
            all: all.clone(),
        }))
    }
}

/// The layer that limits the calls of one connection.
#[derive(Debug, Clone)]
pub(in crate::grpc) struct ConnectionLimiter(Arc<Shares>);

#[derive(Debug)]
struct Shares {
    all: Arc<Budgets>,
    turned_away: bool,
    calls: MemoryShare,
    fetches: MemoryShare,
    checks: MemoryShare,
    watches: MemoryShare,
    reflections: MemoryShare,
    requests: MemoryShare,
    answers: MemoryShare,
}

/// The units that a call has taken.
struct Admitted {
    kind: CallKind,
    /// Held until the answer is written.
    permits: Vec<Taken>,
    /// Held until the answer is made.
    bytes: Option<Taken>,
    /// Held until the request is read.
    reading: Option<Taken>,
}

/// The units that a call holds until its answer is written.
pub(in crate::grpc) struct WritePermits {
    _permits: Vec<Taken>,
    _memory: Option<AnswerMemory>,
}

impl Shares {
    fn admit(&self, kind: CallKind, headers: &HeaderMap) -> Result<Admitted, ApiError> {
        let mut admitted = Admitted { kind, permits: Vec::new(), bytes: None, reading: None };
        if kind.is_ours() {
            if self.all.closing.load(Ordering::Relaxed) {
                return Err(Error::Draining.into());
            }
            if self.turned_away {
                return Err(ApiError::ConnectionLimit(self.all.max_connections));
            }
            admitted.permits.push(self.calls.take(1).map_err(|scope| self.all.calls_full(scope))?);
            let headers =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32);
            let bytes = self.requests.take(headers.sum());
            let full = |scope| ApiError::ByteLimit(BudgetKind::Requests, scope);
            admitted.bytes = Some(bytes.map_err(full)?);
        }
        let one = |share: &MemoryShare| share.take(1).map_err(|scope| self.all.calls_full(scope));
        match kind {
            CallKind::Fetch | CallKind::Consume => {
                let most = self.all.fetches.most();
                let permit = self.fetches.take(1);
                let permit = permit.map_err(|scope| ApiError::WaiterLimit(most, scope))?;
                admitted.permits.push(permit);
            }
            CallKind::Check => admitted.reading = Some(one(&self.checks)?),
            CallKind::Watch => admitted.permits.push(one(&self.watches)?),
            CallKind::Reflection => admitted.permits.push(one(&self.reflections)?),
            CallKind::Settle | CallKind::Ours | CallKind::Admin | CallKind::Other => {}
        }
        Ok(admitted)
    }
}

impl Budgets {
    fn calls_full(&self, scope: ExhaustedScope) -> ApiError {
        ApiError::CallLimit(self.calls.most(), scope)
    }
}

impl<S, R, B> Middleware<Request<R>, S> for ConnectionLimiter
where
    S: InnerService<Request<tonic::body::Body>, Response = Response<B>>,
    R: http_body::Body<Data = Bytes> + Send + 'static,
    R::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    B: http_body::Body + Default + Send + 'static,
{
    type Response = Response<HeldBody<B, WritePermits>>;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<Self::Response, S::Error>> + Send + 'static {
        let kind = Call::kind_of(&request);
        let admitted = match self.0.admit(kind, request.headers()) {
            Ok(admitted) => admitted,
            Err(refused) => return Either::Left(ready(Ok(to_status(&refused).into_http()))),
        };
        let budget = AnswerBudget::new(self.0.answers.clone());
        let mut next = next.later();
        Either::Right(async move {
            let (request, Admitted { permits, bytes, .. }) = match read(request, admitted).await {
                Ok(read) => read,
                Err(refused) => return Ok(to_status(&refused).into_http()),
            };
            Call::of(request.extensions()).inspect(|call| call.may_take(budget));
            let mut answer = next.serve(request).await?;
            drop(bytes);
            let memory = answer.extensions_mut().remove::<AnswerMemory>();
            let held = WritePermits { _permits: permits, _memory: memory };
            Ok(answer.map(|body| HeldBody::new(body, held)))
        })
    }
}

/// Reads the whole message of a request that has one message.
async fn read<B>(
    request: Request<B>,
    mut admitted: Admitted,
) -> Result<(Request<tonic::body::Body>, Admitted), ApiError>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    let (kind, taken) = (admitted.kind, &mut admitted.bytes);
    let most = if kind.is_ours() { LARGEST_REQUEST } else { LARGEST_NAME };
    let bounds = RequestBounds { most, settlements: kind.settlements(), taken: taken.as_mut() };
    let mut settlements = 0;
    let body = match kind {
        CallKind::Fetch
        | CallKind::Settle
        | CallKind::Ours
        | CallKind::Admin
        | CallKind::Check
        | CallKind::Watch => {
            let read = reading::read(&head.headers, body, bounds).await?;
            settlements = read.settlements;
            tonic::body::Body::new(WholeRequest::new(read.message))
        }
        CallKind::Consume => {
            reading::refuse_compressed(&head.headers)?;
            tonic::body::Body::new(LimitedFrames::new(body, LARGEST_FRAME))
        }
        CallKind::Reflection => {
            tonic::body::Body::new(LimitedStream::new(body, LARGEST_REFLECTION, LONGEST_REFLECTION))
        }
        CallKind::Other => tonic::body::Body::empty(),
    };
    admitted.reading = None;
    let mut request = Request::from_parts(head, body);
    if kind == CallKind::Fetch {
        // A Fetch that waits keeps nothing large of its request. Before that it settles.
        let bytes = admitted.bytes.take().filter(|_| settlements > 0);
        bytes.map(|bytes| request.extensions_mut().insert(RequestMemory::new(bytes)));
    }
    Ok((request, admitted))
}
