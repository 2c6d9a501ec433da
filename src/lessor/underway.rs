//! One future of the task that is under way, or none. Owns when it is dropped: at its end, or when it is given up.

use std::{future::Future, pin::Pin};

/// See the [module](self).
pub(super) struct Underway<T>(Option<Pin<Box<dyn Future<Output = T> + Send>>>);

impl<T> Underway<T> {
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Begins `future`. It is polled by [`Underway::next`] only.
    pub(super) fn begin(&mut self, future: impl Future<Output = T> + Send + 'static) {
        self.0 = Some(Box::pin(future));
    }

    pub(super) fn cancel(&mut self) {
        self.0 = None;
    }

    pub(super) fn is_some(&self) -> bool {
        self.0.is_some()
    }

    /// Waits for the end. Never ends if nothing is under way. Cancel-safe.
    pub(super) async fn next(&mut self) -> T {
        match &mut self.0 {
            Some(future) => {
                let output = future.await;
                self.0 = None;
                output
            }
            None => std::future::pending().await,
        }
    }
}
