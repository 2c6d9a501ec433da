//! The rights in use. They come from the policy file and from the file of API keys that it names. Both are read
//! again when they change. Decides nothing about callers: `access` does.
//!
//! A file that cannot be used changes nothing: the rights stay as they were, and one line says so.

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
};

use tokio_util::sync::CancellationToken;

use crate::{
    access::{ApiKeys, ApiKeysError, Policy, PolicyError, Rights},
    audit::{Audit, AuditScope},
    secrets::{self, FileFault, FileLooks, FileNews, Reader},
};

/// The rights of this replica, and the files that they come from.
#[derive(Debug)]
pub struct Gatekeeper {
    file: Option<PathBuf>,
    /// Whether clients may show certificates, which identify them.
    certificates: bool,
    /// Whether a policy is refused that accepts callers without a credential.
    must_authenticate: bool,
    audit: Audit,
    state: RwLock<Arc<Taken>>,
}

/// The files as they were read, and their meaning.
#[derive(Debug)]
struct Taken {
    policy: String,
    keys: String,
    keys_file: Option<PathBuf>,
    rights: Arc<Rights>,
}

/// The reason why there are no rights.
#[derive(Debug, thiserror::Error)]
pub enum AccessFileError {
    /// A file cannot be read.
    #[error("cannot read {}: {}", .0.display(), .1)]
    Unreadable(PathBuf, io::Error),
    /// The policy file has a mistake.
    #[error("{}:{}", .0.display(), .1)]
    Policy(PathBuf, PolicyError),
    /// The file of API keys has a mistake.
    #[error("{}: {}", .0.display(), .1)]
    ApiKeys(PathBuf, ApiKeysError),
    /// The policy accepts no credential.
    #[error(
        "{}: nothing in `authenticate` identifies a caller, so its rules are for nobody: name \
         `api_keys`, set `anonymous: true`, or start with --tls-client-ca", .0.display()
    )]
    Nobody(PathBuf),
    /// The policy accepts callers without a credential, and the listener is open to strangers.
    #[error(
        "{}: `authenticate` accepts callers without a credential, and this replica listens beyond \
         loopback without --insecure", .0.display()
    )]
    Anybody(PathBuf),
}

impl FileFault for AccessFileError {}

impl Gatekeeper {
    /// Without a policy: everybody may do everything.
    pub fn open() -> Self {
        let rights = Arc::new(Rights::open());
        let taken = Taken { policy: String::new(), keys: String::new(), keys_file: None, rights };
        let (audit, state) = (Audit::new(AuditScope::Off), RwLock::new(Arc::new(taken)));
        Self { file: None, certificates: false, must_authenticate: false, audit, state }
    }

    /// Reads a policy file and the files that it names. Blocks, so it is only for the start of the process.
    /// `certificates`: clients may show certificates, so the policy needs no other way to identify them.
    ///
    /// # Errors
    /// See [`AccessFileError`].
    pub fn load(file: PathBuf, certificates: bool) -> Result<Self, AccessFileError> {
        let read = |path: &Path| {
            let read = secrets::read_at_start(path).map(|(text, _)| text);
            read.map_err(|error| AccessFileError::Unreadable(path.to_owned(), error))
        };
        let text = read(&file)?;
        let keys_file = parse(&file, &text)?.authenticate().api_keys_file(&file);
        let keys = keys_file.as_deref().map(read).transpose()?.unwrap_or_default();
        let gatekeeper = Self { file: Some(file), certificates, ..Self::open() };
        gatekeeper.take(text, keys)?;
        Ok(gatekeeper)
    }

    /// From now on, a policy that accepts callers without a credential is refused.
    ///
    /// # Errors
    /// [`AccessFileError::Anybody`]: the present one accepts them.
    pub fn must_authenticate(&mut self) -> Result<(), AccessFileError> {
        self.must_authenticate = true;
        let (file, rights) = (self.file.clone().unwrap_or_default(), self.rights());
        match rights.policy() {
            Some(policy) if !policy.authenticate().anonymous => Ok(()),
            Some(_) | None => Err(AccessFileError::Anybody(file)),
        }
    }

    /// From now on, writes the audit lines of this scope. The first is about the policy.
    pub fn write_audit(&mut self, scope: AuditScope) {
        self.audit = Audit::new(scope);
        if let Some(policy) = self.rights().policy() {
            self.audit.policy_loaded(&policy.digest());
        }
    }

    /// The writer of audit lines.
    pub fn audit(&self) -> &Audit {
        &self.audit
    }

    /// Whether each caller needs a credential.
    pub fn authenticates(&self) -> bool {
        self.rights().policy().is_some_and(|policy| !policy.authenticate().anonymous)
    }

    /// The rights at this moment.
    pub fn rights(&self) -> Arc<Rights> {
        self.taken().rights.clone()
    }

    /// Reads the files again whenever they change, until `stop`.
    pub async fn follow(&self, stop: CancellationToken) {
        let Some(file) = &self.file else { return };
        let (policy, mut keys) = (Reader::new(file.clone()), None);
        let mut looks = FileLooks::new(stop);
        while let Some(news) = looks.next(self.look(file, &policy, &mut keys)).await {
            match news {
                Some(FileNews::Unusable(error)) => tracing::error!(
                    error,
                    "the policy cannot be used: all rights stay as they were"
                ),
                Some(FileNews::Usable) => tracing::info!("the policy can be used again"),
                None => {}
            }
        }
    }

    /// Reads both files once. `keys` is the reader of the file of API keys, as the last look left it.
    async fn look(
        &self,
        file: &Path,
        policy: &Reader,
        keys: &mut Option<(PathBuf, Reader)>,
    ) -> Result<(), AccessFileError> {
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |error| AccessFileError::Unreadable(path, error)
        };
        let (text, _) = policy.read().await.map_err(unreadable(file))?;
        let taken = self.taken();
        let keys_file = match text == taken.policy {
            true => taken.keys_file.clone(),
            false => parse(file, &text)?.authenticate().api_keys_file(file),
        };
        if keys.as_ref().map(|(path, _)| path) != keys_file.as_ref() {
            *keys = keys_file.map(|path| (path.clone(), Reader::new(path)));
        }
        let keys = match keys {
            Some((path, reader)) => reader.read().await.map_err(unreadable(path))?.0,
            None => String::new(),
        };
        if text == taken.policy && keys == taken.keys {
            return Ok(());
        }
        self.take(text, keys)
    }

    /// Uses these texts from now on. For tests too, as if they had been read from the files.
    ///
    /// # Errors
    /// See [`AccessFileError`]: the rights stay as they were.
    #[doc(hidden)]
    pub fn take(&self, text: String, keys: String) -> Result<(), AccessFileError> {
        let file = self.file.clone().unwrap_or_default();
        let policy = parse(&file, &text)?;
        let authenticate = policy.authenticate();
        let identifies = self.certificates || authenticate.identifies();
        if !identifies && !authenticate.anonymous {
            return Err(AccessFileError::Nobody(file));
        }
        if authenticate.anonymous && self.must_authenticate {
            return Err(AccessFileError::Anybody(file));
        }
        let keys_file = authenticate.api_keys_file(&file);
        let parsed = ApiKeys::parse(&keys).map_err(|error| {
            AccessFileError::ApiKeys(keys_file.clone().unwrap_or_default(), error)
        })?;
        let from_before = authenticate.accept_anonymous_tokens;
        let (digest, (principals, rules), api_keys) =
            (policy.digest(), policy.counts(), parsed.len());
        tracing::info!(digest, principals, rules, api_keys, "a policy is in use");
        self.audit.policy_loaded(&digest);
        if from_before {
            tracing::warn!(
                "accept_anonymous_tokens is set: each principal may settle tokens from before the policy"
            );
        }
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let rights = Arc::new(Rights::new(policy, parsed, state.rights.generation() + 1));
        *state = Arc::new(Taken { policy: text, keys, keys_file, rights });
        Ok(())
    }

    fn taken(&self) -> Arc<Taken> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn parse(file: &Path, text: &str) -> Result<Policy, AccessFileError> {
    Policy::parse(text).map_err(|error| AccessFileError::Policy(file.to_owned(), error))
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use tempfile::TempDir;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::access::{ApiKeyDigest, Credential, NewApiKey, Unauthenticated};

    const POLICY: &str = "\
version: 1
authenticate: {api_keys: {file: keys}}
principals: [{name: orders, match: ['key:*']}]
rules: [{principals: [orders], streams: [S], consumers: ['*'], verbs: [work]}]
";

    /// A folder with a policy and its keys.
    struct Files {
        folder: TempDir,
        secret: String,
    }

    impl Files {
        fn new() -> Self {
            let (folder, key) = (tempfile::tempdir().unwrap(), NewApiKey::random("a").unwrap());
            let key = key.unwrap();
            let files = Self { folder, secret: key.secret };
            files.write("keys", &key.line);
            files.write("policy", POLICY);
            files
        }

        fn write(&self, name: &str, text: &str) {
            // As a rename, so that no reader sees a part of it.
            let part = self.folder.path().join("part");
            fs::write(&part, text).unwrap();
            fs::rename(part, self.folder.path().join(name)).unwrap();
        }

        fn load(&self) -> Result<Gatekeeper, AccessFileError> {
            Gatekeeper::load(self.folder.path().join("policy"), false)
        }

        /// Whether the key is accepted.
        fn accepted(&self, gatekeeper: &Gatekeeper) -> Result<(), Unauthenticated> {
            let credential = Credential::ApiKey(ApiKeyDigest::of(&self.secret).unwrap());
            gatekeeper.rights().caller(credential, Duration::ZERO).map(|_| ())
        }
    }

    #[test]
    fn file_that_cannot_be_used_is_named_at_the_start() {
        let files = Files::new();
        let error = |changed: Option<&str>| {
            changed.inspect(|text| files.write("policy", text));
            files.load().unwrap_err().to_string()
        };
        let wrong = error(Some(&POLICY.replace("rules", "rule")));
        assert!(wrong.contains("policy:4:1: unknown field `rule`"), "{wrong}");
        let nobody = error(Some(&POLICY.replace("api_keys: {file: keys}", "")));
        assert!(nobody.contains("its rules are for nobody"), "{nobody}");
        files.write("keys", "a secret");
        let keys = error(Some(POLICY));
        assert!(keys.contains("keys: line 1 is not an API key") && !keys.contains("a secret"));
        fs::remove_file(files.folder.path().join("keys")).unwrap();
        assert!(error(None).contains("keys: No such file"));
        fs::remove_file(files.folder.path().join("policy")).unwrap();
        assert!(error(None).contains("policy: No such file"));
    }

    #[test]
    fn listener_for_strangers_takes_no_policy_that_needs_no_credential() {
        let files = Files::new();
        let mut gatekeeper = files.load().unwrap();
        assert!(gatekeeper.authenticates());
        gatekeeper.must_authenticate().unwrap();
        let open = POLICY.replace("authenticate: {", "authenticate: {anonymous: true, ");
        let keys = fs::read_to_string(files.folder.path().join("keys")).unwrap();
        let refused = gatekeeper.take(open.clone(), keys).unwrap_err();
        assert!(matches!(refused, AccessFileError::Anybody(_)), "{refused}");
        assert!(gatekeeper.authenticates());
        files.write("policy", &open);
        let mut gatekeeper = files.load().unwrap();
        assert!(!gatekeeper.authenticates());
        assert!(matches!(gatekeeper.must_authenticate(), Err(AccessFileError::Anybody(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn changed_files_count_within_two_looks_and_wrong_files_never() {
        let files = Files::new();
        let gatekeeper = Arc::new(files.load().unwrap());
        let (following, stop) = (gatekeeper.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let tasks = TaskTracker::new();
        tasks.spawn(async move { following.follow(stopped).await });
        let looks = || tokio::time::sleep(2 * secrets::LOOK_INTERVAL);
        let generation = gatekeeper.rights().generation();
        looks().await;
        assert_eq!(gatekeeper.rights().generation(), generation, "nothing changed");

        let keys = fs::read_to_string(files.folder.path().join("keys")).unwrap();
        files.write("keys", "# revoked");
        looks().await;
        assert_eq!(files.accepted(&gatekeeper), Err(Unauthenticated::ApiKey));
        files.write("keys", "a mistake");
        files.write("policy", "a mistake");
        looks().await;
        assert_eq!(gatekeeper.rights().generation(), generation + 1, "the old rights stay");

        // The policy names another file now.
        files.write("other", &keys);
        files.write("policy", &POLICY.replace("file: keys", "file: other"));
        looks().await;
        assert_eq!(files.accepted(&gatekeeper), Ok(()));
        stop.cancel();
        tasks.close();
        tasks.wait().await;
    }
}
