//! A replica whose time of day is not ours: `settle_by` in its tokens is by its own clock, so what
//! it leaves behind is not settled without it.

use std::{sync::Arc, time::Duration};

use fetch_proxy::{
    bus::Incoming,
    clock,
    cluster::OpenedToken,
    keys::Keys,
    lessor::{Action, Error, Settled},
    pb::peer::v1 as wire,
    token::{Claims, InstanceId, new_key_line},
};
use prost::Message as _;
use tempfile::NamedTempFile;
use testkit::{
    BOUND,
    fake_broker::{FakeBroker, info},
};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::linked::{Member, Net, PATIENCE};

const BEAT: &str = "_fetchproxy.linked.beat";

/// A replica of a version of its own, with a clock that is ahead of ours by so many milliseconds. It
/// only beats.
struct Other {
    us: InstanceId,
    keys: Arc<Keys>,
    net: Net,
    heard: UnboundedReceiver<Incoming>,
    ahead: i64,
    beats: u8,
    /// Replicas whose clocks it doubts.
    doubted: Vec<InstanceId>,
}

impl Other {
    fn new(net: &Net, keys: &NamedTempFile, ahead: i64) -> Self {
        let us = InstanceId::random().unwrap();
        let heard = net.overhear(us, BEAT);
        let keys = Arc::new(Keys::load(Some(keys.path().to_owned()), "linked").unwrap());
        Self { us, keys, net: net.clone(), heard, ahead, beats: 0, doubted: Vec::new() }
    }

    /// Hears the last beat of that one, and says one of its own.
    async fn beat(&mut self, to: &Member, echo: bool) {
        let mut echoes = Vec::new();
        while let Ok(heard) = self.heard.try_recv() {
            let beat = wire::Beat::decode(&*heard.message).unwrap();
            let (_, body) = self.keys.sealer().open_frame(BEAT, &beat.body).unwrap();
            let body = wire::BeatBody::decode(&*body).unwrap();
            assert!(body.uptime > 0 && body.sent > 0);
            if echo && beat.instance == to.us.0.as_slice() {
                let (instance, uptime) = (beat.instance, body.uptime);
                echoes = vec![wire::Echo { instance, uptime, held: 0 }];
            }
        }
        self.beats += 1;
        let sent = u64::try_from(clock::unix_time().as_micros()).unwrap();
        let name = |id: &InstanceId| id.0.to_vec().into();
        let keys: Vec<_> =
            self.keys.sealer().ring().ids().iter().map(|id| id.to_vec().into()).collect();
        let body = wire::BeatBody {
            instance: name(&self.us),
            keys: keys.clone(),
            uptime: u64::from(self.beats),
            sent: sent.checked_add_signed(self.ahead * 1000).unwrap(),
            echoes,
            doubted: self.doubted.iter().map(name).collect(),
            ..wire::BeatBody::default()
        };
        let body = self.keys.sealer().seal_frame(BEAT, &body.encode_to_vec(), [self.beats; 24]);
        let (instance, body) = (name(&self.us), body.into());
        let beat = wire::Beat { instance, keys, body, ..wire::Beat::default() };
        self.net.say(BEAT, &beat.encode_to_vec().into());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A token of that replica for a lease that ends in so many seconds by its clock, acked without it.
async fn ack_orphan(
    member: &Member,
    owner: InstanceId,
    ends_in: i64,
    ahead: i64,
) -> Option<Result<Settled, Error>> {
    let now = i64::try_from(clock::unix_time().as_millis()).unwrap();
    let claims = Claims {
        owner,
        lease: 1,
        settle_by: u64::try_from(now + ahead + ends_in * 1000).unwrap(),
        leader: 1,
        created: "first".into(),
        ack_subject: "$JS.ACK.S.worker.1.1.1.1.0".into(),
        principal: "anonymous".into(),
        span: None,
    };
    let tokens = vec![OpenedToken { claims, action: Action::Ack, by: None }];
    member.cluster.settle_ownerless(tokens, clock::now() + BOUND).await.remove(0)
}

async fn one() -> (Net, NamedTempFile, FakeBroker, Member) {
    let (net, keys) = Net::new(&new_key_line().unwrap());
    let broker = FakeBroker::new(info(Duration::from_secs(60)));
    let member = Member::join(&net, &keys, &broker, 10).await;
    (net, keys, broker, member)
}

fn is_done(result: &Option<Result<Settled, Error>>) -> bool {
    matches!(result, Some(Ok(Settled::Done { .. })))
}

#[tokio::test(start_paused = true)]
async fn leases_of_an_owner_with_a_wrong_clock_need_the_owner() {
    for ahead in [10_000, -10_000] {
        let (net, keys, broker, member) = one().await;
        let mut owner = Other::new(&net, &keys, ahead);
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            owner.beat(&member, true).await;
        }
        // It is gone, and its tokens are not.
        tokio::time::sleep(PATIENCE).await;
        let told = ack_orphan(&member, owner.us, 30, ahead).await;
        assert!(told.is_none(), "{ahead}: {told:?}");
        assert_eq!(broker.published(), [], "{ahead}");
        let told = ack_orphan(&member, owner.us, -60, ahead).await;
        assert!(matches!(told, Some(Err(Error::LeaseExpired { .. }))), "{ahead}: {told:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn fast_clock_of_an_owner_is_found_without_an_echo() {
    let (net, keys, broker, member) = one().await;
    let mut owner = Other::new(&net, &keys, 10_000);
    owner.beat(&member, false).await;
    assert!(ack_orphan(&member, owner.us, 30, 10_000).await.is_none());
    assert_eq!(broker.published(), []);
}

#[tokio::test(start_paused = true)]
async fn leases_of_a_dead_owner_with_a_right_clock_are_settled() {
    let (net, keys, broker, member) = one().await;
    let mut owner = Other::new(&net, &keys, 100);
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_secs(1)).await;
        owner.beat(&member, true).await;
    }
    tokio::time::sleep(PATIENCE).await;
    let told = ack_orphan(&member, owner.us, 30, 100).await;
    assert!(is_done(&told), "{told:?}");
    // Nor of one that was never heard, or does not say the time.
    let unknown = InstanceId::random().unwrap();
    assert!(is_done(&ack_orphan(&member, unknown, 30, 0).await));
    assert_eq!(broker.published().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn new_replica_learns_a_dead_owner_s_clock_from_others() {
    let (net, keys, broker, member) = one().await;
    let gone = InstanceId::random().unwrap();
    let mut witness = Other::new(&net, &keys, 0);
    witness.doubted = vec![gone];
    witness.beat(&member, true).await;
    assert!(ack_orphan(&member, gone, 30, 10_000).await.is_none());
    // The word of one whose own clock is off counts for nothing.
    let mut liar = Other::new(&net, &keys, 20_000);
    let fine = InstanceId::random().unwrap();
    liar.doubted = vec![fine];
    liar.beat(&member, true).await;
    assert!(is_done(&ack_orphan(&member, fine, 30, 0).await));
    assert_eq!(broker.published().len(), 1);
    // And it is passed on.
    let told = liar.us;
    let mut other = Other::new(&net, &keys, 0);
    tokio::time::sleep(Duration::from_secs(2)).await;
    let mut doubted = Vec::new();
    while let Ok(heard) = other.heard.try_recv() {
        let beat = wire::Beat::decode(&*heard.message).unwrap();
        let (_, body) = other.keys.sealer().open_frame(BEAT, &beat.body).unwrap();
        doubted.extend(wire::BeatBody::decode(&*body).unwrap().doubted);
    }
    assert!(doubted.iter().any(|id| *id == told.0.as_slice()), "{doubted:?}");
}
