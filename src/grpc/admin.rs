//! The methods of AdminService, and their listener on this machine. They check the rights of the caller, and the
//! room `admin` answers. The layer `callers` names the caller at the client port, and the kernel at the
//! admin socket.

use std::{io, sync::Arc};

use http::{Request as HttpRequest, Response as HttpResponse};
use tokio_util::sync::CancellationToken;
use tonic::{Extensions, Request, Response, Status, metadata::MetadataMap, service::Routes};
use tower::ServiceBuilder;

use super::{
    call::{Call, audit_refusal, audited},
    layers::ErrorReasons,
    reflection::{ContractError, reflected},
    to_status::to_status,
};
use crate::{
    access::{KnownCaller, Rights, Unauthenticated, Verb},
    admin::{Inspector, MeantLeases},
    api_error::ApiError,
    broker::Broker,
    bus::Bus,
    credentials::Gatekeeper,
    net::{InnerService, LastService, LocalListener, Middleware, MiddlewareLayer, Next},
    pb::{
        self,
        admin_service_server::{AdminService, AdminServiceServer},
        time::timestamp,
    },
};

/// Longest request of AdminService, in bytes.
const MAX_ADMIN_REQUEST_BYTES: usize = 64 * 1024;

/// The calls for operators.
pub(super) struct Admin<B: Broker + Bus> {
    gatekeeper: Arc<Gatekeeper>,
    inspector: Arc<Inspector<B>>,
}

/// The user of the process at the other end of the admin socket.
#[derive(Debug, Clone, Copy)]
struct LocalUser(u32);

/// The caller of a call for operators, with the rights at the beginning of the call.
struct Operator {
    caller: KnownCaller,
    rights: Arc<Rights>,
    /// It calls at the admin socket, and may do everything.
    is_local: bool,
}

impl<B: Broker + Bus> Admin<B> {
    /// The service, for a listener.
    pub(super) fn server(
        gatekeeper: Arc<Gatekeeper>,
        inspector: Arc<Inspector<B>>,
    ) -> AdminServiceServer<Self> {
        let server = AdminServiceServer::new(Self { gatekeeper, inspector });
        server.max_decoding_message_size(MAX_ADMIN_REQUEST_BYTES)
    }

    fn operator(&self, extensions: &Extensions) -> Result<Operator, ApiError> {
        let rights = self.gatekeeper.rights();
        let known = Call::of(extensions).and_then(|call| call.caller());
        match (extensions.get::<LocalUser>(), known) {
            (Some(LocalUser(user)), _) => {
                let caller = rights.local_caller(*user);
                Ok(Operator { caller, rights, is_local: true })
            }
            (None, Some(caller)) => {
                Ok(Operator { caller: caller.clone(), rights, is_local: false })
            }
            // Both listeners name their callers.
            (None, None) => Err(ApiError::Unauthenticated(Unauthenticated::Missing)),
        }
    }

    /// The status of a call that was refused. If the caller lacks a right, the audit says so.
    fn refused<T>(
        &self,
        method: &'static str,
        (metadata, extensions): (&MetadataMap, &Extensions),
    ) -> impl Fn(ApiError) -> Result<Response<T>, Status> {
        move |refused| {
            let audit = self.gatekeeper.audit();
            audit_refusal(&audited(audit, method, metadata.as_ref(), extensions), &refused);
            Err(to_status(&refused))
        }
    }
}

impl Operator {
    /// Whether the operator may do this with some consumer.
    fn may_somewhere(&self, verb: Verb) -> Result<(), ApiError> {
        if self.is_local { Ok(()) } else { Ok(self.rights.may_somewhere(&self.caller, verb)?) }
    }

    /// Whether the operator may do this with all consumers.
    fn may_everywhere(&self, verb: Verb) -> Result<(), ApiError> {
        if self.is_local { Ok(()) } else { Ok(self.rights.may_everywhere(&self.caller, verb)?) }
    }

    /// Whether the operator may do this with this consumer, if there is one, or with some consumer.
    fn may_at(&self, verb: Verb, consumer: Option<(&str, &str)>) -> Result<(), ApiError> {
        match consumer.filter(|_| !self.is_local) {
            Some(consumer) => Ok(self.rights.may(&self.caller, verb, consumer)?),
            None => self.may_somewhere(verb),
        }
    }

    /// Whether the operator may do this with a consumer.
    fn may(&self, verb: Verb) -> impl Fn(&str, &str) -> bool + Sync {
        move |stream, consumer| {
            self.is_local || self.rights.may(&self.caller, verb, (stream, consumer)).is_ok()
        }
    }
}

#[tonic::async_trait]
impl<B: Broker + Bus> AdminService for Admin<B> {
    async fn who_am_i(
        &self,
        request: Request<pb::WhoAmIRequest>,
    ) -> Result<Response<pb::WhoAmIResponse>, Status> {
        let operator = self.operator(request.extensions()).map_err(|error| to_status(&error))?;
        let Operator { caller, rights, is_local } = operator;
        let verbs = match is_local {
            true => [Verb::Inspect, Verb::Admin].into_iter().collect(),
            false => rights.verbs_of(&caller),
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

    async fn list_replicas(
        &self,
        request: Request<pb::ListReplicasRequest>,
    ) -> Result<Response<pb::ListReplicasResponse>, Status> {
        let (metadata, extensions, pb::ListReplicasRequest {}) = request.into_parts();
        let answer = async {
            self.operator(&extensions)?.may_somewhere(Verb::Inspect)?;
            Ok(Response::new(self.inspector.list_replicas().await))
        };
        answer.await.or_else(self.refused("ListReplicas", (&metadata, &extensions)))
    }

    async fn list_consumers(
        &self,
        request: Request<pb::ListConsumersRequest>,
    ) -> Result<Response<pb::ListConsumersResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let answer = async {
            let operator = self.operator(&extensions)?;
            let named = !request.stream.is_empty() && !request.consumer.is_empty();
            let named = named.then_some((&*request.stream, &*request.consumer));
            operator.may_at(Verb::Inspect, named)?;
            let may = operator.may(Verb::Inspect);
            let consumers = self.inspector.list_consumers(request, &may).await?;
            Ok(Response::new(consumers))
        };
        answer.await.or_else(self.refused("ListConsumers", (&metadata, &extensions)))
    }

    async fn list_leases(
        &self,
        request: Request<pb::ListLeasesRequest>,
    ) -> Result<Response<pb::ListLeasesResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let answer = async {
            let operator = self.operator(&extensions)?;
            let meant = MeantLeases::read(&request.filter.clone().unwrap_or_default())?;
            operator.may_at(Verb::Inspect, meant.consumer())?;
            let may = operator.may(Verb::Inspect);
            Ok(Response::new(self.inspector.list_leases(request, &may).await?))
        };
        answer.await.or_else(self.refused("ListLeases", (&metadata, &extensions)))
    }

    async fn list_connections(
        &self,
        request: Request<pb::ListConnectionsRequest>,
    ) -> Result<Response<pb::ListConnectionsResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let answer = async {
            self.operator(&extensions)?.may_everywhere(Verb::Inspect)?;
            Ok(Response::new(self.inspector.list_connections(request).await?))
        };
        answer.await.or_else(self.refused("ListConnections", (&metadata, &extensions)))
    }

    async fn release_leases(
        &self,
        request: Request<pb::ReleaseLeasesRequest>,
    ) -> Result<Response<pb::ReleaseLeasesResponse>, Status> {
        let (metadata, extensions, request) = request.into_parts();
        let answer = async {
            let operator = self.operator(&extensions)?;
            let meant = MeantLeases::read(&request.filter.clone().unwrap_or_default())?;
            operator.may_at(Verb::Admin, meant.consumer())?;
            let may = operator.may(Verb::Admin);
            let validate_only = request.validate_only;
            let response = self.inspector.release_leases(request, &may).await?;
            if !validate_only {
                let audit = self.gatekeeper.audit();
                let call = audited(audit, "ReleaseLeases", metadata.as_ref(), &extensions);
                call.leases_released(&operator.caller, &meant.to_string(), response.released);
            }
            Ok(Response::new(response))
        };
        answer.await.or_else(self.refused("ReleaseLeases", (&metadata, &extensions)))
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
pub fn serve_admin<B: Broker + Bus>(
    name: &str,
    gatekeeper: Arc<Gatekeeper>,
    inspector: Arc<Inspector<B>>,
    stop: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + 'static, AdminSocketError> {
    let listener = LocalListener::bind(name)
        .map_err(|error| AdminSocketError::Listen(name.to_owned(), error))?;
    let routes = reflected(Routes::new(Admin::server(gatekeeper, inspector)))?.prepare();
    let service = move |user| {
        ServiceBuilder::new()
            .layer(MiddlewareLayer(LocalUser(user)))
            .layer(MiddlewareLayer(ErrorReasons))
            .service(LastService(routes.clone()))
    };
    Ok(listener.serve(service, stop))
}

/// Each request carries the user at the other end.
impl<S, R, B> Middleware<HttpRequest<R>, S> for LocalUser
where
    S: InnerService<HttpRequest<R>, Response = HttpResponse<B>>,
    R: Send + 'static,
    B: 'static,
{
    type Response = S::Response;
    type Error = S::Error;

    fn handle(
        &self,
        mut request: HttpRequest<R>,
        next: Next<'_, S>,
    ) -> impl Future<Output = Result<S::Response, S::Error>> + Send + 'static {
        request.extensions_mut().insert(*self);
        next.run(request)
    }
}
