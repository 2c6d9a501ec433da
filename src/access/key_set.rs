//! Key sets of issuers (RFC 7517), and the key in them that a token names.

use std::fmt;

use serde::Deserialize;

use super::{signature::VerifyingKey, token_algorithm::TokenAlgorithm};

/// Most keys of one set.
const MAX_KEYS_OF_ISSUER: usize = 64;

/// The public keys of an issuer. Keys that cannot verify a token are left out.
pub struct KeySet(Vec<VerifyingKey>);

/// The reason why a text is no key set. It shows nothing of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeySetError {
    /// It is something else.
    #[error("it is not a key set: JSON such as {{\"keys\": […]}}")]
    NotAKeySet,
    /// It has too many keys.
    #[error("it has more than {MAX_KEYS_OF_ISSUER} keys")]
    Many,
}

/// The reason why a set has no key for a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoKey {
    /// No key has the name that the token gives, or the token gives none and several keys would fit.
    Unknown,
    /// The key of that name is not for the algorithm of the token.
    Algorithm,
}

#[derive(Deserialize)]
struct KeySetDocument {
    keys: Vec<serde_json::Value>,
}

impl KeySet {
    /// Reads a key set. A set without a key that can be used is a key set too.
    ///
    /// # Errors
    /// See [`KeySetError`].
    pub fn parse(text: &str) -> Result<Self, KeySetError> {
        let document: KeySetDocument =
            serde_json::from_str(text).map_err(|_| KeySetError::NotAKeySet)?;
        if document.keys.len() > MAX_KEYS_OF_ISSUER {
            return Err(KeySetError::Many);
        }
        Ok(Self(document.keys.iter().filter_map(VerifyingKey::read).collect()))
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The key for a token with this algorithm, which names its key by `id`.
    ///
    /// # Errors
    /// See [`NoKey`].
    pub(super) fn find(
        &self,
        id: Option<&str>,
        algorithm: TokenAlgorithm,
    ) -> Result<&VerifyingKey, NoKey> {
        let fits = |key: &&VerifyingKey| key.fits(algorithm);
        let Some(id) = id else {
            let mut fitting = self.0.iter().filter(fits);
            let key = fitting.next().ok_or(NoKey::Unknown)?;
            return if fitting.next().is_none() { Ok(key) } else { Err(NoKey::Unknown) };
        };
        let mut named = self.0.iter().filter(|key| key.has_id(id)).peekable();
        named.peek().ok_or(NoKey::Unknown)?;
        named.find(fits).ok_or(NoKey::Algorithm)
    }
}

impl fmt::Debug for KeySet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeySet({} keys)", self.len())
    }
}
