//! Credentials as callers send them: in the `authorization` header, or as the certificate of their connection.

use std::{fmt, sync::Arc, time::Duration};

use super::{
    api_key::{ApiKeyDigest, ApiKeys},
    identity::Identity,
};

/// Longest value of the header, in bytes.
const MAX_BEARER_BYTES: usize = 8 * 1024;
const SCHEME: &str = "bearer";

/// The credential of a call. A secret in it is kept as a digest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Credential {
    /// The caller has sent none.
    Missing,
    /// An API key.
    ApiKey(ApiKeyDigest),
    /// The certificate of the connection.
    Certificate(CertifiedClient),
    /// A JSON Web Token. Nothing of it is checked yet.
    Token(BearerToken),
}

/// A client as its verified certificate names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertifiedClient {
    /// Its identities: one `spiffe://…`, or one `dns:…` for each DNS name, or none.
    pub identities: Arc<[Identity]>,
    /// The end of the certificate, since the Unix epoch.
    pub not_after: Duration,
    /// Tells one certificate from another: the beginning of its SHA-256, in hexadecimal digits.
    pub digest: Arc<str>,
}

/// A JSON Web Token as it was sent. It is shown nowhere.
#[derive(Clone, PartialEq, Eq)]
pub struct BearerToken(pub(super) Arc<str>);

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken")
    }
}

/// The reason why there is no caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NotAccepted {
    /// The credential is not accepted.
    Unauthenticated(Unauthenticated),
    /// The keys of the issuer with this name are not here. So nobody can say whether the token is good.
    KeysAway(Arc<str>),
    /// The issuer with this name has no such key, as far as is known here.
    UnknownKey(Arc<str>),
}

impl From<Unauthenticated> for NotAccepted {
    fn from(why: Unauthenticated) -> Self {
        Self::Unauthenticated(why)
    }
}

/// The reason why a credential is not accepted. It tells a guesser nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unauthenticated {
    /// There is none, and the policy asks for one.
    Missing,
    /// The header is not one `Bearer` credential of a kind that is known.
    Malformed,
    /// The API key is not known, or has expired.
    ApiKey,
    /// The token is by an issuer that the policy does not name.
    Issuer,
    /// The algorithm of the token is not accepted, or its key is for another algorithm.
    Algorithm,
    /// The issuer has no key of the name that the token gives.
    UnknownKey,
    /// The signature of the token is not by its issuer.
    Signature,
    /// The token is for others.
    Audience,
    /// The credential has ended.
    Expired,
    /// The token is not valid yet.
    NotYetValid,
    /// The token lives for longer than the policy allows.
    Lifetime,
    /// This claim of the token is missing or wrong.
    Claim(&'static str),
}

impl Unauthenticated {
    /// One for each reason on the wire.
    pub const ALL: [Self; 11] = [
        Self::Missing,
        Self::Malformed,
        Self::ApiKey,
        Self::Issuer,
        Self::Algorithm,
        Self::UnknownKey,
        Self::Signature,
        Self::Audience,
        Self::Expired,
        Self::NotYetValid,
        Self::Lifetime,
    ];

    /// The reason on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed | Self::Claim(_) => "malformed",
            Self::ApiKey => "api_key",
            Self::Issuer => "issuer",
            Self::Algorithm => "algorithm",
            Self::UnknownKey => "unknown_key",
            Self::Signature => "signature",
            Self::Audience => "audience",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::Lifetime => "lifetime",
        }
    }

    /// The reason in words.
    pub fn message(self) -> String {
        let words = match self {
            Self::Missing => {
                "the call has no credential: send the header `authorization: Bearer …`, or show a \
                 client certificate with a SPIFFE ID or a DNS name"
            }
            Self::Malformed => {
                "the header `authorization` must be there once, with `Bearer` and an API key or a \
                 JSON Web Token"
            }
            Self::ApiKey => "the API key is not known here, or has expired",
            Self::Issuer => "the policy does not name the issuer of the token",
            Self::Algorithm => {
                "the algorithm of the token is not accepted, or is not that of its key"
            }
            Self::UnknownKey => "the issuer of the token has no such key",
            Self::Signature => "the signature of the token is not by its issuer",
            Self::Audience => "the token is for another audience",
            Self::Expired => "the credential has ended",
            Self::NotYetValid => "the token is not valid yet",
            Self::Lifetime => "the token lives for longer than the policy allows",
            Self::Claim(claim) => {
                return format!("the claim `{claim}` of the token is missing or wrong");
            }
        };
        words.to_owned()
    }
}

impl Credential {
    /// Reads the values of all `authorization` headers of a call. A header that cannot be read is never
    /// treated as a missing header.
    ///
    /// # Errors
    /// [`Unauthenticated::Malformed`], or [`Unauthenticated::ApiKey`] for a key of another length.
    pub fn read<'h>(headers: impl IntoIterator<Item = &'h [u8]>) -> Result<Self, Unauthenticated> {
        let mut headers = headers.into_iter();
        let Some(header) = headers.next() else { return Ok(Self::Missing) };
        if headers.next().is_some() || header.len() > MAX_BEARER_BYTES {
            return Err(Unauthenticated::Malformed);
        }
        let text = str::from_utf8(header).map_err(|_| Unauthenticated::Malformed)?;
        let (scheme, token) = text.split_once(' ').ok_or(Unauthenticated::Malformed)?;
        let token = token.trim_matches(' ');
        if !scheme.eq_ignore_ascii_case(SCHEME) {
            return Err(Unauthenticated::Malformed);
        }
        if ApiKeys::is_key(token) {
            return ApiKeyDigest::of(token).map(Self::ApiKey).ok_or(Unauthenticated::ApiKey);
        }
        // The parts of a token are base64url, and none of them is empty.
        let part = |part: &str| {
            let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_');
            !part.is_empty() && part.bytes().all(fits)
        };
        match token.split('.').filter(|text| part(text)).count() {
            3 if token.matches('.').count() == 2 => Ok(Self::Token(BearerToken(token.into()))),
            _ => Err(Unauthenticated::Malformed),
        }
    }

    /// The certificate of the connection counts if there is no other credential, and if it names somebody.
    #[must_use]
    pub fn or(self, certificate: Option<&CertifiedClient>) -> Self {
        match (self, certificate) {
            (Self::Missing, Some(client)) if !client.identities.is_empty() => {
                Self::Certificate(client.clone())
            }
            (credential, _) => credential,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(headers: &[&[u8]]) -> Result<Credential, Unauthenticated> {
        Credential::read(headers.iter().copied())
    }

    #[test]
    fn header_is_one_bearer_credential_or_a_mistake() {
        let key = format!("fpk_{}", "a".repeat(43));
        let good = ["Bearer ", "bearer ", "BEARER   "].map(|scheme| format!("{scheme}{key}"));
        for header in &good {
            let digest = ApiKeyDigest::of(&key).unwrap();
            assert_eq!(read(&[header.as_bytes()]), Ok(Credential::ApiKey(digest)), "{header}");
        }
        assert_eq!(read(&[]), Ok(Credential::Missing));
        let short = "Bearer fpk_short".to_owned();
        assert_eq!(read(&[short.as_bytes()]), Err(Unauthenticated::ApiKey));
        let long = format!("Bearer fpk_{}", "a".repeat(9000));
        for header in [
            "",
            "Bearer",
            "Bearer ",
            &key,
            "Basic dTpw",
            "Bearer a.b",
            "Bearer a.b.",
            "Bearer a.b.c.d",
            "Bearer a.b.c d",
            "Bearer a.b.c=",
            "Bearer x fpk_",
            &long,
        ] {
            assert_eq!(read(&[header.as_bytes()]), Err(Unauthenticated::Malformed), "{header}");
        }
        let token = read(&[b"Bearer a.b.c"]).unwrap();
        assert_eq!(token, Credential::Token(BearerToken("a.b.c".into())));
        assert!(!format!("{token:?}").contains("a.b.c"));
        let twice = [good[0].as_bytes(), good[0].as_bytes()];
        assert_eq!(read(&twice), Err(Unauthenticated::Malformed));
        assert_eq!(read(&[b"Bearer \xff"]), Err(Unauthenticated::Malformed));
    }

    #[test]
    fn certificate_counts_only_for_a_call_without_a_header() {
        let client = |identities: &[Identity]| CertifiedClient {
            identities: identities.into(),
            not_after: Duration::MAX,
            digest: "".into(),
        };
        let named = client(&[Identity::parse("dns:a.example").unwrap()]);
        let certified = Credential::Certificate(named.clone());
        assert_eq!(Credential::Missing.or(Some(&named)), certified);
        assert_eq!(Credential::Missing.or(None), Credential::Missing);
        assert_eq!(Credential::Missing.or(Some(&client(&[]))), Credential::Missing);
        let key = format!("fpk_{}", "a".repeat(43));
        let key = Credential::ApiKey(ApiKeyDigest::of(&key).unwrap());
        assert_eq!(key.clone().or(Some(&named)), key);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(3000))]

        #[test]
        fn any_header_is_read_without_a_panic_and_is_never_missing(
            bytes in prop::collection::vec(any::<u8>(), 0..80), text in "(?i:bearer )?(fpk_)?.{0,50}",
        ) {
            prop_assert_ne!(read(&[&bytes]), Ok(Credential::Missing));
            prop_assert_ne!(read(&[text.as_bytes()]), Ok(Credential::Missing));
        }
    }
}
