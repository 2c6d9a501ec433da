//! The keys in use. They come from the key file, which is read again when it changes. Without a file, the
//! process makes a key of its own. Decides which key seals; `token` seals.
//!
//! A new first key seals only once every known replica has it. So a rotation never makes a token that
//! another replica cannot open yet:
//!
//! ```text
//!  file: old          file: new, old                 every peer has new     file: new
//!  old seals ───────▶ old seals, both open ────────▶ new seals ───────────▶ new alone
//! ```

use std::{
    collections::BTreeSet,
    fmt, io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use tokio_util::sync::CancellationToken;

use crate::{
    metrics::FileMeter,
    secrets::{self, FileFault, FileLooks, FileNews, OpenTo, Reader},
    token::{self, KeyId, KeyRing, KeyRingError, Sealer},
};

/// The keys of this replica.
#[derive(Debug)]
pub struct Keys {
    cluster: String,
    file: Option<PathBuf>,
    state: RwLock<State>,
}

struct State {
    text: Arc<str>,
    /// The keys that every peer has. `None` while no peer is known.
    common: Option<BTreeSet<KeyId>>,
    sealer: Arc<Sealer>,
}

/// Leaves the text out, because it contains the keys.
impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ring = self.sealer.ring();
        f.debug_struct("State").field("common", &self.common).field("ring", ring).finish()
    }
}

/// The reason why there are no keys.
#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    /// The file cannot be read.
    #[error("cannot read {}: {}", .0.display(), .1)]
    Unreadable(PathBuf, io::Error),
    /// The file contains something other than keys.
    #[error("{}: {}", .0.display(), .1)]
    Invalid(PathBuf, KeyRingError),
    /// The system has no randomness for a key.
    #[error("cannot make a token key: {0}")]
    Randomness(getrandom::Error),
}

impl FileFault for KeysError {}

impl Keys {
    /// Reads the keys of the file. Without a file, makes a key that no other replica has.
    ///
    /// # Errors
    /// See [`KeysError`].
    pub fn load(file: Option<PathBuf>, cluster: &str) -> Result<Self, KeysError> {
        let text = match &file {
            Some(path) => {
                let (text, open_to) = secrets::read_at_start(path)
                    .map_err(|error| KeysError::Unreadable(path.clone(), error))?;
                open_to.warn(path);
                text
            }
            None => {
                tracing::warn!(
                    "no --token-key-file: tokens are sealed with a key of this process, and are \
                     unknown after a restart and at other replicas"
                );
                token::new_key_line().map_err(KeysError::Randomness)?
            }
        };
        Self::of(file, text, cluster)
    }

    /// The keys of this text, as if it were the text of this file; the file is not read.
    ///
    /// # Errors
    /// [`KeysError::Invalid`].
    #[doc(hidden)]
    pub fn of(file: Option<PathBuf>, text: String, cluster: &str) -> Result<Self, KeysError> {
        let invalid = |error| KeysError::Invalid(file.clone().unwrap_or_default(), error);
        let ring = KeyRing::parse(&text).map_err(invalid)?;
        let sealer = Arc::new(Sealer::new(ring, cluster));
        let state = State { text: text.into(), common: None, sealer };
        Ok(Self { cluster: cluster.to_owned(), file, state: RwLock::new(state) })
    }

    /// Takes up another text, as if it had been read from the file. For tests.
    ///
    /// # Errors
    /// [`KeysError::Invalid`]: the keys stay as they were.
    #[doc(hidden)]
    pub fn retake(&self, text: String) -> Result<(), KeysError> {
        self.take(&self.file.clone().unwrap_or_default(), text, OpenTo::Nobody)
    }

    /// Whether other replicas may have the same keys.
    pub fn shared(&self) -> bool {
        self.file.is_some()
    }

    /// The ring that seals and opens at this moment.
    pub fn sealer(&self) -> Arc<Sealer> {
        self.read().sealer.clone()
    }

    /// Sets the keys that every known peer has. `None`: no peer is known.
    pub fn common(&self, common: Option<BTreeSet<KeyId>>) {
        if self.read().common == common {
            return;
        }
        let mut state = self.write();
        let text = state.text.clone();
        self.put(&mut state, text, common);
    }

    /// Reads the file again whenever it changes, until `stop`.
    pub async fn follow(&self, stop: CancellationToken, meter: FileMeter) {
        let Some(file) = &self.file else { return };
        let (reader, mut looks) = (Reader::new(file.clone()), FileLooks::new(stop));
        let look = async || {
            let read = reader.read().await;
            let (text, open_to) =
                read.map_err(|error| KeysError::Unreadable(file.clone(), error))?;
            self.take(file, text, open_to)
        };
        while let Some(news) = looks.next(look()).await {
            news.iter().for_each(|news| meter.usable(*news == FileNews::Usable));
            match news {
                Some(FileNews::Unusable(error)) => tracing::error!(
                    error,
                    "the token key file cannot be used: the keys stay as they were"
                ),
                Some(FileNews::Usable) => tracing::info!("the token key file can be used again"),
                None => {}
            }
        }
    }

    fn take(&self, file: &Path, text: String, open_to: OpenTo) -> Result<(), KeysError> {
        if *self.read().text == *text {
            return Ok(());
        }
        let ring =
            KeyRing::parse(&text).map_err(|error| KeysError::Invalid(file.to_owned(), error))?;
        tracing::info!(keys = ring.ids().len(), "the token key file was read again");
        open_to.warn(file);
        let mut state = self.write();
        let common = state.common.clone();
        self.put(&mut state, text.into(), common);
        Ok(())
    }

    /// Uses this text and these common keys from now on. The text was parsed before. If no key is common
    /// to all, the key that seals stays, if the text still has it.
    fn put(&self, state: &mut State, text: Arc<str>, common: Option<BTreeSet<KeyId>>) {
        let Ok(ring) = KeyRing::parse(&text) else { return };
        let has_all = |id: &KeyId| common.as_ref().is_none_or(|common| common.contains(id));
        let sealing = ring.ids().into_iter().find(has_all);
        let sealing = sealing.unwrap_or_else(|| state.sealer.ring().sealing_id());
        let sealer = Arc::new(Sealer::new(ring.sealing_with(sealing), &self.cluster));
        *state = State { text, common, sealer };
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_is_ever_shown() {
        let key = token::new_key_line().unwrap();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &key).unwrap();
        let keys = Keys::load(Some(file.path().to_owned()), "c").unwrap();
        let shown = format!("{keys:?} {:?} {keys:#?}", keys.sealer());
        assert!(!shown.contains(&key), "{shown}");
    }
}
