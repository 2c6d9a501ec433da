//! The socket for programs on this machine. It accepts processes of the own user and of root alone, as the
//! kernel names them. Owns its connections and the tasks on them. Knows nothing about the calls.

use std::{
    fs, io,
    os::unix::{fs::PermissionsExt as _, net::UnixStream as StdUnixStream},
    path::{Path, PathBuf},
};

use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{UnixListener, UnixStream},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::listener::{HttpService, Spawn};
use crate::{clock, log_throttle::LogThrottle};

/// Most connections at once. Operators need few.
const MOST_CONNECTIONS: usize = 64;
/// Calls open at once on one connection.
const STREAMS: u32 = 16;
const ROOT: u32 = 0;

/// A socket that is listened on. Its file is removed when this is dropped.
#[derive(Debug)]
pub(crate) struct LocalListener {
    listener: UnixListener,
    file: Option<PathBuf>,
    strangers: LogThrottle,
}

impl LocalListener {
    /// Listens at this name: `@` and a name that is no file, which only Linux has, or a path.
    ///
    /// # Errors
    /// The reason of the system. A file that another process listens on is in use.
    pub(crate) fn bind(name: &str) -> io::Result<Self> {
        let (listener, file) = match name.strip_prefix('@') {
            Some(name) => (UnixListener::bind(format!("\0{name}"))?, None),
            None => (bind_file(Path::new(name))?, Some(PathBuf::from(name))),
        };
        Ok(Self { listener, file, strangers: LogThrottle::default() })
    }

    /// Serves until `stop`. `service` makes the service of a connection for a process of this user.
    pub(crate) async fn serve<S: HttpService>(
        self,
        service: impl Fn(u32) -> S,
        stop: CancellationToken,
    ) {
        let calls = TaskTracker::new();
        let mut builder = auto::Builder::new(Spawn(calls.clone()));
        builder.http2().timer(TokioTimer::new()).max_concurrent_streams(STREAMS);
        let builder = builder.http2_only();
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = connections.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let Ok((stream, _)) = accepted else {
                // The cause is a lack of descriptors or memory.
                tokio::time::sleep(super::listener::ACCEPT_RETRY).await;
                continue;
            };
            let Some(user) = self.user(&stream) else { continue };
            if connections.len() >= MOST_CONNECTIONS {
                continue;
            }
            let (service, builder) = (service(user), builder.clone());
            connections.spawn(async move {
                let service = TowerToHyperService::new(service);
                // The peer sees itself how the connection ended.
                let _ = builder.serve_connection(TokioIo::new(stream), service).await;
            });
        }
        connections.shutdown().await;
        calls.close();
        calls.wait().await;
    }

    /// The user of the process at the other end, if it is the own user or root.
    fn user(&self, stream: &UnixStream) -> Option<u32> {
        let user = stream.peer_cred().ok()?.uid();
        if is_welcome(user, own_user()) {
            return Some(user);
        }
        if self.strangers.allow(clock::now()) {
            tracing::info!(user, "a process of another user is refused at the admin socket");
        }
        None
    }
}

impl Drop for LocalListener {
    fn drop(&mut self) {
        if let Some(file) = &self.file {
            let _ = fs::remove_file(file);
        }
    }
}

/// Processes of the same user could do everything to this one anyway.
fn is_welcome(user: u32, own: u32) -> bool {
    user == own || user == ROOT
}

fn own_user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Listens on a file that only the own user may open. Replaces a file that a process has left behind.
fn bind_file(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path) => {
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        bound => bound?,
    };
    // Until here, the user of a peer is checked anyway.
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Whether it is a socket that nobody listens on.
fn is_left_behind(path: &Path) -> bool {
    let connected = StdUnixStream::connect(path);
    connected.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_user_and_root_are_welcome_and_nobody_else() {
        for (user, own, welcome) in
            [(1000, 1000, true), (0, 1000, true), (1001, 1000, false), (1000, 0, false)]
        {
            assert_eq!(is_welcome(user, own), welcome, "{user} at {own}");
        }
    }
}
