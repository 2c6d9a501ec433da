//! Replicas that come and go, and the choice that a client has between them at any moment: like a
//! Service without sticky clients.

use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering},
};

use tempfile::NamedTempFile;
use testkit::{
    dice::Dice,
    proxy::{Client, Proxy},
};

pub struct Fleet {
    nats: String,
    keys: NamedTempFile,
    started: AtomicU64,
    serving: Mutex<Vec<(u64, Client)>>,
}

/// One replica; it ends with this.
pub struct Replica {
    number: u64,
    pub proxy: Proxy,
}

impl Fleet {
    pub fn new(nats: String) -> Self {
        let keys = NamedTempFile::new().unwrap();
        std::fs::write(keys.path(), fetch_proxy::token::new_key_line().unwrap()).unwrap();
        Self { nats, keys, started: AtomicU64::new(0), serving: Mutex::default() }
    }

    fn serving(&self) -> MutexGuard<'_, Vec<(u64, Client)>> {
        self.serving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts one more, which clients may choose as soon as it is ready.
    pub async fn start(&self) -> Replica {
        let (keys, nats) = (self.keys.path().to_owned(), self.nats.clone());
        // Starting waits for a file.
        let starting = tokio::task::spawn_blocking(move || {
            let flags = ["--cluster", "fleet", "--token-key-file", keys.to_str().unwrap()];
            Proxy::start_at(&nats, &flags)
        });
        let proxy = starting.await.unwrap();
        let client = proxy.client().await.max_decoding_message_size(64 << 20);
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        self.serving().push((number, client));
        Replica { number, proxy }
    }

    /// Ends it by a signal, and returns its log. Clients can choose it until it is gone.
    pub async fn end(&self, mut replica: Replica, signal: &str) -> String {
        replica.proxy.signal(signal);
        let status = replica.proxy.wait().await;
        assert_eq!(status.success(), signal == "TERM", "{}", replica.proxy.log());
        self.serving().retain(|(number, _)| *number != replica.number);
        replica.proxy.log()
    }

    /// Any of those that serve.
    pub fn any(&self, dice: &mut Dice) -> Client {
        let serving = self.serving();
        let place = dice.within(0..serving.len() as u64);
        serving[usize::try_from(place).unwrap()].1.clone()
    }
}
