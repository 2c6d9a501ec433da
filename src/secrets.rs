//! Reads files that hold secrets. A file system that hangs, or a pipe without a writer, must neither block
//! the start permanently nor block a thread that serves. Reports who else may read or write a file. Tells a fault of a
//! file once, for owners that read files again.

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

/// Longest time to read a file. A local file takes less than a millisecond, a file over a network some
/// tens of milliseconds.
const READ_TIMEOUT: Duration = Duration::from_secs(2);
/// Largest file, in bytes: it has room for 20,000 token keys.
const LARGEST: u64 = 1024 * 1024;
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

/// The fault that the last look at files found. A fault is told once, even if it lasts.
#[derive(Debug, Default)]
pub struct ToldFault(Option<String>);

impl ToldFault {
    /// The news of a look. `None`: nothing has changed since the last look.
    pub fn after<E: fmt::Display>(&mut self, look: Result<(), E>) -> Option<FileNews> {
        let wrong = look.err().map(|error| error.to_string());
        let news = match &wrong {
            Some(error) if self.0 != wrong => Some(FileNews::Unusable(error.clone())),
            None if self.0.is_some() => Some(FileNews::Usable),
            Some(_) | None => None,
        };
        self.0 = wrong;
        news
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn fault_is_told_once_until_it_changes_or_ends() {
        let mut told = ToldFault::default();
        let unusable = |error: &str| Some(FileNews::Unusable(error.to_owned()));
        for (look, news) in [
            (Ok(()), None),
            (Err("a"), unusable("a")),
            (Err("a"), None),
            (Err("b"), unusable("b")),
            (Ok(()), Some(FileNews::Usable)),
            (Ok(()), None),
            (Err("b"), unusable("b")),
        ] {
            assert_eq!(told.after(look), news);
        }
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
