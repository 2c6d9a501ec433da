//! The methods that the listener for clients serves, by the path of a request.

/// The full name of the service for operators.
const ADMIN_SERVICE: &str = "fetchproxy.v1.AdminService";
/// The service's full name, as health and reflection call it.
pub const SERVICE: &str = "fetchproxy.v1.FetchService";

const METHODS: [&str; 15] = [
    "Fetch",
    "GiveBack",
    "Ack",
    "Nak",
    "Term",
    "Extend",
    "Settle",
    "GetConsumer",
    "Consume",
    "WhoAmI",
    "ListReplicas",
    "ListConsumers",
    "ListLeases",
    "ListConnections",
    "ReleaseLeases",
];

/// The kind of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallKind {
    /// `Fetch` of our service.
    Fetch,
    /// `Settle` of our service.
    Settle,
    /// `Consume` of our service, a stream.
    Consume,
    /// Another method of our service.
    Ours,
    /// A method of the service for operators.
    Admin,
    /// A health check.
    Check,
    /// A stream of health.
    Watch,
    /// A stream of reflection.
    Reflection,
    /// No method that is served.
    Other,
}

impl CallKind {
    /// The kind of a call to `path`, which is `/SERVICE/METHOD`.
    pub(super) fn of(path: &str) -> Self {
        let Some((service, method)) = path.strip_prefix('/').and_then(|path| path.split_once('/'))
        else {
            return Self::Other;
        };
        match (service, method) {
            (SERVICE, "Fetch") => Self::Fetch,
            (SERVICE, "Settle") => Self::Settle,
            (SERVICE, "Consume") => Self::Consume,
            (SERVICE, _) => Self::Ours,
            (ADMIN_SERVICE, _) => Self::Admin,
            ("grpc.health.v1.Health", "Check") => Self::Check,
            ("grpc.health.v1.Health", "Watch") => Self::Watch,
            (service, _) if service.starts_with("grpc.reflection.") => Self::Reflection,
            _ => Self::Other,
        }
    }

    /// The method of a call to `path`, if it is a method of ours.
    pub(super) fn method(path: &str) -> &'static str {
        let method = path.rsplit('/').next();
        METHODS.into_iter().find(|known| method == Some(known)).unwrap_or("another method")
    }

    /// Whether `path` is a method of ours that is served.
    pub(super) fn is_known(path: &str) -> bool {
        let method = path.trim_start_matches('/').split_once('/').map(|(_, method)| method);
        METHODS.into_iter().any(|known| method == Some(known))
    }

    /// The number of the repeated field with settlements of its request, if the request has one.
    pub(super) fn settlements(self) -> Option<u32> {
        match self {
            Self::Fetch => Some(14),
            Self::Settle => Some(1),
            Self::Consume
            | Self::Ours
            | Self::Admin
            | Self::Check
            | Self::Watch
            | Self::Reflection
            | Self::Other => None,
        }
    }

    /// Its name, for the log.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fetch => "Fetch",
            Self::Settle => "Settle",
            Self::Consume => "Consume",
            Self::Ours => "a settlement",
            Self::Admin => "a call for operators",
            Self::Check | Self::Watch => "health",
            Self::Reflection => "reflection",
            Self::Other => "another method",
        }
    }

    /// Whether it is a call of one of our services.
    pub(super) fn is_ours(self) -> bool {
        matches!(self, Self::Fetch | Self::Settle | Self::Consume | Self::Ours | Self::Admin)
    }

    /// Whether a call of this kind waits for messages.
    pub(super) fn is_waiter(self) -> bool {
        matches!(self, Self::Fetch | Self::Consume)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb;

    #[test]
    fn field_with_settlements_is_that_of_the_contract() {
        let pool = prost_reflect::DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).unwrap();
        let service = pool.get_service_by_name(SERVICE).unwrap();
        for method in service.methods() {
            let kind = CallKind::of(&format!("/{SERVICE}/{}", method.name()));
            let field = method.input().get_field_by_name("settlements");
            assert_eq!(kind.settlements(), field.map(|it| it.number()), "{}", method.name());
        }
    }
}
