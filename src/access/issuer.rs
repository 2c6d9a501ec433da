//! Issuers of JSON Web Tokens, as a policy file names them: what they are called here, what a token of them must say,
//! and where their keys are.
//!
//! ```text
//!  jwt        = 1..16 of: name, issuer, audiences, keys, [algorithms], [clock_skew], [max_lifetime], [subject]
//!  kubernetes = issuer, audiences, keys, [algorithms], [clock_skew], [max_lifetime]
//!  keys       = one of file, url, discovery: true; with url and discovery also [ca_file], [bearer_file]
//! ```

use std::{
    net::IpAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{Uri, uri::Scheme};
use serde::Deserialize;

use super::{
    fields::{FilePath, IssuerName, List, TextField, TimeField},
    identity::KUBERNETES_ISSUER,
    token_algorithm::TokenAlgorithm,
};

/// The difference between our clock and that of an issuer that a token may show.
const DEFAULT_SKEW: Duration = Duration::from_secs(60);
const MAX_SKEW_SECONDS: u64 = 300;
/// The longest life of a token: from its `iat` to its `exp`.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);
const MAX_LIFETIME_SECONDS: u64 = 366 * 24 * 3600;

/// The claim that names the caller, unless the policy names another.
const DEFAULT_SUBJECT: &str = "sub";
/// The place of the metadata of an issuer (OpenID Connect Discovery 1.0, section 4).
const DISCOVERY_PATH: &str = "/.well-known/openid-configuration";

/// An entry of `jwt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct JwtEntry {
    name: IssuerName,
    issuer: TextField,
    audiences: List<TextField, 1, 16>,
    keys: KeysEntry,
    #[serde(default)]
    algorithms: Option<List<TokenAlgorithm, 1, 16>>,
    #[serde(default)]
    clock_skew: Option<TimeField<0, MAX_SKEW_SECONDS>>,
    #[serde(default)]
    max_lifetime: Option<TimeField<1, MAX_LIFETIME_SECONDS>>,
    #[serde(default)]
    subject: Option<TextField>,
}

/// The entry `kubernetes`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct KubernetesEntry {
    issuer: TextField,
    audiences: List<TextField, 1, 16>,
    keys: KeysEntry,
    #[serde(default)]
    algorithms: Option<List<TokenAlgorithm, 1, 16>>,
    #[serde(default)]
    clock_skew: Option<TimeField<0, MAX_SKEW_SECONDS>>,
    #[serde(default)]
    max_lifetime: Option<TimeField<1, MAX_LIFETIME_SECONDS>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct KeysEntry {
    #[serde(default)]
    file: Option<FilePath>,
    #[serde(default)]
    url: Option<TextField>,
    #[serde(default)]
    discovery: bool,
    #[serde(default)]
    ca_file: Option<FilePath>,
    #[serde(default)]
    bearer_file: Option<FilePath>,
}

/// An issuer whose tokens are accepted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issuer {
    /// Its name here: part of identities, in answers and in the log.
    pub name: Arc<str>,
    /// The claim `iss` of its tokens.
    pub issuer: Box<str>,
    /// Where its keys are.
    pub keys: KeySource,
    pub(super) audiences: Vec<Box<str>>,
    pub(super) algorithms: Vec<TokenAlgorithm>,
    pub(super) skew: Duration,
    pub(super) max_lifetime: Duration,
    pub(super) subject: Subject,
}

/// The claims that name the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Subject {
    /// This claim, a text.
    Claim(Box<str>),
    /// The namespace and the name of a Kubernetes service account.
    ServiceAccount,
}

/// Where the keys of an issuer are. A relative path counts from the folder of the policy file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeySource {
    /// The key set itself.
    pub place: KeyPlace,
    /// The file with the authorities that the server of the keys is trusted by. `None`: those of the system.
    ca_file: Option<Box<str>>,
    /// The file with the bearer that the server of the keys asks for.
    bearer_file: Option<Box<str>>,
}

/// The place of a key set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPlace {
    /// This file.
    File(Box<str>),
    /// This URL.
    Url(Box<str>),
    /// The URL that the metadata of the issuer names. The metadata are at this URL.
    Discovery(Box<str>),
}

impl JwtEntry {
    fn meaning(&self) -> Issuer {
        let subject = self.subject.as_ref().map_or(DEFAULT_SUBJECT, |claim| &claim.0);
        Issuer {
            name: (&*self.name.0).into(),
            issuer: self.issuer.0.clone(),
            keys: self.keys.meaning(&self.issuer.0),
            audiences: texts(&self.audiences),
            algorithms: algorithms(self.algorithms.as_ref()),
            skew: self.clock_skew.map_or(DEFAULT_SKEW, |skew| skew.0),
            max_lifetime: self.max_lifetime.map_or(DEFAULT_LIFETIME, |most| most.0),
            subject: Subject::Claim(subject.into()),
        }
    }
}

impl KubernetesEntry {
    fn meaning(&self) -> Issuer {
        Issuer {
            name: KUBERNETES_ISSUER.into(),
            issuer: self.issuer.0.clone(),
            keys: self.keys.meaning(&self.issuer.0),
            audiences: texts(&self.audiences),
            algorithms: algorithms(self.algorithms.as_ref()),
            skew: self.clock_skew.map_or(DEFAULT_SKEW, |skew| skew.0),
            max_lifetime: self.max_lifetime.map_or(DEFAULT_LIFETIME, |most| most.0),
            subject: Subject::ServiceAccount,
        }
    }
}

fn texts(list: &List<TextField, 1, 16>) -> Vec<Box<str>> {
    list.0.iter().map(|text| text.0.clone()).collect()
}

fn algorithms(listed: Option<&List<TokenAlgorithm, 1, 16>>) -> Vec<TokenAlgorithm> {
    listed.map_or_else(|| TokenAlgorithm::DEFAULT.to_vec(), |list| list.0.clone())
}

impl KeysEntry {
    fn meaning(&self, issuer: &str) -> KeySource {
        let path = |path: &Option<FilePath>| path.as_ref().map(|path| path.0.clone());
        let place = match (&self.file, &self.url) {
            (Some(file), _) => KeyPlace::File(file.0.clone()),
            (None, Some(url)) => KeyPlace::Url(url.0.clone()),
            (None, None) => {
                let url = format!("{}{DISCOVERY_PATH}", issuer.trim_end_matches('/'));
                KeyPlace::Discovery(url.into())
            }
        };
        KeySource { place, ca_file: path(&self.ca_file), bearer_file: path(&self.bearer_file) }
    }

    /// The mistake that needs more than one field: the field, and words.
    fn mistake(&self, issuer: &str) -> Option<(Option<&'static str>, String)> {
        let named = [self.file.is_some(), self.url.is_some(), self.discovery];
        if named.iter().filter(|named| **named).count() != 1 {
            return Some((None, "`keys` needs one of `file`, `url` and `discovery: true`".into()));
        }
        for (field, path) in [("ca_file", &self.ca_file), ("bearer_file", &self.bearer_file)] {
            if self.file.is_some() && path.is_some() {
                return Some((Some(field), format!("`{field}` is for `url` and `discovery`")));
            }
        }
        match &self.meaning(issuer).place {
            KeyPlace::File(_) => None,
            KeyPlace::Url(url) => Some((Some("url"), key_url(url).err()?.to_owned())),
            KeyPlace::Discovery(url) => {
                let why = key_url(url).err()?;
                Some((Some("discovery"), format!("`issuer` is no such URL: {why}")))
            }
        }
    }
}

/// Reads the URL of a key set, or of the metadata of an issuer.
///
/// # Errors
/// The mistake, for people.
pub fn key_url(url: &str) -> Result<Uri, &'static str> {
    let parsed: Uri = url.parse().map_err(|_| "it is not a URL")?;
    let (Some(scheme), Some(host)) = (parsed.scheme(), parsed.host()) else {
        return Err("it must begin with https://");
    };
    if parsed.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err("a URL with a user is not allowed: use `bearer_file`");
    }
    let address: Result<IpAddr, _> = host.trim_matches(['[', ']']).parse();
    let is_loopback = host == "localhost" || address.is_ok_and(|address| address.is_loopback());
    match scheme {
        scheme if *scheme == Scheme::HTTPS => Ok(parsed),
        scheme if *scheme == Scheme::HTTP && is_loopback => Ok(parsed),
        scheme if *scheme == Scheme::HTTP => Err("http is only for loopback: use https"),
        _ => Err("it must begin with https://"),
    }
}

/// All issuers of a policy file, in its order.
pub(super) fn issuers(jwt: &[JwtEntry], kubernetes: Option<&KubernetesEntry>) -> Vec<Issuer> {
    let jwt = jwt.iter().map(JwtEntry::meaning);
    jwt.chain(kubernetes.map(KubernetesEntry::meaning)).collect()
}

/// A mistake: the place in the list of `jwt`, or none for `kubernetes`; the fields on the way to it; words.
pub(super) type IssuerMistake = (Option<usize>, Vec<&'static str>, String);

/// The first mistake that needs more than one field.
pub(super) fn mistake(
    jwt: &[JwtEntry],
    kubernetes: Option<&KubernetesEntry>,
) -> Option<IssuerMistake> {
    let of_keys = |place: Option<usize>, keys: &KeysEntry, issuer: &str| {
        let (field, message) = keys.mistake(issuer)?;
        Some((place, ["keys"].into_iter().chain(field).collect(), message))
    };
    for (place, entry) in jwt.iter().enumerate() {
        if *entry.name.0 == *KUBERNETES_ISSUER {
            let message = "the name `kubernetes` is taken: use the entry `kubernetes`".to_owned();
            return Some((Some(place), vec!["name"], message));
        }
        let before = &jwt[..place];
        if before.iter().any(|other| other.name == entry.name) {
            let message = format!("a second issuer has the name `{}`", entry.name.0);
            return Some((Some(place), vec!["name"], message));
        }
        if before.iter().any(|other| other.issuer == entry.issuer) {
            let message = format!("a second entry is for the issuer `{}`", entry.issuer.0);
            return Some((Some(place), vec!["issuer"], message));
        }
        let mistake = of_keys(Some(place), &entry.keys, &entry.issuer.0);
        if mistake.is_some() {
            return mistake;
        }
    }
    let entry = kubernetes?;
    if jwt.iter().any(|other| other.issuer == entry.issuer) {
        let message = format!("a second entry is for the issuer `{}`", entry.issuer.0);
        return Some((None, vec!["issuer"], message));
    }
    of_keys(None, &entry.keys, &entry.issuer.0)
}

impl Issuer {
    /// Whether the keys of both are the same, so that keys of the one are keys of the other.
    pub fn has_keys_of(&self, other: &Self) -> bool {
        self.name == other.name && self.issuer == other.issuer && self.keys == other.keys
    }

    /// The issuer and its keys in one line.
    pub fn in_words(&self) -> String {
        let place = match &self.keys.place {
            KeyPlace::File(file) => format!("the file {file}"),
            KeyPlace::Url(url) => url.to_string(),
            KeyPlace::Discovery(url) => format!("the URL that {url} names"),
        };
        format!("{}, keys from {place}", self.issuer)
    }
}

impl KeySource {
    /// The file of the keys, if they are in a file.
    pub fn key_file(&self, policy_file: &Path) -> Option<PathBuf> {
        match &self.place {
            KeyPlace::File(file) => Some(beside(policy_file, file)),
            KeyPlace::Url(_) | KeyPlace::Discovery(_) => None,
        }
    }

    /// The file with the authorities for the server of the keys.
    pub fn ca_file(&self, policy_file: &Path) -> Option<PathBuf> {
        self.ca_file.as_ref().map(|file| beside(policy_file, file))
    }

    /// The file with the bearer for the server of the keys.
    pub fn bearer_file(&self, policy_file: &Path) -> Option<PathBuf> {
        self.bearer_file.as_ref().map(|file| beside(policy_file, file))
    }
}

fn beside(policy_file: &Path, file: &str) -> PathBuf {
    policy_file.parent().unwrap_or(Path::new("")).join(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_of_keys_is_https_or_on_loopback() {
        for url in [
            "https://login.example/keys",
            "https://login.example:8443/a?b=c",
            "http://127.0.0.1:8080/keys",
            "http://[::1]/keys",
            "http://localhost/keys",
        ] {
            assert!(key_url(url).is_ok(), "{url}");
        }
        for (url, said) in [
            ("http://login.example/keys", "only for loopback"),
            ("http://127.0.0.1.example/keys", "only for loopback"),
            ("ftp://login.example/keys", "https://"),
            ("login.example/keys", "not a URL"),
            ("/keys", "https://"),
            ("https://user:secret@login.example/keys", "bearer_file"),
            ("https://", "not a URL"),
            ("", "not a URL"),
        ] {
            let error = key_url(url).unwrap_err();
            assert!(error.contains(said), "{url}: {error}");
        }
    }
}
