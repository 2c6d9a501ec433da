//! Promises about the message of a delivery that is read again.

use fetch_proxy::broker::Broker;

use super::{
    client::{one, take, until},
    worlds::{Operated, World},
};

contract! {
    each_delivery_is_read_again_as_it_came(world: World) on fake, model, real {
        for number in 0..20 {
            world.publish(vec![number; usize::from(number) * 100]).await;
        }
        let came = take(&world, 20).await;
        let acks: Vec<_> = came.iter().rev().map(|delivery| delivery.ack.clone()).collect();
        let again = world.broker().read_again(&acks, until()).await.unwrap();
        assert_eq!(again, came.into_iter().rev().map(Some).collect::<Vec<_>>());
        assert_eq!(world.broker().read_again(&[], until()).await, Ok(Vec::new()));
    }

    message_that_left_its_stream_is_read_as_none(world: Operated) on model, real {
        world.publish(vec![1]).await;
        world.publish(vec![2]).await;
        let came = take(&world, 2).await;
        world.remove(1).await;
        let acks: Vec<_> = came.iter().map(|delivery| delivery.ack.clone()).collect();
        let again = world.broker().read_again(&acks, until()).await.unwrap();
        assert_eq!(again, [None, Some(came[1].clone())]);
    }

    later_attempt_is_read_with_its_own_count(world: World) on fake, model, real {
        world.publish(vec![7]).await;
        let first = one(&world).await;
        let second = one(&world).await;
        assert_eq!(second.delivery_count, 2);
        let acks = [second.ack.clone(), first.ack.clone()];
        let again = world.broker().read_again(&acks, until()).await.unwrap();
        assert_eq!(again, [Some(second), Some(first)]);
    }
}
