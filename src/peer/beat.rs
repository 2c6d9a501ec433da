//! What each replica says of itself once a second, and hears of the others: who is there, with which
//! keys, names and room. Decides nothing about them; that is the roster's.

use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use tokio::time::sleep;

use super::{BEAT, PREFIX, Peers, nonce, roster::Said};
use crate::{
    broker::Broker,
    bus::Bus,
    clock,
    pb::peer::v1 as pb,
    token::{InstanceId, KeyId},
};

/// Who is new has heard of everybody after this: they answer its first beat by one of theirs.
const MEETING: Duration = Duration::from_millis(250);
/// Keys of another replica that are looked at.
const MOST_KEYS: usize = 64;

impl<B: Broker + Bus> Peers<B> {
    /// Makes itself known to those that are there, and waits until they have made themselves known.
    pub async fn meet(&self) {
        // First of all it has to listen.
        sleep(MEETING / 5).await;
        self.beat().await;
        sleep(MEETING).await;
    }

    pub(super) async fn beat(&self) {
        let (said, subject) = (self.said(), self.beat_subject());
        let Ok(nonce) = nonce() else { return };
        let instance = Bytes::copy_from_slice(&self.us.0);
        let keys: Vec<Bytes> = said.keys.iter().map(|key| Bytes::copy_from_slice(key)).collect();
        let body = pb::BeatBody {
            instance: instance.clone(),
            keys: keys.clone(),
            names: said.names.iter().map(|name| Bytes::copy_from_slice(&name.0)).collect(),
            version: said.version,
            room: said.room,
            draining: said.draining,
        };
        let body = self.keys.sealer().seal_frame(&subject, &body.encode_to_vec(), nonce).into();
        let beat = pb::Beat { instance, keys, started: said.started, body };
        let until = clock::now() + BEAT;
        self.lessor.broker().tell(&subject, beat.encode_to_vec().into(), until).await;
    }

    fn said(&self) -> Said {
        Said {
            names: self.names().answered(),
            keys: self.key_ids(),
            started: self.started.0,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            room: u64::from(self.lessor.room()),
            draining: self.lessor.is_draining(),
        }
    }

    pub(super) fn heard_beat(&self, message: &[u8]) {
        let Ok(beat) = pb::Beat::decode(message) else { return };
        let body = self.keys.sealer().open_frame(&self.beat_subject(), &beat.body).ok();
        let body = body.and_then(|body| pb::BeatBody::decode(&*body).ok());
        let Some((from, said)) = read(beat, body) else { return };
        if from == self.us {
            return;
        }
        let now = clock::now();
        let mut roster = self.roster();
        let version = said.version.clone();
        if roster.hear(from, said, now) {
            tracing::info!(replica = %from, version, "a replica is heard of");
            // It wants to know of us, too.
            self.speak.notify_one();
        }
        let common = roster.common_keys(&self.key_ids(), now);
        drop(roster);
        self.keys.common(common);
    }

    pub(super) fn beat_subject(&self) -> String {
        format!("{PREFIX}{}.beat", self.cluster)
    }
}

/// What a beat says. A body that we cannot open is believed for nothing but that there is somebody.
fn read(beat: pb::Beat, body: Option<pb::BeatBody>) -> Option<(InstanceId, Said)> {
    let id = |bytes: &Bytes| Some(InstanceId(bytes.as_ref().try_into().ok()?));
    let key = |bytes: &Bytes| KeyId::try_from(bytes.as_ref()).ok();
    let from = id(&beat.instance)?;
    let body = body.filter(|body| body.instance == beat.instance);
    let keys = body.as_ref().map_or(&beat.keys, |body| &body.keys).iter().take(MOST_KEYS);
    let said = Said {
        keys: keys.filter_map(key).collect(),
        started: beat.started,
        names: body.iter().flat_map(|body| &body.names).filter_map(id).collect(),
        room: body.as_ref().map_or(0, |body| body.room),
        draining: body.as_ref().is_none_or(|body| body.draining),
        version: body.map(|body| body.version).unwrap_or_default(),
    };
    Some((from, said))
}
