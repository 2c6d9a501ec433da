//! The same calls at another proxy of this build, which has flags or variables that the first has not.

use testkit::{proxy::Proxy, traces::TraceReceiver};

use crate::{
    Half, proxied,
    setup::{FLAGS, Setup},
};

/// A proxy on the nats-server of the first.
pub struct OtherProxy(Proxy);

impl OtherProxy {
    /// A proxy without metrics.
    pub fn without_metrics(setup: &Setup) -> Self {
        Self(Proxy::start_at(&setup.nats_url(), &[&FLAGS[..], &["--metrics", "off"]].concat()))
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

    /// As [`proxied::batches`], confirmed.
    pub async fn batches(&self, setup: &Setup, clients: usize, messages: usize) -> Half {
        let clients = self.connect(clients).await;
        let cpu = setup.cpu_of(self.0.pid());
        proxied::batches_of(setup, clients, &cpu, messages, true).await
    }

    /// As [`proxied::singles`].
    pub async fn singles(&self, setup: &Setup, clients: usize, messages: usize) -> Half {
        let clients = self.connect(clients).await;
        proxied::singles_of(setup, clients, &setup.cpu_of(self.0.pid()), messages).await
    }

    async fn connect(&self, count: usize) -> Vec<proxied::Client> {
        proxied::connect(&format!("http://{}", self.0.grpc), count).await
    }
}
