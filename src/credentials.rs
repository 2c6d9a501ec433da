//! The rights in use. They come from the policy file, from the files that it names, and from the servers of issuers.
//! Files are read again when they change, and servers are asked again. Decides nothing about callers: `access` does.
//!
//! A file that cannot be used changes nothing: the rights stay as they were, and one line says so. No call waits for
//! a server: the keys of an issuer are here, or its tokens get `AUTH_UNAVAILABLE`.

mod fetch;
mod http;
mod issuers;
mod refresh;

use std::{
    collections::BTreeMap,
    io,
    panic::AssertUnwindSafe,
    path::{Path, PathBuf},
    sync::{Arc, PoisonError, RwLock},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::{
    fetch::{FetchFault, FetchedKeys},
    issuers::{IssuerWork, Issuers},
};
use crate::{
    access::{
        ApiKeys, ApiKeysError, Credential, Issuer, KeySet, KeySetError, KeySets, KnownCaller,
        NotAccepted, Policy, PolicyError, Rights,
    },
    audit::{Audit, AuditScope},
    clock,
    metrics::FileMeter,
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
    issuers: Issuers,
}

/// The texts of the files that a policy names, by their paths.
type NamedFiles = BTreeMap<PathBuf, String>;

/// The files as they were read, what was fetched, and their meaning.
#[derive(Debug)]
struct Taken {
    policy: String,
    files: NamedFiles,
    /// What the servers of issuers have sent, by the names of the issuers.
    fetched: BTreeMap<Arc<str>, (Issuer, String)>,
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
    /// The file with the keys of an issuer has a mistake.
    #[error("{}: {}", .0.display(), .1)]
    KeySet(PathBuf, KeySetError),
    /// The policy accepts no credential.
    #[error(
        "{}: nothing in `authenticate` identifies a caller, so its rules are for nobody: name \
         `api_keys`, `jwt` or `kubernetes`, set `anonymous: true`, or start with --tls-client-ca", .0.display()
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

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> AccessFileError + use<> {
    let path = path.to_owned();
    move |error| AccessFileError::Unreadable(path, error)
}

impl Gatekeeper {
    /// Without a policy: everybody may do everything.
    pub fn open() -> Self {
        let rights = Arc::new(Rights::open());
        let (policy, files, fetched) = (String::new(), NamedFiles::new(), BTreeMap::new());
        let taken = Taken { policy, files, fetched, rights };
        let state = RwLock::new(Arc::new(taken));
        let issuers = Issuers::default();
        let audit = Audit::new(AuditScope::Off);
        Self { file: None, certificates: false, must_authenticate: false, audit, state, issuers }
    }

    /// Reads a policy file and the files that it names. Blocks, so it is only for the start of the process. It asks
    /// no server. `certificates`: clients may show certificates, so the policy needs no other way to identify them.
    ///
    /// # Errors
    /// See [`AccessFileError`].
    pub fn load(file: PathBuf, certificates: bool) -> Result<Self, AccessFileError> {
        let (text, _) = secrets::read_at_start(&file).map_err(unreadable(&file))?;
        let policy = parse(&file, &text)?;
        let mut files = NamedFiles::new();
        for path in named_files(&policy, &file) {
            let (text, _) = secrets::read_at_start(&path).map_err(unreadable(&path))?;
            files.insert(path, text);
        }
        for path in policy.issuers().iter().flat_map(|issuer| files_for_fetches(issuer, &file)) {
            secrets::look_at_start(&path).map_err(unreadable(&path))?;
        }
        let gatekeeper = Self { file: Some(file), certificates, ..Self::open() };
        gatekeeper.take(text, files)?;
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

    /// The issuers whose keys were fetched, and how old the keys are.
    pub fn key_ages(&self) -> Vec<(Arc<str>, Duration)> {
        self.issuers.ages(clock::now())
    }

    /// The rights at this moment.
    pub fn rights(&self) -> Arc<Rights> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).rights.clone()
    }

    /// The caller with this credential, by these rights. A token that names an unknown key makes the keys be fetched
    /// again, if that was not tried just now. `now` is the time since the Unix epoch.
    ///
    /// # Errors
    /// See [`NotAccepted`].
    pub fn accept(
        &self,
        rights: &Rights,
        credential: Credential,
        now: Duration,
    ) -> Result<KnownCaller, NotAccepted> {
        let accepted = rights.caller(credential, now);
        if let Err(NotAccepted::UnknownKey(issuer)) = &accepted
            && self.issuers.ask(issuer, clock::now())
        {
            return Err(NotAccepted::KeysAway(issuer.clone()));
        }
        accepted
    }

    /// Reads the files again whenever they change, and fetches the keys of issuers, until `stop`.
    pub async fn follow(&self, stop: CancellationToken, meter: FileMeter) {
        let Some(file) = &self.file else { return };
        let fetch = |issuer| fetch::fetch(issuer, file.clone());
        let files = self.follow_files(file, stop.clone(), meter);
        tokio::join!(files, self.follow_issuers(fetch, stop));
    }

    async fn follow_files(&self, file: &Path, stop: CancellationToken, meter: FileMeter) {
        let (policy, mut named) = (Reader::new(file.to_owned()), BTreeMap::new());
        let mut looks = FileLooks::new(stop);
        while let Some(news) = looks.next(self.look(file, &policy, &mut named)).await {
            news.iter().for_each(|news| meter.usable(*news == FileNews::Usable));
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

    /// Reads all files once. `named` are the readers of the files that the policy names, as the last look left them.
    async fn look(
        &self,
        file: &Path,
        policy: &Reader,
        named: &mut BTreeMap<PathBuf, Reader>,
    ) -> Result<(), AccessFileError> {
        let (text, _) = policy.read().await.map_err(unreadable(file))?;
        let taken = self.taken();
        let paths = match text == taken.policy {
            true => taken.files.keys().cloned().collect(),
            false => named_files(&parse(file, &text)?, file),
        };
        named.retain(|path, _| paths.contains(path));
        let mut files = NamedFiles::new();
        for path in paths {
            let reader = named.entry(path.clone()).or_insert_with(|| Reader::new(path.clone()));
            let (text, _) = reader.read().await.map_err(unreadable(&path))?;
            files.insert(path, text);
        }
        if text == taken.policy && files == taken.files {
            return Ok(());
        }
        self.take(text, files)
    }

    async fn follow_issuers<F>(&self, fetch: impl Fn(Issuer) -> F, stop: CancellationToken)
    where
        F: Future<Output = Result<FetchedKeys, FetchFault>> + Send + 'static,
    {
        let mut fetches = JoinSet::new();
        loop {
            let IssuerWork { fetches: due, outlived, next } = self.issuers.work(clock::now());
            for issuer in outlived {
                tracing::error!(
                    issuer = &*issuer.name,
                    "the keys of an issuer are a day old: its tokens are not accepted until they are fetched"
                );
                self.take_fetched(&issuer, None);
            }
            for issuer in due {
                // Without an end, this fetch would count as running for ever, and no other would follow.
                let fetched = AssertUnwindSafe(fetch(issuer.clone())).catch_unwind();
                fetches.spawn(
                    async move { (issuer, fetched.await.unwrap_or(Err(FetchFault::Panic))) },
                );
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = self.issuers.changed() => {}
                () = clock::sleep_until(next) => {}
                Some(Ok((issuer, fetched))) = fetches.join_next() => self.fetched(&issuer, fetched),
            }
        }
    }

    /// A fetch of the keys of this issuer has ended.
    fn fetched(&self, issuer: &Issuer, fetched: Result<FetchedKeys, FetchFault>) {
        let ended = fetched.as_ref().map(|_| ());
        if self.issuers.ended(issuer, ended, clock::now())
            && let Ok(keys) = fetched
        {
            self.take_fetched(issuer, Some(keys));
        }
    }

    /// Uses these keys of an issuer from now on, or none.
    fn take_fetched(&self, issuer: &Issuer, keys: Option<FetchedKeys>) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let Taken { policy, files, fetched, rights } = &**state;
        let text = keys.as_ref().map(|(text, _)| text);
        let named = rights
            .policy()
            .is_some_and(|policy| policy.issuers().iter().any(|known| known.has_keys_of(issuer)));
        if !named || fetched.get(&issuer.name).map(|(_, text)| text) == text {
            return;
        }
        let (mut fetched, mut key_sets) = (fetched.clone(), rights.key_sets().clone());
        fetched.remove(&issuer.name);
        key_sets.remove(&issuer.name);
        if let Some((text, keys)) = keys {
            let (issuer_name, count) = (&*issuer.name, keys.len());
            tracing::info!(issuer = issuer_name, keys = count, "the keys of an issuer are in use");
            fetched.insert(issuer.name.clone(), (issuer.clone(), text));
            key_sets.insert(issuer.name.clone(), Arc::new(keys));
        }
        let (policy, files) = (policy.clone(), files.clone());
        let rights = Arc::new(rights.with_key_sets(key_sets));
        *state = Arc::new(Taken { policy, files, fetched, rights });
    }

    /// Uses this policy from now on, as if it had been read from its file. It names no other file. For tests.
    ///
    /// # Errors
    /// See [`AccessFileError`]: the rights stay as they were.
    #[doc(hidden)]
    pub fn retake(&self, text: String) -> Result<(), AccessFileError> {
        self.take(text, NamedFiles::default())
    }

    /// Uses these texts from now on. The keys of issuers stay, if the policy still names their servers.
    fn take(&self, text: String, files: NamedFiles) -> Result<(), AccessFileError> {
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
        let text_of = |path: &Path| files.get(path).map_or("", String::as_str);
        let parsed = authenticate.api_keys_file(&file).map_or(Ok(ApiKeys::default()), |path| {
            let parsed = ApiKeys::parse(text_of(&path));
            parsed.map_err(|error| AccessFileError::ApiKeys(path, error))
        })?;
        let mut key_sets = KeySets::new();
        for issuer in policy.issuers() {
            let Some(path) = issuer.keys.key_file(&file) else { continue };
            let keys = KeySet::parse(text_of(&path));
            let keys = keys.map_err(|error| AccessFileError::KeySet(path, error))?;
            key_sets.insert(issuer.name.clone(), Arc::new(keys));
        }
        let from_before = authenticate.accept_anonymous_tokens;
        let (digest, (principals, rules), api_keys, issuers) =
            (policy.digest(), policy.counts(), parsed.len(), policy.issuers().len());
        tracing::info!(digest, principals, rules, api_keys, issuers, "a policy is in use");
        self.audit.policy_loaded(&digest);
        if from_before {
            tracing::warn!(
                "accept_anonymous_tokens is set: each principal may settle tokens from before the policy"
            );
        }
        let asked = policy.issuers().iter().filter(|issuer| issuer.keys.key_file(&file).is_none());
        let asked: Vec<_> = asked.cloned().collect();
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let mut fetched = state.fetched.clone();
        fetched.retain(|_, (asked, _)| {
            policy.issuers().iter().any(|issuer| issuer.has_keys_of(asked))
        });
        for name in fetched.keys() {
            let keys = state.rights.key_sets().get(name);
            keys.map(|keys| key_sets.insert(name.clone(), keys.clone()));
        }
        let rights = Rights::new(policy, parsed, state.rights.generation());
        let rights = Arc::new(rights.with_key_sets(key_sets));
        *state = Arc::new(Taken { policy: text, files, fetched, rights });
        drop(state);
        // Only now: what is fetched for an issuer that the policy in use does not name is dropped.
        self.issuers.follow(asked.iter(), clock::now());
        Ok(())
    }

    fn taken(&self) -> Arc<Taken> {
        self.state.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn parse(file: &Path, text: &str) -> Result<Policy, AccessFileError> {
    Policy::parse(text).map_err(|error| AccessFileError::Policy(file.to_owned(), error))
}

/// The files with API keys and with the keys of issuers.
fn named_files(policy: &Policy, file: &Path) -> Vec<PathBuf> {
    let keys = policy.issuers().iter().filter_map(|issuer| issuer.keys.key_file(file));
    policy.authenticate().api_keys_file(file).into_iter().chain(keys).collect()
}

/// The files that a fetch of the keys of this issuer reads.
fn files_for_fetches(issuer: &Issuer, file: &Path) -> impl Iterator<Item = PathBuf> {
    issuer.keys.ca_file(file).into_iter().chain(issuer.keys.bearer_file(file))
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        sync::atomic::{AtomicU32, Ordering},
    };

    use tempfile::TempDir;
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::access::{ApiKeyDigest, NewApiKey, Unauthenticated};

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
        fn accepted(&self, gatekeeper: &Gatekeeper) -> Result<(), NotAccepted> {
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
        let refused = gatekeeper.take(open.clone(), NamedFiles::new()).unwrap_err();
        assert!(matches!(refused, AccessFileError::Anybody(_)), "{refused}");
        assert!(gatekeeper.authenticates());
        files.write("policy", &open);
        let mut gatekeeper = files.load().unwrap();
        assert!(!gatekeeper.authenticates());
        assert!(matches!(gatekeeper.must_authenticate(), Err(AccessFileError::Anybody(_))));
    }

    #[tokio::test(start_paused = true)]
    async fn fetch_that_panics_is_tried_again() {
        let files = Files::new();
        let issuers = "jwt: [{name: corp, issuer: i, audiences: [a], keys: {url: 'http://127.0.0.1:1/'}}], api_keys";
        files.write("policy", &POLICY.replace("api_keys", issuers));
        let (gatekeeper, fetches) = (files.load().unwrap(), AtomicU32::new(0));
        let stop = CancellationToken::new();
        let fetch = |_| {
            let first = fetches.fetch_add(1, Ordering::Relaxed) == 0;
            async move {
                assert!(!first, "the first fetch panics");
                let text = testkit::issuer::key_set(&[&testkit::issuer::TokenKey::p256("k")]);
                let keys = KeySet::parse(&text).unwrap();
                Ok((text, keys))
            }
        };
        let following = gatekeeper.follow_issuers(fetch, stop);
        let within = tokio::time::timeout(Duration::from_secs(10), following).await;
        assert!(within.is_err(), "it follows until it is stopped");
        assert_eq!(fetches.into_inner(), 2);
        assert!(gatekeeper.rights().key_sets().contains_key("corp"));
    }

    #[tokio::test(start_paused = true)]
    async fn changed_files_count_within_two_looks_and_wrong_files_never() {
        let files = Files::new();
        let gatekeeper = Arc::new(files.load().unwrap());
        let (following, stop) = (gatekeeper.clone(), CancellationToken::new());
        let stopped = stop.clone();
        let tasks = TaskTracker::new();
        tasks.spawn(async move { following.follow(stopped, FileMeter::default()).await });
        let looks = || tokio::time::sleep(2 * secrets::LOOK_INTERVAL);
        let generation = gatekeeper.rights().generation();
        looks().await;
        assert_eq!(gatekeeper.rights().generation(), generation, "nothing changed");

        let keys = fs::read_to_string(files.folder.path().join("keys")).unwrap();
        files.write("keys", "# revoked");
        looks().await;
        assert_eq!(files.accepted(&gatekeeper), Err(Unauthenticated::ApiKey.into()));
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
