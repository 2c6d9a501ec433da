//! Promises about limits of pulls, and about pulls of one moment that meet a limit.

use fetch_proxy::{
    broker::{AckKind, Delivery, Inbox, PullEnd, PullRequest},
    clock,
};
use testkit::BOUND;

use super::{
    client::{InboxOf, arrivals, attempts, end, millis, one, open, pull, say},
    worlds::Operated,
};

fn busy(text: &str) -> PullEnd {
    PullEnd::Busy(text.to_owned())
}

/// A consumer at its `max_ack_pending` of 1: the delivery that is not settled, and a pull that waits for the next
/// message.
async fn full<W: Operated>(world: &W) -> (Delivery, InboxOf<W>) {
    world.update(|config| config.max_ack_pending = Some(1)).await;
    for number in 0..2 {
        world.publish(vec![number]).await;
    }
    let first = one(world).await;
    let mut inbox = open(world).await;
    inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
    world.pulled(1).await;
    (first, inbox)
}

contract! {
    a_pull_beyond_a_limit_ends_at_once_with_the_limit(world: Operated) on model, real {
        world.update(|config| {
            config.max_batch = Some(2);
            config.max_expires = Some(millis(5_000));
            config.max_bytes = Some(1_000);
        })
        .await;
        let mut inbox = open(&world).await;
        inbox.pull(pull(1, 3)).await.unwrap();
        assert_eq!(end(&mut inbox).await, busy("Exceeded MaxRequestBatch of 2"));
        inbox.pull(PullRequest { expires: millis(6_000), ..pull(2, 1) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, busy("Exceeded MaxRequestExpires of 5s"));
        inbox.pull(PullRequest { max_bytes: Some(1_001), ..pull(3, 1) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, busy("Exceeded MaxRequestMaxBytes of 1000"));
        inbox.pull(PullRequest { max_bytes: Some(1_000), ..pull(4, 2) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, PullEnd::Done);
    }

    a_pull_beyond_max_waiting_ends_at_once(world: Operated) on model, real {
        world.delete_consumer().await;
        world.set_max_waiting(1);
        world.create_again().await;
        let (mut first, mut second) = (open(&world).await, open(&world).await);
        let asked = PullRequest { expires: BOUND, ..pull(1, 1) };
        first.pull(asked).await.unwrap();
        world.pulled(1).await;
        second.pull(asked).await.unwrap();
        assert_eq!(end(&mut second).await, busy("Exceeded MaxWaiting"));
    }

    a_pull_ends_at_once_if_others_wait_for_the_pending_messages(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        world.publish(vec![1]).await;
        one(&world).await;
        world.publish(vec![2]).await;
        let (mut first, mut second) = (open(&world).await, open(&world).await);
        first.pull(PullRequest { expires: BOUND, no_wait: false, ..pull(1, 10) }).await.unwrap();
        world.pulled(1).await;
        second.pull(PullRequest { expires: BOUND, ..pull(1, 10) }).await.unwrap();
        assert_eq!(end(&mut second).await, PullEnd::RequestsPending);
        let mut third = open(&world).await;
        third.pull(PullRequest { no_wait: false, ..pull(1, 10) }).await.unwrap();
        assert_eq!(end(&mut third).await, PullEnd::Done, "a pull that waits is not refused");
    }

    only_time_ends_a_pull_at_max_ack_pending(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(2)).await;
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        let mut inbox = open(&world).await;
        let began = clock::now();
        inbox.pull(PullRequest { expires: millis(700), ..pull(1, 5) }).await.unwrap();
        let (found, end) = arrivals(&mut inbox, 5).await;
        assert_eq!((attempts(&found), end), (vec![(1, 1), (2, 1)], Some(PullEnd::Done)));
        assert!(clock::now() - began >= millis(650));
    }

    only_time_ends_a_pull_that_brings_the_last_message_allowed(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        world.publish(vec![1]).await;
        let mut inbox = open(&world).await;
        let began = clock::now();
        inbox.pull(PullRequest { expires: millis(700), ..pull(1, 5) }).await.unwrap();
        let (found, end) = arrivals(&mut inbox, 5).await;
        assert_eq!((found.len(), end), (1, Some(PullEnd::Done)));
        assert!(clock::now() - began >= millis(650), "although no message is left");
    }

    the_end_of_a_pull_ends_others_that_have_brought_something(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(2)).await;
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        world.set_ack_wait(3 * BOUND).await;
        // Both wait before the first message is handed out.
        world.pause(millis(500)).await;
        let (mut short, mut long) = (open(&world).await, open(&world).await);
        short.pull(PullRequest { expires: millis(2_000), ..pull(1, 2) }).await.unwrap();
        world.pulled(1).await;
        long.pull(PullRequest { expires: 3 * BOUND, ..pull(1, 2) }).await.unwrap();
        assert_eq!(attempts(&arrivals(&mut short, 1).await.0), [(1, 1)]);
        assert_eq!(attempts(&arrivals(&mut long, 1).await.0), [(2, 1)]);
        assert_eq!(end(&mut short).await, PullEnd::Done);
        assert_eq!(end(&mut long).await, PullEnd::Done, "long before its time");
    }

    a_waiting_pull_brings_a_nacked_message_at_max_ack_pending(world: Operated) on model, real {
        let (first, mut inbox) = full(&world).await;
        say(&world, &first, AckKind::Nak(None)).await.unwrap();
        assert_eq!(attempts(&arrivals(&mut inbox, 1).await.0), [(1, 2)]);
    }

    a_waiting_pull_brings_a_message_as_soon_as_another_is_settled(world: Operated) on model, real {
        let (first, mut inbox) = full(&world).await;
        say(&world, &first, AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&arrivals(&mut inbox, 1).await.0), [(2, 1)]);
    }
}
