//! Promises about settlements, and the attempts that follow.

use fetch_proxy::{
    broker::{AckKind, AckPublish, Broker, BrokerError, Confirmation, Delivery, Inbox},
    clock,
};

use super::{
    client::{arrivals, attempts, expire, millis, one, open, pull, say, take, unsettled, until},
    worlds::{ACK_WAIT, World},
};

contract! {
    ack_and_term_end_a_message(world: World) on fake, model, real {
        for kind in [AckKind::Ack, AckKind::Term("no".into())] {
            world.publish(vec![1]).await;
            let delivery = one(&world).await;
            say(&world, &delivery, kind).await.unwrap();
            assert_eq!(unsettled(&world).await, 0);
        }
    }

    nak_brings_a_message_back_at_once_or_after_its_delay(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let first = one(&world).await;
        say(&world, &first, AckKind::Nak(None)).await.unwrap();
        let second = one(&world).await;
        assert_eq!((second.stream_sequence, second.delivery_count), (1, 2));
        let began = clock::now();
        say(&world, &second, AckKind::Nak(Some(millis(500)))).await.unwrap();
        let third = one(&world).await;
        assert_eq!(third.delivery_count, 3);
        assert!(clock::now() - began >= millis(450));
    }

    progress_restarts_the_ack_wait(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        let received = clock::now();
        tokio::time::sleep(ACK_WAIT / 2).await;
        say(&world, &delivery, AckKind::Progress).await.unwrap();
        assert_eq!(one(&world).await.delivery_count, 2);
        assert!(clock::now() - received >= ACK_WAIT * 14 / 10);
    }

    late_settlement_never_leaves(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        let order = |by| AckPublish { ack: delivery.ack.clone(), kind: AckKind::Ack, confirm_group: None, by: Some(by) };
        for confirmation in [Confirmation::Confirmed, Confirmation::Sent] {
            let results = world.broker().settle(vec![order(clock::now())], confirmation, until()).await;
            assert!(matches!(results[..], [Err(BrokerError::Unsent(_))]), "{results:?}");
        }
        assert_eq!(unsettled(&world).await, 1);
        let results = world.broker().settle(vec![order(until())], Confirmation::Confirmed, until()).await;
        assert_eq!(results, [Ok(())]);
        assert_eq!(unsettled(&world).await, 0);
    }

    results_keep_the_order_of_their_publishes(world: World) on fake, model, real {
        for number in 0..50 {
            world.publish(vec![number]).await;
        }
        let mut inbox = open(&world).await;
        inbox.pull(pull(1, 50)).await.unwrap();
        let (found, _) = arrivals(&mut inbox, 50).await;
        for (confirmation, half) in [Confirmation::Confirmed, Confirmation::Sent].into_iter().zip(found.chunks(25)) {
            let order = |one: &Delivery| AckPublish { ack: one.ack.clone(), kind: AckKind::Ack, confirm_group: None, by: None };
            let orders = half.iter().map(order).collect();
            let results = world.broker().settle(orders, confirmation, until()).await;
            assert_eq!(results, vec![Ok(()); 25]);
        }
        testkit::eventually("all to be settled", || async {
            (unsettled(&world).await == 0).then_some(())
        })
        .await;
    }

    publishes_of_one_group_are_applied_when_the_last_is_answered(world: World) on fake, model, real {
        for round in 0..20_u64 {
            for number in 0..100 {
                world.publish(vec![number]).await;
            }
            let mut inbox = open(&world).await;
            let mut found = Vec::new();
            while found.len() < 100 {
                inbox.pull(pull(1 + found.len() as u64, 100 - found.len() as u32)).await.unwrap();
                found.extend(arrivals(&mut inbox, 100 - found.len()).await.0);
            }
            let order = |(place, one): (usize, &Delivery)| {
                let kind = if place % 2 == 0 { AckKind::Ack } else { AckKind::Term("no".into()) };
                AckPublish { ack: one.ack.clone(), kind, confirm_group: Some(7), by: None }
            };
            let orders = found.iter().enumerate().map(order).collect();
            let results = world.broker().settle(orders, Confirmation::Confirmed, until()).await;
            assert_eq!(results, vec![Ok(()); 100]);
            // At once, and not eventually.
            assert_eq!(unsettled(&world).await, 0, "round {round}");
        }
    }

    a_settled_message_can_be_settled_again(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        for kind in [AckKind::Ack, AckKind::Ack, AckKind::Term("no".into()), AckKind::Progress] {
            assert_eq!(say(&world, &delivery, kind).await, Ok(()), "a success, whatever it did");
        }
        // Not even these bring it back.
        for delay in [None, Some(millis(1))] {
            assert_eq!(say(&world, &delivery, AckKind::Nak(delay)).await, Ok(()));
        }
        assert_eq!(unsettled(&world).await, 0);
        assert_eq!(attempts(&take(&world, 1).await), []);
    }

    a_message_that_is_nacked_twice_comes_back_once(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        for _ in 0..2 {
            say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        }
        assert_eq!(attempts(&take(&world, 2).await), [(1, 2)]);
    }

    an_ack_after_a_nak_ends_the_message(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        say(&world, &delivery, AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 1).await), []);
        assert_eq!(unsettled(&world).await, 0);
    }

    a_delay_takes_a_nacked_message_back_out_of_the_line(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        say(&world, &delivery, AckKind::Nak(None)).await.unwrap();
        say(&world, &delivery, AckKind::Nak(Some(millis(800)))).await.unwrap();
        let began = clock::now();
        assert_eq!(attempts(&take(&world, 1).await), []);
        assert_eq!(one(&world).await.delivery_count, 2);
        assert!(clock::now() - began >= millis(700));
    }

    progress_after_the_ack_wait_does_not_help(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        expire().await;
        say(&world, &delivery, AckKind::Progress).await.unwrap();
        assert_eq!(attempts(&take(&world, 1).await), [(1, 2)], "it was in line already");
    }

    an_ack_after_the_ack_wait_ends_the_message(world: World) on fake, model, real {
        world.publish(vec![1]).await;
        let delivery = one(&world).await;
        expire().await;
        say(&world, &delivery, AckKind::Ack).await.unwrap();
        assert_eq!(attempts(&take(&world, 1).await), []);
    }
}

#[tokio::test]
async fn real_broker_leaves_no_task_behind() {
    let world = super::worlds::real().await;
    world.broker().close(until()).await;
    world.tasks.close();
    tokio::time::timeout(testkit::BOUND, world.tasks.wait()).await.expect("a task continues");
}
