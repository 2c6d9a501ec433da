//! What each replica says of itself once a second, and hears of the others: who is there, with which
//! keys, names and room. Decides nothing about them; that is the roster's.

use std::{collections::BTreeSet, time::Duration};

use bytes::Bytes;
use prost::Message as _;
use tokio::time::sleep;

use super::{
    HEARTBEAT_INTERVAL, Peers, SUBJECT_PREFIX,
    members::{Claimed, Heard, PeerStatus, Tenure},
    nonce,
};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    pb::peer::v1 as pb,
    token::{self, InstanceId, KeyId},
};

/// Who is new has heard of everybody after this: they answer its first beat by one of theirs.
const ANNOUNCE_TIME: Duration = Duration::from_millis(250);
/// Keys of another replica that are looked at.
const MOST_KEYS: usize = 64;
/// Replicas whose clocks another replica doubts, that are looked at.
const MOST_DOUBTED: usize = 64;
/// Characters of another replica's name and version that are kept: a name of a pod has 63, and so has
/// that of its host.
const MAX_LABEL_CHARS: usize = 160;

impl<B: Broker + Bus> Peers<B> {
    /// Makes itself known to those that are there, and waits until they have made themselves known.
    pub async fn meet(&self) {
        // First of all it has to listen.
        sleep(ANNOUNCE_TIME / 5).await;
        self.beat().await;
        sleep(ANNOUNCE_TIME).await;
    }

    pub(super) async fn beat(&self) {
        let subject = self.beat_subject();
        let Ok(nonce) = nonce() else { return };
        let instance = Bytes::copy_from_slice(&self.us.0);
        let key_ids = self.key_ids();
        let keys: Vec<Bytes> = key_ids.iter().map(|key| Bytes::copy_from_slice(key)).collect();
        let (tenure, draining) = (self.service().tenure(&key_ids), self.lessor.is_draining());
        // To strangers a replica that leaves is as good as gone.
        let outside = if draining { Tenure::Waiting } else { tenure };
        let names = self.names().answered();
        let mut body = pb::BeatBody {
            instance: instance.clone(),
            keys: keys.clone(),
            names: names.iter().map(|name| Bytes::copy_from_slice(&name.0)).collect(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            room: u64::from(self.lessor.room()),
            draining,
            tenure: told(tenure).into(),
            name: self.name.clone(),
            echoes: self.echoes(),
            doubted: self.doubted(),
            ..pb::BeatBody::default()
        };
        // Last of all: the way is as long as it takes from here.
        (body.uptime, body.sent) = self.stamp();
        let body = self.keys.sealer().seal_frame(&subject, &body.encode_to_vec(), nonce).into();
        let beat = pb::Beat {
            instance,
            keys,
            // Version 0.1 yields to strangers that are older by this; who does not serve is not.
            started: if outside == Tenure::Waiting { u64::MAX } else { self.started.0 },
            body,
            keyless: !self.keys.shared(),
            tenure: told(outside).into(),
            name: self.name.clone(),
        };
        let until = clock::now() + HEARTBEAT_INTERVAL;
        self.lessor.broker().publish(&subject, beat.encode_to_vec().into(), until).await;
    }

    pub(super) fn heard_beat(&self, message: &[u8]) {
        let Ok(beat) = pb::Beat::decode(message) else { return };
        let Some(from) = id(&beat.instance).filter(|from| *from != self.us) else { return };
        let now = clock::now();
        let Ok(body) = self.keys.sealer().open_frame(&self.beat_subject(), &beat.body) else {
            let new = claimed(&beat)
                .is_some_and(|claimed| self.members().hear_stranger(from, claimed, now));
            if new {
                // It may be one of ours that seals with a key that we do not have yet.
                self.speak.notify_one();
            }
            return;
        };
        let body = pb::BeatBody::decode(&*body).ok();
        let Some(body) = body.filter(|body| body.instance == beat.instance) else { return };
        let said = said(&body);
        let heard = self.members().hear(from, said.clone(), now);
        if heard == Heard::Old {
            return;
        }
        self.compare_clocks(from, &body, &said);
        if heard == Heard::New {
            let PeerStatus { name, version, .. } = said;
            tracing::info!(replica = %from, name, version, "a replica was found");
            // It wants to know of us, too.
            self.speak.notify_one();
        }
        let members = self.members();
        let common = members.common_keys(&self.key_ids(), now);
        drop(members);
        self.keys.common(common);
    }

    pub(super) fn beat_subject(&self) -> String {
        format!("{SUBJECT_PREFIX}{}.beat", self.cluster)
    }
}

/// What a beat says that was sealed with a key of ours.
fn said(body: &pb::BeatBody) -> PeerStatus {
    let tenure = tenure(body.tenure());
    PeerStatus {
        keys: keys(&body.keys),
        names: body.names.iter().filter_map(id).collect(),
        tenure,
        version: legible(&body.version),
        name: legible(&body.name),
        room: body.room,
        draining: body.draining,
        uptime: body.uptime,
        doubted: body.doubted.iter().take(MOST_DOUBTED).filter_map(id).collect(),
    }
}

/// What a beat says that was not. `None`: no replica says that, of whatever version: each seals, and
/// with one of its keys.
fn claimed(beat: &pb::Beat) -> Option<Claimed> {
    let keys = keys(&beat.keys);
    let sealed_with = token::key_of_frame(&beat.body)?;
    let tenure = tenure(beat.tenure());
    let name = legible(&beat.name);
    keys.contains(&sealed_with).then_some(Claimed { keys, keyless: beat.keyless, tenure, name })
}

fn id(bytes: &Bytes) -> Option<InstanceId> {
    Some(InstanceId(bytes.as_ref().try_into().ok()?))
}

fn keys(keys: &[Bytes]) -> BTreeSet<KeyId> {
    keys.iter().take(MOST_KEYS).filter_map(|key| key.as_ref().try_into().ok()).collect()
}

/// One that does not say it has served as long as it likes: older replicas went by that.
fn tenure(tenure: pb::Tenure) -> Tenure {
    match tenure {
        pb::Tenure::Waiting => Tenure::Waiting,
        pb::Tenure::Serving => Tenure::Serving,
        pb::Tenure::Unspecified | pb::Tenure::Established => Tenure::Established,
    }
}

fn told(tenure: Tenure) -> pb::Tenure {
    match tenure {
        Tenure::Waiting => pb::Tenure::Waiting,
        Tenure::Serving => pb::Tenure::Serving,
        Tenure::Established => pb::Tenure::Established,
    }
}

/// What somebody else wrote, fit for a line of the log.
fn legible(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_LABEL_CHARS).collect()
}
