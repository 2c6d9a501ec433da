//! Fetches the keys of one issuer from its server: the metadata of the issuer, if the policy asks for them, and then
//! the key set.

use std::{io, path::PathBuf, time::Duration};

use http::Uri;
use serde::Deserialize;
use tokio::time::timeout;

use super::http::{HttpFault, get};
use crate::{
    access::{Issuer, KeyPlace, KeySet, KeySetError, key_url},
    secrets::{FileFault, Reader},
};

/// Longest time for all of it.
const ISSUER_TIMEOUT: Duration = Duration::from_secs(5);

/// The keys of an issuer, and their text.
pub(super) type FetchedKeys = (String, KeySet);

/// The reason why the keys of an issuer are not here.
#[derive(Debug, thiserror::Error)]
pub(super) enum FetchFault {
    /// A file cannot be read.
    #[error("cannot read {}: {}", .0.display(), .1)]
    File(PathBuf, io::Error),
    /// A URL is not allowed.
    #[error("{0}: {1}")]
    Url(String, &'static str),
    /// The server gives no answer that can be used.
    #[error("{0}: {1}")]
    Http(String, HttpFault),
    /// The metadata are something else.
    #[error("{0}: it is not the metadata of an issuer: JSON with `issuer` and `jwks_uri`")]
    Metadata(String),
    /// The metadata are those of another issuer.
    #[error("{0}: it is the metadata of another issuer")]
    OtherIssuer(String),
    /// The answer is no key set.
    #[error("{0}: {1}")]
    KeySet(String, KeySetError),
    /// It took too long.
    #[error("there was no answer within 5s")]
    Slow,
    /// The fetch has panicked, which is a defect of this program.
    #[error("the fetch has panicked, as another line says")]
    Panic,
}

impl FileFault for &FetchFault {}

/// The metadata of an issuer (OpenID Connect Discovery 1.0, section 3).
#[derive(Deserialize)]
struct IssuerMetadata {
    issuer: String,
    jwks_uri: String,
}

/// Fetches the keys of this issuer. Relative paths in it count from the folder of the policy file.
pub(super) async fn fetch(issuer: Issuer, policy_file: PathBuf) -> Result<FetchedKeys, FetchFault> {
    let fetched = timeout(ISSUER_TIMEOUT, within_time(&issuer, policy_file)).await;
    fetched.unwrap_or(Err(FetchFault::Slow))
}

async fn within_time(issuer: &Issuer, policy_file: PathBuf) -> Result<FetchedKeys, FetchFault> {
    // Both are read each time: they are renewed while the process runs.
    let authorities = text_of(issuer.keys.ca_file(&policy_file)).await?;
    let bearer = text_of(issuer.keys.bearer_file(&policy_file)).await?;
    let bearer = bearer.as_deref().map(str::trim);
    let ask = async |url: &Uri, bearer: Option<&str>| {
        let answer = get(url, authorities.as_deref(), bearer).await;
        answer.map_err(|fault| FetchFault::Http(url.to_string(), fault))
    };
    let (url, bearer) = match &issuer.keys.place {
        KeyPlace::Url(url) | KeyPlace::File(url) => (parsed(url)?, bearer),
        KeyPlace::Discovery(url) => {
            let metadata = parsed(url)?;
            let text = ask(&metadata, bearer).await?;
            let named: IssuerMetadata = serde_json::from_str(&text)
                .map_err(|_| FetchFault::Metadata(metadata.to_string()))?;
            if named.issuer != *issuer.issuer {
                return Err(FetchFault::OtherIssuer(metadata.to_string()));
            }
            let url = parsed(&named.jwks_uri)?;
            // The bearer is for the server that the policy names, and for no other.
            let same = (url.scheme(), url.authority()) == (metadata.scheme(), metadata.authority());
            (url, bearer.filter(|_| same))
        }
    };
    let text = ask(&url, bearer).await?;
    let keys = KeySet::parse(&text);
    let keys = keys.map_err(|error| FetchFault::KeySet(url.to_string(), error))?;
    Ok((text, keys))
}

fn parsed(url: &str) -> Result<Uri, FetchFault> {
    key_url(url).map_err(|why| FetchFault::Url(url.to_owned(), why))
}

async fn text_of(file: Option<PathBuf>) -> Result<Option<String>, FetchFault> {
    let Some(file) = file else { return Ok(None) };
    let read = Reader::new(file.clone()).read().await;
    read.map(|(text, _)| Some(text)).map_err(|error| FetchFault::File(file, error))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use tempfile::TempDir;
    use testkit::{
        authority::Authority,
        issuer::{IssuerAnswer, IssuerServer, TokenKey, key_set},
    };

    use super::*;
    use crate::access::Policy;

    /// The issuer of a policy with these keys, and the folder of its files.
    fn issuer(name: &str, keys: &str) -> (Issuer, TempDir) {
        let policy = format!(
            "version: 1\nauthenticate: {{jwt: [{{name: a, issuer: '{name}', audiences: [a], keys: {keys}}}]}}\n\
             principals: [{{name: a, match: [x]}}]"
        );
        let policy = Policy::parse(&policy).unwrap();
        (policy.issuers()[0].clone(), tempfile::tempdir().unwrap())
    }

    async fn fetched(issuer: &Issuer, folder: &Path) -> Result<usize, String> {
        let fetched = fetch(issuer.clone(), folder.join("policy.yaml")).await;
        fetched.map(|(_, keys)| keys.len()).map_err(|fault| fault.to_string())
    }

    fn keys() -> String {
        key_set(&[&TokenKey::p256("k")])
    }

    #[tokio::test]
    async fn each_wrong_answer_is_named_and_no_other_server_is_asked() {
        let elsewhere = IssuerServer::start(IssuerAnswer::Text(keys()));
        let server = IssuerServer::start(IssuerAnswer::Text(keys()));
        let (issuer, folder) = issuer("i", &format!("{{url: '{}/keys'}}", server.url()));
        assert_eq!(fetched(&issuer, folder.path()).await, Ok(1));
        let padded = |size| format!("{}{}", keys(), " ".repeat(size));
        let many = vec![TokenKey::p256("k").jwk(); 65];
        let many = serde_json::json!({ "keys": many }).to_string();
        for (answer, said) in [
            (IssuerAnswer::Text(padded(256 * 1024)), "larger than 256 KiB"),
            (IssuerAnswer::Text(many), "more than 64 keys"),
            (IssuerAnswer::Text("<html>".to_owned()), "not a key set"),
            (IssuerAnswer::Text(String::new()), "not a key set"),
            (IssuerAnswer::Status(500, String::new()), "the status 500"),
            (IssuerAnswer::Status(204, String::new()), "the status 204"),
            (IssuerAnswer::Status(302, elsewhere.url()), "302, and redirects are not followed"),
            (IssuerAnswer::Status(308, elsewhere.url()), "308, and redirects are not followed"),
        ] {
            server.set(answer);
            let fault = fetched(&issuer, folder.path()).await.unwrap_err();
            assert!(fault.contains(said) && fault.contains("/keys: "), "{said}: {fault}");
        }
        assert!(elsewhere.requests().is_empty());
        server.set(IssuerAnswer::Text(padded(200 * 1024)));
        assert_eq!(fetched(&issuer, folder.path()).await, Ok(1));
        drop(server);
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        assert!(fault.contains("cannot connect"), "{fault}");
    }

    #[tokio::test]
    async fn silent_server_is_given_up_after_five_seconds() {
        let server = IssuerServer::start(IssuerAnswer::Silence);
        let (issuer, folder) = issuer("i", &format!("{{url: '{}'}}", server.url()));
        let begun = crate::clock::now();
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        let took = crate::clock::now() - begun;
        assert!(fault.contains("no answer within 5s"), "{fault}");
        assert!((5..8).contains(&took.as_secs()), "{took:?}");
    }

    #[tokio::test]
    async fn metadata_name_the_keys_and_must_be_of_the_same_issuer() {
        let elsewhere = IssuerServer::start(IssuerAnswer::Text(keys()));
        let server = IssuerServer::start(IssuerAnswer::Silence);
        let url = server.url();
        let (issuer, folder) =
            issuer(&format!("{url}/realm/"), "{discovery: true, bearer_file: bearer}");
        fs::write(folder.path().join("bearer"), "secret\n").unwrap();
        let metadata = |issuer: &str, keys_at: &str| {
            let text = serde_json::json!({ "issuer": issuer, "jwks_uri": keys_at }).to_string();
            let path = "/realm/.well-known/openid-configuration";
            server.set(IssuerAnswer::Paths(vec![(path, text), ("/keys", keys())]));
        };
        let ours = format!("{url}/realm/");
        metadata(&ours, &format!("{url}/keys"));
        assert_eq!(fetched(&issuer, folder.path()).await, Ok(1));
        let requests = server.requests();
        assert_eq!(requests.len(), 2);
        for request in requests {
            assert!(request.contains("authorization: Bearer secret\r\n"), "{request}");
        }
        metadata(&ours, &format!("{}/keys", elsewhere.url()));
        assert_eq!(fetched(&issuer, folder.path()).await, Ok(1));
        let [request] = &elsewhere.requests()[..] else { panic!("{:?}", elsewhere.requests()) };
        assert!(!request.contains("secret"), "the bearer is not for that server: {request}");
        for (name, keys_at, said) in [
            (&*format!("{url}/realm"), &*format!("{url}/keys"), "metadata of another issuer"),
            (&ours, "http://login.example/keys", "http is only for loopback"),
            (&ours, "file:///etc/passwd", "not a URL"),
            (&ours, "", "not a URL"),
        ] {
            metadata(name, keys_at);
            let fault = fetched(&issuer, folder.path()).await.unwrap_err();
            assert!(fault.contains(said), "{said}: {fault}");
        }
        server.set(IssuerAnswer::Text("{}".to_owned()));
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        assert!(fault.contains("not the metadata of an issuer"), "{fault}");
        fs::write(folder.path().join("bearer"), "two\nlines").unwrap();
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        assert!(fault.contains("no header may have") && !fault.contains("lines"), "{fault}");
        fs::remove_file(folder.path().join("bearer")).unwrap();
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        assert!(fault.contains("bearer: No such file"), "{fault}");
    }

    #[tokio::test]
    async fn server_is_trusted_by_the_authorities_of_the_policy_alone() {
        let [ours, other] = ["ours", "other"].map(Authority::new);
        let server = IssuerServer::start_tls(IssuerAnswer::Text(keys()), &ours.server());
        let url = format!("https://{}/keys", server.address());
        let (issuer, folder) = issuer("i", &format!("{{url: '{url}', ca_file: ca}}"));
        let ca = |text: &str| fs::write(folder.path().join("ca"), text).unwrap();
        ca(ours.pem());
        assert_eq!(fetched(&issuer, folder.path()).await, Ok(1));
        for (text, said) in [
            (other.pem(), "invalid peer certificate"),
            ("", "no authority to trust the server by"),
            ("-----BEGIN CERTIFICATE-----", "not valid PEM"),
        ] {
            ca(text);
            let fault = fetched(&issuer, folder.path()).await.unwrap_err();
            assert!(fault.contains(said), "{said}: {fault}");
        }
        let (issuer, folder) = self::issuer("i", &format!("{{url: '{url}'}}"));
        let fault = fetched(&issuer, folder.path()).await.unwrap_err();
        assert!(fault.contains("TLS: "), "the system does not trust it: {fault}");
    }
}
