//! The same calls at a proxy with TLS and with a policy of 100 rules, by clients with a token of an issuer.

use std::{fs, time::Duration};

use fetch_proxy::pb::fetch_service_client::FetchServiceClient;
use tempfile::TempDir;
use testkit::{
    authority::Authority,
    issuer::{TokenKey, claims, key_set},
    measure::{Half, Run},
    proxy::Proxy,
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint};

use crate::{
    proxied::{self, Batches, Bearer, Client},
    setup::{FLAGS, Setup},
};

const ISSUER: &str = "https://login.example/";
/// Longer than a run takes.
const LIFETIME: Duration = Duration::from_secs(3600);
/// Rules of the policy. The last of them allows the calls.
const RULES: usize = 100;

/// A proxy that knows its callers, on the nats-server of the other.
pub struct Guarded {
    proxy: Proxy,
    authority: Authority,
    token: String,
    _folder: TempDir,
}

impl Guarded {
    pub fn start(setup: &Setup) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (authority, key) = (Authority::new("bench"), TokenKey::p256("bench"));
        authority.server().write(folder.path(), "server");
        fs::write(folder.path().join("keys"), key_set(&[&key])).unwrap();
        let rules = (1..=RULES).map(|rule| {
            let stream = if rule == RULES { setup.backlog.stream.clone() } else { format!("S{rule}*") };
            format!("- {{principals: [bench], streams: ['{stream}'], consumers: ['c*'], verbs: [work]}}\n")
        });
        let policy = format!(
            "version: 1\nauthenticate:\n  jwt:\n    - name: bench\n      issuer: {ISSUER}\n      \
             audiences: [fetch-proxy]\n      keys: {{file: keys}}\n\
             principals: [{{name: bench, match: ['jwt:bench/w*']}}]\nrules:\n{}",
            rules.collect::<String>()
        );
        fs::write(folder.path().join("policy"), policy).unwrap();
        let [cert, tls_key, policy] = ["server.crt", "server.key", "policy"]
            .map(|name| folder.path().join(name).to_str().unwrap().to_owned());
        let flags = ["--tls-cert", &cert, "--tls-key", &tls_key, "--policy-file", &policy];
        let proxy = Proxy::start_at(&setup.nats_url(), &[&FLAGS[..], &flags].concat());
        let token = key.token("ES256", &claims(ISSUER, "worker", LIFETIME));
        Self { proxy, authority, token, _folder: folder }
    }

    async fn connect(&self, count: usize) -> Vec<Client> {
        let tls =
            ClientTlsConfig::new().ca_certificate(Certificate::from_pem(self.authority.pem()));
        let endpoint = Endpoint::from_shared(format!("https://{}", self.proxy.grpc)).unwrap();
        let endpoint = endpoint.tls_config(tls).unwrap();
        let mut clients = Vec::new();
        for _ in 0..count {
            let channel = endpoint.connect().await.unwrap();
            clients.push(FetchServiceClient::with_interceptor(channel, Bearer::of(&self.token)));
        }
        clients
    }

    /// As [`proxied::batches`].
    pub async fn batches(&self, setup: &Setup, batches: Batches, run: Run) -> Half {
        let clients = self.connect(batches.clients).await;
        let processes = setup.proxied_by(self.proxy.pid());
        proxied::batches_of(setup, clients, &processes, batches, run).await
    }

    /// As [`proxied::singles`].
    pub async fn singles(&self, setup: &Setup, clients: usize, run: Run) -> Half {
        let clients = self.connect(clients).await;
        proxied::singles_of(setup, clients, &setup.proxied_by(self.proxy.pid()), run).await
    }
}
