//! Bounds the calls that are under way, in number and in bytes, and refuses those beyond a bound before
//! anything is done. A health Check is never refused for want of places.
//!
//! ```text
//!  headers ─▶ a place ─▶ the request in whole ─▶ the service ─▶ the answer written ─▶ the place is free
//!               └ CALL_LIMIT  └ BYTE_LIMIT, REQUEST_TIMEOUT
//! ```

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

use super::{
    SERVICE,
    answer::{Body, DeliveryGuard, WriteState},
    budget::{MemoryBudget, MemoryShare, Taken},
    reading::{self, Bounds, Limited, Read},
    to_status::to_status,
};
use crate::{
    api_error::{ApiError, BudgetKind as Of, ExhaustedScope},
    lessor::Error,
    limits::CallLimits,
    net::{ClientConnection, OpenCall},
};

/// Largest request of our service that is read, in bytes.
const LARGEST_REQUEST: usize = 4 * 1024 * 1024;
/// Largest request of health, in bytes: it is a name.
const LARGEST_NAME: usize = 4 * 1024;
/// Checks of one connection whose requests are being read. A Check answers at once, so more are no
/// probes.
const CHECKS: usize = 64;
/// Health Watch streams of one connection. A client library opens one.
const WATCHES: usize = 16;
/// Reflection streams of one connection, and of all. A tool opens one, for a moment.
const REFLECTIONS: usize = 4;
const ALL_REFLECTIONS: usize = 64;
/// All requests of one reflection stream, in bytes: names of files and symbols.
const LARGEST_REFLECTION: usize = 256 * 1024;
/// Longest reflection stream.
const LONGEST_REFLECTION: Duration = Duration::from_secs(60);

/// The places for calls, and how many are taken.
#[derive(Debug, Clone)]
pub(super) struct Calls(Arc<Budgets>);

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
    /// Somebody waits for the last call.
    closing: AtomicBool,
}

impl Calls {
    pub(super) fn new(limits: &CallLimits, max_connections: usize) -> Self {
        Self(Arc::new(Budgets {
            calls: MemoryBudget::new(limits.max_calls),
            fetches: MemoryBudget::new(limits.max_waiters),
            checks: MemoryBudget::new(max_connections.max(1000)),
            // A quarter of a gigabyte would be full of them with 20,000.
            watches: MemoryBudget::new(max_connections.div_ceil(2).clamp(WATCHES, 5000)),
            reflections: MemoryBudget::new(ALL_REFLECTIONS),
            requests: MemoryBudget::new(limits.max_request_bytes),
            answers: MemoryBudget::new(limits.max_answer_bytes),
            max_connections,
            closing: AtomicBool::new(false),
        }))
    }

    /// Waits until no call is under way, and lets no new ones in.
    pub(super) async fn idle(&self) {
        self.0.closing.store(true, Ordering::Relaxed);
        self.0.calls.all_free().await;
    }

    /// The bounds of one more connection. One that is `turned_away` may ask for health alone.
    pub(super) fn on(&self, connection: &Arc<ClientConnection>, turned_away: bool) -> Places {
        let all = &self.0;
        Places(Arc::new(OfConnection {
            connection: connection.clone(),
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

/// The bounds of one connection: a layer before its service.
#[derive(Clone)]
pub(super) struct Places(Arc<OfConnection>);

struct OfConnection {
    all: Arc<Budgets>,
    connection: Arc<ClientConnection>,
    turned_away: bool,
    calls: MemoryShare,
    fetches: MemoryShare,
    checks: MemoryShare,
    watches: MemoryShare,
    reflections: MemoryShare,
    requests: MemoryShare,
    answers: MemoryShare,
}

/// The share of the bytes for answers; among the extensions of each request of ours.
#[derive(Debug, Clone)]
pub(super) struct AnswerBytes(pub(super) MemoryShare);

/// The kind of a call, by its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Fetch,
    Settle,
    /// Another of our service.
    Ours,
    Check,
    Watch,
    Reflection,
    /// Nothing that is served.
    Other,
}

impl Kind {
    fn of(path: &str) -> Self {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
        else {
            return Self::Other;
        };
        match (service, method) {
            (SERVICE, "Fetch") => Self::Fetch,
            (SERVICE, "Settle") => Self::Settle,
            (SERVICE, _) => Self::Ours,
            ("grpc.health.v1.Health", "Check") => Self::Check,
            ("grpc.health.v1.Health", "Watch") => Self::Watch,
            (service, _) if service.starts_with("grpc.reflection.") => Self::Reflection,
            _ => Self::Other,
        }
    }

    fn is_ours(self) -> bool {
        matches!(self, Self::Fetch | Self::Settle | Self::Ours)
    }
}

/// Whether a path is one of our service: `/fetchproxy.v1.FetchService/…`.
pub(super) fn is_ours(path: &str) -> bool {
    Kind::of(path).is_ours()
}

/// The permits of a call.
struct Admitted {
    kind: Kind,
    /// Until the answer is written.
    places: Vec<Taken>,
    /// Until the answer is made.
    bytes: Option<Taken>,
    /// Until the request is read.
    reading: Option<Taken>,
    open: OpenCall,
}

impl OfConnection {
    fn admit(&self, kind: Kind, headers: &HeaderMap) -> Result<Admitted, ApiError> {
        let open = self.connection.open_call();
        let mut admitted = Admitted { kind, places: Vec::new(), bytes: None, reading: None, open };
        if kind.is_ours() {
            if self.all.closing.load(Ordering::Relaxed) {
                return Err(Error::Draining.into());
            }
            if self.turned_away {
                return Err(ApiError::ConnectionLimit(self.all.max_connections));
            }
            admitted.places.push(self.calls.take(1).map_err(|short| self.all.calls_full(short))?);
            let headers =
                headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 32);
            let bytes = self.requests.take(headers.sum());
            admitted.bytes = Some(bytes.map_err(|short| ApiError::ByteLimit(Of::Requests, short))?);
        }
        let more = |share: &MemoryShare| share.take(1).map_err(|short| self.all.calls_full(short));
        match kind {
            Kind::Fetch => {
                let most = self.all.fetches.most();
                let place = self.fetches.take(1);
                admitted.places.push(place.map_err(|short| ApiError::WaiterLimit(most, short))?);
            }
            Kind::Check => admitted.reading = Some(more(&self.checks)?),
            Kind::Watch => admitted.places.push(more(&self.watches)?),
            Kind::Reflection => admitted.places.push(more(&self.reflections)?),
            Kind::Settle | Kind::Ours | Kind::Other => {}
        }
        Ok(admitted)
    }
}

impl Budgets {
    fn calls_full(&self, short: ExhaustedScope) -> ApiError {
        ApiError::CallLimit(self.calls.most(), short)
    }
}

impl<S> Layer<S> for Places {
    type Service = Counted<S>;

    fn layer(&self, inner: S) -> Counted<S> {
        Counted { places: self.clone(), inner }
    }
}

/// A service behind these bounds; see the module.
#[derive(Clone)]
pub(super) struct Counted<S> {
    places: Places,
    inner: S,
}

impl<S, B> Service<Request<B>> for Counted<S>
where
    S: Service<Request<tonic::body::Body>, Response = Response<tonic::body::Body>>,
    S: Clone + Send + 'static,
    S::Future: Send,
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let places = self.places.0.clone();
        let kind = Kind::of(request.uri().path());
        let admitted = match places.admit(kind, request.headers()) {
            Ok(admitted) => admitted,
            Err(refused) => return Box::pin(async move { Ok(refusal(&refused)) }),
        };
        // The one that was asked whether it is ready is the one that is called.
        let next = self.inner.clone();
        let mut inner = std::mem::replace(&mut self.inner, next);
        Box::pin(async move {
            let (request, admitted) = match read(request, admitted).await {
                Ok(read) => read,
                Err(refused) => return Ok(refusal(&refused)),
            };
            let mut request = request;
            request.extensions_mut().insert(AnswerBytes(places.answers.clone()));
            let Admitted { places: taken, bytes, open, .. } = admitted;
            let answer = inner.call(request).await?;
            drop(bytes);
            Ok(held(answer, taken, open, &places.connection))
        })
    }
}

/// The request with its message in whole, where it has one message.
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
    let bounds = Bounds { most, settle: kind == Kind::Settle, taken: taken.as_mut() };
    let body = match kind {
        Kind::Fetch | Kind::Settle | Kind::Ours | Kind::Check | Kind::Watch => {
            let message = reading::read(&head.headers, body, bounds).await?;
            tonic::body::Body::new(Read::new(message))
        }
        Kind::Reflection => {
            tonic::body::Body::new(Limited::new(body, LARGEST_REFLECTION, LONGEST_REFLECTION))
        }
        Kind::Other => tonic::body::Body::empty(),
    };
    admitted.reading = None;
    if kind == Kind::Fetch
        && let Some(bytes) = &mut admitted.bytes
    {
        // Nothing that is long is left of it while it waits.
        bytes.shrink_to(0);
    }
    Ok((Request::from_parts(head, body), admitted))
}

/// The answer, which holds its places until it is written.
fn held(
    mut answer: Response<tonic::body::Body>,
    places: Vec<Taken>,
    open: OpenCall,
    connection: &ClientConnection,
) -> Response<Body> {
    let load = answer.extensions_mut().remove::<DeliveryGuard>();
    if http_body::Body::is_end_stream(answer.body()) {
        return answer.map(|body| Body::new(body, None));
    }
    let load = load.map(|freight| freight.unload()).unwrap_or_default();
    let begun = connection.unwritten.begin(load.ends_at());
    let (ended, cut) = (AtomicBool::new(false), AtomicBool::new(false));
    let hold = WriteState { load, _places: places, begun, _open: open, ended, cut };
    answer.map(|body| Body::new(body, Some(hold)))
}

fn refusal(refused: &ApiError) -> Response<Body> {
    to_status(refused).into_http().map(|body| Body::new(body, None))
}
