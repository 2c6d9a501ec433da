//! API keys: a random secret for a client, and its SHA-256 in a file. A digest that is fast to compute is
//! enough, because nobody can guess 256 random bits.
//!
//! ```text
//!  laptop-anna sha256:9f86…  expires=2027-01-31T00:00:00Z   # one key; two lines of one name are a rotation
//! ```

use std::{
    collections::HashMap,
    fmt,
    time::{Duration, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::digest::{SHA256, digest};

use super::identity::{Identity, IdentityKind, is_name};

/// Secret scanners find a leaked key by this.
const PREFIX: &str = "fpk_";
const SECRET_BYTES: usize = 32;
/// The secret in base64url without padding.
const SECRET_TEXT: usize = 43;
/// The algorithm, in front of each digest.
const ALGORITHM: &str = "sha256:";
const EXPIRES: &str = "expires=";

/// A new key.
pub struct NewApiKey {
    /// The key, for the client.
    pub secret: String,
    /// The line for the file.
    pub line: String,
}

impl NewApiKey {
    /// Makes a key. `None`: a key cannot have this name.
    ///
    /// # Errors
    /// The operating system has no randomness.
    pub fn random(name: &str) -> Result<Option<Self>, getrandom::Error> {
        if !is_name(name) {
            return Ok(None);
        }
        let mut bytes = [0; SECRET_BYTES];
        getrandom::fill(&mut bytes)?;
        let secret = format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes));
        let line = format!("{name} {ALGORITHM}{}", hex(&sha256(secret.as_bytes())));
        Ok(Some(Self { secret, line }))
    }
}

/// The SHA-256 of a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ApiKeyDigest([u8; 32]);

impl ApiKeyDigest {
    /// The digest of a key. `None`: the text has another length or prefix than a key. A password is no key,
    /// even if its digest is in the file.
    pub fn of(key: &str) -> Option<Self> {
        let is_key = key.len() == PREFIX.len() + SECRET_TEXT && ApiKeys::is_key(key);
        is_key.then(|| Self(sha256(key.as_bytes())))
    }
}

/// The accepted keys, by their digests.
#[derive(Default)]
pub struct ApiKeys(HashMap<ApiKeyDigest, ApiKey>);

struct ApiKey {
    identity: Identity,
    /// The time from which the key is refused, since the Unix epoch.
    expires: Option<Duration>,
}

/// The mistake in a file of API keys.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ApiKeysError {
    /// A line is neither a key nor a comment.
    #[error(
        "line {0} is not an API key: `NAME sha256:HEX`, as `fetch-proxy keygen --api-key NAME` prints it"
    )]
    NotAKey(usize),
    /// A line has a key and not its digest.
    #[error("line {0} has the key itself: the file must have only its SHA-256")]
    Secret(usize),
    /// The time at which a key expires cannot be read.
    #[error("line {0}: `expires=` needs a time in UTC, such as 2027-01-31T00:00:00Z")]
    Expires(usize),
    /// The file has a key twice.
    #[error("line {0} repeats a key")]
    Duplicate(usize),
}

impl ApiKeys {
    /// Reads one key per line. `#` begins a comment.
    ///
    /// # Errors
    /// See [`ApiKeysError`].
    pub fn parse(text: &str) -> Result<Self, ApiKeysError> {
        let mut keys = HashMap::new();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.split('#').next().unwrap_or_default().trim();
            if line.is_empty() {
                continue;
            }
            if line.contains(PREFIX) {
                return Err(ApiKeysError::Secret(number));
            }
            let mut words = line.split_ascii_whitespace();
            let name = words.next().filter(|name| is_name(name));
            let digest = words.next().and_then(|word| word.strip_prefix(ALGORITHM));
            let (Some(name), Some(digest)) = (name, digest.and_then(read_hex)) else {
                return Err(ApiKeysError::NotAKey(number));
            };
            let expires = match (words.next(), words.next()) {
                (None, _) => None,
                (Some(word), None) => {
                    let time = word.strip_prefix(EXPIRES).ok_or(ApiKeysError::NotAKey(number))?;
                    Some(read_time(time).ok_or(ApiKeysError::Expires(number))?)
                }
                (Some(_), Some(_)) => return Err(ApiKeysError::NotAKey(number)),
            };
            let identity = Identity::new(IdentityKind::ApiKey, name);
            let identity = identity.map_err(|_| ApiKeysError::NotAKey(number))?;
            if keys.insert(ApiKeyDigest(digest), ApiKey { identity, expires }).is_some() {
                return Err(ApiKeysError::Duplicate(number));
            }
        }
        Ok(Self(keys))
    }

    /// Whether a credential looks like an API key.
    pub fn is_key(credential: &str) -> bool {
        credential.starts_with(PREFIX)
    }

    /// The identity of a key, and the time from which the key is refused. `now` and that time are times
    /// since the Unix epoch. `None`: the key is not in the file, or has expired.
    pub fn find(&self, key: &ApiKeyDigest, now: Duration) -> Option<(&Identity, Option<Duration>)> {
        let found = self.0.get(key)?;
        let is_valid = found.expires.is_none_or(|expires| now < expires);
        is_valid.then_some((&found.identity, found.expires))
    }

    /// The number of keys.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no key.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ApiKeys({} keys)", self.len())
    }
}

/// The SHA-256 of these bytes.
pub(super) fn sha256(of: &[u8]) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, of).as_ref());
    bytes
}

fn read_hex(text: &str) -> Option<[u8; 32]> {
    let mut bytes = [0; 32];
    if text.len() != 2 * bytes.len() {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digit = |place: usize| char::from(pair[place]).to_digit(16);
        *byte = u8::try_from(16 * digit(0)? + digit(1)?).ok()?;
    }
    Some(bytes)
}

fn read_time(text: &str) -> Option<Duration> {
    let time = humantime::parse_rfc3339(text).ok()?;
    time.duration_since(UNIX_EPOCH).ok()
}

/// Bytes in hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.filter_map(|digit| char::from_digit(digit.into(), 16)).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The identity of a key, and the time at which the key ends.
    fn find<'k>(
        keys: &'k ApiKeys,
        key: &str,
        now: Duration,
    ) -> Option<(&'k str, Option<Duration>)> {
        let (identity, expires) = keys.find(&ApiKeyDigest::of(key)?, now)?;
        Some((identity.as_str(), expires))
    }

    const NOW: Duration = Duration::from_secs(1_800_000_000);

    #[test]
    fn new_key_is_accepted_by_its_line_and_no_other() {
        let [old, new] = [(); 2].map(|()| NewApiKey::random("anna").unwrap().unwrap());
        let keys = ApiKeys::parse(&format!("# two of one name\n{}\n{}\n", old.line, new.line));
        let keys = keys.unwrap();
        for key in [&old, &new] {
            assert_eq!(find(&keys, &key.secret, NOW), Some(("key:anna", None)));
            assert!(!key.line.contains(&key.secret) && ApiKeys::is_key(&key.secret));
        }
        let other = NewApiKey::random("anna").unwrap().unwrap();
        assert!(find(&keys, &other.secret, NOW).is_none());
        assert!(find(&keys, &old.secret[..old.secret.len() - 1], NOW).is_none());
        assert!(!format!("{keys:?}").contains("anna"));
        assert!(NewApiKey::random("Anna").unwrap().is_none());
    }

    #[test]
    fn expired_key_is_refused_from_its_time_on() {
        let key = NewApiKey::random("a").unwrap().unwrap();
        let keys = ApiKeys::parse(&format!("{} expires=2027-01-15T08:00:00Z", key.line)).unwrap();
        assert_eq!(find(&keys, &key.secret, NOW - Duration::from_nanos(1)).unwrap().1, Some(NOW));
        assert!(find(&keys, &key.secret, NOW).is_none());
    }

    #[test]
    fn password_is_no_key_even_if_its_digest_is_in_the_file() {
        for password in ["hunter2", "fpk_hunter2"] {
            let line = format!("a {ALGORITHM}{}", hex(&sha256(password.as_bytes())));
            assert!(find(&ApiKeys::parse(&line).unwrap(), password, NOW).is_none());
        }
    }

    #[test]
    fn wrong_line_is_named_and_not_shown() {
        let key = NewApiKey::random("a").unwrap().unwrap();
        let line = &key.line;
        for (text, error) in [
            ("a".to_owned(), ApiKeysError::NotAKey(1)),
            ("a sha256:00".to_owned(), ApiKeysError::NotAKey(1)),
            (line.replace("a sha256", "A sha256"), ApiKeysError::NotAKey(1)),
            (line.replace("sha256", "sha1"), ApiKeysError::NotAKey(1)),
            (format!("\n{line} what"), ApiKeysError::NotAKey(2)),
            (format!("{line} expires=2027-01-31T00:00:00Z more"), ApiKeysError::NotAKey(1)),
            (format!("{line} expires=tomorrow"), ApiKeysError::Expires(1)),
            (format!("{line} expires=1969-01-31T00:00:00Z"), ApiKeysError::Expires(1)),
            (format!("{line}\n\n{line}"), ApiKeysError::Duplicate(3)),
            (format!("a {}", key.secret), ApiKeysError::Secret(1)),
        ] {
            let found = ApiKeys::parse(&text).unwrap_err();
            assert_eq!(found, error, "{text}");
            assert!(!found.to_string().contains(&key.secret));
        }
        assert!(ApiKeys::parse("# nothing\n\n").unwrap().is_empty());
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_a_panic(text in ".{0,200}", key in ".{0,80}") {
            if let Ok(keys) = ApiKeys::parse(&text) {
                prop_assert!(find(&keys, &key, NOW).is_none());
            }
            let _ = ApiKeys::parse(&format!("a sha256:{text}"));
            let _ = ApiKeys::parse(&format!("a sha256:{} expires={text}", "0".repeat(64)));
        }
    }
}
