//! A connection that ends after some bytes of its answers, at each third byte. No message is dark: a Fetch has it again
//! by the name of its attempt, and a stream with `keep` loses it at once.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use async_nats::jetstream::consumer::pull;
use fetch_proxy::pb::{self, FetchRequest, Outcome};
use testkit::{
    BOUND,
    consume::keep,
    jetstream::{Fixture, config},
    nats_server::NatsServer,
    proxy::{Client, Proxy, ack, fetch},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tonic::transport::Endpoint;

const STEP: usize = 3;
/// Longer than any test: no message comes back by JetStream's ack wait.
const ACK_WAIT: Duration = Duration::from_secs(600);

/// A wire that passes all requests, and so many bytes of the answers. Then it closes both sides.
struct CutWire {
    client: Client,
    passed: Arc<AtomicUsize>,
}

impl CutWire {
    async fn after(bytes: usize, proxy: &Proxy) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let passed = Arc::new(AtomicUsize::new(0));
        let (server, count) = (proxy.grpc.clone(), passed.clone());
        tokio::spawn(async move {
            let (client, _) = listener.accept().await.unwrap();
            // No further connection can be made.
            drop(listener);
            let server = TcpStream::connect(server).await.unwrap();
            let (mut from_client, mut to_client) = client.into_split();
            let (mut from_server, mut to_server) = server.into_split();
            let down = async {
                let mut buffer = vec![0; 4096];
                while count.load(Ordering::Relaxed) < bytes {
                    let left = (bytes - count.load(Ordering::Relaxed)).min(buffer.len());
                    let read = from_server.read(&mut buffer[..left]).await.unwrap_or(0);
                    if read == 0 || to_client.write_all(&buffer[..read]).await.is_err() {
                        return;
                    }
                    count.fetch_add(read, Ordering::Relaxed);
                }
            };
            tokio::select! {
                () = down => {}
                _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
            }
        });
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        Self { client: Client::new(channel), passed }
    }

    /// The bytes of the answers so far.
    fn passed(&self) -> usize {
        self.passed.load(Ordering::Relaxed)
    }
}

async fn stage(max_deliver: i64) -> (Proxy, Fixture, Client) {
    let proxy = Proxy::start(NatsServer::shared(), &[]);
    let consumer = pull::Config { ack_wait: ACK_WAIT, max_deliver, ..config() };
    let (fixture, near) = (Fixture::new(consumer).await, proxy.client().await);
    (proxy, fixture, near)
}

/// The message is here, on a certain attempt, and is settled.
async fn settled(mut near: Client, request: FetchRequest, sequence: u64) -> u32 {
    let answer = timeout(BOUND, near.fetch(request)).await.expect("it hangs").unwrap();
    let messages = answer.into_inner().messages;
    let sequences = Vec::from_iter(messages.iter().map(|message| message.stream_sequence));
    assert_eq!(sequences, [sequence]);
    let outcome = near.ack(ack(&messages[0].token)).await.unwrap().into_inner().outcome();
    assert_eq!(outcome, Outcome::Confirmed);
    messages[0].delivery_count
}

/// Each message has one attempt alone, so a message that goes back is destroyed.
#[tokio::test]
async fn answer_that_is_cut_is_had_again_by_its_attempt() {
    let (proxy, fixture, near) = stage(1).await;
    let (mut cut, mut whole) = (0, 0);
    for bytes in (0..).step_by(STEP) {
        let sequence = fixture.publish("n", "x").await;
        let mut wire = CutWire::after(bytes, &proxy).await;
        let attempt_id = format!("attempt-{bytes}");
        let request = FetchRequest { attempt_id, ..fetch(&fixture, 1, 10_000) };
        let answer = timeout(BOUND, wire.client.fetch(request.clone())).await.expect("it hangs");
        let again = FetchRequest { attempt_again: true, ..request };
        assert_eq!(settled(near.clone(), again, sequence).await, 1);
        match answer {
            Ok(_) => whole += 1,
            Err(_) => cut += 1,
        }
        // The wire passes more than the answer has.
        if whole > 0 && wire.passed() < bytes {
            break;
        }
    }
    println!("measured: {cut} answers were cut, and {whole} were whole");
    assert!(cut > 100, "only {cut} answers were cut");
}

#[tokio::test]
async fn message_of_a_stream_that_is_cut_is_at_another_worker_at_once() {
    let (proxy, fixture, near) = stage(-1).await;
    let (mut received, mut attempts) = (0, [0; 3]);
    for bytes in (0..).step_by(STEP) {
        let mut wire = CutWire::after(bytes, &proxy).await;
        let start = keep(&fixture, 1, 0, None);
        let frame = pb::ConsumeRequest { start: Some(start), ..Default::default() };
        let (send, mut receive) = tokio::sync::mpsc::unbounded_channel();
        send.send(frame).unwrap();
        let frames = futures_util::stream::poll_fn(move |cx| receive.poll_recv(cx));
        let opened = timeout(BOUND, wire.client.consume(frames)).await.expect("it hangs");
        let sequence = fixture.publish("n", "x").await;
        let mut came = false;
        if let Ok(answer) = opened {
            let mut answer = answer.into_inner();
            while let Ok(Some(frame)) = timeout(BOUND, answer.message()).await.expect("it hangs") {
                came |= !frame.messages.is_empty();
                if came {
                    break;
                }
            }
        }
        received += usize::from(came);
        drop((send, wire.client));
        let attempt = settled(near.clone(), fetch(&fixture, 1, 10_000), sequence).await;
        attempts[attempt as usize] += 1;
        if received > 5 {
            break;
        }
    }
    let [_, unseen, lost] = attempts;
    println!(
        "measured: {unseen} went back on their first attempt, and {lost} were lost on the way"
    );
    assert!(unseen > 0 && lost > received, "{unseen} and {lost}");
}
