//! Rights: which caller a credential is, and what this caller may do at this moment.
//!
//! Without a policy, everybody is the principal `anonymous` and may do everything.

use std::{sync::Arc, time::Duration};

use super::{
    api_key::ApiKeys,
    compiled::Policy,
    credential::{Credential, NotAccepted, Unauthenticated},
    document::PrincipalLimits,
    identity::Identity,
    jwt::{self, KeySets},
    verbs::{Verb, VerbSet},
};

/// The principal of everybody while there is no policy, and of tokens from that time.
pub const ANONYMOUS_PRINCIPAL: &str = "anonymous";

/// A policy and its API keys, as they were read together, and the keys of its issuers.
#[derive(Debug, Clone)]
pub struct Rights {
    policy: Option<Arc<Policy>>,
    api_keys: Arc<ApiKeys>,
    /// The keys of issuers that are here.
    key_sets: KeySets,
    /// Higher with each change.
    generation: u64,
}

/// The caller of one call.
#[derive(Debug, Clone)]
pub struct KnownCaller {
    /// The identity that its credential gave.
    pub identity: Identity,
    /// The name of its principal. `None`: no principal matches, and it may do nothing.
    pub principal: Option<Arc<str>>,
    /// The time at which its credential ends, since the Unix epoch.
    pub until: Option<Duration>,
    pub(super) credential: Credential,
    /// The generation of the rights that accepted it.
    generation: u64,
}

/// A right that a caller does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Denied {
    /// The caller.
    pub identity: Identity,
    /// The principal of the caller.
    pub principal: Option<Arc<str>>,
    /// The kind of call.
    pub verb: Verb,
    /// The stream and the consumer, as far as the caller knows them.
    pub consumer: Option<(Arc<str>, Arc<str>)>,
    /// The reason.
    pub why: DenialCause,
}

/// The reason why a caller does not have a right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DenialCause {
    /// No rule allows it.
    NoRule,
    /// No principal matches the identity.
    NoPrincipal,
    /// The token belongs to another principal.
    ForeignToken,
    /// The token does not name its consumer in a form that is known.
    UnknownConsumer,
    /// There is no policy, so no call for operators is allowed.
    NoPolicy,
}

impl Rights {
    /// The rights without a policy.
    pub fn open() -> Self {
        Self { policy: None, api_keys: Arc::default(), key_sets: KeySets::new(), generation: 0 }
    }

    /// The rights by a policy.
    pub fn new(policy: Policy, api_keys: ApiKeys, generation: u64) -> Self {
        let (policy, api_keys) = (Some(policy.into()), api_keys.into());
        Self { policy, api_keys, key_sets: KeySets::new(), generation }
    }

    /// The same with other keys of issuers, as the next generation.
    #[must_use]
    pub fn with_key_sets(&self, key_sets: KeySets) -> Self {
        Self { key_sets, generation: self.generation + 1, ..self.clone() }
    }

    /// The keys of issuers that are here.
    pub fn key_sets(&self) -> &KeySets {
        &self.key_sets
    }

    /// The policy, if there is one.
    pub fn policy(&self) -> Option<&Policy> {
        self.policy.as_deref()
    }

    /// The limits of a principal. Without a policy, and for a name that the policy does not have, there are
    /// none.
    pub fn limits_of(&self, principal: &str) -> PrincipalLimits {
        let principal = self.policy().and_then(|policy| policy.principal(principal));
        principal.map_or_else(PrincipalLimits::default, |principal| principal.limits)
    }

    /// Whether the policy has a principal of this name.
    pub fn has_principal(&self, name: &str) -> bool {
        self.policy().is_some_and(|policy| policy.principal(name).is_some())
    }

    /// The number of API keys.
    pub fn api_keys(&self) -> usize {
        self.api_keys.len()
    }

    /// The number of this state of the rights.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The caller with this credential. `now` is the time since the Unix epoch.
    ///
    /// # Errors
    /// The credential is not accepted.
    pub fn caller(
        &self,
        credential: Credential,
        now: Duration,
    ) -> Result<KnownCaller, NotAccepted> {
        let generation = self.generation;
        let Some(policy) = &self.policy else {
            let principal = Some(ANONYMOUS_PRINCIPAL.into());
            let identity = Identity::anonymous();
            return Ok(KnownCaller { identity, principal, until: None, credential, generation });
        };
        let (identity, until) = match &credential {
            Credential::Missing if policy.authenticate().anonymous => (Identity::anonymous(), None),
            Credential::Missing => return Err(Unauthenticated::Missing.into()),
            Credential::ApiKey(key) => {
                let (identity, until) =
                    self.api_keys.find(key, now).ok_or(Unauthenticated::ApiKey)?;
                (identity.clone(), until)
            }
            Credential::Certificate(client) if client.not_after <= now => {
                return Err(Unauthenticated::Expired.into());
            }
            Credential::Certificate(client) => {
                let mut matching = client.identities.iter();
                let matching = matching.find(|identity| policy.principal_of(identity).is_some());
                let identity = matching.or(client.identities.first());
                let identity = identity.ok_or(Unauthenticated::Missing)?;
                (identity.clone(), Some(client.not_after))
            }
            Credential::Token(token) => {
                let (identity, until) =
                    jwt::identity_of(&token.0, policy.issuers(), &self.key_sets, now)?;
                (identity, Some(until))
            }
        };
        let principal = policy.principal_of(&identity).map(|principal| principal.name.clone());
        Ok(KnownCaller { identity, principal, until, credential, generation })
    }

    /// The process of this user on this machine.
    pub fn local_caller(&self, user: u32) -> KnownCaller {
        let identity = Identity::local(user);
        let principal = self.policy.as_ref().and_then(|policy| policy.principal_of(&identity));
        KnownCaller {
            principal: principal.map(|principal| principal.name.clone()),
            identity,
            until: None,
            credential: Credential::Missing,
            generation: self.generation,
        }
    }

    /// The verbs that the caller has at some consumer.
    pub fn verbs_of(&self, caller: &KnownCaller) -> VerbSet {
        match (&self.policy, &caller.principal) {
            (None, _) => Verb::ALL.into_iter().collect(),
            (Some(_), None) => VerbSet::NONE,
            (Some(policy), Some(principal)) => policy.verbs_of(principal),
        }
    }

    /// Whether calls for operators are allowed at the client port.
    ///
    /// # Errors
    /// There is no policy, which could say who is an operator.
    pub fn admits_operators(&self, caller: &KnownCaller) -> Result<(), Denied> {
        match self.policy {
            Some(_) => Ok(()),
            None => Err(caller.denied(Verb::Inspect, DenialCause::NoPolicy)),
        }
    }

    /// Whether the caller may do this at some consumer.
    ///
    /// # Errors
    /// The right that it does not have.
    pub fn may_somewhere(&self, caller: &KnownCaller, verb: Verb) -> Result<(), Denied> {
        let may = self.verbs_of(caller).has(verb);
        if may { Ok(()) } else { Err(caller.denied(verb, caller.without_rule())) }
    }

    /// Whether one rule allows this to the caller for all streams and all consumers.
    ///
    /// # Errors
    /// The right that it does not have.
    pub fn may_everywhere(&self, caller: &KnownCaller, verb: Verb) -> Result<(), Denied> {
        let may = match (&self.policy, &caller.principal) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(policy), Some(principal)) => policy.allows_everywhere(principal, verb),
        };
        if may { Ok(()) } else { Err(caller.denied(verb, caller.without_rule())) }
    }

    /// Whether the caller may do this with the consumer.
    ///
    /// # Errors
    /// The right that it does not have.
    pub fn may(
        &self,
        caller: &KnownCaller,
        verb: Verb,
        (stream, consumer): (&str, &str),
    ) -> Result<(), Denied> {
        let Some(policy) = &self.policy else { return Ok(()) };
        let denied = |why| {
            let consumer = Some((stream.into(), consumer.into()));
            Err(Denied { consumer, ..caller.denied(verb, why) })
        };
        match &caller.principal {
            None => denied(DenialCause::NoPrincipal),
            Some(name) if policy.allows(name, verb, stream, consumer) => Ok(()),
            Some(_) => denied(DenialCause::NoRule),
        }
    }

    /// The line of the first rule that allows this to the caller. `None`: there is no policy, or no such rule.
    pub fn rule_line(
        &self,
        caller: &KnownCaller,
        verb: Verb,
        consumer: (&str, &str),
    ) -> Option<usize> {
        self.policy.as_ref()?.rule_line(caller.principal.as_deref()?, verb, consumer)
    }

    /// Whether the caller, which was accepted earlier, is still the same principal and may still do this. To be
    /// asked before something is handed to a caller that has waited.
    ///
    /// # Errors
    /// The caller is not accepted any more, or is another principal, or does not have the right.
    pub fn still_may(
        &self,
        caller: &KnownCaller,
        verb: Verb,
        consumer: (&str, &str),
        now: impl FnOnce() -> Duration,
    ) -> Result<(), RightLost> {
        if caller.generation == self.generation {
            return Ok(());
        }
        let again = self.caller(caller.credential.clone(), now())?;
        if again.principal != caller.principal {
            let consumer = Some((consumer.0.into(), consumer.1.into()));
            return Err(Denied { consumer, ..caller.denied(verb, DenialCause::NoRule) }.into());
        }
        Ok(self.may(&again, verb, consumer)?)
    }
}

/// The reason why a caller lost a right while it waited.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RightLost {
    /// Its credential is not accepted any more.
    NotAccepted(NotAccepted),
    /// It does not have the right any more.
    Denied(Denied),
}

impl From<NotAccepted> for RightLost {
    fn from(why: NotAccepted) -> Self {
        Self::NotAccepted(why)
    }
}

impl From<Denied> for RightLost {
    fn from(denied: Denied) -> Self {
        Self::Denied(denied)
    }
}

impl KnownCaller {
    /// The reason why nothing allows something to this caller.
    fn without_rule(&self) -> DenialCause {
        if self.principal.is_some() { DenialCause::NoRule } else { DenialCause::NoPrincipal }
    }

    /// This caller does not have the right. The consumer is left out.
    fn denied(&self, verb: Verb, why: DenialCause) -> Denied {
        let (identity, principal) = (self.identity.clone(), self.principal.clone());
        Denied { identity, principal, verb, consumer: None, why }
    }
}

/// The caller of settlements, with the rights at the beginning of its call.
#[derive(Debug, Clone)]
pub struct Settler {
    rights: Arc<Rights>,
    caller: KnownCaller,
}

impl Settler {
    /// This caller, with these rights.
    pub fn new(rights: Arc<Rights>, caller: KnownCaller) -> Self {
        Self { rights, caller }
    }

    /// The caller.
    pub fn caller(&self) -> &KnownCaller {
        &self.caller
    }

    /// The rights at the beginning of its call.
    pub fn rights(&self) -> &Rights {
        &self.rights
    }

    /// Whether the caller may do this to the lease of a token. `consumer` is the consumer that the token
    /// names, and `owner` its principal. Returns the principal that the lease must have. `None`: any.
    ///
    /// # Errors
    /// The right that the caller does not have. The consumer is left out, because only the token names it.
    pub fn may(
        &self,
        verb: Verb,
        consumer: Option<(&str, &str)>,
        owner: &str,
    ) -> Result<Option<Arc<str>>, Denied> {
        let Some(policy) = &self.rights.policy else { return Ok(None) };
        let unknown = || self.caller.denied(verb, DenialCause::UnknownConsumer);
        let consumer = consumer.ok_or_else(unknown)?;
        let without_consumer = |denied| Denied { consumer: None, ..denied };
        self.rights.may(&self.caller, verb, consumer).map_err(without_consumer)?;
        if self.caller.principal.as_deref() == Some(owner) {
            return Ok(self.caller.principal.clone());
        }
        let from_before =
            policy.authenticate().accept_anonymous_tokens && owner == ANONYMOUS_PRINCIPAL;
        if from_before || self.rights.may(&self.caller, Verb::SettleAny, consumer).is_ok() {
            return Ok(None);
        }
        Err(self.caller.denied(verb, DenialCause::ForeignToken))
    }
}

impl Denied {
    /// The detail on the wire, if there is one.
    pub fn detail(&self) -> Option<&'static str> {
        match self.why {
            DenialCause::NoRule => None,
            DenialCause::NoPrincipal => Some("no_principal"),
            DenialCause::ForeignToken => Some("foreign_token"),
            DenialCause::UnknownConsumer => Some("unknown_consumer"),
            DenialCause::NoPolicy => Some("no_policy"),
        }
    }

    /// The right in words.
    pub fn message(&self) -> String {
        let name = self.principal.as_deref().unwrap_or_default();
        let verb = self.verb.name();
        match (self.why, &self.consumer) {
            (DenialCause::NoPrincipal, _) => {
                format!("the policy has no principal for the identity `{}`", self.identity)
            }
            (DenialCause::ForeignToken, _) => {
                format!("the token belongs to another principal than `{name}`")
            }
            (DenialCause::UnknownConsumer, _) => {
                "the token does not name its consumer in a known form".to_owned()
            }
            (DenialCause::NoPolicy, _) => {
                "calls for operators need a policy here: use the admin socket".to_owned()
            }
            (DenialCause::NoRule, Some((stream, consumer))) => {
                format!("principal `{name}` may not {verb} at consumer `{consumer}` of `{stream}`")
            }
            (DenialCause::NoRule, None) if matches!(self.verb, Verb::Inspect | Verb::Admin) => {
                format!("no rule allows `{verb}` for this call to principal `{name}`")
            }
            (DenialCause::NoRule, None) => {
                format!("principal `{name}` may not {verb} at the consumer of the token")
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::{ApiKeyDigest, CertifiedClient, NewApiKey};

    const NOW: Duration = Duration::from_secs(1_800_000_000);
    const ORDERS: (&str, &str) = ("ORDERS", "worker");

    const POLICY: &str = "
version: 1
authenticate: {api_keys: {file: keys}}
principals:
- {name: orders, match: ['key:orders-*']}
- {name: dispatcher, match: ['key:dispatcher']}
- {name: reader, match: ['key:reader']}
rules:
- {principals: [orders], streams: [ORDERS], consumers: ['worker*'], verbs: [work]}
- {principals: [dispatcher], streams: ['*'], consumers: ['*'], verbs: [settle-any]}
- {principals: [reader], streams: [ORDERS], consumers: ['*'], verbs: [fetch, settle]}
";

    /// The secrets of API keys with these names, and their file.
    struct Keys(Vec<NewApiKey>);

    impl Keys {
        fn new(names: &[&str]) -> Self {
            Self(names.iter().map(|name| NewApiKey::random(name).unwrap().unwrap()).collect())
        }

        fn rights(&self, policy: &str, generation: u64) -> Rights {
            let lines: Vec<_> = self.0.iter().map(|key| key.line.clone()).collect();
            let keys = ApiKeys::parse(&lines.join("\n")).unwrap();
            Rights::new(Policy::parse(policy).unwrap(), keys, generation)
        }

        fn caller(&self, rights: &Rights, place: usize) -> KnownCaller {
            let digest = ApiKeyDigest::of(&self.0[place].secret).unwrap();
            rights.caller(Credential::ApiKey(digest), NOW).unwrap()
        }
    }

    #[test]
    fn everybody_is_anonymous_and_may_do_everything_without_a_policy() {
        let rights = Rights::open();
        let caller = rights.caller(Credential::Missing, NOW).unwrap();
        assert_eq!(caller.principal.as_deref(), Some(ANONYMOUS_PRINCIPAL));
        for verb in Verb::ALL {
            assert_eq!(rights.may(&caller, verb, ORDERS), Ok(()));
        }
        let settler = Settler::new(rights.into(), caller);
        assert_eq!(settler.may(Verb::Settle, None, "orders"), Ok(None));
    }

    #[test]
    fn caller_without_an_accepted_credential_is_nobody() {
        let keys = Keys::new(&["orders-1"]);
        let rights = keys.rights(POLICY, 1);
        let refused = rights.caller(Credential::Missing, NOW).unwrap_err();
        assert_eq!(refused, Unauthenticated::Missing.into());
        let other = Keys::new(&["orders-1"]);
        let digest = ApiKeyDigest::of(&other.0[0].secret).unwrap();
        let refused = rights.caller(Credential::ApiKey(digest), NOW).unwrap_err();
        assert_eq!(refused, Unauthenticated::ApiKey.into());
        let open = POLICY.replace("authenticate: {", "authenticate: {anonymous: true, ");
        let caller = keys.rights(&open, 1).caller(Credential::Missing, NOW).unwrap();
        assert_eq!((caller.identity, caller.principal), (Identity::anonymous(), None));
    }

    /// The credential of a certificate with these identities.
    fn certificate(identities: &[&str], not_after: Duration) -> Credential {
        let identities = identities.iter().map(|text| Identity::parse(text).unwrap()).collect();
        Credential::Missing.or(Some(&CertifiedClient { identities, not_after, digest: "".into() }))
    }

    #[test]
    fn certificate_is_the_first_of_its_names_that_a_principal_matches() {
        let policy = POLICY.replace("'key:reader'", "'dns:*.orders', 'spiffe://prod/*', 'dns:b'");
        let rights = Keys::new(&[]).rights(&policy, 1);
        let end = NOW + Duration::from_secs(1);
        for (identities, identity, principal) in [
            (&["spiffe://prod/ns/a"][..], "spiffe://prod/ns/a", Some("reader")),
            (&["spiffe://test/ns/a"], "spiffe://test/ns/a", None),
            (&["dns:x", "dns:b", "dns:a.orders"], "dns:b", Some("reader")),
            (&["dns:x", "dns:y"], "dns:x", None),
        ] {
            let caller = rights.caller(certificate(identities, end), NOW).unwrap();
            assert_eq!(
                (caller.identity.as_str(), caller.principal.as_deref()),
                (identity, principal)
            );
            assert_eq!(caller.until, Some(end));
        }
        let ended = rights.caller(certificate(&["dns:b"], NOW), NOW).unwrap_err();
        assert_eq!(ended, Unauthenticated::Expired.into());
        // Nothing of it counts without a policy.
        let caller = Rights::open().caller(certificate(&["dns:b"], end), NOW).unwrap();
        assert_eq!(caller.identity, Identity::anonymous());
    }

    #[test]
    fn right_is_asked_by_verb_stream_and_consumer() {
        let keys = Keys::new(&["orders-1", "nobody", "dispatcher"]);
        let rights = keys.rights(POLICY, 1);
        let [orders, nobody, dispatcher] = [0, 1, 2].map(|place| keys.caller(&rights, place));
        assert_eq!(rights.may(&orders, Verb::Fetch, ORDERS), Ok(()));
        for (caller, verb, consumer, why) in [
            (&orders, Verb::Fetch, ("OTHER", "worker"), DenialCause::NoRule),
            (&orders, Verb::Fetch, ("ORDERS", "other"), DenialCause::NoRule),
            (&orders, Verb::Admin, ORDERS, DenialCause::NoRule),
            (&nobody, Verb::Fetch, ORDERS, DenialCause::NoPrincipal),
            (&dispatcher, Verb::Fetch, ORDERS, DenialCause::NoRule),
        ] {
            let denied = rights.may(caller, verb, consumer).unwrap_err();
            assert_eq!(denied.why, why, "{denied:?}");
            let (stream, name) = denied.consumer.clone().unwrap();
            assert_eq!((&*stream, &*name), consumer);
        }
    }

    #[test]
    fn token_is_settled_by_its_principal_or_by_the_right_to_settle_any() {
        let keys = Keys::new(&["orders-1", "orders-2", "dispatcher", "reader"]);
        let of = |policy: &str, place| {
            let rights = keys.rights(policy, 1);
            let caller = keys.caller(&rights, place);
            Settler::new(rights.into(), caller)
        };
        let why = |denied: Result<_, Denied>| denied.map_err(|denied| denied.why);
        for place in [0, 1] {
            let own = of(POLICY, place).may(Verb::Extend, Some(ORDERS), "orders");
            assert_eq!(own, Ok(Some("orders".into())), "each identity of the principal");
        }
        assert_eq!(of(POLICY, 2).may(Verb::Settle, Some(ORDERS), "orders"), Ok(None));
        let foreign = of(POLICY, 3).may(Verb::Settle, Some(ORDERS), "orders").unwrap_err();
        assert_eq!((foreign.why, foreign.consumer), (DenialCause::ForeignToken, None));
        let extended = of(POLICY, 3).may(Verb::Extend, Some(ORDERS), "reader").unwrap_err();
        assert_eq!((extended.why, extended.consumer), (DenialCause::NoRule, None));
        let unknown = of(POLICY, 0).may(Verb::Settle, None, "orders");
        assert_eq!(why(unknown), Err(DenialCause::UnknownConsumer));

        let before = of(POLICY, 0).may(Verb::Settle, Some(ORDERS), ANONYMOUS_PRINCIPAL);
        assert_eq!(why(before), Err(DenialCause::ForeignToken));
        let accepting =
            POLICY.replace("authenticate: {", "authenticate: {accept_anonymous_tokens: true, ");
        let before = of(&accepting, 0).may(Verb::Settle, Some(ORDERS), ANONYMOUS_PRINCIPAL);
        assert_eq!(before, Ok(None));
        let other = of(&accepting, 0).may(Verb::Settle, Some(ORDERS), "reader");
        assert_eq!(why(other), Err(DenialCause::ForeignToken));
        let elsewhere = of(&accepting, 0).may(Verb::Settle, Some(("A", "b")), ANONYMOUS_PRINCIPAL);
        assert_eq!(why(elsewhere), Err(DenialCause::NoRule));
    }

    #[test]
    fn caller_that_waited_is_asked_again_only_if_the_rights_changed() {
        let keys = Keys::new(&["orders-1"]);
        let before = keys.rights(POLICY, 1);
        let caller = keys.caller(&before, 0);
        let still = |rights: &Rights, now| rights.still_may(&caller, Verb::Fetch, ORDERS, || now);
        assert_eq!(still(&before, NOW), Ok(()));
        assert_eq!(still(&keys.rights(POLICY, 2), NOW), Ok(()));
        let denied = still(&keys.rights(&POLICY.replace("[work]", "[settle]"), 2), NOW);
        assert!(matches!(denied, Err(RightLost::Denied(_))), "{denied:?}");
        let renamed = POLICY.replace("orders,", "renamed,").replace("[orders]", "[renamed]");
        let denied = still(&keys.rights(&renamed, 2), NOW);
        assert!(matches!(denied, Err(RightLost::Denied(_))), "a new name: {denied:?}");
        let revoked = Keys::new(&["orders-1"]).rights(POLICY, 2);
        let lost = RightLost::NotAccepted(Unauthenticated::ApiKey.into());
        assert_eq!(still(&revoked, NOW), Err(lost));
    }
}
