//! An issuer of tokens: keys, tokens signed by them, and a server on loopback that publishes the keys and counts who
//! asks for them.

use std::{
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ring::{
    hmac,
    rand::SystemRandom,
    rsa::PublicKeyComponents,
    signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair,
        EcdsaSigningAlgorithm, Ed25519KeyPair, KeyPair as _, RSA_PKCS1_SHA256, RSA_PKCS1_SHA384,
        RSA_PKCS1_SHA512, RSA_PSS_SHA256, RSA_PSS_SHA384, RSA_PSS_SHA512, RsaEncoding, RsaKeyPair,
    },
};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::{Value, json};

use crate::{BOUND, authority::Signed};

/// An RSA key of 2048 bits for tests. Neither ring nor rcgen makes one.
const RSA_TEST_KEY: &[u8] = include_bytes!("rsa_test_key.der");

/// A key that signs tokens.
pub struct TokenKey {
    id: Option<String>,
    pair: TokenKeyPair,
}

enum TokenKeyPair {
    Rsa(RsaKeyPair),
    Curve(EcdsaKeyPair, &'static str),
    Ed(Ed25519KeyPair),
}

fn base64url(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl TokenKey {
    /// The RSA key, under this name.
    pub fn rsa(id: &str) -> Self {
        let pair = TokenKeyPair::Rsa(RsaKeyPair::from_der(RSA_TEST_KEY).unwrap());
        Self { id: Some(id.to_owned()), pair }
    }

    /// A new key on P-256.
    pub fn p256(id: &str) -> Self {
        Self::curve(id, &ECDSA_P256_SHA256_FIXED_SIGNING, "P-256")
    }

    /// A new key on P-384.
    pub fn p384(id: &str) -> Self {
        Self::curve(id, &ECDSA_P384_SHA384_FIXED_SIGNING, "P-384")
    }

    fn curve(id: &str, algorithm: &'static EcdsaSigningAlgorithm, name: &'static str) -> Self {
        let random = SystemRandom::new();
        let der = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(algorithm, der.as_ref(), &random).unwrap();
        Self { id: Some(id.to_owned()), pair: TokenKeyPair::Curve(pair, name) }
    }

    /// A new key on Ed25519.
    pub fn ed25519(id: &str) -> Self {
        let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = TokenKeyPair::Ed(Ed25519KeyPair::from_pkcs8(der.as_ref()).unwrap());
        Self { id: Some(id.to_owned()), pair }
    }

    /// The same key without a name.
    #[must_use]
    pub fn unnamed(self) -> Self {
        Self { id: None, ..self }
    }

    /// The public key, as an entry of a key set.
    pub fn jwk(&self) -> Value {
        let mut jwk = match &self.pair {
            TokenKeyPair::Rsa(pair) => {
                let key: PublicKeyComponents<Vec<u8>> = pair.public().into();
                json!({ "kty": "RSA", "use": "sig", "n": base64url(key.n), "e": base64url(key.e) })
            }
            TokenKeyPair::Curve(pair, name) => {
                // A byte, and two coordinates of one size.
                let point = &pair.public_key().as_ref()[1..];
                let (x, y) = point.split_at(point.len() / 2);
                json!({ "kty": "EC", "crv": name, "x": base64url(x), "y": base64url(y) })
            }
            TokenKeyPair::Ed(pair) => {
                json!({ "kty": "OKP", "crv": "Ed25519", "x": base64url(pair.public_key()) })
            }
        };
        if let Some(id) = &self.id {
            jwk["kid"] = id.as_str().into();
        }
        jwk
    }

    /// A token with these claims, whose header names the key and this algorithm.
    pub fn token(&self, algorithm: &str, claims: &Value) -> String {
        let mut header = json!({ "typ": "JWT", "alg": algorithm });
        if let Some(id) = &self.id {
            header["kid"] = id.as_str().into();
        }
        self.token_with(&header, claims)
    }

    /// A token with these claims and this header. The key signs by the algorithm in it, or else by its first.
    pub fn token_with(&self, header: &Value, claims: &Value) -> String {
        let text = [header, claims].map(|part| base64url(part.to_string())).join(".");
        let signature = self.sign(header["alg"].as_str().unwrap_or_default(), text.as_bytes());
        format!("{text}.{}", base64url(signature))
    }

    fn sign(&self, algorithm: &str, text: &[u8]) -> Vec<u8> {
        let random = SystemRandom::new();
        match &self.pair {
            TokenKeyPair::Rsa(pair) => {
                let padding: &'static dyn RsaEncoding = match algorithm {
                    "RS384" => &RSA_PKCS1_SHA384,
                    "RS512" => &RSA_PKCS1_SHA512,
                    "PS256" => &RSA_PSS_SHA256,
                    "PS384" => &RSA_PSS_SHA384,
                    "PS512" => &RSA_PSS_SHA512,
                    _ => &RSA_PKCS1_SHA256,
                };
                let mut signature = vec![0; pair.public().modulus_len()];
                pair.sign(padding, &random, text, &mut signature).unwrap();
                signature
            }
            TokenKeyPair::Curve(pair, _) => pair.sign(&random, text).unwrap().as_ref().to_vec(),
            TokenKeyPair::Ed(pair) => pair.sign(text).as_ref().to_vec(),
        }
    }

    /// A token with the algorithm HS256, made with the modulus of an RSA key as the secret, as a forger has it.
    pub fn forged_by_modulus(&self, claims: &Value) -> String {
        let jwk = self.jwk();
        let modulus = URL_SAFE_NO_PAD.decode(jwk["n"].as_str().unwrap()).unwrap();
        let header = json!({ "alg": "HS256", "kid": self.id });
        let text = [&header, claims].map(|part| base64url(part.to_string())).join(".");
        let secret = hmac::Key::new(hmac::HMAC_SHA256, &modulus);
        format!("{text}.{}", base64url(hmac::sign(&secret, text.as_bytes())))
    }
}

/// The text of a key set with these keys.
pub fn key_set(keys: &[&TokenKey]) -> String {
    let keys: Vec<_> = keys.iter().map(|key| key.jwk()).collect();
    json!({ "keys": keys }).to_string()
}

/// Good claims of a token of this issuer from now on.
pub fn claims(issuer: &str, subject: &str, lifetime: Duration) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let until = now + lifetime;
    json!({
        "iss": issuer, "sub": subject, "aud": "fetch-proxy",
        "iat": now.as_secs(), "exp": until.as_secs(),
    })
}

/// The answer of a server to each request.
#[derive(Clone)]
pub enum IssuerAnswer {
    /// This text, with status 200.
    Text(String),
    /// The text of the path, with status 200. The status is 404 for another path.
    Paths(Vec<(&'static str, String)>),
    /// This status, to be followed to that place.
    Status(u16, String),
    /// None: the connection stays open.
    Silence,
}

/// A listener at this address. A process that is being started holds a copy of each earlier listener for a moment.
fn bound(address: SocketAddr) -> TcpListener {
    let began = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && began.elapsed() < BOUND => {
                thread::sleep(Duration::from_millis(10));
            }
            bound => return bound.unwrap(),
        }
    }
}

/// A server that publishes the keys of an issuer, at any path.
pub struct IssuerServer {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<String>>>,
    answer: Arc<Mutex<IssuerAnswer>>,
    ended: Arc<AtomicBool>,
    /// Accepts connections, and ends with the server.
    listening: Option<JoinHandle<()>>,
}

impl IssuerServer {
    /// A server with this answer, at a free port.
    pub fn start(answer: IssuerAnswer) -> Self {
        Self::start_at("127.0.0.1:0".parse().unwrap(), answer)
    }

    /// The same at this address.
    pub fn start_at(address: SocketAddr, answer: IssuerAnswer) -> Self {
        Self::started(address, answer, None)
    }

    /// A server that speaks TLS, with this certificate.
    pub fn start_tls(answer: IssuerAnswer, signed: &Signed) -> Self {
        let tls = Some(signed.server_tls());
        Self::started("127.0.0.1:0".parse().unwrap(), answer, tls)
    }

    fn started(address: SocketAddr, answer: IssuerAnswer, tls: Option<Arc<ServerConfig>>) -> Self {
        let listener = bound(address);
        let mut server = Self {
            address: listener.local_addr().unwrap(),
            requests: Arc::default(),
            answer: Arc::new(Mutex::new(answer)),
            ended: Arc::default(),
            listening: None,
        };
        let (requests, answer) = (server.requests.clone(), server.answer.clone());
        let ended = server.ended.clone();
        let accept = move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Relaxed) {
                    return;
                }
                let (requests, answer, tls) = (requests.clone(), answer.clone(), tls.clone());
                thread::spawn(move || match (stream.unwrap(), tls) {
                    (stream, None) => serve(stream, &requests, &answer),
                    (stream, Some(tls)) => {
                        let connection = ServerConnection::new(tls).unwrap();
                        serve(StreamOwned::new(connection, stream), &requests, &answer);
                    }
                });
            }
        };
        server.listening = Some(thread::spawn(accept));
        server
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The URL of the server, without a path.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Answers like this from now on.
    pub fn set(&self, answer: IssuerAnswer) {
        *self.answer.lock().unwrap() = answer;
    }

    /// The heads of all requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

impl Drop for IssuerServer {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // The listener waits for a connection.
        drop(TcpStream::connect(self.address));
        // From now on its address is refused.
        let _ = self.listening.take().map(JoinHandle::join);
    }
}

fn serve(
    mut stream: impl Read + Write,
    requests: &Mutex<Vec<String>>,
    answer: &Mutex<IssuerAnswer>,
) {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        if stream.read(&mut byte).unwrap_or(0) == 0 {
            return;
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    let path = head.split(' ').nth(1).unwrap_or_default().to_owned();
    requests.lock().unwrap().push(head);
    let answer = answer.lock().unwrap().clone();
    let whole =
        |text: &str| format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{text}", text.len());
    let text = match answer {
        IssuerAnswer::Text(text) => whole(&text),
        IssuerAnswer::Paths(texts) => {
            let text = texts.iter().find(|(known, _)| *known == path);
            let missing = "HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n".to_owned();
            text.map_or(missing, |(_, text)| whole(text))
        }
        IssuerAnswer::Status(status, place) => {
            format!("HTTP/1.1 {status} Other\r\nlocation: {place}\r\ncontent-length: 0\r\n\r\n")
        }
        IssuerAnswer::Silence => {
            // The client ends the connection.
            let _ = stream.read(&mut byte);
            return;
        }
    };
    let _ = stream.write_all(text.as_bytes()).and_then(|()| stream.flush());
}
