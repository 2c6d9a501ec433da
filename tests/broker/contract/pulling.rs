//! Promises about pulls: the messages that a pull brings, and its end.

use std::time::Duration;

use fetch_proxy::{
    broker::{AckKind, AckPolicy, Broker, ConsumerName, Inbox, InfoError, PullEnd, PullRequest},
    clock,
};
use testkit::BOUND;

use super::{
    client::{arrivals, attempts, end, millis, one, open, pull, read, say, sequences, take, until},
    worlds::{ACK_WAIT, Operated, World},
};

contract! {
    info_describes_a_consumer_and_names_a_missing_one(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let info = world.broker().info(&world.name(), until()).await.unwrap();
        assert_eq!((info.ack_wait, info.ack_policy), (ACK_WAIT, AckPolicy::Explicit));
        assert_eq!((info.pending, info.ack_pending, info.delivered, info.push), (1, 0, 0, false));
        assert!(info.leader_shows, "the one server that is connected has led it all the time");
        let nobody = ConsumerName { consumer: "nobody".into(), ..world.name() };
        assert_eq!(world.broker().info(&nobody, until()).await, Err(InfoError::NoConsumer));
        let nowhere = ConsumerName { stream: "NOWHERE".into(), ..world.name() };
        assert_eq!(world.broker().info(&nowhere, until()).await, Err(InfoError::NoStream));
    }

    full_batch_ends_without_a_status_and_a_short_batch_with_one(world: World) on fake, model, real {
        for number in 0..5 {
            world.publish(vec![number]).await;
        }
        let mut inbox = open(&world).await;
        inbox.pull(pull(1, 3)).await.unwrap();
        let (first, end) = arrivals(&mut inbox, 3).await;
        assert_eq!((first.len(), end), (3, None));
        inbox.pull(pull(2, 10)).await.unwrap();
        let (rest, end) = arrivals(&mut inbox, 10).await;
        assert_eq!((rest.len(), end), (2, Some(PullEnd::Done)));
        let sequences: Vec<u64> = first.iter().chain(&rest).map(|one| one.stream_sequence).collect();
        assert_eq!(sequences, [1, 2, 3, 4, 5]);
        assert_eq!((rest[1].payload.as_ref(), rest[1].delivery_count, rest[1].pending), (&[4][..], 1, 0));
    }

    empty_pull_ends_when_it_expires(world: World) on fake, model, real {
        let mut inbox = open(&world).await;
        let began = clock::now();
        inbox.pull(pull(1, 3)).await.unwrap();
        assert_eq!(arrivals(&mut inbox, 1).await, (vec![], Some(PullEnd::Done)));
        assert!(clock::now() - began >= Duration::from_millis(250));
    }

    waiting_pull_brings_the_first_message_and_ends(world: World) on fake, model, real {
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 10) }).await.unwrap();
        let (found, ()) = tokio::join!(arrivals(&mut inbox, 10), async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            world.publish(vec![7]).await;
        });
        assert_eq!((found.0.len(), found.1), (1, Some(PullEnd::Done)));
    }

    message_beyond_the_bytes_of_a_pull_is_reported_only(world: World) on fake, model, real {
        world.publish(vec![0; 5000]).await;
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { max_bytes: Some(1000), ..pull(1, 3) }).await.unwrap();
        assert_eq!(arrivals(&mut inbox, 1).await, (vec![], Some(PullEnd::TooLarge)));
    }

    a_delivery_says_what_it_is(world: World) on fake, model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 2).await;
        assert_eq!(attempts(&found), [(1, 1), (2, 1)]);
        let left: Vec<u64> = found.iter().map(|one| one.pending).collect();
        let places: Vec<u64> = found.iter().map(|one| one.consumer_sequence).collect();
        assert_eq!((left, places), (vec![2, 1], vec![1, 2]));
        let subject = W::Broker::delivery_of(&found[1].ack);
        assert_eq!(subject, Some((world.name(), 1)));
        let info = read(&world).await;
        assert_eq!((info.pending, info.ack_pending), (1, 2));
        assert_eq!((info.delivered, info.delivered_stream), (2, 2));
    }

    a_pull_that_waits_for_its_batch_ends_with_its_time(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let mut inbox = open(&world).await;
        let began = clock::now();
        inbox.pull(PullRequest { no_wait: false, ..pull(1, 3) }).await.unwrap();
        let (found, end) = arrivals(&mut inbox, 3).await;
        assert_eq!((found.len(), end), (1, Some(PullEnd::Done)));
        assert!(clock::now() - began >= millis(250));
    }

    a_pull_that_waits_for_its_batch_outlasts_max_ack_pending(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        for number in 0..5 {
            world.publish(vec![number]).await;
        }
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { no_wait: false, expires: BOUND, ..pull(1, 5) }).await.unwrap();
        for number in 0..5 {
            let (found, end) = arrivals(&mut inbox, 1).await;
            assert_eq!((found.len(), end), (1, None), "each message follows the settlement before it");
            assert_eq!(found[0].payload.as_ref(), [number]);
            say(&world, &found[0], AckKind::Ack).await.unwrap();
        }
    }

    a_pull_at_a_consumer_that_is_not_there_ends_at_once(world: World) on fake, model, real {
        let mut inbox = open(&world).await;
        world.delete_consumer().await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, PullEnd::ConsumerGone);
    }

    waiting_pulls_are_served_in_turn(world: Operated) on model, real {
        let (mut first, mut second) = (open(&world).await, open(&world).await);
        let asked = PullRequest { expires: BOUND, no_wait: false, ..pull(1, 2) };
        first.pull(asked).await.unwrap();
        world.pulled(1).await;
        second.pull(asked).await.unwrap();
        world.pulled(2).await;
        for number in 0..4 {
            world.publish(vec![number]).await;
        }
        assert_eq!(sequences(&arrivals(&mut first, 2).await.0), [1, 3]);
        assert_eq!(sequences(&arrivals(&mut second, 2).await.0), [2, 4]);
    }

    a_message_too_large_for_a_pull_is_for_the_next_pull(world: Operated) on model, real {
        let (mut narrow, mut wide) = (open(&world).await, open(&world).await);
        let asked = PullRequest { expires: BOUND, ..pull(1, 2) };
        narrow.pull(PullRequest { max_bytes: Some(1000), ..asked }).await.unwrap();
        world.pulled(1).await;
        wide.pull(asked).await.unwrap();
        world.pulled(2).await;
        world.publish(vec![0; 5000]).await;
        assert_eq!(end(&mut narrow).await, PullEnd::TooLarge);
        assert_eq!(arrivals(&mut wide, 1).await.0.len(), 1);
    }

    a_message_that_fits_exactly_is_brought_and_ends_the_pull_without_a_word(
        world: Operated
    ) on model, real {
        for _ in 0..4 {
            world.publish(vec![0; 500]).await;
        }
        let first = one(&world).await;
        let size = (first.subject.len() + first.ack.0.len() + first.payload.len()) as u64;
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { max_bytes: Some(size - 1), ..pull(1, 10) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, PullEnd::TooLarge);
        // No end comes, not even after the time of this pull: the next arrival is of the next pull.
        inbox.pull(PullRequest { max_bytes: Some(size), ..pull(2, 10) }).await.unwrap();
        assert_eq!(sequences(&arrivals(&mut inbox, 1).await.0), [2]);
        tokio::time::sleep(Duration::from_millis(500)).await;
        inbox.pull(pull(3, 1)).await.unwrap();
        assert_eq!(sequences(&arrivals(&mut inbox, 1).await.0), [3]);
    }
}
