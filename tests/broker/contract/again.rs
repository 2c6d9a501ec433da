//! Promises about messages that are delivered again: when, in which order, and how often.

use fetch_proxy::{
    broker::{AckKind, AckSubject, Delivery, Inbox, PullEnd, PullRequest},
    clock,
};

use super::{
    client::{
        attempts, comes_after, end, expire, millis, one, open, pull, say, sequences, take,
        unsettled, until_unsettled,
    },
    worlds::{ACK_WAIT, Operated, World},
};

/// The ack subject of another message.
fn other(of: &Delivery, sequence: u64) -> AckSubject {
    let mut tokens: Vec<String> = of.ack.0.split('.').map(str::to_owned).collect();
    let place = tokens.len() - 4;
    tokens[place] = sequence.to_string();
    tokens[place + 1] = sequence.to_string();
    AckSubject(tokens.join(".").into())
}

contract! {
    an_unsettled_message_comes_back_after_its_ack_wait_with_the_next_count(
        world: World
    ) on fake, model, real {
        world.publish(vec![1]).await;
        one(&world).await;
        for count in 2..4 {
            let began = clock::now();
            let again = comes_after(&world, ACK_WAIT, began).await;
            assert_eq!((again.stream_sequence, again.delivery_count), (1, count));
        }
    }

    each_attempt_has_its_own_ack_wait_with_a_backoff(world: Operated) on model, real {
        let backoff = [300, 900, 1500].map(millis);
        world.update(|config| config.backoff = backoff.to_vec()).await;
        world.publish(vec![1]).await;
        one(&world).await;
        for wait in [backoff[0], backoff[1], backoff[2], backoff[2]] {
            let began = clock::now();
            comes_after(&world, wait, began).await;
        }
    }

    progress_restarts_the_wait_of_its_attempt_with_a_backoff(world: Operated) on model, real {
        world.update(|config| config.backoff = [300, 1200].map(millis).to_vec()).await;
        world.publish(vec![1]).await;
        one(&world).await;
        let second = one(&world).await;
        tokio::time::sleep(millis(300)).await;
        let began = clock::now();
        say(&world, &second, AckKind::Progress).await.unwrap();
        comes_after(&world, millis(1200), began).await;
    }

    a_delay_counts_from_the_first_wait_of_a_backoff(world: Operated) on model, real {
        world.update(|config| config.backoff = [300, 900, 1500].map(millis).to_vec()).await;
        world.publish(vec![1]).await;
        let mut delivery = one(&world).await;
        for wait in [300, 900, 1500, 1500] {
            let began = clock::now();
            say(&world, &delivery, AckKind::Nak(Some(millis(300)))).await.unwrap();
            delivery = comes_after(&world, millis(wait), began).await;
        }
    }

    nacked_messages_come_before_expired_ones_and_new_messages_come_last(
        world: World
    ) on fake, model, real {
        for number in 0..5 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 4).await;
        for place in [2, 0] {
            say(&world, &found[place], AckKind::Nak(None)).await.unwrap();
        }
        expire().await;
        assert_eq!(attempts(&take(&world, 5).await), [(3, 2), (1, 2), (2, 2), (4, 2), (5, 1)]);
    }

    a_message_nacked_after_others_expired_comes_after_them(world: World) on fake, model, real {
        for number in 0..2 {
            world.publish(vec![number]).await;
        }
        let first = one(&world).await;
        tokio::time::sleep(ACK_WAIT / 2).await;
        one(&world).await;
        tokio::time::sleep(ACK_WAIT * 4 / 5).await;
        // The first has expired. The second has not, and is nacked now.
        let second = Delivery { ack: other(&first, 2), ..first.clone() };
        say(&world, &second, AckKind::Nak(None)).await.unwrap();
        assert_eq!(sequences(&take(&world, 2).await), [1, 2]);
    }

    a_nacked_message_that_is_too_large_for_a_pull_goes_behind_the_others(
        world: Operated
    ) on model, real {
        world.publish(vec![0; 5000]).await;
        world.publish(vec![2]).await;
        for delivery in take(&world, 2).await {
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { max_bytes: Some(1000), ..pull(1, 2) }).await.unwrap();
        assert_eq!(end(&mut inbox).await, PullEnd::TooLarge);
        assert_eq!(attempts(&take(&world, 2).await), [(2, 2), (1, 2)]);
    }

    max_ack_pending_stops_new_messages_and_no_nacked_ones(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(2)).await;
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 5).await;
        assert_eq!(attempts(&found), [(1, 1), (2, 1)]);
        assert_eq!(attempts(&take(&world, 5).await), []);
        for place in [1, 0] {
            say(&world, &found[place], AckKind::Nak(None)).await.unwrap();
        }
        assert_eq!(attempts(&take(&world, 5).await), [(2, 2), (1, 2)]);
        say(&world, &found[1], AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 5).await), [(3, 1)]);
    }

    a_message_that_waits_for_its_delay_counts_as_unsettled(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        for number in 0..2 {
            world.publish(vec![number]).await;
        }
        let first = one(&world).await;
        say(&world, &first, AckKind::Nak(Some(millis(1500)))).await.unwrap();
        assert_eq!(attempts(&take(&world, 2).await), [], "not even the second");
        assert_eq!(unsettled(&world).await, 1);
    }

    one_attempt_is_over_with_its_ack_wait(world: Operated) on model, real {
        world.update(|config| config.max_deliver = Some(1)).await;
        world.publish(vec![1]).await;
        let only = one(&world).await;
        expire().await;
        until_unsettled(&world, 0).await;
        say(&world, &only, AckKind::Nak(None)).await.unwrap();
        assert_eq!(attempts(&take(&world, 1).await), []);
    }

    the_last_of_several_attempts_is_over_when_a_pull_asks(world: Operated) on model, real {
        world.update(|config| config.max_deliver = Some(2)).await;
        world.publish(vec![1]).await;
        one(&world).await;
        expire().await;
        let last = one(&world).await;
        expire().await;
        assert_eq!(unsettled(&world).await, 1, "nobody has asked");
        assert_eq!(attempts(&take(&world, 1).await), []);
        assert_eq!(unsettled(&world).await, 0);
        assert_eq!(say(&world, &last, AckKind::Ack).await, Ok(()));
    }

    a_nak_of_the_last_attempt_ends_the_message(world: Operated) on model, real {
        world.update(|config| config.max_deliver = Some(2)).await;
        world.publish(vec![1]).await;
        for _ in 0..2 {
            let delivery = one(&world).await;
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        assert_eq!(unsettled(&world).await, 1);
        assert_eq!(attempts(&take(&world, 1).await), []);
        assert_eq!(unsettled(&world).await, 0);
    }
}
