//! Who we are to NATS. Owns the credentials and the answer to a server's challenge. Files are read
//! anew for every connection, so that rotated credentials are taken up.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use async_nats::AuthError;

use crate::secrets::Reader;

/// One way to authenticate.
#[derive(Clone, Default)]
pub enum Auth {
    /// As nobody, or as the user named in the server's URL.
    #[default]
    None,
    /// User and password.
    User(String, String),
    /// A bare token.
    Token(String),
    /// A credentials file: a user JWT and its seed.
    Credentials(PathBuf),
    /// A file with an nkey seed.
    Nkey(PathBuf),
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
            Self::Credentials(path) => {
                let text = read(path).await?;
                let jwt = decorated(&text, "NATS USER JWT").ok_or_else(|| refuse("no user JWT"))?;
                let seed =
                    decorated(&text, "USER NKEY SEED").ok_or_else(|| refuse("no nkey seed"))?;
                answer.jwt = Some(jwt.to_owned());
                answer.signature = Some(sign(seed, nonce)?.1);
            }
            Self::Nkey(path) => {
                let (public, signature) = sign(read(path).await?.trim(), nonce)?;
                answer.nkey = Some(public);
                answer.signature = Some(signature);
            }
        }
        Ok(answer)
    }
}

/// Where the file hangs, the attempt to connect fails, and nothing else waits for it.
async fn read(path: &Path) -> Result<String, AuthError> {
    let read = Reader::new(path.to_owned()).read().await;
    read.map(|(text, _)| text).map_err(|error| refuse(&format!("{}: {error}", path.display())))
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
    use super::*;

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

        let answer = Auth::Credentials(file.path().to_owned()).answer(b"nonce").await.unwrap();

        assert_eq!(answer.jwt.as_deref(), Some("eyJ0.e30.sig"));
        pair.verify(b"nonce", &answer.signature.unwrap()).unwrap();
    }

    #[tokio::test]
    async fn a_credentials_file_without_a_seed_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "-----BEGIN NATS USER JWT-----\nabc\n").unwrap();
        assert!(Auth::Credentials(file.path().to_owned()).answer(b"nonce").await.is_err());
    }

    #[test]
    fn secrets_are_not_shown() {
        let shown = format!("{:?}", Auth::User("u".into(), "hunter2".into()));
        assert!(!shown.contains("hunter2"), "{shown}");
    }
}
