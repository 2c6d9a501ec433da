//! The proxy's identity at NATS. Owns the credentials and the answer to a server's challenge. Files are
//! read again for every connection, so that rotated credentials are used.

use std::{fmt, path::PathBuf, sync::Arc};

use async_nats::AuthError;

use crate::secrets::Reader;

/// One way to authenticate.
#[derive(Clone, Default)]
pub enum Auth {
    /// No credentials, or those in the server's URL.
    #[default]
    None,
    /// User and password.
    User(String, String),
    /// A bare token.
    Token(String),
    /// A credentials file: a user JWT and its seed.
    Credentials(Arc<Reader>),
    /// A file with an nkey seed.
    Nkey(Arc<Reader>),
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::User(..) => "User(***)",
            Self::Token(_) => "Token(***)",
            Self::Credentials(_) => "Credentials(***)",
            Self::Nkey(_) => "Nkey(***)",
        })
    }
}

impl Auth {
    /// A credentials file. All clones share one reader, so a file that hangs costs one thread.
    pub fn credentials(file: PathBuf) -> Self {
        Self::Credentials(Arc::new(Reader::new(file)))
    }

    /// A file with an nkey seed. Its clones share one reader, too.
    pub fn nkey(file: PathBuf) -> Self {
        Self::Nkey(Arc::new(Reader::new(file)))
    }

    /// Answers the server's challenge.
    pub(super) async fn answer(&self, nonce: &[u8]) -> Result<async_nats::Auth, AuthError> {
        let mut answer = async_nats::Auth::new();
        match self {
            Self::None => {}
            Self::User(user, password) => {
                answer.username = Some(user.clone());
                answer.password = Some(password.clone());
            }
            Self::Token(token) => answer.token = Some(token.clone()),
            Self::Credentials(file) => {
                let text = read(file).await?;
                let jwt = decorated(&text, "NATS USER JWT").ok_or_else(|| refuse("no user JWT"))?;
                let seed =
                    decorated(&text, "USER NKEY SEED").ok_or_else(|| refuse("no nkey seed"))?;
                answer.jwt = Some(jwt.to_owned());
                answer.signature = Some(sign(seed, nonce)?.1);
            }
            Self::Nkey(file) => {
                let (public, signature) = sign(read(file).await?.trim(), nonce)?;
                answer.nkey = Some(public);
                answer.signature = Some(signature);
            }
        }
        Ok(answer)
    }
}

/// If the file hangs, the attempt to connect fails, and nothing else waits for the file.
async fn read(file: &Reader) -> Result<String, AuthError> {
    let failed = |error| refuse(&format!("{}: {error}", file.path().display()));
    file.read().await.map(|(text, _)| text).map_err(failed)
}

fn sign(seed: &str, nonce: &[u8]) -> Result<(String, Vec<u8>), AuthError> {
    let pair = nkeys::KeyPair::from_seed(seed).map_err(|_| refuse("not an nkey seed"))?;
    let signature = pair.sign(nonce).map_err(|_| refuse("the nkey seed cannot sign"))?;
    Ok((pair.public_key(), signature))
}

/// The line between `-----BEGIN <label>-----` and its END, as credentials files write them.
fn decorated<'t>(text: &'t str, label: &str) -> Option<&'t str> {
    let mut lines = text.lines().map(str::trim);
    lines.find(|line| line.starts_with("---") && line.contains(&format!("BEGIN {label}")))?;
    lines.find(|line| !line.is_empty()).filter(|line| !line.starts_with("---"))
}

fn refuse(why: &str) -> AuthError {
    AuthError::new(why)
}

#[cfg(test)]
mod tests {
    use std::{
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use super::*;
    use crate::secrets::OpenTo;

    #[tokio::test]
    async fn a_credentials_file_signs_the_challenge_with_its_seed() {
        let pair = nkeys::KeyPair::new_user();
        let text = format!(
            "-----BEGIN NATS USER JWT-----\neyJ0.e30.sig\n------END NATS USER JWT------\n\n\
             -----BEGIN USER NKEY SEED-----\n{}\n------END USER NKEY SEED------\n",
            pair.seed().unwrap()
        );
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();

        let answer = Auth::credentials(file.path().to_owned()).answer(b"nonce").await.unwrap();

        assert_eq!(answer.jwt.as_deref(), Some("eyJ0.e30.sig"));
        pair.verify(b"nonce", &answer.signature.unwrap()).unwrap();
    }

    #[tokio::test]
    async fn a_credentials_file_without_a_seed_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "-----BEGIN NATS USER JWT-----\nabc\n").unwrap();
        assert!(Auth::credentials(file.path().to_owned()).answer(b"nonce").await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_credentials_file_that_hangs_costs_one_thread_for_all_attempts() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let auth = Auth::Credentials(Arc::new(Reader::by(pipe.clone(), |path| {
            STARTED.fetch_add(1, Ordering::Relaxed);
            Ok((std::fs::read_to_string(path)?, OpenTo::Nobody))
        })));
        for _ in 0..3 {
            let attempt = auth.clone();
            let (answer, ()) = tokio::join!(
                attempt.answer(b"nonce"),
                tokio::time::advance(Duration::from_secs(2))
            );
            assert!(answer.is_err());
        }
        std::fs::write(&pipe, "no credentials").unwrap();
        let Err(refused) = auth.answer(b"nonce").await else { panic!("there is no JWT") };
        assert!(refused.to_string().contains("no user JWT"), "{refused}");
        assert_eq!(STARTED.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", Auth::User("u".into(), "hunter2".into()));
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
