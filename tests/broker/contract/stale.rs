//! Promises about ack subjects of earlier attempts. JetStream does not fence: a delivery is known by its
//! stream sequence alone, so an old subject settles the delivery of the present holder.

use fetch_proxy::{
    broker::{AckKind, BrokerError, Delivery},
    clock,
};

use super::{
    client::{attempts, comes_after, expire, millis, one, say, say_until, take, unsettled},
    worlds::{ACK_WAIT, Operated, World},
};

/// The subject of the first attempt, after another worker has received the second.
async fn stale<W: World>(world: &W) -> Delivery {
    world.publish(vec![1]).await;
    let stale = one(world).await;
    expire().await;
    assert_eq!(one(world).await.delivery_count, 2);
    stale
}

contract! {
    stale_ack_ends_the_delivery_of_another_worker(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let stale = one(&world).await;
        let current = one(&world).await;
        assert_eq!(current.delivery_count, 2, "the ack wait of the first delivery is over");
        say(&world, &stale, AckKind::Ack).await.unwrap();
        assert_eq!(unsettled(&world).await, 0);
    }

    stale_term_ends_the_delivery_of_another_worker(world: World) on fake, model, real {
        let stale = stale(&world).await;
        say(&world, &stale, AckKind::Term("no".into())).await.unwrap();
        assert_eq!(unsettled(&world).await, 0);
        expire().await;
        assert_eq!(attempts(&take(&world, 1).await), []);
    }

    stale_nak_brings_back_the_message_of_another_worker(world: World) on fake, model, real {
        let stale = stale(&world).await;
        say(&world, &stale, AckKind::Nak(None)).await.unwrap();
        assert_eq!(attempts(&take(&world, 1).await), [(1, 3)]);
    }

    stale_nak_with_a_delay_sets_the_clock_of_another_worker(world: World) on fake, model, real {
        let stale = stale(&world).await;
        let began = clock::now();
        say(&world, &stale, AckKind::Nak(Some(millis(300)))).await.unwrap();
        assert_eq!(comes_after(&world, millis(300), began).await.delivery_count, 3);
    }

    stale_progress_restarts_the_ack_wait_of_another_worker(world: World) on fake, model, real {
        let stale = stale(&world).await;
        let began = clock::now();
        tokio::time::sleep(ACK_WAIT / 2).await;
        say(&world, &stale, AckKind::Progress).await.unwrap();
        let third = comes_after(&world, ACK_WAIT * 3 / 2, began).await;
        assert_eq!(third.delivery_count, 3);
    }

    numbers_of_a_subject_apart_from_the_message_do_not_matter(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let mut forged = one(&world).await;
        let mut tokens: Vec<String> = forged.ack.0.split('.').map(str::to_owned).collect();
        let place = tokens.len() - 5;
        tokens[place] = "99".to_owned();
        tokens[place + 2] = "77".to_owned();
        forged.ack.0 = tokens.join(".").into();
        say(&world, &forged, AckKind::Ack).await.unwrap();
        assert_eq!(unsettled(&world).await, 0);
    }

    an_old_subject_settles_a_consumer_of_the_same_name(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let old = one(&world).await;
        let created = super::client::read(&world).await.created;
        world.delete_consumer().await;
        world.create_again().await;
        assert_ne!(super::client::read(&world).await.created, created);
        let soon = clock::now() + millis(500);
        let early = say_until(&world, &old, AckKind::Ack, soon).await;
        assert_eq!(early, Err(BrokerError::Unconfirmed), "it was not delivered here yet");
        assert_eq!(attempts(&take(&world, 1).await), [(1, 1)]);
        say(&world, &old, AckKind::Ack).await.unwrap();
        assert_eq!(unsettled(&world).await, 0);
    }

    an_old_subject_settles_a_consumer_that_was_reset(world: Operated) on model, real {
        for number in 0..2 {
            world.publish(vec![number]).await;
        }
        let old = take(&world, 2).await;
        let created = super::client::read(&world).await.created;
        if !world.reset(1).await {
            return;
        }
        // INFO may have the old number of deliveries for a moment.
        let info = testkit::eventually("the numbers of the reset", || async {
            Some(super::client::read(&world).await).filter(|info| info.delivered == 0)
        });
        let info = info.await;
        assert_eq!((info.created, info.ack_pending), (created, 0));
        let soon = clock::now() + millis(500);
        let early = say_until(&world, &old[1], AckKind::Ack, soon).await;
        assert_eq!(early, Err(BrokerError::Unconfirmed));
        let again = take(&world, 2).await;
        assert_eq!(attempts(&again), [(1, 1), (2, 1)], "the attempts are counted again");
        assert_eq!(again[0].consumer_sequence, 1);
        say(&world, &old[1], AckKind::Ack).await.unwrap();
        assert_eq!(unsettled(&world).await, 1);
    }

    an_old_nak_is_ignored_if_its_consumer_sequence_is_not_there_yet(
        world: Operated
    ) on model, real {
        for number in 0..5 {
            world.publish(vec![number]).await;
        }
        for delivery in take(&world, 4).await {
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        // The second attempt of the first message: the fifth delivery of the consumer.
        let old = take(&world, 1).await.remove(0);
        assert_eq!((old.stream_sequence, old.consumer_sequence), (1, 5));
        if !world.reset(1).await {
            return;
        }
        assert_eq!(attempts(&take(&world, 1).await), [(1, 1)]);
        for (delay, next) in [(None, 2), (Some(millis(1)), 3)] {
            say(&world, &old, AckKind::Nak(delay)).await.unwrap();
            tokio::time::sleep(millis(100)).await;
            assert_eq!(attempts(&take(&world, 1).await), [(next, 1)], "not the first again");
        }
    }
}
