//! Credentials as callers send them: in the `authorization` header, or as the certificate of their connection.

use std::{sync::Arc, time::Duration};

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

/// The reason why a credential is not accepted. It tells a guesser nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unauthenticated {
    /// There is none, and the policy asks for one.
    Missing,
    /// The header is not one `Bearer` credential of a kind that is known.
    Malformed,
    /// The API key is not known, or has expired.
    ApiKey,
    /// The credential has ended.
    Expired,
}

impl Unauthenticated {
    /// The reason on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Missing => "missing",
            Self::Malformed => "malformed",
            Self::ApiKey => "api_key",
            Self::Expired => "expired",
        }
    }

    /// The reason in words.
    pub fn message(self) -> &'static str {
        match self {
            Self::Missing => {
                "the call has no credential: send the header `authorization: Bearer …`, or show a \
                 client certificate with a SPIFFE ID or a DNS name"
            }
            Self::Malformed => {
                "the header `authorization` must be there once, with `Bearer` and an API key"
            }
            Self::ApiKey => "the API key is not known here, or has expired",
            Self::Expired => "the credential has ended",
        }
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
        if !scheme.eq_ignore_ascii_case(SCHEME) || !ApiKeys::is_key(token) {
            return Err(Unauthenticated::Malformed);
        }
        ApiKeyDigest::of(token).map(Self::ApiKey).ok_or(Unauthenticated::ApiKey)
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
        for header in
            ["", "Bearer", "Bearer ", &key, "Basic dTpw", "Bearer a.b.c", "Bearer x fpk_", &long]
        {
            assert_eq!(read(&[header.as_bytes()]), Err(Unauthenticated::Malformed), "{header}");
        }
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
