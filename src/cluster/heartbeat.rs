//! The heartbeat of a replica, as it is sent once a second: what is written into it, and what is read
//! out of the heartbeat of another replica. Decides nothing. Pure.

use std::collections::BTreeSet;

use bytes::Bytes;

use super::{
    agreement::ObeyedPolicy,
    members::{Claimed, PeerStatus, Tenure},
};
use crate::{
    pb::peer::v1 as pb,
    token::{self, InstanceId, KeyId},
};

/// Keys of another replica that are read.
const MOST_KEYS: usize = 64;
/// Replicas whose clocks another replica doubts, that are read.
const MOST_DOUBTED: usize = 64;
/// Characters of another replica's name and version that are kept. The name of a pod has at most 63,
/// and so has the name of its host.
const MAX_LABEL_CHARS: usize = 160;

/// The part of a heartbeat that was sealed with a key of this replica.
pub(super) fn status(body: &pb::BeatBody) -> PeerStatus {
    PeerStatus {
        keys: key_ids(&body.keys),
        names: body.names.iter().filter_map(instance).collect(),
        tenure: tenure(body.tenure()),
        version: legible(&body.version),
        name: legible(&body.name),
        room: body.room,
        draining: body.draining,
        counts: [body.leases, body.waiters, body.consumers],
        uptime: body.uptime,
        policy: ObeyedPolicy::read(body.policy.as_ref()),
        doubted: body.doubted.iter().take(MOST_DOUBTED).filter_map(instance).collect(),
    }
}

/// The part of a heartbeat that is in the clear. `None`: no version of a replica sends it like this,
/// because each seals its heartbeat with one of its keys.
pub(super) fn claimed(beat: &pb::Beat) -> Option<Claimed> {
    let keys = key_ids(&beat.keys);
    let sealed_with = token::key_of_frame(&beat.body)?;
    let (tenure, name) = (tenure(beat.tenure()), legible(&beat.name));
    keys.contains(&sealed_with).then_some(Claimed { keys, keyless: beat.keyless, tenure, name })
}

/// The identifier of a replica: 8 bytes.
pub(super) fn instance(bytes: &Bytes) -> Option<InstanceId> {
    Some(InstanceId(bytes.as_ref().try_into().ok()?))
}

pub(super) fn instance_bytes(id: &InstanceId) -> Bytes {
    Bytes::copy_from_slice(&id.0)
}

pub(super) fn tenure_to_wire(tenure: Tenure) -> pb::Tenure {
    match tenure {
        Tenure::Waiting => pb::Tenure::Waiting,
        Tenure::Serving => pb::Tenure::Serving,
        Tenure::Established => pb::Tenure::Established,
    }
}

fn key_ids(keys: &[Bytes]) -> BTreeSet<KeyId> {
    keys.iter().take(MOST_KEYS).filter_map(|key| key.as_ref().try_into().ok()).collect()
}

/// A replica whose version does not send its tenure counts as established.
fn tenure(tenure: pb::Tenure) -> Tenure {
    match tenure {
        pb::Tenure::Waiting => Tenure::Waiting,
        pb::Tenure::Serving => Tenure::Serving,
        pb::Tenure::Unspecified | pb::Tenure::Established => Tenure::Established,
    }
}

/// Text of another replica, fit for a line of the log.
fn legible(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_LABEL_CHARS).collect()
}
