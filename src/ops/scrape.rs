//! The page of metrics: one scrape at a time. Owns the page until its readers have it.
//!
//! A page is made on a thread for blocking work, so its size delays no call. It is made whole before its first
//! byte is sent, so a slow reader delays nobody.

use std::{
    io::{self, Write as _},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use axum::{body::Body, extract::Request};
use bytes::Bytes;
use flate2::{Compression, write::GzEncoder};
use http::{HeaderMap, Response, StatusCode, header};
use tokio::{
    sync::{Mutex, OwnedMutexGuard, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::{
    clock,
    metrics::{Format, Metrics},
};

/// Longest wait for the scrape before.
const LONGEST_SCRAPE_WAIT: Duration = Duration::from_secs(1);
/// Most pages that are not read yet. A page of 15,000 series has 2 MB.
const MAX_UNREAD_PAGES: usize = 16;

/// Answers scrapers.
#[derive(Clone)]
pub(super) struct Scrapes {
    metrics: Metrics,
    /// The number of pages that were begun.
    begun: Arc<AtomicU64>,
    last: Arc<Mutex<Option<Page>>>,
    unread: Arc<Semaphore>,
}

/// A page that was made.
struct Page {
    number: u64,
    wanted: Wanted,
    bytes: Bytes,
}

/// The wish of a scraper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    format: Format,
    gzip: bool,
}

/// The bytes of a page, and their place among the unread pages.
struct Unread {
    bytes: Vec<u8>,
    _place: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Unread {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Scrapes {
    pub(super) fn new(metrics: Metrics) -> Self {
        let unread = Arc::new(Semaphore::new(MAX_UNREAD_PAGES));
        Self { metrics, begun: Arc::default(), last: Arc::default(), unread }
    }

    /// The answer to one scrape.
    pub(super) async fn answer(self, request: Request) -> Response<Body> {
        let wanted = Wanted::of(request.headers());
        let seen = self.begun.load(Ordering::SeqCst);
        // Beyond the wait, or after a panic, there is no page.
        match timeout(LONGEST_SCRAPE_WAIT, self.page(wanted, seen)).await {
            Ok(Some(bytes)) => wanted.answer(bytes),
            Ok(None) | Err(_) => {
                let mut answer = Response::new(Body::from("other scrapes are not done yet\n"));
                *answer.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
                answer
            }
        }
    }

    /// A page that was begun after the first `seen` pages.
    async fn page(self, wanted: Wanted, seen: u64) -> Option<Bytes> {
        let last = self.last.clone().lock_owned().await;
        // Scrapers that waited for the same scrape share the next page.
        if let Some(page) = &*last
            && page.number > seen
            && page.wanted == wanted
        {
            return Some(page.bytes.clone());
        }
        let place = self.unread.clone().acquire_owned().await.ok()?;
        // A page that is begun is finished, also if its scraper leaves.
        tokio::task::spawn_blocking(move || self.make(last, place, wanted)).await.ok()?
    }

    fn make(
        self,
        mut last: OwnedMutexGuard<Option<Page>>,
        place: OwnedSemaphorePermit,
        wanted: Wanted,
    ) -> Option<Bytes> {
        let number = self.begun.fetch_add(1, Ordering::SeqCst) + 1;
        let page = self.metrics.page(wanted.format, clock::now()).into_bytes();
        let bytes = if wanted.gzip { packed(&page).ok()? } else { page };
        let bytes = Bytes::from_owner(Unread { bytes, _place: place });
        *last = Some(Page { number, wanted, bytes: bytes.clone() });
        Some(bytes)
    }
}

impl Wanted {
    fn of(headers: &HeaderMap) -> Self {
        let all = |name| {
            let values = headers.get_all(name).iter().filter_map(|value| value.to_str().ok());
            values.collect::<Vec<_>>().join(",")
        };
        let gzip = all(header::ACCEPT_ENCODING).split(',').any(|coding| {
            let (name, quality) = coding.split_once(';').unwrap_or((coding, ""));
            name.trim() == "gzip"
                && !matches!(quality.trim(), "q=0" | "q=0.0" | "q=0.00" | "q=0.000")
        });
        Self { format: Format::accepted(&all(header::ACCEPT)), gzip }
    }

    fn answer(self, bytes: Bytes) -> Response<Body> {
        let mut answer = Response::builder()
            .header(header::CONTENT_TYPE, self.format.content_type())
            .header(header::VARY, "accept, accept-encoding");
        if self.gzip {
            answer = answer.header(header::CONTENT_ENCODING, "gzip");
        }
        answer.body(Body::from(bytes)).unwrap_or_default()
    }
}

fn packed(page: &[u8]) -> io::Result<Vec<u8>> {
    let mut packer = GzEncoder::new(Vec::new(), Compression::fast());
    packer.write_all(page)?;
    packer.finish()
}
