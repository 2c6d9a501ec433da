//! Tells the other replicas what was seen of a consumer, and holds back what arrives until they have
//! answered. Decides nothing: the monitor says when there is something to tell.
//!
//! Until all replicas know, nothing is pulled, and no delivery is handed out. The ends of pulls are held
//! back too, so that the pump hears of an end after all that the pull has brought.

use std::{collections::VecDeque, future::Future, pin::Pin};

use crate::{broker::PullEnd, lessor::delivery::GrantedDelivery};

type Announcement = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Something that has arrived and is held back.
pub(super) enum HeldBack {
    Message(GrantedDelivery),
    End(u64, PullEnd),
}

/// See the [module](self).
#[derive(Default)]
pub(super) struct Announcer {
    announcement: Option<Announcement>,
    held_back: VecDeque<HeldBack>,
}

impl Announcer {
    /// Announces one more thing. The future ends when all replicas have answered, or are given up.
    pub(super) fn announce(&mut self, told: impl Future<Output = ()> + Send + 'static) {
        let before = self.announcement.take();
        self.announcement = Some(Box::pin(async move {
            told.await;
            if let Some(before) = before {
                before.await;
            }
        }));
    }

    pub(super) fn is_announcing(&self) -> bool {
        self.announcement.is_some()
    }

    /// Waits until the others know. Never ends if there is nothing to tell. Cancel-safe.
    pub(super) async fn known(&mut self) {
        match &mut self.announcement {
            Some(announcement) => announcement.await,
            None => std::future::pending().await,
        }
    }

    /// The others know. Returns what was held back, in its order.
    pub(super) fn finish(&mut self) -> VecDeque<HeldBack> {
        self.announcement = None;
        std::mem::take(&mut self.held_back)
    }

    pub(super) fn hold_back(&mut self, arrived: HeldBack) {
        self.held_back.push_back(arrived);
    }
}
