//! Finds out who calls, before anything else is done with a call: a stranger takes no permit. Leaves the
//! caller in the extensions of the request. Health and reflection need no credential.

use std::{
    future::{Future, ready},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use futures_util::future::Either;
use http::{Request, Response, header::AUTHORIZATION};

use super::strangers::StrangerLimit;
use crate::{
    access::{BearerCache, Credential, KnownCaller, NotAccepted, Rights},
    api_error::ApiError,
    clock,
    credentials::Gatekeeper,
    grpc::{
        call::{Call, audit_refusal, audited},
        method::CallKind,
        to_status::to_status,
    },
    lock::lock,
    net::{ClientConnection, InnerService, Middleware, Next, Peer},
    refusal_log::{RefusalLog, RefusedCaller},
};

/// A layer that knows the caller of each call; see the [module](self).
#[derive(Debug, Clone)]
pub(in crate::grpc) struct AcceptCallers(Arc<Door>);

/// The door of one connection.
#[derive(Debug)]
struct Door {
    gatekeeper: Arc<Gatekeeper>,
    refusals: Arc<RefusalLog>,
    /// The tokens of one connection. No two connections share a lock for each call.
    accepted: Mutex<BearerCache>,
    /// The caller of each call while there is no policy.
    anonymous: OnceLock<KnownCaller>,
    strangers: StrangerLimit,
    connection: Arc<ClientConnection>,
}

impl AcceptCallers {
    /// The layer of one connection.
    pub(in crate::grpc) fn new(
        gatekeeper: Arc<Gatekeeper>,
        refusals: Arc<RefusalLog>,
        connection: &Arc<ClientConnection>,
    ) -> Self {
        let (strangers, connection) = (StrangerLimit::new(connection), connection.clone());
        let accepted = Mutex::default();
        let anonymous = OnceLock::new();
        Self(Arc::new(Door { gatekeeper, refusals, accepted, anonymous, strangers, connection }))
    }
}

impl Door {
    fn caller<R>(&self, rights: &Rights, request: &Request<R>) -> Result<KnownCaller, NotAccepted> {
        // Clients may have credentials before there is a policy.
        if rights.policy().is_none() {
            if let Some(caller) = self.anonymous.get() {
                return Ok(caller.clone());
            }
            let caller = rights.caller(Credential::Missing, Duration::ZERO)?;
            return Ok(self.anonymous.get_or_init(|| caller).clone());
        }
        let now = clock::unix_time();
        let headers = request.headers().get_all(AUTHORIZATION);
        let headers: Vec<&[u8]> = headers.iter().map(|value| value.as_bytes()).collect();
        let generation = rights.generation();
        if let [header] = headers[..]
            && let Some(caller) = lock(&self.accepted).find(header, generation, now)
        {
            return Ok(caller);
        }
        let sent = Credential::read(headers.iter().copied())?;
        let peer = request.extensions().get::<Arc<Peer>>();
        let credential = sent.or(peer.and_then(|peer| peer.certificate.as_ref()));
        let caller = self.gatekeeper.accept(rights, credential, now)?;
        if let [header] = headers[..] {
            lock(&self.accepted).keep(header, generation, &caller);
        }
        Ok(caller)
    }

    /// The caller, if calls of this kind are served to it.
    fn admitted(
        rights: &Rights,
        kind: CallKind,
        caller: KnownCaller,
    ) -> Result<KnownCaller, ApiError> {
        if kind == CallKind::Admin {
            rights.admits_operators(&caller)?;
        }
        Ok(caller)
    }
}

impl<S, R, B> Middleware<Request<R>, S> for AcceptCallers
where
    S: InnerService<Request<R>, Response = Response<B>>,
    R: Send + 'static,
    B: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        request: Request<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        let (kind, door) = (Call::kind_of(&request), &*self.0);
        if kind.is_ours() {
            let rights = door.gatekeeper.rights();
            let caller = door.caller(&rights, &request).map_err(ApiError::from);
            door.strangers.asked(&caller);
            let admitted = caller.and_then(|caller| Door::admitted(&rights, kind, caller));
            match admitted {
                Ok(caller) => {
                    door.connection.identified(caller.identity.as_str());
                    if let Some(call) = Call::of(request.extensions()) {
                        call.is_from(caller, rights);
                    }
                }
                Err(refused) => {
                    let method = CallKind::method(request.uri().path());
                    let (headers, extensions) = (request.headers(), request.extensions());
                    let call = audited(door.gatekeeper.audit(), method, headers, extensions);
                    audit_refusal(&call, &refused);
                    let denied = if let ApiError::NotAllowed(denied) = &refused {
                        Some(denied)
                    } else {
                        None
                    };
                    let principal = denied.and_then(|denied| denied.principal.as_deref());
                    let caller = RefusedCaller { principal, ..RefusedCaller::default() };
                    door.refusals.refused(kind.name(), &caller, &refused);
                    return Either::Left(ready(Ok(to_status(&refused).into_http())));
                }
            }
        }
        Either::Right(next.run(request))
    }
}
