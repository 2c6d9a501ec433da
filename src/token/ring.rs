//! The keys that seal and open tokens. They come from a file that all replicas share, or are made by one
//! process for itself.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{
    KEY_ID,
    cipher::{Cipher, NONCE, Subkey},
};

/// The name of a key. It reveals nothing about the key.
pub type KeyId = [u8; KEY_ID];

/// The name of a key, for people.
pub fn key_name(id: KeyId) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Keys in order. One key seals: the first, unless another is chosen. All keys open.
pub struct KeyRing {
    first: Key,
    others: Vec<Key>,
    /// Index of the sealing key: 0 is `first`, and the others follow.
    sealing: usize,
}

pub(super) struct Key {
    pub(super) id: KeyId,
    pub(super) cipher: Cipher,
}

/// The mistake in a key file. It never shows a key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyRingError {
    /// A line is neither a key nor a comment.
    #[error(
        "line {0} is not a key: a key is base64 of 32 bytes, as `fetch-proxy keygen` prints it"
    )]
    NotAKey(usize),
    /// Anybody can guess a key: all its bytes are the same, as in a template.
    #[error(
        "line {0} has a key that anybody can guess: all its bytes are the same. `fetch-proxy keygen` \
         makes a key"
    )]
    Guessable(usize),
    /// The file has a key twice.
    #[error("line {0} repeats a key")]
    Duplicate(usize),
    /// The file has no key.
    #[error("the file has no key: `fetch-proxy keygen` makes one")]
    Empty,
}

impl KeyRing {
    /// Reads one key per line. `#` begins a comment.
    ///
    /// # Errors
    /// See [`KeyRingError`].
    pub fn parse(text: &str) -> Result<Self, KeyRingError> {
        let mut keys: Vec<Key> = Vec::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            let bytes = STANDARD.decode(line).ok().and_then(|bytes| bytes.try_into().ok());
            let bytes: [u8; 32] = bytes.ok_or(KeyRingError::NotAKey(number))?;
            // A random key is like this once in 2^248.
            if bytes.iter().all(|byte| *byte == bytes[0]) {
                return Err(KeyRingError::Guessable(number));
            }
            let key = Key::new(bytes);
            if keys.iter().any(|known| known.id == key.id) {
                return Err(KeyRingError::Duplicate(number));
            }
            keys.push(key);
        }
        let mut keys = keys.into_iter();
        let first = keys.next().ok_or(KeyRingError::Empty)?;
        Ok(Self { first, others: keys.collect(), sealing: 0 })
    }

    /// A ring of one key.
    pub fn single(key: [u8; 32]) -> Self {
        Self { first: Key::new(key), others: Vec::new(), sealing: 0 }
    }

    /// The names of the keys, in their order.
    pub fn ids(&self) -> Vec<KeyId> {
        self.keys().map(|key| key.id).collect()
    }

    /// The same ring, with this key as the sealing key. Without a key of that name, nothing changes.
    #[must_use]
    pub fn sealing_with(mut self, id: KeyId) -> Self {
        let place = self.keys().position(|key| key.id == id);
        self.sealing = place.unwrap_or(self.sealing);
        self
    }

    /// The name of the sealing key.
    pub fn sealing_id(&self) -> KeyId {
        self.sealing().id
    }

    pub(super) fn sealing(&self) -> &Key {
        self.others.get(self.sealing.wrapping_sub(1)).unwrap_or(&self.first)
    }

    pub(super) fn find(&self, id: &[u8]) -> Option<&Key> {
        self.keys().find(|key| key.id == id)
    }

    fn keys(&self) -> impl Iterator<Item = &Key> {
        std::iter::once(&self.first).chain(&self.others)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyRing({} keys)", 1 + self.others.len())
    }
}

impl Key {
    fn new(bytes: [u8; 32]) -> Self {
        let cipher = Cipher::new(bytes);
        // The name is the tag of an empty text under the key, which reveals nothing about the key. The
        // nonce of zeros is never used for a token, because the nonces of tokens are random.
        let mut id = [0; KEY_ID];
        if let Some(tag) = cipher.seal([0; NONCE], &mut Subkey::default(), b"key id", &mut []) {
            id.copy_from_slice(&tag[..KEY_ID]);
        }
        Self { id, cipher }
    }
}

/// Makes a line for a key file: 32 random bytes in base64.
///
/// # Errors
/// The operating system has no randomness.
pub fn new_key_line() -> Result<String, getrandom::Error> {
    let mut key = [0; 32];
    getrandom::fill(&mut key)?;
    Ok(STANDARD.encode(key))
}
