//! The methods of AdminService, and their listener on this machine. Decides no right: the layer `callers` does
//! at the port for clients, and the kernel at the admin socket.

use std::{io, sync::Arc};

use http::{Request as HttpRequest, Response as HttpResponse};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, service::Routes};
use tower::{Service as TowerService, ServiceBuilder};

use super::{
    layers::ErrorReasons,
    reflection::{ContractError, reflected},
    to_status::to_status,
};
use crate::{
    access::{KnownCaller, Unauthenticated, Verb},
    api_error::ApiError,
    credentials::Gatekeeper,
    net::{LocalListener, Middleware, MiddlewareLayer, Next},
    pb::{
        self,
        admin_service_server::{AdminService, AdminServiceServer},
        time::timestamp,
    },
};

/// Longest request of AdminService, in bytes.
const MAX_ADMIN_REQUEST_BYTES: usize = 64 * 1024;

/// The calls for operators.
pub(super) struct Admin {
    gatekeeper: Arc<Gatekeeper>,
}

/// The user of the process at the other end of the admin socket.
#[derive(Debug, Clone, Copy)]
struct LocalUser(u32);

impl Admin {
    /// The service, for a listener.
    pub(super) fn server(gatekeeper: Arc<Gatekeeper>) -> AdminServiceServer<Self> {
        let server = AdminServiceServer::new(Self { gatekeeper });
        server.max_decoding_message_size(MAX_ADMIN_REQUEST_BYTES)
    }
}

#[tonic::async_trait]
impl AdminService for Admin {
    async fn who_am_i(
        &self,
        request: Request<pb::WhoAmIRequest>,
    ) -> Result<Response<pb::WhoAmIResponse>, Status> {
        let rights = self.gatekeeper.rights();
        let extensions = request.extensions();
        let (caller, verbs) = match (extensions.get::<LocalUser>(), extensions.get::<KnownCaller>())
        {
            (Some(LocalUser(user)), _) => {
                (rights.local_caller(*user), [Verb::Inspect, Verb::Admin].into_iter().collect())
            }
            (None, Some(caller)) => (caller.clone(), rights.verbs_of(caller)),
            // Both listeners name their callers.
            (None, None) => {
                return Err(to_status(&ApiError::Unauthenticated(Unauthenticated::Missing)));
            }
        };
        let verbs = Verb::ALL.into_iter().filter(|verb| verbs.has(*verb));
        Ok(Response::new(pb::WhoAmIResponse {
            identity: caller.identity.to_string(),
            principal: caller.principal.as_deref().unwrap_or_default().to_owned(),
            verbs: verbs.map(|verb| verb.name().to_owned()).collect(),
            credential_expire_time: caller.until.map(timestamp),
            policy_digest: rights.policy().map(|policy| policy.digest()).unwrap_or_default(),
        }))
    }
}

/// The reason why there is no admin socket.
#[derive(Debug, thiserror::Error)]
pub enum AdminSocketError {
    /// Its name cannot be listened on.
    #[error("cannot listen on the admin socket {0}: {1}")]
    Listen(String, io::Error),
    /// The contract cannot be served: a bug.
    #[error(transparent)]
    Contract(#[from] ContractError),
}

/// Listens on the admin socket of this name. The future serves AdminService there until `stop`.
///
/// # Errors
/// See [`AdminSocketError`].
pub fn serve_admin(
    name: &str,
    gatekeeper: Arc<Gatekeeper>,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + 'static, AdminSocketError> {
    let listener = LocalListener::bind(name)
        .map_err(|error| AdminSocketError::Listen(name.to_owned(), error))?;
    let routes = reflected(Routes::new(Admin::server(gatekeeper)))?.prepare();
    let service = move |user| {
        ServiceBuilder::new()
            .layer(MiddlewareLayer(LocalUser(user)))
            .layer(MiddlewareLayer(ErrorReasons))
            .service(routes.clone())
    };
    Ok(listener.serve(service, stop))
}

/// Each request carries the user at the other end.
impl<S, R, B> Middleware<HttpRequest<R>, S> for LocalUser
where
    S: TowerService<HttpRequest<R>, Response = HttpResponse<B>, Future: Send> + Send + 'static,
    R: Send + 'static,
    B: 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    async fn handle(
        self,
        mut request: HttpRequest<R>,
        next: Next<S>,
    ) -> Result<S::Response, S::Error> {
        request.extensions_mut().insert(self);
        next.run(request).await
    }
}
