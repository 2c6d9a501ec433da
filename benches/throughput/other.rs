//! The same calls at another proxy of this build, which has flags or variables that the first has not.

use std::path::Path;

use testkit::{
    measure::{Half, Run},
    proxy::Proxy,
    traces::TraceReceiver,
};

use crate::{
    consumed::Streams,
    one_call,
    proxied::{self, Batches},
    setup::{FLAGS, Setup},
};

/// A proxy on the nats-server of the first.
pub struct OtherProxy(Proxy);

impl OtherProxy {
    /// A proxy with these flags.
    pub fn with(setup: &Setup, flags: &[&str]) -> Self {
        Self(Proxy::start_at(&setup.nats_url(), &[&FLAGS[..], flags].concat()))
    }

    /// Another program of the proxy.
    pub fn program(setup: &Setup, program: &Path) -> Self {
        Self(Proxy::start_other(program, &setup.nats_url(), &FLAGS))
    }

    /// A proxy that traces one call in a hundred, and sends the spans to this receiver.
    pub fn traced(setup: &Setup, receiver: &TraceReceiver) -> Self {
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.url),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.01"),
        ];
        Self(Proxy::start_with(&setup.nats_url(), &FLAGS, &variables))
    }

    /// As [`proxied::batches`].
    pub async fn batches(&self, setup: &Setup, batches: Batches, run: Run) -> Half {
        let clients = self.connect(batches.clients).await;
        let processes = setup.proxied_by(self.0.pid());
        proxied::batches_of(setup, clients, &processes, batches, run).await
    }

    /// As [`proxied::singles`].
    pub async fn singles(&self, setup: &Setup, clients: usize, run: Run) -> Half {
        let clients = self.connect(clients).await;
        proxied::singles_of(setup, clients, &setup.proxied_by(self.0.pid()), run).await
    }

    /// As [`one_call::singles`].
    pub async fn one_call(&self, setup: &Setup, clients: usize, run: Run) -> Half {
        let clients = self.connect(clients).await;
        one_call::singles_of(setup, clients, &setup.proxied_by(self.0.pid()), run).await
    }

    /// As [`Streams::acked`].
    pub async fn consumed(&self, setup: &Setup, streams: Streams, run: Run) -> Half {
        let clients = self.connect(streams.count).await;
        streams.acked_of(setup, clients, &setup.proxied_by(self.0.pid()), run).await
    }

    async fn connect(&self, count: usize) -> Vec<proxied::Client> {
        proxied::connect(&format!("http://{}", self.0.grpc), count).await
    }
}
