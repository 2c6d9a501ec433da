//! Promises about an operator's work at a consumer that is in use.

use fetch_proxy::{
    broker::{AckKind, Denial, Inbox, PullEnd, PullRequest},
    clock,
};
use testkit::BOUND;

use super::{
    client::{
        arrivals, attempts, comes_after, end, expire, millis, one, open, pull, read, say,
        sequences, take, until_unsettled,
    },
    worlds::{ACK_WAIT, Operated, World},
};

contract! {
    deleted_consumer_denies_settlements(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        world.delete_consumer().await;
        let denied = say(&world, &delivery, AckKind::Ack).await;
        assert_eq!(denied, Err(Denial::Gone.into()));
    }

    a_deleted_consumer_ends_its_pulls(world: Operated) on model, real {
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
        world.pulled(1).await;
        world.delete_consumer().await;
        assert_eq!(end(&mut inbox).await, PullEnd::ConsumerGone);
    }

    a_paused_consumer_brings_nothing_and_continues_by_itself(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let began = clock::now();
        world.pause(millis(1_500)).await;
        assert!(read(&world).await.paused);
        assert_eq!(attempts(&take(&world, 1).await), []);
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
        assert_eq!(attempts(&arrivals(&mut inbox, 1).await.0), [(1, 1)]);
        assert!(clock::now() - began >= millis(1_400));
        assert!(!read(&world).await.paused);
    }

    a_paused_consumer_still_counts_ack_waits_and_takes_acks(world: Operated) on model, real {
        for number in 0..2 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 2).await;
        world.pause(ACK_WAIT * 2).await;
        expire().await;
        say(&world, &found[0], AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 2).await), []);
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 2) }).await.unwrap();
        assert_eq!(attempts(&arrivals(&mut inbox, 2).await.0), [(2, 2)]);
    }

    a_waiting_pull_outlives_a_reset(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        say(&world, &delivery, AckKind::Ack).await.unwrap();
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
        world.pulled(1).await;
        if world.reset(1).await {
            assert_eq!(attempts(&arrivals(&mut inbox, 1).await.0), [(1, 1)]);
        }
    }

    a_reset_can_leave_messages_out(world: Operated) on model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        one(&world).await;
        if world.reset(3).await {
            assert_eq!(read(&world).await.delivered_stream, 2);
            assert_eq!(attempts(&take(&world, 3).await), [(3, 1)]);
        }
    }

    a_lower_ack_wait_holds_for_messages_that_are_out(world: Operated) on model, real {
        world.set_ack_wait(3 * BOUND).await;
        world.publish(vec![1]).await;
        one(&world).await;
        world.set_ack_wait(ACK_WAIT).await;
        let began = clock::now();
        assert_eq!(one(&world).await.delivery_count, 2);
        assert!(clock::now() - began < 2 * BOUND, "long before the old ack wait");
    }

    a_longer_ack_wait_holds_for_messages_that_are_out(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let began = clock::now();
        one(&world).await;
        world.set_ack_wait(ACK_WAIT * 2).await;
        assert_eq!(comes_after(&world, ACK_WAIT * 2, began).await.delivery_count, 2);
    }

    a_raised_max_ack_pending_lets_messages_pass_at_once(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 2) }).await.unwrap();
        assert_eq!(sequences(&arrivals(&mut inbox, 1).await.0), [1]);
        world.update(|config| config.max_ack_pending = Some(2)).await;
        assert_eq!(sequences(&arrivals(&mut inbox, 1).await.0), [2]);
    }

    a_lowered_max_ack_pending_takes_nothing_back(world: Operated) on model, real {
        for number in 0..4 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 3).await;
        world.update(|config| config.max_ack_pending = Some(2)).await;
        say(&world, &found[0], AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 4).await), [], "two are out");
        say(&world, &found[1], AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 4).await), [(4, 1)]);
    }

    a_lowered_max_deliver_ends_messages_with_their_ack_wait(world: Operated) on model, real {
        world.publish(vec![1]).await;
        for _ in 0..2 {
            let delivery = one(&world).await;
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        assert_eq!(one(&world).await.delivery_count, 3);
        world.update(|config| config.max_deliver = Some(2)).await;
        expire().await;
        // No pull has asked since.
        until_unsettled(&world, 0).await;
    }

    a_raised_max_deliver_does_not_bring_back_what_has_ended(world: Operated) on model, real {
        world.update(|config| config.max_deliver = Some(1)).await;
        world.publish(vec![1]).await;
        one(&world).await;
        expire().await;
        until_unsettled(&world, 0).await;
        world.update(|config| config.max_deliver = Some(5)).await;
        assert_eq!(attempts(&take(&world, 1).await), []);
    }

    a_new_backoff_holds_for_the_next_attempts(world: Operated) on model, real {
        world.publish(vec![1]).await;
        one(&world).await;
        world.update(|config| config.backoff = [1_000, 300].map(millis).to_vec()).await;
        one(&world).await;
        let began = clock::now();
        assert_eq!(comes_after(&world, millis(300), began).await.delivery_count, 3);
    }

    a_new_filter_holds_for_messages_that_were_not_looked_at(world: Operated) on model, real {
        let filter = |subject: &str| format!("{}.{subject}", world.name().stream);
        world.update(|config| config.filter = Some(filter("x"))).await;
        for subject in ["x", "y", "x", "y"] {
            world.publish_to(subject, vec![1]).await;
        }
        let first = one(&world).await;
        world.update(|config| config.filter = Some(filter("y"))).await;
        assert_eq!(read(&world).await.pending, 2);
        assert_eq!(sequences(&take(&world, 4).await), [2, 4], "the third is passed");
        say(&world, &first, AckKind::Nak(None)).await.unwrap();
        assert_eq!(attempts(&take(&world, 4).await), [(1, 2)], "although it does not match now");
        // The last message is passed as soon as a pull has asked.
        world.publish_to("x", vec![5]).await;
        assert_eq!(attempts(&take(&world, 4).await), []);
        world.update(|config| config.filter = None).await;
        assert_eq!(attempts(&take(&world, 4).await), [], "neither is looked at again");
    }
}
