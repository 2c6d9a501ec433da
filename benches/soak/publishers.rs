//! The publishers, on a connection of their own. They keep a steady rate of messages of several
//! sizes. The id of a message determines its payload.

use std::{sync::Arc, time::Duration};

use async_nats::{HeaderMap, jetstream::Context};
use bytes::Bytes;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{MissedTickBehavior, interval, timeout},
};

use testkit::delivery_log::DeliveryLog;

pub const STREAM: &str = "SOAK";
pub const ID: &str = "Soak-Id";
/// Nobody knows what becomes of a message whose PubAck has not come by then.
const PUB_ACK: Duration = Duration::from_secs(6);

/// The payload of a message. One in fifty is no JSON.
pub fn payload(id: u64) -> Bytes {
    let size = match id % 400 {
        7 => 200 * 1024,
        rest if rest % 20 == 3 => 16 * 1024,
        rest if rest % 3 == 1 => 1024,
        _ => 100,
    };
    let fill = char::from(b'a' + u8::try_from(id % 26).unwrap());
    let open = if id % 50 == 11 { "" } else { "{" };
    let mut text = format!("{open}\"id\":{id},\"fill\":\"");
    text.extend(std::iter::repeat_n(fill, size));
    text += "\"}";
    text.into()
}

/// Publishes so many a second until told to stop; returns when every PubAck has come or not.
pub async fn publish(
    jetstream: Context,
    rate: u32,
    log: Arc<DeliveryLog>,
    mut stop: watch::Receiver<bool>,
) {
    let mut ticks = interval(Duration::from_secs(1) / rate);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut open = JoinSet::new();
    for id in 1.. {
        tokio::select! {
            _ = ticks.tick() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
        let (jetstream, log) = (jetstream.clone(), log.clone());
        open.spawn(async move {
            let mut headers = HeaderMap::new();
            headers.insert(ID, id.to_string());
            let sent = timeout(PUB_ACK, async {
                let subject = format!("soak.{}", id % 7);
                jetstream.publish_with_headers(subject, headers, payload(id)).await.ok()?.await.ok()
            });
            log.published(id, sent.await.ok().flatten().map(|stored| stored.sequence));
        });
        while open.try_join_next().is_some() {}
    }
    open.join_all().await;
}
