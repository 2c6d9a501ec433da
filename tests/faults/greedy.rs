//! Strangers who make the proxy hold as much as they can: requests that never end, answers that
//! nobody reads, streams without number. The process stays small, and a good client at the same
//! time is served.

use std::{
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use fetch_proxy::{client::probe, pb};
use flate2::{Compression, write::GzEncoder};
use h2::{Reason, SendStream, client::ResponseFuture};
use prost::Message;
use testkit::{
    BOUND, eventually,
    jetstream::{Fixture, config},
    millis,
    nats_server::NatsServer,
    proxy::{Proxy, ack, fetch},
};
use tokio::{net::TcpStream, task::JoinHandle, time::timeout};

const FETCH: &str = "/fetchproxy.v1.FetchService/Fetch";
const SETTLE: &str = "/fetchproxy.v1.FetchService/Settle";
const ACK: &str = "/fetchproxy.v1.FetchService/Ack";
const CHECK: &str = "/grpc.health.v1.Health/Check";
const WATCH: &str = "/grpc.health.v1.Health/Watch";
const REFLECT: &str = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";

/// The process with all that the tests of this file make it hold stays below this, in MB.
const MOST_MEMORY: u64 = 256;

/// The memory of the process now, in MB.
fn memory(proxy: &Proxy) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", proxy.pid())).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

/// The most that it had until this was stopped.
struct Peak {
    stop: Arc<AtomicBool>,
    task: JoinHandle<u64>,
}

impl Peak {
    fn of(proxy: &Proxy) -> Self {
        let (stop, file) =
            (Arc::new(AtomicBool::new(false)), format!("/proc/{}/status", proxy.pid()));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut most = 0;
            while !stopped.load(Ordering::Relaxed) {
                let status = fs::read_to_string(&file).unwrap();
                let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
                let now = line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024;
                most = most.max(now);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            most
        });
        Self { stop, task }
    }

    /// Asserts that it was little.
    async fn was_small(self, what: &str) {
        self.stop.store(true, Ordering::Relaxed);
        let most = self.task.await.unwrap();
        println!("measured: memory under {what}: {most} MB");
        assert!(most < MOST_MEMORY, "{most} MB under {what}");
    }
}

/// A connection of a stranger.
struct Stranger {
    send: h2::client::SendRequest<Bytes>,
    driver: JoinHandle<Result<(), h2::Error>>,
}

impl Stranger {
    async fn connect(proxy: &Proxy) -> Self {
        Self::with_window(proxy, 65_535).await
    }

    /// One that lets the proxy send so many bytes on each stream.
    async fn with_window(proxy: &Proxy, window: u32) -> Self {
        let socket = TcpStream::connect(&proxy.grpc).await.unwrap();
        let mut builder = h2::client::Builder::new();
        builder.initial_window_size(window).max_concurrent_reset_streams(10_000);
        let (send, connection) = builder.handshake(socket).await.unwrap();
        let driver = tokio::spawn(connection);
        let mut stranger = Self { send, driver };
        // Its settings must have arrived, so that it does not open more streams than it may.
        let answer = stranger.call(CHECK, &framed(&Empty {}), true).await.0;
        timeout(BOUND, answer).await.unwrap().unwrap();
        stranger
    }

    /// Begins a call, and sends this much of it.
    async fn call(
        &mut self,
        path: &str,
        body: &Bytes,
        end: bool,
    ) -> (ResponseFuture, SendStream<Bytes>) {
        self.call_with(path, &[], body, end).await
    }

    async fn call_with(
        &mut self,
        path: &str,
        headers: &[(&str, &str)],
        body: &Bytes,
        end: bool,
    ) -> (ResponseFuture, SendStream<Bytes>) {
        let mut request = http::Request::post(format!("http://proxy{path}"))
            .header("content-type", "application/grpc")
            .header("te", "trailers");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut send = self.send.clone().ready().await.unwrap();
        let (answer, mut stream) = send.send_request(request.body(()).unwrap(), false).unwrap();
        if !body.is_empty() || end {
            stream.send_data(body.clone(), end).unwrap();
        }
        (answer, stream)
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

#[derive(Clone, PartialEq, Message)]
struct Empty {}

/// A message as gRPC frames it.
fn framed(message: &impl Message) -> Bytes {
    raw_frame(0, &message.encode_to_vec())
}

fn raw_frame(flag: u8, message: &[u8]) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(flag);
    frame.put_u32(u32::try_from(message.len()).unwrap());
    frame.put_slice(message);
    frame.freeze()
}

/// The reason of a call that was answered with an error and no message.
async fn refusal(answer: ResponseFuture) -> String {
    let answer = timeout(BOUND, answer).await.expect("it hangs");
    let answer = answer.unwrap_or_else(|error| panic!("no answer: {error}"));
    let reason = answer.headers().get("fetchproxy-reason");
    reason.map(|reason| reason.to_str().unwrap().to_owned()).unwrap_or_default()
}

/// A client that fetches and settles one message after another.
struct Good {
    stop: Arc<AtomicBool>,
    task: JoinHandle<Vec<Duration>>,
}

impl Good {
    async fn start(proxy: &Proxy) -> Self {
        let fixture = Fixture::new(config()).await;
        fixture.publish_many(4000).await;
        let mut client = proxy.client().await;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let task = tokio::spawn(async move {
            let mut took = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let began = Instant::now();
                match client.fetch(fetch(&fixture, 1, 5000)).await {
                    Ok(answer) => {
                        for message in &answer.into_inner().messages {
                            served(client.ack(ack(&message.token)).await.err());
                        }
                    }
                    Err(refused) => served(Some(refused)),
                }
                took.push(began.elapsed());
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            took
        });
        Self { stop, task }
    }

    /// The time that nearly all rounds took, but one in a hundred.
    async fn p99(self) -> Duration {
        self.stop.store(true, Ordering::Relaxed);
        let mut took = self.task.await.expect("it was refused");
        took.sort_unstable();
        took[(took.len() - 1) * 99 / 100]
    }
}

/// A machine that is busy may keep NATS from answering in time. A limit is the strangers' doing.
fn served(refused: Option<tonic::Status>) {
    let reason = refused.map(|refused| testkit::proxy::reason(&refused).1);
    assert!(reason.as_ref().is_none_or(|reason| !reason.ends_with("_LIMIT")), "{reason:?}");
}

/// A proxy, and how a good client is served while it has nothing else to do.
async fn quiet() -> (Proxy, Duration) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let good = Good::start(&proxy).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = good.p99().await;
    (proxy, before)
}

async fn still_good(good: Good, before: Duration, what: &str) {
    let p99 = good.p99().await;
    println!("measured: a good client beside {what}: {p99:?}, before {before:?}");
    assert!(p99 < before * 20 + Duration::from_secs(2), "{p99:?}, before {before:?}");
}

#[tokio::test]
async fn endless_requests_hold_little_memory_for_a_short_time() {
    let (proxy, before) = quiet().await;
    let (good, peak) = (Good::start(&proxy).await, Peak::of(&proxy));
    let mut stranger = Stranger::connect(&proxy).await;
    let size = 4 * 1024 * 1024 - 64;
    let body = raw_frame(0, &vec![0; size]).slice(..size);
    let mut open = Vec::new();
    for _ in 0..120 {
        open.push(stranger.call(SETTLE, &body, false).await);
    }
    let mut reasons = Vec::new();
    for (answer, _stream) in open {
        reasons.push(refusal(answer).await);
    }
    let count = |name: &str| reasons.iter().filter(|reason| *reason == name).count();
    let (bytes, time) = (count("BYTE_LIMIT"), count("REQUEST_TIMEOUT"));
    assert_eq!(bytes + time, 120, "{reasons:?}");
    assert!(time >= 1 && bytes >= 100, "{bytes} by bytes, {time} by time");
    peak.was_small("120 unfinished requests of 4 MiB").await;
    still_good(good, before, "unfinished requests").await;
}

#[tokio::test]
async fn requests_without_a_body_leave_permits_and_end_in_time() {
    let (proxy, before) = quiet().await;
    let (good, peak) = (Good::start(&proxy).await, Peak::of(&proxy));
    let mut strangers = Vec::new();
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut stranger = Stranger::connect(&proxy).await;
        for _ in 0..1000 {
            open.push(stranger.call(ACK, &Bytes::new(), false).await);
        }
        strangers.push(stranger);
    }
    let began = Instant::now();
    let (mut told, mut cut) = (0, 0);
    for (answer, _stream) in open {
        // On a busy machine a stranger is late to answer pings, and is cut off.
        match timeout(BOUND, answer).await.expect("it hangs") {
            Ok(answer) => {
                let reason = answer.headers()["fetchproxy-reason"].to_str().unwrap();
                assert!(["REQUEST_TIMEOUT", "CALL_LIMIT"].contains(&reason), "{reason}");
                told += 1;
            }
            Err(_) => cut += 1,
        }
    }
    println!("measured: 20,000 calls without a body had ended after: {:?}", began.elapsed());
    assert!(told + cut == 20_000 && told >= 10_000, "{told} told, {cut} cut off");
    peak.was_small("20,000 calls without a body").await;
    still_good(good, before, "calls without a body").await;
}

/// Fetches of a consumer with this many messages of 100 KB on one connection that takes no answer.
async fn unread(
    proxy: &Proxy,
    fixture: &Fixture,
    window: u32,
    fetches: u32,
    lease: Option<i64>,
) -> (Stranger, Vec<ResponseFuture>) {
    let mut stranger = Stranger::with_window(proxy, window).await;
    let mut request = fetch(fixture, 1000, 10_000);
    request.linger = millis(2000);
    request.lease = lease.and_then(millis);
    let mut answers = Vec::new();
    for _ in 0..fetches {
        answers.push(stranger.call(FETCH, &framed(&request), true).await.0);
    }
    (stranger, answers)
}

#[tokio::test]
async fn unread_answers_hold_little_memory_and_return_their_messages() {
    let (proxy, before) = quiet().await;
    let many = async_nats::jetstream::consumer::pull::Config { max_ack_pending: -1, ..config() };
    let fixture = Fixture::new(many).await;
    for _ in 0..800 {
        fixture.publish("large", vec![b'x'; 100_000]).await;
    }
    let (good, peak) = (Good::start(&proxy).await, Peak::of(&proxy));
    let began = Instant::now();
    let (_stranger, answers) = unread(&proxy, &fixture, 0, 40, None).await;
    for answer in answers {
        // Refused, or begun and then reset.
        if let Ok(answer) = timeout(BOUND * 2, answer).await.expect("it hangs") {
            let mut body = answer.into_body();
            let end = timeout(BOUND * 2, body.data()).await.expect("the answer is never released");
            assert!(!matches!(end, Some(Ok(_))), "it has no window to come by");
        }
    }
    println!("measured: 40 unread answers were gone after: {:?}", began.elapsed());
    peak.was_small("40 answers of 4 MiB that nobody reads").await;
    let mut client = proxy.client().await;
    let mut seen = 0;
    while seen < 800 {
        let answer = client.fetch(fetch(&fixture, 1000, 10_000)).await.unwrap().into_inner();
        assert!(!answer.messages.is_empty(), "{seen} of 800 came back");
        for message in &answer.messages {
            client.ack(ack(&message.token)).await.unwrap();
        }
        seen += answer.messages.len();
    }
    still_good(good, before, "answers that nobody reads").await;
}

#[tokio::test]
async fn answer_is_dropped_when_its_leases_have_ended() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for _ in 0..10 {
        fixture.publish("large", vec![b'x'; 100_000]).await;
    }
    let began = Instant::now();
    let (_stranger, mut answers) = unread(&proxy, &fixture, 0, 1, Some(1000)).await;
    let answer = timeout(BOUND, answers.remove(0)).await.unwrap().unwrap();
    let answered = began.elapsed();
    let mut body = answer.into_body();
    let end = timeout(BOUND, body.data()).await.expect("the answer is never released");
    assert!(matches!(end, Some(Err(error)) if error.reason() == Some(Reason::CANCEL)));
    let held = began.elapsed() - answered;
    println!("measured: an unread answer with a lease of 1 s was held for: {held:?}");
    assert!(held < Duration::from_secs(8), "{held:?} is as long as if it had leases");
}

/// An answer in one piece leaves hyper at once. Only the end of the connection frees it.
#[tokio::test]
async fn small_unread_answer_ends_its_connection() {
    let fixture = Fixture::new(config()).await;
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    for _ in 0..2 {
        fixture.publish("small", vec![b'x'; 2000]).await;
    }
    let (mut stranger, mut answers) = unread(&proxy, &fixture, 1, 1, None).await;
    let answer = timeout(BOUND, answers.remove(0)).await.unwrap().unwrap();
    let ended = timeout(BOUND, &mut stranger.driver).await.expect("the answer is never released");
    println!("measured: the connection of a small unread answer ended: {ended:?}");
    drop(answer);
    let mut client = proxy.client().await;
    let answer = client.fetch(fetch(&fixture, 2, 10_000)).await.unwrap().into_inner();
    assert_eq!(answer.messages[0].delivery_count, 1, "it cost an attempt");
}

#[tokio::test]
async fn health_streams_are_bounded_and_a_check_is_still_answered() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let peak = Peak::of(&proxy);
    let mut strangers = Vec::new();
    let mut open = Vec::new();
    for _ in 0..20 {
        let mut stranger = Stranger::connect(&proxy).await;
        for _ in 0..500 {
            open.push(stranger.call(WATCH, &framed(&Empty {}), true).await.0);
        }
        strangers.push(stranger);
    }
    let (mut watching, mut refused) = (Vec::new(), 0);
    for answer in open {
        let answer = timeout(BOUND, answer).await.unwrap().unwrap();
        match answer.headers().get("fetchproxy-reason") {
            Some(reason) => refused += usize::from(reason == "CALL_LIMIT"),
            None => watching.push(answer),
        }
    }
    assert_eq!((watching.len(), refused), (20 * 16, 20 * (500 - 16)));
    for stranger in &mut strangers {
        let (answer, _) = stranger.call(CHECK, &framed(&Empty {}), true).await;
        assert_eq!(refusal(answer).await, "", "health was refused");
    }
    assert!(probe(&proxy.grpc, "", BOUND).await.unwrap().1);
    peak.was_small("10,000 health streams").await;
}

#[tokio::test]
async fn reflection_streams_are_bounded() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let peak = Peak::of(&proxy);
    let mut stranger = Stranger::connect(&proxy).await;
    let size = 4 * 1024 * 1024 - 64;
    let body = raw_frame(0, &vec![0; size]).slice(..size);
    let mut refused = 0;
    let mut open = Vec::new();
    for _ in 0..100 {
        open.push(stranger.call(REFLECT, &body, false).await);
    }
    for (answer, _stream) in open {
        refused += usize::from(refusal(answer).await == "CALL_LIMIT");
    }
    // Connections within the bound have sent too much, and leave their permits to others.
    assert!(refused >= 50, "{refused}");
    peak.was_small("100 reflection streams").await;
}

#[tokio::test]
async fn few_bytes_do_not_become_megabytes() {
    let (proxy, before) = quiet().await;
    let (good, peak) = (Good::start(&proxy).await, Peak::of(&proxy));
    let mut stranger = Stranger::connect(&proxy).await;
    // A thousand forged tokens of 4 KB.
    let settlement = pb::Settlement {
        number: 0,
        token: "A".repeat(4000),
        action: Some(pb::settlement::Action::Ack(pb::AckAction {})),
    };
    let settlements = vec![settlement; 1000];
    let request = pb::SettleRequest { settlements, ..Default::default() }.encode_to_vec();
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    std::io::Write::write_all(&mut gzip, &request).unwrap();
    let bomb = raw_frame(1, &gzip.finish().unwrap());
    assert!(bomb.len() < 20_000, "{}", bomb.len());
    // As many as 1.15 MB/s are of 5.4 KB, for three seconds.
    let mut answers = Vec::new();
    for _ in 0..640 {
        let gzip = [("grpc-encoding", "gzip")];
        answers.push(stranger.call_with(SETTLE, &gzip, &bomb, true).await.0);
        tokio::time::sleep(Duration::from_millis(4)).await;
    }
    for answer in answers {
        assert_eq!(refusal(answer).await, "REQUEST_TOO_LARGE");
    }
    // Two bytes are a settlement, which is seventy when it is decoded.
    let empties = raw_frame(0, &[0x0a, 0].repeat(2_000_000));
    for _ in 0..10 {
        let (answer, _) = stranger.call(SETTLE, &empties, true).await;
        assert_eq!(refusal(answer).await, "INVALID_FIELD");
    }
    peak.was_small("small requests that become large").await;
    still_good(good, before, "small requests that become large").await;
}

/// h2 bounds these; the test holds that its bounds are on.
#[tokio::test]
async fn streams_reset_at_once_cost_nothing_or_their_connection() {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    proxy.ready().await;
    let (good, peak) = (Good::start(&proxy).await, Peak::of(&proxy));
    let stranger = Stranger::connect(&proxy).await;
    for _ in 0..20_000 {
        let Ok(mut send) = stranger.send.clone().ready().await else { break };
        let request = http::Request::post(format!("http://proxy{ACK}")).body(()).unwrap();
        let Ok((_, mut stream)) = send.send_request(request, false) else { break };
        stream.send_reset(Reason::CANCEL);
    }
    peak.was_small("20,000 streams that are reset at once").await;
    // It was not refused. How fast it was says more of the machine that both share.
    good.p99().await;
    let memory = eventually("the memory", || async {
        let memory = memory(&proxy);
        (memory < MOST_MEMORY / 2).then_some(memory)
    })
    .await;
    println!("measured: memory afterwards: {memory} MB");
}
