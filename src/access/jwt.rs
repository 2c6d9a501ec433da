//! JSON Web Tokens: whether a token is accepted, and the identity that it gives.
//!
//! ```text
//!  token ─▶ issuer by `iss` ─▶ algorithm ─▶ key by `kid` ─▶ signature ─▶ claims ─▶ identity, and its end
//! ```
//! 1. No claim is judged before the signature. Only `iss` is read before, to find the keys.
//! 2. The algorithm must be in the list of the issuer, and be of the kind of the key.
//! 3. `iss`, `aud`, `exp` and the subject must be there. No key and no URL in the token is ever used.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use serde::{
    Deserialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;

use super::{
    credential::{NotAccepted, Unauthenticated},
    identity::{Identity, IdentityKind},
    issuer::{Issuer, Subject},
    key_set::{KeySet, NoKey},
    signature::{Claims, SignatureFault},
    token_algorithm::TokenAlgorithm,
};

/// The private claim of Kubernetes, and the beginning of the subject of a service account.
const KUBERNETES_CLAIM: &str = "kubernetes.io";
const SERVICE_ACCOUNT: &str = "system:serviceaccount:";

/// The keys of issuers, by the names of the issuers.
pub type KeySets = BTreeMap<Arc<str>, Arc<KeySet>>;

/// The header, as far as it decides something.
#[derive(Deserialize)]
struct TokenHeader {
    alg: String,
    #[serde(default)]
    kid: Option<String>,
    #[serde(default)]
    crit: Option<IgnoredAny>,
}

/// The claim that is read before the signature is checked.
#[derive(Deserialize)]
struct ClaimedIssuer {
    iss: String,
}

/// The identity that a token gives, and the time at which the token ends. Both times are since the Unix epoch.
pub(super) fn identity_of(
    token: &str,
    issuers: &[Issuer],
    keys: &KeySets,
    now: Duration,
) -> Result<(Identity, Duration), NotAccepted> {
    let malformed = Unauthenticated::Malformed;
    let mut parts = token.split('.');
    let (Some(header), Some(claims), Some(_), None) =
        (parts.next(), parts.next(), parts.next(), parts.next())
    else {
        return Err(malformed.into());
    };
    let header: TokenHeader = read(header).ok_or(malformed)?;
    let ClaimedIssuer { iss } = read(claims).ok_or(malformed)?;
    if header.crit.is_some() {
        return Err(malformed.into());
    }
    let issuer = issuers.iter().find(|issuer| *issuer.issuer == *iss);
    let issuer = issuer.ok_or(Unauthenticated::Issuer)?;
    let algorithm = TokenAlgorithm::named(&header.alg);
    let algorithm = algorithm.filter(|algorithm| issuer.algorithms.contains(algorithm));
    let algorithm = algorithm.ok_or(Unauthenticated::Algorithm)?;
    let away = || NotAccepted::KeysAway(issuer.name.clone());
    let keys = keys.get(&issuer.name).ok_or_else(away)?;
    let key = keys.find(header.kid.as_deref(), algorithm).map_err(|none| match none {
        NoKey::Unknown => NotAccepted::UnknownKey(issuer.name.clone()),
        NoKey::Algorithm => Unauthenticated::Algorithm.into(),
    })?;
    let claims = key.claims(token, algorithm).map_err(|fault| match fault {
        SignatureFault::Malformed => malformed,
        SignatureFault::Signature => Unauthenticated::Signature,
    })?;
    Ok(judge(issuer, &claims, now)?)
}

fn read<T: DeserializeOwned>(part: &str) -> Option<T> {
    serde_json::from_slice(&URL_SAFE_NO_PAD.decode(part).ok()?).ok()
}

/// Judges the claims of a token that this issuer has signed.
fn judge(
    issuer: &Issuer,
    claims: &Claims,
    now: Duration,
) -> Result<(Identity, Duration), Unauthenticated> {
    let claim = Unauthenticated::Claim;
    if claims.get("iss").and_then(Value::as_str) != Some(&*issuer.issuer) {
        return Err(claim("iss"));
    }
    let accepted = |audience: &Value| {
        let accepted = |text: &str| issuer.audiences.iter().any(|accepted| **accepted == *text);
        audience.as_str().is_some_and(accepted)
    };
    let audience = claims.get("aud").ok_or(claim("aud"))?;
    let several = audience.as_array();
    let is_for_us = several.map_or_else(|| accepted(audience), |all| all.iter().any(accepted));
    if !is_for_us {
        return Err(Unauthenticated::Audience);
    }
    let expires = time(claims, "exp")?.ok_or(claim("exp"))?;
    let until = expires.checked_add(issuer.skew).ok_or(claim("exp"))?;
    if now >= until {
        return Err(Unauthenticated::Expired);
    }
    let issued = time(claims, "iat")?;
    let latest = now.saturating_add(issuer.skew);
    for begins in [time(claims, "nbf")?, issued].into_iter().flatten() {
        if begins > latest {
            return Err(Unauthenticated::NotYetValid);
        }
    }
    // A token that does not say when it was made may be as old as can be. Then its rest alone is bounded.
    if expires.saturating_sub(issued.unwrap_or(now)) > issuer.max_lifetime {
        return Err(Unauthenticated::Lifetime);
    }
    Ok((subject(issuer, claims)?, until))
}

/// A time in seconds, with a fraction or without. `None`: the claim is missing.
fn time(claims: &Claims, name: &'static str) -> Result<Option<Duration>, Unauthenticated> {
    let Some(value) = claims.get(name) else { return Ok(None) };
    let seconds = value.as_u64().map(Duration::from_secs);
    let time = seconds.or_else(|| Duration::try_from_secs_f64(value.as_f64()?).ok());
    time.map(Some).ok_or(Unauthenticated::Claim(name))
}

fn subject(issuer: &Issuer, claims: &Claims) -> Result<Identity, Unauthenticated> {
    let text = |claim: &str| claims.get(claim).and_then(Value::as_str);
    let (kind, name) = match &issuer.subject {
        Subject::Claim(claim) => {
            let subject = text(claim).filter(|subject| !subject.is_empty());
            let subject = subject.ok_or(Unauthenticated::Claim("subject"))?;
            (IdentityKind::Jwt, format!("{}/{subject}", issuer.name))
        }
        Subject::ServiceAccount => {
            let claim = Unauthenticated::Claim(KUBERNETES_CLAIM);
            let private = claims.get(KUBERNETES_CLAIM).ok_or(claim)?;
            let named = |name: Option<&Value>| name.and_then(Value::as_str).map(str::to_owned);
            let namespace = named(private.get("namespace")).ok_or(claim)?;
            let account = private.get("serviceaccount").and_then(|account| account.get("name"));
            let account = named(account).ok_or(claim)?;
            let plain = |part: &str| !part.is_empty() && !part.contains(['/', ':']);
            if !plain(&namespace) || !plain(&account) {
                return Err(claim);
            }
            if text("sub") != Some(&*format!("{SERVICE_ACCOUNT}{namespace}:{account}")) {
                return Err(Unauthenticated::Claim("sub"));
            }
            (IdentityKind::ServiceAccount, format!("{namespace}/{account}"))
        }
    };
    Identity::new(kind, &name).map_err(|_| Unauthenticated::Claim("subject"))
}
