//! Keys: shared, rotated, and not shared.

use std::{fs, time::Duration};

use fetch_proxy::client::probe;
use tempfile::NamedTempFile;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, extend, fetch, reason},
};
use tonic::Code;

use super::pair::{Pair, key_file, new_key};

/// So much of a token's text is its version and its key's name; what follows is chance.
const KEY_NAMED: usize = 6;

async fn serving(proxy: &Proxy) -> bool {
    probe(&proxy.ops, "", BOUND).await.unwrap().1
}

#[tokio::test]
async fn key_rotation_loses_no_token() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let old = fs::read_to_string(pair.keys.path()).unwrap();
    let before = pair.leased(&fixture, 2).await;
    // Added, promoted, and the old one removed, while both replicas run.
    let new = new_key();
    fs::write(pair.keys.path(), format!("{new}\n{old}\n")).unwrap();
    for proxy in [&pair.owner, &pair.other] {
        eventually("the new key", || async { proxy.log().contains("read again").then_some(()) })
            .await;
    }
    pair.at_other.ack(ack(&before[0].token)).await.unwrap();
    let between = pair.leased(&fixture, 1).await;
    pair.at_other.ack(ack(&between[0].token)).await.unwrap();
    // The new key seals once all have been heard to have it; then the old one can go.
    let sealed_anew = || async {
        let mut client = pair.at_owner.clone();
        fixture.publish("n", "x").await;
        let answer = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        let token = &answer.messages[0].token;
        client.ack(ack(token)).await.unwrap();
        // The key's name is in front.
        (token[..KEY_NAMED] != before[1].token[..KEY_NAMED]).then_some(())
    };
    eventually("the new key to seal", sealed_anew).await;
    pair.at_other.ack(ack(&before[1].token)).await.unwrap();
    fs::write(pair.keys.path(), format!("{new}\n")).unwrap();
    for proxy in [&pair.owner, &pair.other] {
        let read = || async { (proxy.log().matches("read again").count() >= 2).then_some(()) };
        eventually("the old key to go", read).await;
    }
    let after = pair.leased(&fixture, 1).await;
    pair.at_other.ack(ack(&after[0].token)).await.unwrap();
    let refused = pair.at_other.ack(ack(&before[1].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unavailable, "KEY_UNKNOWN".to_owned()));
}

/// Two replicas, each with a key file of its own: the nodes of a cluster bring the files up to date
/// one after the other.
struct Rotation {
    fixture: Fixture,
    files: [NamedTempFile; 2],
    proxies: [Proxy; 2],
    clients: [Client; 2],
    /// Leases that live through all steps.
    kept: Vec<String>,
}

impl Rotation {
    async fn start(key: &str) -> Self {
        let fixture = Fixture::new(config()).await;
        let files = [key_file(&[key]), key_file(&[key])];
        let start = |file: &NamedTempFile| {
            let flags = ["--cluster", "rotation", "--token-key-file"];
            let flags = [&flags[..], &[file.path().to_str().unwrap()]].concat();
            Proxy::start(NatsServer::shared(), &flags)
        };
        let proxies = [start(&files[0]), start(&files[1])];
        let clients = [proxies[0].client().await, proxies[1].client().await];
        for proxy in &proxies {
            let heard = || async { proxy.log().contains("a replica was found").then_some(()) };
            eventually("replicas to hear of each other", heard).await;
        }
        Self { fixture, files, proxies, clients, kept: Vec::new() }
    }

    /// Gives this text to one replica after the other, and looks at all tokens at each.
    async fn step(&mut self, keys: &[&str]) {
        for place in 0..2 {
            let read = || self.proxies[place].log().matches("read again").count();
            let before = read();
            fs::write(self.files[place].path(), keys.join("\n")).unwrap();
            eventually("the file to be read", || async { (read() > before).then_some(()) }).await;
            self.no_token_is_refused().await;
        }
    }

    /// Each replica grants one more, and each takes all that there are.
    async fn no_token_is_refused(&mut self) {
        for place in 0..2 {
            let token = self.granted(place).await;
            self.kept.push(token);
        }
        for client in &mut self.clients {
            for token in &self.kept {
                client.extend(extend(token, 60_000)).await.unwrap();
            }
        }
    }

    async fn granted(&mut self, place: usize) -> String {
        self.fixture.publish("n", "x").await;
        let answer = self.clients[place].fetch(fetch(&self.fixture, 1, 10_000)).await.unwrap();
        answer.into_inner().messages.remove(0).token
    }

    /// Waits until a replica seals with another key than the one of this token: its name is in
    /// front.
    async fn seals_anew(&mut self, place: usize, old: &str) {
        let began = std::time::Instant::now();
        loop {
            let token = self.granted(place).await;
            self.clients[1 - place].ack(ack(&token)).await.unwrap();
            if token[..KEY_NAMED] != old[..KEY_NAMED] {
                return;
            }
            assert!(began.elapsed() < BOUND, "the new key does not seal");
        }
    }
}

#[tokio::test]
async fn documented_key_rotation_refuses_no_token_at_any_step() {
    let (old, new) = (new_key(), new_key());
    let mut rotation = Rotation::start(&old).await;
    rotation.no_token_is_refused().await;
    rotation.step(&[&old, &new]).await;
    rotation.step(&[&new, &old]).await;
    let sealed_before = rotation.kept[0].clone();
    for place in 0..2 {
        rotation.seals_anew(place, &sealed_before).await;
    }
    // The longest lease is over.
    for (number, token) in std::mem::take(&mut rotation.kept).iter().enumerate() {
        rotation.clients[number % 2].ack(ack(token)).await.unwrap();
    }
    rotation.step(&[&new]).await;
    assert_eq!(rotation.kept.len(), 4);
}

#[tokio::test]
async fn wrong_key_file_is_logged_and_the_old_keys_stay() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    fs::write(pair.keys.path(), "no key at all").unwrap();
    eventually("the error", || async { pair.other.log().contains("cannot be used").then_some(()) })
        .await;
    pair.at_other.ack(ack(&leased[0].token)).await.unwrap();
}

/// A read of such a file never ends. The one thread of the process would do nothing else.
#[tokio::test]
async fn hanging_key_file_delays_nothing_and_its_recovery_is_logged() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let key = new_key();
    fs::write(&file, &key).unwrap();
    let flags = ["--token-key-file", file.to_str().unwrap()];
    let proxy = Proxy::start(NatsServer::shared(), &flags);
    proxy.ready().await;
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    fs::rename(&pipe, &file).unwrap();
    let told = || async { proxy.log().contains("it is not a regular file").then_some(()) };
    eventually("the error", told).await;
    assert!(serving(&proxy).await, "{}", proxy.log());
    let well = folder.path().join("well");
    fs::write(&well, &key).unwrap();
    fs::rename(&well, &file).unwrap();
    let told = || async { proxy.log().contains("can be used again").then_some(()) };
    eventually("the line that says that it is well", told).await;
}

#[tokio::test]
async fn open_permissions_of_a_key_file_are_logged_once() {
    use std::os::unix::fs::PermissionsExt as _;
    for (mode, said) in [(0o600, None), (0o644, Some("read")), (0o606, Some("write"))] {
        let file = key_file(&[&new_key()]);
        fs::set_permissions(file.path(), fs::Permissions::from_mode(mode)).unwrap();
        let flags = ["--token-key-file", file.path().to_str().unwrap()];
        let proxy = Proxy::start(NatsServer::shared(), &flags);
        proxy.ready().await;
        let log = proxy.log();
        let line = log.lines().find(|line| line.contains("open to everybody on this machine"));
        assert_eq!(line.is_some(), said.is_some(), "{log}");
        let others = said.map(|said| format!("\"others\":\"{said}\""));
        assert!(others.is_none_or(|others| line.unwrap().contains(&others)), "{log}");
    }
}

#[tokio::test]
async fn later_replica_without_a_common_key_does_not_serve() {
    // A server of its own: whoever beats there is heard by all.
    let server = NatsServer::start();
    let (one, other) = (key_file(&[&new_key()]), key_file(&[&new_key()]));
    let flag = |file: &NamedTempFile| file.path().to_str().unwrap().to_owned();
    let elder = Proxy::start(&server, &["--cluster", "c", "--token-key-file", &flag(&one)]);
    eventually("readiness", || async { serving(&elder).await.then_some(()) }).await;
    let younger = Proxy::start(&server, &["--cluster", "c", "--token-key-file", &flag(&other)]);
    let keyless = Proxy::start(&server, &["--cluster", "c"]);
    for (proxy, said) in [(&younger, "shares no token key"), (&keyless, "has no --token-key-file")]
    {
        eventually("not serving", || async { (!serving(proxy).await).then_some(()) }).await;
        eventually("the reason", || async { proxy.log().contains(said).then_some(()) }).await;
        // Not even before it had heard of the elder: a rolling update would take that one away.
        assert!(!proxy.log().contains("\"message\":\"ready\""), "{}", proxy.log());
    }
    assert!(serving(&elder).await, "{}", elder.log());
    // Keys that are brought in line heal it by themselves.
    fs::copy(one.path(), other.path()).unwrap();
    eventually("readiness", || async { serving(&younger).await.then_some(()) }).await;
    drop(elder);
    drop(younger);
    eventually("readiness", || async { serving(&keyless).await.then_some(()) }).await;
}

#[tokio::test]
async fn new_first_key_seals_after_the_last_replica_without_it_left() {
    let server = NatsServer::start();
    let fixture = Fixture::on(&server, config()).await;
    let (old, new) = (new_key(), new_key());
    let (one, other) = (key_file(&[&old]), key_file(&[&old]));
    let start = |file: &NamedTempFile| {
        let file = file.path().to_str().unwrap();
        Proxy::start(&server, &["--cluster", "c", "--token-key-file", file])
    };
    let (stays, goes) = (start(&one), start(&other));
    let heard = || async { stays.log().contains("a replica was found").then_some(()) };
    eventually("the other replica", heard).await;
    let mut client = stays.client().await;
    let mut key_in_use = async || {
        fixture.publish("n", "x").await;
        let answer = client.fetch(fetch(&fixture, 1, 5000)).await.unwrap().into_inner();
        answer.messages[0].token[..KEY_NAMED].to_owned()
    };
    let before = key_in_use().await;
    fs::write(one.path(), format!("{new}\n{old}\n")).unwrap();
    eventually("the new key", || async { stays.log().contains("read again").then_some(()) }).await;
    assert_eq!(key_in_use().await, before, "the other replica does not have it");
    drop(goes);
    let began = std::time::Instant::now();
    while key_in_use().await == before {
        assert!(began.elapsed() < BOUND, "the replica has left, and the old key still seals");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

#[tokio::test]
async fn replica_ahead_of_the_keys_says_so() {
    let fixture = Fixture::new(config()).await;
    let mut pair = Pair::start().await;
    let leased = pair.leased(&fixture, 1).await;
    let stranger = key_file(&[&new_key()]);
    let flags = ["--token-key-file", stranger.path().to_str().unwrap()];
    let server = NatsServer::start();
    let behind = Proxy::start(&server, &flags);
    let refused = behind.client().await.ack(ack(&leased[0].token)).await.unwrap_err();
    assert_eq!(reason(&refused), (Code::Unavailable, "KEY_UNKNOWN".to_owned()));
}
