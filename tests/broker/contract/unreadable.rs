//! Promises about messages that break every connection that brings them.

use fetch_proxy::broker::{
    AckKind, AckPublish, Arrival, Broker, Confirmation, ConnectionKind, Inbox, InboxEvent,
};
use testkit::BOUND;

use super::{
    client::{arrivals, open, pull, until},
    worlds::World,
};

contract! {
    unreadable_message_breaks_its_connection_and_is_terminated(world: World) on fake, model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
            world.publish_poison().await;
        }
        let (mut broken, mut read) = (0, Vec::new());
        while read.len() < 3 {
            let Ok(mut inbox) = world.broker().open(&world.name(), ConnectionKind::Shared).await else {
                tokio::task::yield_now().await;
                continue;
            };
            if inbox.pull(pull(1, 1)).await.is_err() {
                continue;
            }
            let mut buffer = Vec::new();
            match inbox.next(&mut buffer).await {
                InboxEvent::Arrived => read.extend(buffer.into_iter().filter_map(|one| match one {
                    Arrival::Message(delivery) => Some(delivery.stream_sequence),
                    Arrival::End { .. } => None,
                })),
                InboxEvent::Lost => {}
                InboxEvent::Broken => broken += 1,
            }
            let search = world.broker().unreadable(&world.name(), 1, until()).await.unwrap();
            for found in search.found {
                assert_eq!(found.stream_sequence % 2, 0, "a good message is called unreadable");
                let kind = AckKind::Term("unreadable".into());
                let orders = vec![AckPublish { ack: found.ack, kind, confirm_group: None, by: None }];
                let results = world.broker().settle(orders, Confirmation::Confirmed, until()).await;
                assert_eq!(results, [Ok(())]);
            }
        }
        assert!(broken >= 2, "{broken}");
        assert_eq!(read[..1], [1]);
    }

    dedicated_connection_breaks_alone(world: World) on fake, model, real {
        let mut shared = open(&world).await;
        world.publish_poison().await;
        let link = world.broker().link();
        let mut apart = world.broker().open(&world.name(), ConnectionKind::Dedicated).await.unwrap();
        apart.pull(pull(1, 1)).await.unwrap();
        let news = tokio::time::timeout(BOUND, apart.next(&mut Vec::new())).await.unwrap();
        assert_eq!(news, InboxEvent::Broken);
        world.publish(vec![7]).await;
        shared.pull(pull(1, 1)).await.unwrap();
        assert_eq!(arrivals(&mut shared, 1).await.0.len(), 1);
        assert_eq!(world.broker().link(), link);
    }
}
