//! Identities: one spelling for each kind of credential. The prefixes differ, so no credential of one kind
//! can look like another kind.

use std::{fmt, sync::Arc};

use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};

/// Longest identity, in bytes.
const MAX_IDENTITY_BYTES: usize = 512;
/// Longest identity of a SPIFFE id, in bytes: each implementation must take that many (SPIFFE-ID, section 2.3).
const MAX_SPIFFE_BYTES: usize = 2048;
/// Encoded in an identity, next to bytes that are not ASCII. With `%` among them, two texts never become
/// the same identity.
const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'%');
/// The name of the issuer of service account tokens, in answers and in the log.
pub(super) const KUBERNETES_ISSUER: &str = "kubernetes";
const ANONYMOUS_IDENTITY: &str = "anonymous";

/// The kind of credential that an identity comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IdentityKind {
    /// The SPIFFE id in a client certificate.
    Spiffe,
    /// A DNS name in a client certificate.
    Dns,
    /// The issuer's name in the policy file, a slash, and the subject of a JSON Web Token.
    Jwt,
    /// The namespace, a slash, and the name of a Kubernetes service account.
    ServiceAccount,
    /// The name of an API key.
    ApiKey,
    /// The user id of a process on this machine.
    Local,
}

impl IdentityKind {
    const ALL: [Self; 6] =
        [Self::Spiffe, Self::Dns, Self::Jwt, Self::ServiceAccount, Self::ApiKey, Self::Local];

    fn prefix(self) -> &'static str {
        match self {
            Self::Spiffe => "spiffe://",
            Self::Dns => "dns:",
            Self::Jwt => "jwt:",
            Self::ServiceAccount => "k8s:",
            Self::ApiKey => "key:",
            Self::Local => "local:",
        }
    }

    fn longest(self) -> usize {
        match self {
            Self::Spiffe => MAX_SPIFFE_BYTES,
            Self::Dns | Self::Jwt | Self::ServiceAccount | Self::ApiKey | Self::Local => {
                MAX_IDENTITY_BYTES
            }
        }
    }
}

/// The identity of a caller: printable ASCII without a space. It has at most 512 bytes, or 2048 for a SPIFFE id.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Identity(Arc<str>);

/// The reason why a text is no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// The text begins with no known prefix.
    #[error(
        "must begin with spiffe://, dns:, jwt:, k8s:, key: or local:, or be the word anonymous"
    )]
    Kind,
    /// Nothing follows the prefix.
    #[error("nothing follows the prefix")]
    Empty,
    /// A byte is no printable ASCII, or is a space.
    #[error("must be printable ASCII without a space")]
    Characters,
    /// A DNS name has a capital.
    #[error("names of certificates are in lower case here")]
    Capitals,
    /// The text is too long.
    #[error("must be at most {0} bytes long")]
    Long(usize),
}

impl Identity {
    /// The identity of a caller without a credential.
    pub fn anonymous() -> Self {
        Self(ANONYMOUS_IDENTITY.into())
    }

    /// The identity that a credential of this kind gives. `text` stands after the prefix. Characters that
    /// do not fit are percent-encoded.
    ///
    /// # Errors
    /// [`IdentityError::Empty`], [`IdentityError::Capitals`], or [`IdentityError::Long`] after the encoding.
    pub fn new(kind: IdentityKind, text: &str) -> Result<Self, IdentityError> {
        if text.is_empty() {
            return Err(IdentityError::Empty);
        }
        let encoded = utf8_percent_encode(text, ENCODED);
        let identity = format!("{}{encoded}", kind.prefix());
        Self::checked(kind, &identity)
    }

    /// The identity of a process of this user on this machine.
    pub fn local(user: u32) -> Self {
        Self(format!("{}{user}", IdentityKind::Local.prefix()).into())
    }

    /// Reads an identity as this module writes it.
    ///
    /// # Errors
    /// See [`IdentityError`].
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        if text == ANONYMOUS_IDENTITY {
            return Ok(Self::anonymous());
        }
        let kinds = IdentityKind::ALL.into_iter();
        let found = kinds.filter_map(|kind| Some((kind, text.strip_prefix(kind.prefix())?))).next();
        match found {
            None => Err(IdentityError::Kind),
            Some((_, "")) => Err(IdentityError::Empty),
            Some((_, rest)) if !rest.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Err(IdentityError::Characters)
            }
            Some((kind, _)) => Self::checked(kind, text),
        }
    }

    fn checked(kind: IdentityKind, text: &str) -> Result<Self, IdentityError> {
        if text.len() > kind.longest() {
            return Err(IdentityError::Long(kind.longest()));
        }
        if kind == IdentityKind::Dns && text.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Err(IdentityError::Capitals);
        }
        Ok(Self(text.into()))
    }

    /// The name of the issuer whose tokens give this identity. `None`: it is not of a token.
    pub(super) fn issuer(&self) -> Option<&str> {
        issuer_in(&self.0)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of an issuer in an identity, or in the beginning of a pattern of identities.
pub(super) fn issuer_in(identity: &str) -> Option<&str> {
    if identity.starts_with(IdentityKind::ServiceAccount.prefix()) {
        return Some(KUBERNETES_ISSUER);
    }
    let rest = identity.strip_prefix(IdentityKind::Jwt.prefix())?;
    rest.split_once('/').map(|(issuer, _)| issuer)
}

/// Whether a text may name a principal or an API key: at most 64 of `a-z`, `0-9`, `.`, `_` and `-`, and the
/// first is a letter or a digit.
pub(super) fn is_name(text: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let fits = |byte: u8| plain(byte) || matches!(byte, b'.' | b'_' | b'-');
    text.len() <= 64 && text.bytes().next().is_some_and(plain) && text.bytes().all(fits)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn each_kind_of_credential_has_its_spelling() {
        for (kind, text, identity) in [
            (IdentityKind::Spiffe, "prod.example/ns/a/sa/b", "spiffe://prod.example/ns/a/sa/b"),
            (IdentityKind::Dns, "worker.orders.example", "dns:worker.orders.example"),
            (IdentityKind::Jwt, "corp/svc-orders", "jwt:corp/svc-orders"),
            (IdentityKind::Jwt, "corp/a b%é", "jwt:corp/a%20b%25%C3%A9"),
            (IdentityKind::Jwt, "corp/k8s:a/b", "jwt:corp/k8s:a/b"),
            (IdentityKind::ServiceAccount, "orders/worker", "k8s:orders/worker"),
            (IdentityKind::ApiKey, "laptop-anna", "key:laptop-anna"),
            (IdentityKind::Local, "65532", "local:65532"),
        ] {
            let made = Identity::new(kind, text).unwrap();
            assert_eq!(made.as_str(), identity);
            assert_eq!(Identity::parse(identity), Ok(made));
        }
        assert_eq!(Identity::parse("anonymous"), Ok(Identity::anonymous()));
    }

    #[test]
    fn text_that_is_no_identity_is_refused_by_its_mistake() {
        let long = format!("key:{}", "a".repeat(509));
        let long_id = format!("spiffe://d/{}", "a".repeat(2048));
        for (text, error) in [
            ("", IdentityError::Kind),
            ("orders", IdentityError::Kind),
            ("KEY:a", IdentityError::Kind),
            ("key:", IdentityError::Empty),
            ("key:a b", IdentityError::Characters),
            ("key:é", IdentityError::Characters),
            ("anonymous ", IdentityError::Kind),
            ("dns:Worker.example", IdentityError::Capitals),
            (&long, IdentityError::Long(512)),
            (&long_id, IdentityError::Long(2048)),
        ] {
            assert_eq!(Identity::parse(text), Err(error), "{text}");
        }
        assert_eq!(Identity::new(IdentityKind::Jwt, ""), Err(IdentityError::Empty));
        let encoded = "é".repeat(100);
        assert_eq!(Identity::new(IdentityKind::Jwt, &encoded), Err(IdentityError::Long(512)));
        assert!(Identity::parse(&long_id[..2048]).is_ok());
    }

    proptest! {
        #[test]
        fn two_subjects_never_become_one_identity(one in ".{1,40}", other in ".{1,40}") {
            let identity = |text: &str| Identity::new(IdentityKind::Jwt, text).unwrap();
            prop_assert_eq!(identity(&one) == identity(&other), one == other);
            let parsed = Identity::parse(identity(&one).as_str());
            prop_assert_eq!(parsed, Ok(identity(&one)));
        }
    }
}
