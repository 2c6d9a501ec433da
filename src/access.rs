//! Who calls, and what each caller may do. Reads the policy file, the file of API keys and the key sets of issuers, and
//! decides by them. Pure: no file is read here, and `now` is an argument.
//!
//! ```text
//!  credential ─▶ identity ──match──▶ principal ──rules──▶ verbs on a stream and a consumer
//!                key:laptop-anna     orders               fetch, settle, extend
//! ```
//! 1. An identity is exactly one principal: the first in the file with a pattern that matches.
//! 2. Rules only allow. So their order decides nothing, and an absent rule denies.
//! 3. A pattern is matched against the whole text, and a lone `*` matches each text.
//! 4. A file with a mistake is no policy: nothing of it counts.

mod account;
mod api_key;
mod bearer_cache;
mod bucket;
mod compiled;
mod credential;
mod diff;
mod document;
mod explain;
mod fields;
mod identity;
mod issuer;
mod jwt;
mod key_set;
mod pattern;
mod place;
mod rights;
mod signature;
mod token_algorithm;
mod verbs;
mod warnings;

pub use self::{
    account::{CallAccount, OverLimit, ReachedLimit},
    api_key::{ApiKeyDigest, ApiKeys, ApiKeysError, NewApiKey},
    bearer_cache::BearerCache,
    compiled::{Policy, Principal},
    credential::{BearerToken, CertifiedClient, Credential, NotAccepted, Unauthenticated},
    diff::diff,
    document::{Authenticate, PrincipalLimits},
    explain::{AskedRight, Explanation},
    identity::{Identity, IdentityError, IdentityKind},
    issuer::{Issuer, KeyPlace, KeySource, key_url},
    jwt::KeySets,
    key_set::{KeySet, KeySetError},
    pattern::Pattern,
    place::PolicyError,
    rights::{ANONYMOUS_PRINCIPAL, DenialCause, Denied, KnownCaller, RightLost, Rights, Settler},
    verbs::{Verb, VerbSet},
    warnings::warnings,
};
