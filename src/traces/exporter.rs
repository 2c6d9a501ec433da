//! The exporter of the library, on a runtime of its own, which the thread of the queue drives. The library can
//! lock up on a runtime that also runs its callers. Logs that spans are lost.

use std::{
    future::{Future, ready},
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry_sdk::{
    Resource,
    error::{OTelSdkError, OTelSdkResult},
    trace::{SpanData, SpanExporter},
};
use tokio::runtime::{Builder, Runtime};

use super::losses::Losses;
use crate::{clock, log_throttle::LogThrottle};

/// Time between two log lines about lost spans.
const LOSS_WARNING_INTERVAL: Duration = Duration::from_secs(60);

/// The exporter and its runtime.
#[derive(Debug)]
pub(super) struct OwnThreadExporter {
    inner: opentelemetry_otlp::SpanExporter,
    /// It is `None` while the exporter is dropped.
    runtime: Option<Runtime>,
    /// Longest time for one batch, with all its repeats.
    timeout: Duration,
    losses: Arc<Losses>,
    warning: LogThrottle,
    /// The losses of the last log line.
    told: AtomicU64,
}

impl OwnThreadExporter {
    /// The exporter that `build` makes on the new runtime.
    ///
    /// # Errors
    /// The errors of `build`, and of the operating system if it has no runtime for us.
    pub(super) fn new<E: From<io::Error>>(
        timeout: Duration,
        build: impl FnOnce() -> Result<opentelemetry_otlp::SpanExporter, E>,
    ) -> Result<Self, E> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let inner = {
            let _here = runtime.enter();
            build()
        };
        let inner = match inner {
            Ok(inner) => inner,
            Err(error) => {
                // Dropping it would block, which a caller on another runtime may not.
                runtime.shutdown_background();
                return Err(error);
            }
        };
        let (losses, told) = (Arc::default(), AtomicU64::new(0));
        let warning = LogThrottle::every(LOSS_WARNING_INTERVAL);
        Ok(Self { inner, runtime: Some(runtime), timeout, losses, warning, told })
    }

    pub(super) fn losses(&self) -> Arc<Losses> {
        self.losses.clone()
    }

    fn send(&self, batch: Vec<SpanData>) -> OTelSdkResult {
        let spans = batch.len();
        self.losses.unqueue(spans);
        let Some(runtime) = &self.runtime else { return Err(OTelSdkError::AlreadyShutdown) };
        let sent = runtime.block_on(async {
            let sent = tokio::time::timeout(self.timeout, self.inner.export(batch)).await;
            sent.unwrap_or(Err(OTelSdkError::Timeout(self.timeout)))
        });
        if sent.is_err() {
            self.losses.lose(spans);
        }
        self.tell(sent.as_ref().err());
        sent
    }

    /// Logs that spans were lost since the last line.
    fn tell(&self, error: Option<&OTelSdkError>) {
        let dropped = self.losses.dropped();
        let before = self.told.load(Ordering::Relaxed);
        if dropped == before || !self.warning.allow(clock::now()) {
            return;
        }
        self.told.store(dropped, Ordering::Relaxed);
        let spans = dropped - before;
        match error {
            Some(error) => {
                tracing::warn!(spans, dropped, %error, "the receiver of traces takes no spans: they are dropped");
            }
            None => {
                tracing::warn!(spans, dropped, "more spans end than are sent: some are dropped")
            }
        }
    }
}

impl SpanExporter for OwnThreadExporter {
    fn export(&self, batch: Vec<SpanData>) -> impl Future<Output = OTelSdkResult> + Send {
        ready(self.send(batch))
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl Drop for OwnThreadExporter {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}
