//! Makes the accidents of NATS servers happen, each from its begin to its end.

use std::{sync::Arc, time::Duration};

use tokio::time::sleep;

use super::{
    net::Node,
    plan::Outage,
    signs::Sign,
    watch::Trouble,
    world::{NOTICED, World},
};

pub async fn happen(world: &Arc<World>, what: Outage) {
    let net = &world.net;
    let millis = Duration::from_millis;
    let until = |length: u64| net.now() + millis(length);
    troubles(world, what);
    match what {
        Outage::RestartOne { server, how, away, forgets } => {
            net.accident(|network| network.stop_server(server, how));
            sleep(millis(away)).await;
            net.accident(|network| network.start_server(server, millis(forgets)));
            world.sign(Sign::Leader, None);
        }
        Outage::PartServers { one, other, millis: length } => {
            let until = until(length);
            net.accident(|network| {
                network.part(Node::Server(one), Node::Server(other), until);
            });
            sleep(millis(length)).await;
        }
        Outage::PartFromOthers { server, millis: length } => {
            let until = until(length);
            net.accident(|network| network.part_from_servers(server, until));
            sleep(millis(length)).await;
        }
        Outage::PartReplica { replica, server, millis: length } => {
            let (side, until) = (world.replica(replica).side, until(length));
            net.accident(|network| {
                network.part(Node::Replica(side), Node::Server(server), until);
            });
            sleep(millis(length)).await;
        }
        Outage::CutRoute { one, other, millis: length } => {
            let until = until(length);
            net.accident(|network| network.cut_route(one, other, until));
            sleep(millis(length)).await;
        }
        Outage::StallRoute { from, to, millis: length } => {
            let until = until(length);
            net.accident(|network| network.stall_route(from, to, until));
            sleep(millis(length)).await;
        }
        Outage::Refuse { right, millis: length } => {
            net.accident(|network| network.refuse(right));
            sleep(millis(length)).await;
            net.accident(|network| network.grant(right));
            world.watch().right_is_back();
        }
    }
}

/// What the checks know of it. An outage of servers can concern every replica. The servers themselves say when
/// a consumer gets another leader.
fn troubles(world: &Arc<World>, what: Outage) {
    let millis = Duration::from_millis;
    let of_all = |length: u64| world.outage(millis(length) + NOTICED);
    match what {
        Outage::RestartOne { away, .. } => {
            of_all(away);
            world.trouble(Trouble::LeaderAway, millis(away));
            for (consumer, plan) in world.plan.consumers.iter().enumerate() {
                if plan.copies == 1 {
                    world.trouble_of(&world.name(consumer), Trouble::Restarted, millis(away));
                }
            }
        }
        Outage::PartServers { millis: length, .. }
        | Outage::PartFromOthers { millis: length, .. }
        | Outage::CutRoute { millis: length, .. }
        | Outage::StallRoute { millis: length, .. } => of_all(length),
        Outage::PartReplica { replica, millis: length, .. } => {
            let side = world.replica(replica).side;
            world.trouble(Trouble::Wire { side }, millis(length) + NOTICED);
        }
        Outage::Refuse { millis: length, .. } => {
            world.trouble(Trouble::Refused, millis(length) + NOTICED);
        }
    }
}
