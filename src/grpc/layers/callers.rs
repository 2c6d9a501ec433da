//! Finds out who calls, before anything else is done with a call: a stranger takes no permit. Leaves the
//! caller in the extensions of the request. Health and reflection need no credential.

use std::sync::Arc;

use http::{Request, Response, header::AUTHORIZATION};
use tower::Service;

use crate::{
    access::{Credential, KnownCaller, Unauthenticated},
    api_error::ApiError,
    clock,
    credentials::Gatekeeper,
    grpc::{
        audited::{audit_refusal, audited},
        method::CallKind,
        to_status::to_status,
    },
    net::{Middleware, Next, Peer},
    refusal_log::{RefusalLog, RefusedCaller},
};

/// A layer that knows the caller of each call; see the [module](self).
#[derive(Debug, Clone)]
pub(in crate::grpc) struct AcceptCallers {
    gatekeeper: Arc<Gatekeeper>,
    refusals: Arc<RefusalLog>,
}

impl AcceptCallers {
    pub(in crate::grpc) fn new(gatekeeper: Arc<Gatekeeper>, refusals: Arc<RefusalLog>) -> Self {
        Self { gatekeeper, refusals }
    }

    fn caller<R>(&self, request: &Request<R>) -> Result<KnownCaller, Unauthenticated> {
        let rights = self.gatekeeper.rights();
        // Clients may have credentials before there is a policy.
        let credential = match rights.policy() {
            None => Credential::Missing,
            Some(_) => {
                let headers = request.headers().get_all(AUTHORIZATION);
                let sent = Credential::read(headers.iter().map(|value| value.as_bytes()))?;
                let peer = request.extensions().get::<Arc<Peer>>();
                sent.or(peer.and_then(|peer| peer.certificate.as_ref()))
            }
        };
        rights.caller(credential, clock::unix_time())
    }

    /// The caller, if calls of this kind are served to it.
    fn admitted(&self, kind: CallKind, caller: KnownCaller) -> Result<KnownCaller, ApiError> {
        if kind == CallKind::Admin {
            self.gatekeeper.rights().admits_operators(&caller)?;
        }
        Ok(caller)
    }
}

impl<S, R, B> Middleware<Request<R>, S> for AcceptCallers
where
    S: Service<Request<R>, Response = Response<B>, Future: Send> + Send + 'static,
    R: Send + 'static,
    B: Default + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    async fn handle(self, mut request: Request<R>, next: Next<S>) -> Result<S::Response, S::Error> {
        let kind = CallKind::of(request.uri().path());
        if kind.is_ours() {
            let caller = self.caller(&request).map_err(ApiError::Unauthenticated);
            let admitted = caller.and_then(|caller| self.admitted(kind, caller));
            match admitted {
                Ok(caller) => drop(request.extensions_mut().insert(caller)),
                Err(refused) => {
                    let method = CallKind::method(request.uri().path());
                    let (headers, extensions) = (request.headers(), request.extensions());
                    let call = audited(self.gatekeeper.audit(), method, headers, extensions);
                    audit_refusal(&call, &refused);
                    self.refusals.refused(kind.name(), &RefusedCaller::default(), &refused);
                    return Ok(to_status(&refused).into_http());
                }
            }
        }
        next.run(request).await
    }
}
