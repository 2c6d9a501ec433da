//! Reads files that hold secrets. A file system that hangs, or a pipe without a writer, must neither block
//! the start permanently nor block a thread that serves. Reports who else may read or write a file. Has the one loop
//! of owners that read files again, which tells each fault of a file once.

use std::{
    fmt,
    fs::{self, File, Metadata},
    io::{self, Read as _},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};

use tokio::{
    sync::Mutex,
    task::{JoinHandle, spawn_blocking},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// Longest time to read a file. A local file takes less than a millisecond, a file over a network some
/// tens of milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest file, in bytes: it has room for 20,000 token keys.
const LARGEST: u64 = 1024 * 1024;
/// Interval between two looks at files that are read again. They are compared by content: Kubernetes swaps a
/// symbolic link, and neither the time of a file nor a watch of it tells that reliably.
pub const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// Mode bits of all who are neither the owner nor in the group.
const OTHERS_READ: u32 = 0o004;
const OTHERS_WRITE: u32 = 0o002;

/// The others who may use a file, in addition to its owner and its group. A system that does not store these bits may
/// show any value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenTo {
    /// Nobody.
    Nobody,
    /// Everybody on the machine can read it.
    Readers,
    /// Everybody on the machine can write it.
    Writers,
}

impl OpenTo {
    /// Reads this from the mode of a file.
    pub fn of(metadata: &Metadata) -> Self {
        match metadata.permissions().mode() {
            mode if mode & OTHERS_WRITE != 0 => Self::Writers,
            mode if mode & OTHERS_READ != 0 => Self::Readers,
            _ => Self::Nobody,
        }
    }

    /// Logs a warning if others may use the file.
    pub fn warn(self, file: &Path) {
        let others = match self {
            Self::Nobody => return,
            Self::Readers => "read",
            Self::Writers => "write",
        };
        tracing::warn!(
            file = %file.display(),
            others,
            "a file with a secret is open to everybody on this machine"
        );
    }
}

/// The content of a file, and who else may use the file.
pub type Secret = (String, OpenTo);

/// Reads a file of at most 1 MiB, for at most 2 s. Blocks, so it is only for the start of the process.
///
/// # Errors
/// The file is not a regular file, cannot be read, is larger, or takes longer.
pub fn read_at_start(path: &Path) -> io::Result<Secret> {
    at_start(path, read)
}

/// Checks a file that another library will read. Blocks for at most 2 s, so it is only for the start of
/// the process.
///
/// # Errors
/// The file is not a regular file, cannot be opened, or takes longer.
pub fn look_at_start(path: &Path) -> io::Result<OpenTo> {
    at_start(path, |path| Ok(OpenTo::of(&open(path)?.metadata()?)))
}

fn at_start<T: Send + 'static>(
    path: &Path,
    look: impl FnOnce(&Path) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (tell, told) = mpsc::sync_channel(1);
    let path = path.to_owned();
    // If this thread hangs, nothing waits for it: the process ends without it.
    thread::Builder::new().name("file".to_owned()).spawn(move || tell.send(look(&path)))?;
    told.recv_timeout(READ_TIMEOUT).unwrap_or_else(|_| Err(too_slow()))
}

/// Reads one file repeatedly, never twice at the same time. A file that hangs blocks one thread, for any
/// number of callers.
#[derive(Debug)]
pub struct Reader {
    path: PathBuf,
    read: fn(&Path) -> io::Result<Secret>,
    /// The read that is running. The holder of the lock waits for it.
    running: Mutex<Option<JoinHandle<io::Result<Secret>>>>,
}

impl Reader {
    /// A reader of this file. Nothing is read yet.
    pub fn new(path: PathBuf) -> Self {
        Self { path, read, running: Mutex::default() }
    }

    /// A reader that reads with this function.
    #[cfg(test)]
    pub(crate) fn by(path: PathBuf, read: fn(&Path) -> io::Result<Secret>) -> Self {
        Self { read, ..Self::new(path) }
    }

    /// The path of the file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads a file of at most 1 MiB, for at most 2 s. Blocks no thread that serves.
    ///
    /// # Errors
    /// As [`read_at_start`]. After a timeout the next call waits for the same read.
    pub async fn read(&self) -> io::Result<Secret> {
        let reading = async {
            let mut running = self.running.lock().await;
            let read = running.get_or_insert_with(|| {
                let (path, read) = (self.path.clone(), self.read);
                spawn_blocking(move || read(&path))
            });
            let read = read.await;
            *running = None;
            read
        };
        match timeout(READ_TIMEOUT, reading).await {
            Ok(read) => read.map_err(io::Error::other)?,
            Err(_) => Err(too_slow()),
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    // This comes before the open, because opening a pipe waits for its writer.
    let metadata = fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::other("it is a folder"));
    }
    if !metadata.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    File::open(path)
}

fn read(path: &Path) -> io::Result<Secret> {
    let (file, mut text) = (open(path)?, String::new());
    let open_to = OpenTo::of(&file.metadata()?);
    file.take(LARGEST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > LARGEST {
        return Err(io::Error::other("it is larger than 1 MiB"));
    }
    Ok((text, open_to))
}

fn too_slow() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "it was not read within 2s")
}

/// What the log says after a look at files that are read again.
#[derive(Debug, PartialEq, Eq)]
pub enum FileNews {
    /// The files have another fault than at the last look.
    Unusable(String),
    /// The fault is gone.
    Usable,
}

/// The reason why files cannot be used.
pub trait FileFault: fmt::Display {
    /// Looks in a row that must find such a fault before it is news. More than 1 for a fault that a rotation of several
    /// files shows in between.
    fn looks_until_news(&self) -> u32 {
        1
    }
}

/// Repeated looks at files, until a stop.
#[derive(Debug)]
pub struct FileLooks {
    stop: CancellationToken,
    faults: ToldFault,
}

impl FileLooks {
    /// Looks until `stop`.
    pub fn new(stop: CancellationToken) -> Self {
        Self { stop, faults: ToldFault::default() }
    }

    /// Waits for the time of the next look, and then looks. Returns the news of that look, if there are any. `None`:
    /// the looks are stopped.
    pub async fn next<F: FileFault>(
        &mut self,
        look: impl Future<Output = Result<(), F>>,
    ) -> Option<Option<FileNews>> {
        self.stop.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await?;
        let looked = self.stop.run_until_cancelled(look).await?;
        Some(self.faults.after(looked))
    }
}

/// The fault that the last looks at files found. A fault is told once, even if it lasts.
#[derive(Debug, Default)]
pub struct ToldFault {
    told: Option<String>,
    /// Looks in a row that found a fault that may pass.
    passing: u32,
}

impl ToldFault {
    /// The news of a look. `None`: nothing has changed since the last look.
    pub fn after<F: FileFault>(&mut self, look: Result<(), F>) -> Option<FileNews> {
        let patience = look.as_ref().map_or_else(F::looks_until_news, |()| 1);
        self.passing = if patience > 1 { self.passing + 1 } else { 0 };
        if self.passing > 0 && self.passing < patience {
            return None;
        }
        let wrong = look.err().map(|error| error.to_string());
        let news = match &wrong {
            Some(error) if self.told != wrong => Some(FileNews::Unusable(error.clone())),
            None if self.told.is_some() => Some(FileNews::Usable),
            Some(_) | None => None,
        };
        self.told = wrong;
        news
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// A fault with its name, and the looks before it is news.
    struct Fault(&'static str, u32);

    impl fmt::Display for Fault {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl FileFault for Fault {
        fn looks_until_news(&self) -> u32 {
            self.1
        }
    }

    fn unusable(error: &str) -> Option<FileNews> {
        Some(FileNews::Unusable(error.to_owned()))
    }

    #[test]
    fn fault_is_told_once_until_it_changes_or_ends() {
        let mut told = ToldFault::default();
        for (look, news) in [
            (Ok(()), None),
            (Err(Fault("a", 1)), unusable("a")),
            (Err(Fault("a", 1)), None),
            (Err(Fault("b", 1)), unusable("b")),
            (Ok(()), Some(FileNews::Usable)),
            (Ok(()), None),
            (Err(Fault("b", 1)), unusable("b")),
        ] {
            assert_eq!(told.after(look), news);
        }
    }

    #[test]
    fn passing_fault_is_told_at_the_third_look_and_once() {
        let (mut told, passing) = (ToldFault::default(), || Err(Fault("p", 3)));
        let said: Vec<_> = (0..6).map(|_| told.after(passing()).is_some()).collect();
        assert_eq!(said, [false, false, true, false, false, false]);
        assert_eq!(told.after(Ok::<_, Fault>(())), Some(FileNews::Usable));
        assert_eq!(told.after(passing()), None, "it begins to count again");
        assert_eq!(told.after(Ok::<_, Fault>(())), None, "a fault that has passed is no news");
        assert_eq!(told.after(passing()), None);
        assert_eq!(
            told.after(Err(Fault("a", 1))),
            unusable("a"),
            "each other fault is told at once"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn looks_are_two_seconds_apart_until_the_stop() {
        let stop = CancellationToken::new();
        let mut looks = FileLooks::new(stop.clone());
        let begun = crate::clock::now();
        for look in 1..4 {
            let news = looks.next(async { Ok::<_, Fault>(()) }).await;
            assert_eq!((news, crate::clock::now() - begun), (Some(None), look * LOOK_INTERVAL));
        }
        let hanging = looks.next(std::future::pending::<Result<(), Fault>>());
        let stopped = async {
            tokio::time::sleep(2 * LOOK_INTERVAL).await;
            stop.cancel();
        };
        assert_eq!(tokio::join!(hanging, stopped).0, None);
        assert_eq!(looks.next(async { Ok::<_, Fault>(()) }).await, None);
    }

    fn file(text: &str, mode: u32) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), text).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        file
    }

    #[tokio::test]
    async fn a_file_is_read_and_its_mode_is_told() {
        for (mode, open_to) in [
            (0o600, OpenTo::Nobody),
            (0o440, OpenTo::Nobody),
            (0o644, OpenTo::Readers),
            (0o666, OpenTo::Writers),
            (0o602, OpenTo::Writers),
        ] {
            let file = file("secret", mode);
            assert_eq!(read_at_start(file.path()).unwrap(), ("secret".to_owned(), open_to));
            let reader = Reader::new(file.path().to_owned());
            assert_eq!(reader.read().await.unwrap(), ("secret".to_owned(), open_to));
        }
    }

    #[tokio::test]
    async fn an_irregular_or_too_large_file_is_refused_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let large = file(&"x".repeat(1024 * 1024 + 1), 0o600);
        for (path, said) in [
            (&*pipe, "not a regular file"),
            (folder.path(), "a folder"),
            (Path::new("/dev/zero"), "not a regular file"),
            (large.path(), "larger than 1 MiB"),
        ] {
            let error = read_at_start(path).unwrap_err().to_string();
            assert!(error.contains(said), "{path:?}: {error}");
            assert!(path == large.path() || look_at_start(path).is_err());
            let error = Reader::new(path.to_owned()).read().await.unwrap_err().to_string();
            assert!(error.contains(said), "{path:?}: {error}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_file_that_hangs_costs_one_thread_for_all_who_wait() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let reader = Reader::by(pipe.clone(), |path| {
            STARTED.fetch_add(1, Ordering::Relaxed);
            Ok((fs::read_to_string(path)?, OpenTo::Nobody))
        });
        for _ in 0..3 {
            let (first, second, ()) =
                tokio::join!(reader.read(), reader.read(), tokio::time::advance(READ_TIMEOUT));
            for read in [first, second] {
                assert_eq!(read.unwrap_err().kind(), io::ErrorKind::TimedOut);
            }
        }
        fs::write(&pipe, "secret").unwrap();
        assert_eq!(reader.read().await.unwrap().0, "secret");
        assert_eq!(STARTED.load(Ordering::Relaxed), 1);
    }
}
