//! The channel to the proxy: its address, the files of credentials, and one try of each call. Repeats nothing.

use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time;
use tonic::{
    Request, Response, Status,
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity},
};

use crate::{Error, pb::fetch_service_client::FetchServiceClient};

/// The largest answer to ask for, in bytes: the contract's limit.
pub(crate) const MAX_BYTES: u32 = 16 << 20;
/// HTTP/2's own window is 64 KiB, and then a stream waits for the network after each 64 KiB.
const RECEIVE_WINDOW: u32 = 1 << 20;
/// The longest time to connect. The page "Configure the channel" has it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The time between two pings, and the longest time to the answer to a ping.
const PING: Duration = Duration::from_secs(30);
const PONG: Duration = Duration::from_secs(10);

/// The files of a caller's credentials. They are read again, so a new file counts without a restart.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Credentials {
    /// PEM: the authorities to trust in place of those of the system. Only with `https://`.
    pub ca: Option<PathBuf>,
    /// PEM: the certificate of this caller, if the proxy asks for a certificate.
    pub cert: Option<PathBuf>,
    /// PEM: the key of that certificate.
    pub key: Option<PathBuf>,
    /// An API key or a JSON Web Token, which goes with each call.
    pub bearer_file: Option<PathBuf>,
}

/// The contents of `ca`, `cert` and `key`.
type Pems = [Option<Vec<u8>>; 3];

/// The generated client.
pub(crate) type Proxy = FetchServiceClient<Channel>;

pub(crate) struct Connection {
    /// Without the prefix of DNS, which tonic does not know.
    address: String,
    files: Credentials,
    /// The channel, with the contents that it was made of.
    open: Mutex<Option<(Pems, Channel)>>,
}

impl Connection {
    pub fn new(address: &str, files: Credentials) -> Result<Self, Error> {
        let address = address.trim_start_matches("dns:///").to_owned();
        let has_tls = address.starts_with("https://");
        let is_here =
            ["localhost:", "127.0.0.1:", "[::1]:"].iter().any(|at| address.starts_with(at));
        if files.bearer_file.is_some() && !has_tls && !is_here {
            let why = format!("a credential is not sent to {address} without TLS: use https://");
            return Err(Error::invalid(why));
        }
        if !has_tls && (files.ca.is_some() || files.cert.is_some() || files.key.is_some()) {
            let why = format!("{address} is not TLS, so certificates have no use: use https://");
            return Err(Error::invalid(why));
        }
        if files.cert.is_some() != files.key.is_some() {
            return Err(Error::invalid("a certificate and its key go together"));
        }
        endpoint(&address).map_err(|error| Error::invalid(format!("{address}: {error}")))?;
        Ok(Self { address, files, open: Mutex::default() })
    }

    /// One try: an answer within the time, which includes the time to connect.
    pub async fn within<Q, A>(
        &self,
        timeout: Duration,
        message: Q,
        call: impl AsyncFnOnce(Proxy, Request<Q>) -> Result<Response<A>, Status>,
    ) -> Result<A, Error> {
        let mut request = Request::new(message);
        request.set_timeout(timeout);
        let (client, request) = self.ready(request)?;
        let answer = tokio::select! {
            biased;
            answer = call(client, request) => answer,
            () = time::sleep(timeout) => Err(Status::deadline_exceeded("no answer in time")),
        };
        answer.map(Response::into_inner).map_err(|status| Error::of_status(&status))
    }

    /// The generated client, and the request with the bearer. A new certificate makes a new channel.
    pub fn ready<Q>(&self, mut request: Request<Q>) -> Result<(Proxy, Request<Q>), Error> {
        if let Some(bearer) = read(&self.files.bearer_file)? {
            let bearer = String::from_utf8_lossy(&bearer);
            let value = format!("Bearer {}", bearer.trim()).parse();
            let value = value.map_err(|error| Error::unusable("the bearer", &error))?;
            request.metadata_mut().insert("authorization", value);
        }
        let Credentials { ca, cert, key, .. } = &self.files;
        let pems = [read(ca)?, read(cert)?, read(key)?];
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let channel = match &*open {
            Some((made_of, channel)) if *made_of == pems => channel.clone(),
            _ => {
                let channel = connect(&self.address, &pems)
                    .map_err(|error| Error::unusable("the certificates", &error))?;
                *open = Some((pems, channel.clone()));
                channel
            }
        };
        let client = FetchServiceClient::new(channel);
        Ok((client.max_decoding_message_size(MAX_BYTES as usize + (1 << 20)), request))
    }
}

fn endpoint(address: &str) -> Result<Endpoint, tonic::transport::Error> {
    let has_tls = address.starts_with("https://");
    let url = if has_tls { address.to_owned() } else { format!("http://{address}") };
    let endpoint = Endpoint::from_shared(url)?
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(PING)
        .keep_alive_timeout(PONG)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(RECEIVE_WINDOW)
        .initial_connection_window_size(RECEIVE_WINDOW);
    Ok(endpoint)
}

/// Connects at a call, and again after a break.
fn connect(address: &str, [ca, cert, key]: &Pems) -> Result<Channel, tonic::transport::Error> {
    let mut endpoint = endpoint(address)?;
    if address.starts_with("https://") {
        let mut tls = match ca {
            Some(ca) => ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca)),
            None => ClientTlsConfig::new().with_native_roots(),
        };
        if let (Some(cert), Some(key)) = (cert, key) {
            tls = tls.identity(Identity::from_pem(cert, key));
        }
        endpoint = endpoint.tls_config(tls)?;
    }
    Ok(endpoint.connect_lazy())
}

fn read(file: &Option<PathBuf>) -> Result<Option<Vec<u8>>, Error> {
    let Some(file) = file else { return Ok(None) };
    let read = fs::read(file).map_err(|error| Error::unusable(&file.display().to_string(), &error));
    read.map(Some)
}
