//! The queue in front of the exporter, with a bound of our own: the library counts the spans that it drops, and
//! tells nobody.

use std::{sync::Arc, time::Duration};

use opentelemetry::Context;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{BatchConfig, BatchSpanProcessor, Span, SpanData, SpanProcessor},
};

use super::{exporter::OwnThreadExporter, losses::Losses};

/// The library's queue with a bound that counts. The library's own bound is the same, so it is never reached.
#[derive(Debug)]
pub(super) struct BoundedQueue {
    inner: BatchSpanProcessor,
    most: usize,
    losses: Arc<Losses>,
}

impl BoundedQueue {
    /// Starts the exporter's thread. `batches` must have room for `most` spans.
    pub(super) fn new(exporter: OwnThreadExporter, batches: BatchConfig, most: usize) -> Self {
        let losses = exporter.losses();
        Self { inner: BatchSpanProcessor::new(exporter, batches), most, losses }
    }
}

impl SpanProcessor for BoundedQueue {
    fn on_start(&self, span: &mut Span, cx: &Context) {
        self.inner.on_start(span, cx);
    }

    fn on_end(&self, span: SpanData) {
        if self.losses.queue(self.most) {
            self.inner.on_end(span);
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}
