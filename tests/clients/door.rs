//! A proxy that accepts known callers alone, and the credentials that its workers hold. Starts nothing but the server of its issuer.

use std::{collections::BTreeMap, fs, path::Path, time::Duration};

use fetch_proxy::{
    access::NewApiKey,
    client::{Client, ClientTls},
    pb::{self, settlement::Action},
};
use tempfile::TempDir;
use testkit::{
    authority::{Authority, Signed},
    examples::scenario::{Credential, Presence, Ways},
    issuer::{IssuerAnswer, IssuerServer, TokenKey, claims, key_set},
    jetstream::Fixture,
};
use tokio::task::JoinSet;

/// Everybody who has a credential, by name.
const HOLDERS: [(Credential, &str); 6] = [
    (Credential::Right, "worker"),
    // The same name, so that the proxy cannot tell it from the right one.
    (Credential::Renewed, "worker"),
    (Credential::Expired, "worker"),
    (Credential::Neighbour, "neighbour"),
    (Credential::Stranger, "stranger"),
    (Credential::Limited, "limited"),
];
/// The claim `iss` of tokens.
const ISSUER: &str = "https://login.example/";
/// The lifetime of tokens, which is more than a scenario takes.
const TOKEN_LIFETIME: Duration = Duration::from_secs(3600);
/// The end of an API key that has expired.
const EXPIRED: &str = " expires=2020-01-01T00:00:00Z";

pub struct Door {
    ways: Ways,
    folder: TempDir,
    held: Credential,
    /// The API key of each holder, and its line in the proxy's file.
    keys: BTreeMap<Credential, NewApiKey>,
    /// The certificate of each holder, and of the authority that has signed it.
    certificates: BTreeMap<Credential, (Signed, String)>,
    token_key: TokenKey,
    /// The address of the server with the keys of the issuer.
    issuer_address: String,
    /// That server, while it is there.
    issuer: Option<IssuerServer>,
}

impl Door {
    /// For the workers of this consumer, who hold the right credential. The keys of an issuer are at a free address.
    pub fn new(ways: Ways, fixture: &Fixture, issuer_address: &str) -> Self {
        let authority = Authority::new("authority of the proxy");
        let folder = tempfile::tempdir().unwrap();
        authority.server().write(folder.path(), "server");
        fs::write(folder.path().join("ca.crt"), authority.pem()).unwrap();
        fs::write(folder.path().join("policy.yaml"), policy(ways, fixture, issuer_address))
            .unwrap();
        let (mut keys, mut certificates) = (BTreeMap::new(), BTreeMap::new());
        for (credential, name) in HOLDERS {
            let mut key = NewApiKey::random(name).unwrap().unwrap();
            // An authority for each, so that the proxy can stop to trust one of them.
            let authority = Authority::new(&format!("authority of {credential:?}"));
            let signed = authority.client_by(&format!("{name}.example"), |params| {
                if credential == Credential::Expired {
                    params.not_after = rcgen::date_time_ymd(2020, 1, 1);
                }
            });
            if credential == Credential::Expired {
                key.line.push_str(EXPIRED);
            }
            keys.insert(credential, key);
            certificates.insert(credential, (signed, authority.pem().to_owned()));
        }
        let (held, token_key) = (Credential::Right, TokenKey::p256("one"));
        let issuer_address = issuer_address.to_owned();
        let mut door = Self {
            ways,
            folder,
            held,
            keys,
            certificates,
            token_key,
            issuer_address,
            issuer: None,
        };
        if ways == Ways::Tokens {
            door.place_issuer(Presence::Here).unwrap();
        }
        door.write_accepted();
        door.hold(Credential::Right);
        door
    }

    /// For the proxy.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = vec!["--tls-cert", "server.crt", "--tls-key", "server.key"];
        flags.extend(["--policy-file", "policy.yaml"]);
        if self.ways == Ways::Certificates {
            flags.extend(["--tls-client-ca", "client-ca.crt"]);
        }
        flags.chunks(2).flat_map(|pair| [pair[0].to_owned(), self.path(pair[1])]).collect()
    }

    /// For a worker that starts now.
    pub fn env(&self, listen: &str) -> Vec<(String, String)> {
        let mut env = vec![
            ("FETCH_PROXY_ADDR", Self::address(listen)),
            ("FETCH_PROXY_CA", self.path("ca.crt")),
        ];
        match (self.held, self.ways) {
            (Credential::None, _) => {}
            (_, Ways::Keys | Ways::Tokens) => {
                env.push(("FETCH_PROXY_BEARER_FILE", self.path("bearer")));
            }
            (_, Ways::Certificates) => {
                env.push(("FETCH_PROXY_CERT", self.path("tls.crt")));
                env.push(("FETCH_PROXY_KEY", self.path("tls.key")));
            }
        }
        env.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }

    /// With the name that is in the certificate of the proxy.
    fn address(listen: &str) -> String {
        let port = listen.rsplit(':').next().unwrap();
        format!("https://localhost:{port}")
    }

    /// Replaces the files of the workers.
    pub fn hold(&mut self, credential: Credential) {
        self.held = credential;
        match (credential, self.ways) {
            (Credential::None, _) => {}
            (_, Ways::Keys) => self.write("bearer", &self.keys[&credential].secret),
            (_, Ways::Tokens) => self.write("bearer", &self.token(credential)),
            (_, Ways::Certificates) => {
                let (Signed { cert, key, .. }, _) = &self.certificates[&credential];
                self.write("tls.crt", cert);
                self.write("tls.key", key);
            }
        }
    }

    /// Starts or ends the server with the keys of the issuer.
    pub fn place_issuer(&mut self, presence: Presence) -> Result<(), String> {
        if self.ways != Ways::Tokens {
            return Err("the scenario has no issuer".to_owned());
        }
        self.issuer = match presence {
            Presence::Away => None,
            Presence::Here => {
                let keys = IssuerAnswer::Text(key_set(&[&self.token_key]));
                Some(IssuerServer::start_at(self.issuer_address.parse().unwrap(), keys))
            }
        };
        Ok(())
    }

    /// A new token of this holder.
    fn token(&self, credential: Credential) -> String {
        let (_, name) = HOLDERS.into_iter().find(|(holder, _)| *holder == credential).unwrap();
        let mut claims = claims(ISSUER, name, TOKEN_LIFETIME);
        if credential == Credential::Expired {
            (claims["iat"], claims["exp"]) = (1_577_836_800.into(), 1_577_836_900.into());
        }
        self.token_key.token("ES256", &claims)
    }

    /// Makes each call that the limited principal may make, until the set is dropped. A refused call takes nothing from
    /// the workers.
    pub fn spend(&self, listen: &str) -> JoinSet<()> {
        self.write("limited", &self.keys[&Credential::Limited].secret);
        let limited = Client {
            addr: Self::address(listen),
            tls: ClientTls { ca: Some(self.path("ca.crt").into()), ..ClientTls::default() },
            token_file: Some(self.path("limited").into()),
            json: false,
        };
        let mut spending = JoinSet::new();
        spending.spawn(async move {
            let ack = || Action::Ack(pb::AckAction::default());
            loop {
                let _ = limited.settle(vec!["none".to_owned()], ack()).await;
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        });
        spending
    }

    /// From its next look on, the proxy does not accept this credential.
    pub fn revoke(&mut self, credential: Credential) {
        self.keys.remove(&credential);
        self.certificates.remove(&credential);
        self.write_accepted();
    }

    /// What the proxy logs when it has read again what it accepts.
    pub fn line_of_reading(&self) -> &'static str {
        match self.ways {
            // A token counts until its end, so nothing is read.
            Ways::Keys | Ways::Tokens => "a policy is in use",
            Ways::Certificates => "the TLS files were read again",
        }
    }

    fn write_accepted(&self) {
        let lines: Vec<_> = self.keys.values().map(|key| &*key.line).collect();
        self.write("keys", &lines.join("\n"));
        let authorities: Vec<_> = self.certificates.values().map(|(_, pem)| &**pem).collect();
        self.write("client-ca.crt", &authorities.concat());
    }

    /// In one step, as a mounted Secret changes.
    fn write(&self, name: &str, text: &str) {
        let part = self.folder.path().join("part");
        fs::write(&part, text).unwrap();
        fs::rename(part, self.folder.path().join(name)).unwrap();
    }

    fn path(&self, name: &str) -> String {
        Path::join(self.folder.path(), name).to_str().unwrap().to_owned()
    }
}

/// Workers and neighbours may work at this consumer, and strangers at another. Limited
/// workers may make one call a second.
fn policy(ways: Ways, fixture: &Fixture, issuer_address: &str) -> String {
    let (stream, consumer) = (&fixture.stream, &fixture.consumer);
    let of_issuer = format!(
        "authenticate:\n  jwt:\n  - name: corp\n    issuer: {ISSUER}\n    audiences: [fetch-proxy]\n    \
         keys: {{url: 'http://{issuer_address}/keys'}}\n"
    );
    let (authenticate, prefix, end) = match ways {
        Ways::Keys => ("authenticate: {api_keys: {file: keys}}\n", "key:", ""),
        Ways::Certificates => ("", "dns:", ".example"),
        Ways::Tokens => (&*of_issuer, "jwt:corp/", ""),
    };
    format!(
        "version: 1\n\
         {authenticate}\
         principals:\n\
         - {{name: workers, match: ['{prefix}worker{end}']}}\n\
         - {{name: neighbours, match: ['{prefix}neighbour{end}']}}\n\
         - {{name: strangers, match: ['{prefix}stranger{end}']}}\n\
         - name: limited\n  \
           match: ['{prefix}limited{end}']\n  \
           limits: {{calls_per_second: 1, burst: 1}}\n\
         rules:\n\
         - {{principals: [workers, neighbours, limited], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}\n\
         - {{principals: [strangers], streams: [elsewhere], consumers: ['*'], verbs: [work]}}\n"
    )
}
