//! The same calls at a proxy that traces one call in a hundred, and sends the spans to a receiver in this process.

use testkit::{proxy::Proxy, traces::TraceReceiver};

use crate::{
    Half, proxied,
    setup::{FLAGS, Setup},
};

/// A proxy with traces, on the nats-server of the other.
pub struct Traced {
    proxy: Proxy,
    receiver: TraceReceiver,
}

impl Traced {
    pub async fn start(setup: &Setup) -> Self {
        let receiver = TraceReceiver::start().await;
        let variables = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &*receiver.url),
            ("OTEL_TRACES_SAMPLER", "parentbased_traceidratio"),
            ("OTEL_TRACES_SAMPLER_ARG", "0.01"),
        ];
        let proxy = Proxy::start_with(&setup.nats_url(), &FLAGS, &variables);
        Self { proxy, receiver }
    }

    /// As [`proxied::batches`], confirmed.
    pub async fn batches(&self, setup: &Setup, clients: usize, messages: usize) -> Half {
        let clients = self.connect(clients).await;
        let cpu = setup.cpu_of(self.proxy.pid());
        proxied::batches_of(setup, clients, &cpu, messages, true).await
    }

    /// As [`proxied::singles`].
    pub async fn singles(&self, setup: &Setup, clients: usize, messages: usize) -> Half {
        let clients = self.connect(clients).await;
        proxied::singles_of(setup, clients, &setup.cpu_of(self.proxy.pid()), messages).await
    }

    /// The spans that were received.
    pub fn spans(&self) -> usize {
        self.receiver.spans().len()
    }

    async fn connect(&self, count: usize) -> Vec<proxied::Client> {
        proxied::connect(&format!("http://{}", self.proxy.grpc), count).await
    }
}
