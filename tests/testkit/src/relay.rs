//! A TCP relay between a proxy and its NATS, or between a client and a proxy: the wire, and what
//! can go wrong with it. Nothing that passes through is looked at; it is only counted.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

use crate::proxy::Client;

/// The treatment of the bytes of one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// They pass.
    Pass,
    /// Each piece passes after this time.
    Delay(Duration),
    /// So many bytes a second pass on each connection.
    Rate(u32),
    /// They are not even read: the sender's buffers fill, as with a peer that has stopped.
    Stall,
}

#[derive(Debug, Clone)]
struct Wire {
    /// Where new connections go.
    server: String,
    to_server: Flow,
    to_client: Flow,
    /// Whether new connections are served; otherwise they are closed at once.
    open: bool,
    /// Connections of an earlier age are cut.
    age: u64,
    /// Up to this age, the relay closes its direction to the server.
    half_closed: u64,
    /// Connections up to this age carry nothing more, permanently.
    frozen: u64,
    /// The connection that was cut by itself last, by its number.
    cut: u64,
}

/// A relay that lives as long as this; its connections end with it.
pub struct Relay {
    address: SocketAddr,
    wire: Arc<watch::Sender<Wire>>,
    answered: Arc<AtomicU64>,
    heard: Arc<AtomicU64>,
    brought: Brought,
    accepting: JoinHandle<()>,
}

/// By connection, its number and the bytes that it has brought from the server.
type Brought = Arc<Mutex<Vec<(u64, Arc<AtomicU64>)>>>;

impl Relay {
    /// Relays to `server` from a free port of its own. `server` is an address like `127.0.0.1:4222`,
    /// or the URL of a NATS server.
    pub async fn to(server: &str) -> Self {
        Self::behind(TcpListener::bind("127.0.0.1:0").await.unwrap(), server)
    }

    /// The same, where little fits into the wire itself: it fills soon when it stands still.
    pub fn narrow_to(server: &str) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(256 * 1024).unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        Self::behind(socket.listen(64).unwrap(), server)
    }

    fn behind(listener: TcpListener, server: &str) -> Self {
        let address = listener.local_addr().unwrap();
        let wire = Wire {
            server: server.trim_start_matches("nats://").to_owned(),
            to_server: Flow::Pass,
            to_client: Flow::Pass,
            open: true,
            age: 0,
            half_closed: 0,
            frozen: 0,
            cut: 0,
        };
        let wire = Arc::new(watch::channel(wire).0);
        let (answered, heard) = (Arc::default(), Arc::default());
        let counts = (Arc::clone(&heard), Arc::clone(&answered));
        let brought = Brought::default();
        let accept = accept(listener, wire.clone(), counts, brought.clone());
        let accepting = tokio::spawn(accept);
        Self { address, wire, answered, heard, brought, accepting }
    }

    /// Its address, like `127.0.0.1:1234`.
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// The same as the URL of a NATS server.
    pub fn nats_url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// A client of the proxy behind this relay.
    pub async fn client(&self) -> Client {
        Client::connect(format!("http://{}", self.address)).await.unwrap()
    }

    /// Sends new connections to another server, as a load balancer does.
    pub fn turn_to(&self, server: &str) {
        self.wire.send_modify(|wire| wire.server = server.to_owned());
    }

    /// Cuts every connection; new ones are served.
    pub fn cut(&self) {
        self.wire.send_modify(|wire| wire.age += 1);
    }

    /// Cuts the connection that has brought most, and no other.
    pub fn cut_busiest(&self) {
        let brought = std::mem::take(&mut *self.brought.lock().unwrap());
        let busiest = brought.iter().max_by_key(|(_, bytes)| bytes.load(Ordering::Relaxed));
        if let Some((number, _)) = busiest {
            self.wire.send_modify(|wire| wire.cut = *number);
        }
        let others = brought.iter().filter(|(number, _)| Some(number) != busiest.map(|one| &one.0));
        self.brought.lock().unwrap().extend(others.cloned());
    }

    /// Cuts every connection and serves no new one, until [`Relay::open`].
    pub fn close(&self) {
        self.wire.send_modify(|wire| (wire.open, wire.age) = (false, wire.age + 1));
    }

    /// Serves new connections again.
    pub fn open(&self) {
        self.wire.send_modify(|wire| wire.open = true);
    }

    /// Sets the treatment of the bytes of both directions, also on open connections.
    pub fn flow(&self, to_server: Flow, to_client: Flow) {
        self.wire.send_modify(|wire| (wire.to_server, wire.to_client) = (to_server, to_client));
    }

    /// Stops all bytes of every open connection permanently, as if an end were unplugged. New
    /// connections are served.
    pub fn freeze(&self) {
        self.wire.send_modify(|wire| wire.frozen += 1);
    }

    /// How many bytes have passed from the server.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// How many bytes have come from the client, also those that are still to pass.
    pub fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    /// Closes the direction to the server of every connection that is open, and leaves the other.
    pub fn half_close(&self) {
        self.wire.send_modify(|wire| wire.half_closed += 1);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
        self.close();
    }
}

/// Bytes that have come from the client, and that have passed from the server.
type Counts = (Arc<AtomicU64>, Arc<AtomicU64>);

async fn accept(
    listener: TcpListener,
    wire: Arc<watch::Sender<Wire>>,
    counts: Counts,
    brought: Brought,
) {
    let mut number = 0;
    while let Ok((client, _)) = listener.accept().await {
        if wire.borrow().open {
            number += 1;
            let bytes = Arc::default();
            brought.lock().unwrap().push((number, Arc::clone(&bytes)));
            let one = (number, bytes);
            let server = wire.borrow().server.clone();
            tokio::spawn(relay(client, server, wire.subscribe(), counts.clone(), one));
        }
    }
}

/// One connection, until either side ends or it is cut. A cut wire says nothing: what was under way
/// is gone.
async fn relay(
    client: TcpStream,
    server: String,
    mut wire: watch::Receiver<Wire>,
    (heard, answered): Counts,
    (number, brought): (u64, Arc<AtomicU64>),
) {
    let Ok(server) = TcpStream::connect(server).await else { return };
    for side in [&client, &server] {
        let _ = side.set_nodelay(true);
    }
    let born = wire.borrow().clone();
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let (frozen, half_closed) = (born.frozen, born.half_closed);
    let up = Direction {
        from: from_client,
        to: to_server,
        wire: wire.clone(),
        flow: Box::new(move |now| if now.frozen > frozen { Flow::Stall } else { now.to_server }),
        closed: Box::new(move |now| now.half_closed > half_closed),
        came: heard,
        passed: Arc::default(),
    };
    let down = Direction {
        from: from_server,
        to: to_client,
        wire: wire.clone(),
        flow: Box::new(move |now| if now.frozen > frozen { Flow::Stall } else { now.to_client }),
        closed: Box::new(|_| false),
        came: brought,
        passed: answered,
    };
    tokio::select! {
        // Either side's reset is the end of both; their polite ends are each other's to hear.
        _ = async { tokio::try_join!(up.pump(), down.pump()) } => {}
        _ = wire.wait_for(|wire| wire.age != born.age || wire.cut == number) => {}
    }
}

type Of<T> = Box<dyn Fn(&Wire) -> T + Send + Sync>;

/// One direction of one connection.
struct Direction {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    wire: watch::Receiver<Wire>,
    flow: Of<Flow>,
    /// Whether this direction is to be closed.
    closed: Of<bool>,
    came: Arc<AtomicU64>,
    passed: Arc<AtomicU64>,
}

impl Direction {
    async fn pump(self) -> io::Result<()> {
        let Self { mut from, mut to, mut wire, flow, closed, came, passed } = self;
        let mut buffer = vec![0; 64 * 1024];
        let mut free_at = Instant::now();
        loop {
            // The relay ends when the sender of its orders does.
            let gone = |_| io::Error::other("the relay has gone");
            wire.wait_for(|wire| flow(wire) != Flow::Stall).await.map_err(gone)?;
            // A sender that has reset its side takes back what a real wire had not delivered yet.
            if let Some(reset) = from.as_ref().take_error()? {
                return Err(reset);
            }
            let (mut stalls, mut closes) = (wire.clone(), wire.clone());
            let count = tokio::select! {
                biased;
                _ = closes.wait_for(|wire| closed(wire)) => 0,
                _ = stalls.wait_for(|wire| flow(wire) == Flow::Stall) => continue,
                count = from.read(&mut buffer) => count?,
            };
            if count == 0 {
                return to.shutdown().await;
            }
            came.fetch_add(count as u64, Ordering::Relaxed);
            let now = flow(&wire.borrow());
            match now {
                Flow::Delay(delay) => tokio::time::sleep(delay).await,
                Flow::Rate(rate) => {
                    let took = Duration::from_secs_f64(count as f64 / f64::from(rate));
                    free_at = free_at.max(Instant::now()) + took;
                    tokio::time::sleep_until(free_at.into()).await;
                }
                Flow::Pass | Flow::Stall => {}
            }
            to.write_all(&buffer[..count]).await?;
            passed.fetch_add(count as u64, Ordering::Relaxed);
        }
    }
}
