//! Promises about messages that leave their stream: deleted, purged, or too old.

use fetch_proxy::broker::{AckKind, Inbox, PullRequest};
use testkit::BOUND;

use super::{
    client::{
        arrivals, attempts, expire, millis, one, open, pull, read, say, take, until_unsettled,
    },
    worlds::Operated,
};

contract! {
    a_deleted_message_is_settled_and_its_ack_is_a_success(world: Operated) on model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        world.remove(1).await;
        until_unsettled(&world, 0).await;
        assert_eq!(say(&world, &delivery, AckKind::Ack).await, Ok(()));
        expire().await;
        assert_eq!(attempts(&take(&world, 1).await), []);
    }

    a_message_that_is_deleted_while_it_waits_to_come_back_does_not(world: Operated) on model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        for delivery in take(&world, 2).await {
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        world.remove(1).await;
        assert_eq!(attempts(&take(&world, 3).await), [(2, 2), (3, 1)]);
    }

    a_deleted_message_makes_room_at_max_ack_pending(world: Operated) on model, real {
        world.update(|config| config.max_ack_pending = Some(1)).await;
        for number in 0..2 {
            world.publish(vec![number]).await;
        }
        one(&world).await;
        let mut inbox = open(&world).await;
        inbox.pull(PullRequest { expires: BOUND, ..pull(1, 1) }).await.unwrap();
        world.pulled(1).await;
        world.remove(1).await;
        assert_eq!(attempts(&arrivals(&mut inbox, 1).await.0), [(2, 1)]);
    }

    a_purge_settles_everything_and_new_messages_follow(world: Operated) on model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        let found = take(&world, 2).await;
        world.purge(4).await;
        until_unsettled(&world, 0).await;
        assert_eq!(read(&world).await.pending, 0);
        assert_eq!(say(&world, &found[0], AckKind::Nak(None)).await, Ok(()));
        world.publish(vec![4]).await;
        assert_eq!(attempts(&take(&world, 3).await), [(4, 1)]);
    }

    a_purge_of_some_messages_leaves_the_others_to_their_ack_wait(world: Operated) on model, real {
        for number in 0..3 {
            world.publish(vec![number]).await;
        }
        for delivery in take(&world, 3).await {
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        world.purge(2).await;
        until_unsettled(&world, 2).await;
        assert_eq!(attempts(&take(&world, 3).await), [], "the Naks are forgotten");
        expire().await;
        assert_eq!(attempts(&take(&world, 3).await), [(2, 2), (3, 2)]);
    }

    a_message_that_is_too_old_is_neither_delivered_nor_counted(world: Operated) on model, real {
        world.publish(vec![1]).await;
        one(&world).await;
        world.set_max_age(millis(1_500)).await;
        world.publish(vec![2]).await;
        until_unsettled(&world, 0).await;
        testkit::eventually("a message to be too old", || async {
            (read(&world).await.pending == 0).then_some(())
        })
        .await;
        assert_eq!(attempts(&take(&world, 2).await), []);
        world.publish(vec![3]).await;
        assert_eq!(attempts(&take(&world, 2).await), [(3, 1)]);
    }
}
