//! The policy of all replicas, in a run in which it changes. Clients have no credential, so they are all one
//! principal. A right is lost and given back for one consumer.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use fetch_proxy::broker::ConsumerName;
use tokio::time::sleep;

use super::{
    plan::{Accident, Plan},
    replica::Replica,
    watch::Trouble,
    world::World,
};

/// Accidents that take rights away, by the consumer.
#[derive(Debug, Default)]
pub struct Denials(BTreeMap<ConsumerName, usize>);

impl Denials {
    fn names(&self) -> Vec<ConsumerName> {
        self.0.keys().cloned().collect()
    }

    fn begin(&mut self, name: &ConsumerName) {
        *self.0.entry(name.clone()).or_default() += 1;
    }

    fn end(&mut self, name: &ConsumerName) {
        if let Some(count) = self.0.get_mut(name) {
            *count -= 1;
        }
        self.0.retain(|_, count| *count > 0);
    }
}

/// Whether replicas have a policy at all.
fn is_used(plan: &Plan) -> bool {
    plan.accidents.iter().any(|planned| matches!(planned.what, Accident::Policy { .. }))
}

/// A replica reads the policy as it is now.
pub fn read(world: &World, replica: &Replica) {
    if !is_used(&world.plan) {
        return;
    }
    let denied = world.denials.lock().unwrap().names();
    let mut text = "version: 1\n\
                    authenticate: {anonymous: true}\n\
                    principals: [{name: anonymous, match: [anonymous]}]\n\
                    rules:\n\
                    - {principals: ['*'], streams: [none], consumers: [none], verbs: [work]}\n"
        .to_owned();
    let names = (0..world.plan.consumers.len()).map(|consumer| world.name(consumer));
    for ConsumerName { stream, consumer } in names.filter(|name| !denied.contains(name)) {
        text += &format!(
            "- {{principals: [anonymous], streams: [{stream}], consumers: [{consumer}], verbs: [work]}}\n"
        );
    }
    replica.machine.sync(|| replica.gatekeeper.retake(text)).unwrap();
    world.watch().denied(replica.side, &denied, world.net.now());
}

/// An operator takes all rights at a consumer away, and gives them back.
pub async fn change(world: &Arc<World>, consumer: usize, pause: Duration, lasts: Duration) {
    let name = world.name(consumer);
    let turns = u32::try_from(2 * world.plan.replicas.len()).unwrap();
    world.trouble_of(&name, Trouble::Denied, lasts + pause * turns);
    world.denials.lock().unwrap().begin(&name);
    read_in_turn(world, pause).await;
    sleep(lasts).await;
    world.denials.lock().unwrap().end(&name);
    // A suspension may have taken a part of the time.
    world.trouble_of(&name, Trouble::Denied, pause * turns);
    read_in_turn(world, pause).await;
}

async fn read_in_turn(world: &Arc<World>, pause: Duration) {
    for place in 0..world.plan.replicas.len() {
        sleep(pause).await;
        read(world, &world.replica(place));
    }
}
