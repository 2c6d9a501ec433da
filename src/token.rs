//! Tokens: the names of leases outside this process. A token is sealed. Its holder can read nothing in it,
//! and nobody can make or change a token without the key. Frames between replicas are sealed in the same
//! way. Pure: the caller passes the nonces in.
//!
//! ```text
//!  base64url( version 1 │ key id 4 │ nonce 24 │ XChaCha20-Poly1305( claims ) │ tag 16 )
//!  associated data: version, cluster
//!  claims: owner 8 │ lease 8 │ settle_by 8 │ leader 8 │ created, ack subject, principal: each length 2, text
//!          │ tail: any number of fields, each tag 1 │ length 1 │ bytes
//! ```
//! The tail is for fields that later versions add. A replica skips a field that it does not know, so a token
//! of a later version is opened during a rolling update. Tag 1 is the span of the Fetch, 25 bytes. It is there only if that
//! span is sampled.
//!
//! frame: the same head and tag, raw bytes; associated data: version, cluster, NUL, channel
//!
//! Any number of replicas may draw a 192-bit nonce at random, permanently. A counter would have to be
//! shared. So each answer draws one such number, and counts only the tokens of that answer from there.

mod cipher;
mod ring;

use std::{borrow::Cow, fmt};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use self::cipher::{NONCE, TAG};
pub use self::{
    cipher::{Nonce, Nonces, Subkey},
    ring::{KeyId, KeyRing, KeyRingError, key_name, new_key_line},
};

/// The first byte says whether this is a token or a frame, and its version.
const TOKEN: u8 = 1;
const FRAME: u8 = 2;
const KEY_ID: usize = 4;
const HEAD: usize = 1 + KEY_ID + NONCE;
/// Longest token, in bytes: an ack subject is shorter than nats-server's longest control line.
const MAX_TOKEN_BYTES: usize = 8 * 1024;
/// Longest name of a principal, in bytes. The size of an answer is reckoned with it.
pub const MAX_PRINCIPAL_BYTES: usize = 64;
/// Longest tail, in bytes: all fields of later versions together.
const MAX_TAIL_BYTES: usize = 256;
/// The field of the tail with the span of the Fetch: its tag, and bytes of its value.
const SPAN_TAG: u8 = 1;
const SPAN_BYTES: usize = 25;

/// Identifies one start of one process: 8 random bytes, never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub [u8; 8]);

impl InstanceId {
    /// Makes a new identifier.
    ///
    /// # Errors
    /// The operating system has no randomness.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 8];
        getrandom::fill(&mut bytes)?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for InstanceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// The content of a token, for replicas that can open it.
#[derive(Clone, PartialEq, Eq)]
pub struct Claims<'c> {
    /// The replica whose table holds the lease.
    pub owner: InstanceId,
    /// The lease's number there.
    pub lease: u64,
    /// The time until which an Ack is safe without asking the owner, in milliseconds since the Unix
    /// epoch.
    pub settle_by: u64,
    /// The NATS server that led the consumer when the token was sealed, as a digest. `settle_by` holds
    /// only while that server leads.
    pub leader: u64,
    /// When the consumer was created, as JetStream writes it.
    pub created: Cow<'c, str>,
    /// The subject on which the delivery is settled.
    pub ack_subject: Cow<'c, str>,
    /// The client that the token belongs to, at most [`MAX_PRINCIPAL_BYTES`].
    pub principal: Cow<'c, str>,
    /// The span of the Fetch that received the message, if it is sampled.
    pub span: Option<[u8; SPAN_BYTES]>,
}

impl fmt::Debug for Claims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Claims").field("lease", &self.lease).finish_non_exhaustive()
    }
}

/// The reason why a token was not opened. It does not say which check failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenError {
    /// This is not a token of this cluster.
    Invalid,
    /// This looks like a token, with a key that is not in the ring.
    KeyUnknown,
}

/// The name of the key that a frame names, if it looks like a frame. The name is not verified.
pub fn key_of_frame(frame: &[u8]) -> Option<KeyId> {
    let (version, rest) = frame.split_first()?;
    let long_enough = frame.len() >= HEAD + TAG;
    rest.first_chunk().copied().filter(|_| *version == FRAME && long_enough)
}

/// Seals and opens the tokens of one cluster, and the frames that its replicas send each other.
#[derive(Debug)]
pub struct Sealer {
    ring: KeyRing,
    /// Associated data of tokens. The associated data of frames begins with it.
    of_tokens: Vec<u8>,
    of_frames: Vec<u8>,
}

impl Sealer {
    /// Tokens of other clusters are invalid here, even if these clusters share keys.
    pub fn new(ring: KeyRing, cluster: &str) -> Self {
        // The name of a cluster has no NUL, so the NUL separates it from the text behind it.
        let of_frames = [&[FRAME], cluster.as_bytes(), &[0]].concat();
        Self { ring, of_tokens: [&[TOKEN], cluster.as_bytes()].concat(), of_frames }
    }

    /// The ring of this sealer.
    pub fn ring(&self) -> &KeyRing {
        &self.ring
    }

    /// Seals the next token of an answer with the ring's sealing key.
    pub fn seal(&self, claims: &Claims<'_>, nonces: &mut Nonces) -> String {
        let nonce = nonces.next().unwrap_or_default();
        let mut token = self.head(TOKEN, nonce, 80 + claims.ack_subject.len());
        claims.write(&mut token);
        self.close(&mut token, nonce, &mut nonces.subkey, &self.of_tokens);
        URL_SAFE_NO_PAD.encode(token)
    }

    /// Opens a token of this cluster. The next token of the same answer is opened sooner with its `subkey`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open(&self, token: &str, subkey: &mut Subkey) -> Result<Claims<'static>, OpenError> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(OpenError::Invalid);
        }
        let mut bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| OpenError::Invalid)?;
        let (_, body) = self.unseal(&mut bytes, subkey, TOKEN, &self.of_tokens)?;
        Claims::read(body).ok_or(OpenError::Invalid)
    }

    /// Seals a message between replicas on `channel`. It can only be opened for the same channel.
    pub fn seal_frame(&self, channel: &str, message: &[u8], nonce: Nonce) -> Vec<u8> {
        let mut frame = self.head(FRAME, nonce, message.len());
        frame.extend_from_slice(message);
        self.close(&mut frame, nonce, &mut Subkey::default(), &self.of_channel(channel));
        frame
    }

    /// Opens a message that another replica of this cluster sealed for `channel`.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_frame(&self, channel: &str, frame: &[u8]) -> Result<(Nonce, Vec<u8>), OpenError> {
        let mut bytes = frame.to_vec();
        let (nonce, body) =
            self.unseal(&mut bytes, &mut Subkey::default(), FRAME, &self.of_channel(channel))?;
        Ok((nonce, body.to_vec()))
    }

    fn head(&self, version: u8, nonce: Nonce, length: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + length + TAG);
        bytes.push(version);
        bytes.extend_from_slice(&self.ring.sealing().id);
        bytes.extend_from_slice(&nonce);
        bytes
    }

    fn close(&self, bytes: &mut Vec<u8>, nonce: Nonce, subkey: &mut Subkey, associated: &[u8]) {
        let (_, body) = bytes.split_at_mut(HEAD);
        // This fails only for texts of 256 GiB and more.
        if let Some(tag) = self.ring.sealing().cipher.seal(nonce, subkey, associated, body) {
            bytes.extend_from_slice(&tag);
        }
    }

    fn unseal<'b>(
        &self,
        bytes: &'b mut [u8],
        subkey: &mut Subkey,
        version: u8,
        associated: &[u8],
    ) -> Result<(Nonce, &'b [u8]), OpenError> {
        if bytes.len() < HEAD + TAG || bytes[0] != version {
            return Err(OpenError::Invalid);
        }
        let (head, rest) = bytes.split_at_mut(HEAD);
        let (body, tag) = rest.split_at_mut(rest.len() - TAG);
        let key = self.ring.find(&head[1..=KEY_ID]).ok_or(OpenError::KeyUnknown)?;
        let nonce = Nonce::try_from(&head[1 + KEY_ID..]).map_err(|_| OpenError::Invalid)?;
        let tag = (&*tag).try_into().map_err(|_| OpenError::Invalid)?;
        key.cipher.open(nonce, subkey, associated, body, tag).ok_or(OpenError::Invalid)?;
        Ok((nonce, body))
    }

    /// The associated data of a channel. It prevents opening for another channel or another cluster.
    fn of_channel(&self, channel: &str) -> Vec<u8> {
        [&self.of_frames, channel.as_bytes()].concat()
    }
}

impl Claims<'_> {
    fn write(&self, into: &mut Vec<u8>) {
        into.extend_from_slice(&self.owner.0);
        into.extend_from_slice(&self.lease.to_be_bytes());
        into.extend_from_slice(&self.settle_by.to_be_bytes());
        into.extend_from_slice(&self.leader.to_be_bytes());
        for text in [&self.created, &self.ack_subject, &self.principal] {
            // All three are far shorter than 64 KiB. A longer text could not be read back.
            into.extend_from_slice(&u16::try_from(text.len()).unwrap_or(u16::MAX).to_be_bytes());
            into.extend_from_slice(text.as_bytes());
        }
        if let Some(span) = &self.span {
            into.extend_from_slice(&[SPAN_TAG, SPAN_BYTES as u8]);
            into.extend_from_slice(span);
        }
    }

    /// Reads strictly: nothing may be missing, and only a tail may follow.
    fn read(bytes: &[u8]) -> Option<Claims<'static>> {
        let (owner, rest) = bytes.split_first_chunk()?;
        let (lease, rest) = rest.split_first_chunk()?;
        let (settle_by, rest) = rest.split_first_chunk()?;
        let (leader, mut rest) = rest.split_first_chunk()?;
        let mut text = || {
            let (length, after) = rest.split_first_chunk()?;
            let (text, after) = after.split_at_checked(u16::from_be_bytes(*length).into())?;
            rest = after;
            Some(Cow::<str>::Owned(std::str::from_utf8(text).ok()?.to_owned()))
        };
        let (created, ack_subject, principal) = (text()?, text()?, text()?);
        let span = span_of_tail(rest)?;
        (principal.len() <= MAX_PRINCIPAL_BYTES).then_some(Claims {
            owner: InstanceId(*owner),
            lease: u64::from_be_bytes(*lease),
            settle_by: u64::from_be_bytes(*settle_by),
            leader: u64::from_be_bytes(*leader),
            created,
            ack_subject,
            principal,
            span,
        })
    }
}

/// The span in these bytes, if they are whole fields, each tag at most once. Other fields are not known to this
/// version, and a span of another length is not, either.
fn span_of_tail(mut bytes: &[u8]) -> Option<Option<[u8; SPAN_BYTES]>> {
    let (mut seen, mut span) = ([false; 256], None);
    if bytes.len() > MAX_TAIL_BYTES {
        return None;
    }
    while let Some((tag, rest)) = bytes.split_first() {
        let (length, rest) = rest.split_first()?;
        let (value, after) = rest.split_at_checked((*length).into())?;
        if std::mem::replace(&mut seen[usize::from(*tag)], true) {
            return None;
        }
        if *tag == SPAN_TAG {
            span = value.try_into().ok();
        }
        bytes = after;
    }
    Some(span)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use base64::engine::general_purpose::STANDARD;
    use proptest::prelude::*;

    impl Sealer {
        fn sealed(&self, claims: &Claims<'_>, nonce: Nonce) -> String {
            self.seal(claims, &mut Nonces::from(nonce))
        }

        fn opened(&self, token: &str) -> Result<Claims<'static>, OpenError> {
            self.open(token, &mut Subkey::default())
        }
    }

    fn sealer(key: u8, cluster: &str) -> Sealer {
        Sealer::new(KeyRing::single([key; 32]), cluster)
    }

    fn claims() -> impl Strategy<Value = Claims<'static>> {
        let text = || ".{0,120}".prop_map(Cow::Owned);
        let numbers = (any::<[u8; 8]>(), any::<u64>(), any::<u64>(), any::<u64>());
        // A character has at most four bytes.
        let principal = ".{0,16}".prop_map(Cow::Owned);
        (numbers, text(), text(), principal, any::<Option<[u8; SPAN_BYTES]>>()).prop_map(
            |((owner, lease, settle_by, leader), created, ack_subject, principal, span)| Claims {
                owner: InstanceId(owner),
                lease,
                settle_by,
                leader,
                created,
                ack_subject,
                principal,
                span,
            },
        )
    }

    /// A token of a later version: these claims, and this tail.
    fn with_tail(sealer: &Sealer, claims: &Claims<'_>, tail: &[u8]) -> String {
        let mut token = sealer.head(TOKEN, [0; NONCE], 0);
        claims.write(&mut token);
        token.extend_from_slice(tail);
        sealer.close(&mut token, [0; NONCE], &mut Subkey::default(), &sealer.of_tokens);
        URL_SAFE_NO_PAD.encode(token)
    }

    fn field(tag: u8, value: &[u8]) -> Vec<u8> {
        [&[tag, u8::try_from(value.len()).unwrap()], value].concat()
    }

    /// The reference for [`span_of_tail`]: reads the fields into a map, one by one.
    fn fields(tail: &[u8]) -> Option<BTreeMap<u8, Vec<u8>>> {
        let (mut fields, mut bytes) = (BTreeMap::new(), tail.iter().copied());
        while let Some(tag) = bytes.next() {
            let length = usize::from(bytes.next()?);
            let value: Vec<u8> = bytes.by_ref().take(length).collect();
            let whole = value.len() == length && fields.insert(tag, value).is_none();
            whole.then_some(())?;
        }
        (tail.len() <= 256).then_some(fields)
    }

    proptest! {
        #[test]
        fn fields_of_a_later_version_are_skipped(
            claims in claims(),
            tail in prop::collection::btree_map(any::<u8>(), prop::collection::vec(any::<u8>(), 0..30), 0..8),
        ) {
            let span = tail.get(&SPAN_TAG).and_then(|span| span[..].try_into().ok());
            let tail: Vec<u8> = tail.iter().flat_map(|(tag, value)| field(*tag, value)).collect();
            let (sealer, claims) = (sealer(1, "c"), Claims { span: None, ..claims });
            let token = with_tail(&sealer, &claims, &tail);
            prop_assert_eq!(sealer.opened(&token), Ok(Claims { span, ..claims }));
        }

        #[test]
        fn a_tail_is_valid_exactly_if_its_fields_can_be_read(
            tail in prop_oneof![
                prop::collection::vec(0_u8..4, 0..12),
                prop::collection::vec(any::<u8>(), 0..300),
            ],
        ) {
            let sealer = sealer(1, "c");
            let opened = sealer.opened(&with_tail(&sealer, &some(), &tail));
            let span = |fields: BTreeMap<u8, Vec<u8>>| fields.get(&SPAN_TAG)?[..].try_into().ok();
            let expected = fields(&tail).map(|fields| Claims { span: span(fields), ..some() });
            let expected = expected.ok_or(OpenError::Invalid);
            prop_assert_eq!(opened, expected);
        }

        #[test]
        fn sealed_token_is_opened(claims in claims(), nonce: Nonce) {
            let sealer = sealer(1, "c");
            prop_assert_eq!(sealer.opened(&sealer.sealed(&claims, nonce)), Ok(claims));
        }

        #[test]
        fn a_token_changed_anywhere_is_not_opened(
            claims in claims(), nonce: Nonce, at: prop::sample::Index, flip in 1_u8..,
        ) {
            let sealer = sealer(1, "c");
            let mut bytes = URL_SAFE_NO_PAD.decode(sealer.sealed(&claims, nonce)).unwrap();
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            let opened = sealer.opened(&URL_SAFE_NO_PAD.encode(bytes));
            let of_the_key = (1..=KEY_ID).contains(&at);
            let expected = if of_the_key { OpenError::KeyUnknown } else { OpenError::Invalid };
            prop_assert_eq!(opened, Err(expected));
        }

        #[test]
        fn garbage_is_refused_and_harms_nothing(token in ".{0,300}", bytes: Vec<u8>) {
            let sealer = sealer(1, "c");
            prop_assert!(sealer.opened(&token).is_err());
            prop_assert!(sealer.opened(&URL_SAFE_NO_PAD.encode(&bytes)).is_err());
            prop_assert!(sealer.opened(&token.repeat(100)).is_err());
        }
    }

    fn some() -> Claims<'static> {
        Claims {
            owner: InstanceId([7; 8]),
            lease: 1,
            settle_by: 2,
            leader: 3,
            created: "2026-11-23T08:00:00Z".into(),
            ack_subject: "$JS.ACK.ORDERS.worker.1.2.3.4.5".into(),
            principal: "anonymous".into(),
            span: None,
        }
    }

    #[test]
    fn tail_with_a_field_twice_or_cut_or_too_long_is_invalid() {
        let sealer = sealer(1, "c");
        let longest = field(9, &[1; MAX_TAIL_BYTES - 2]);
        for (tail, valid) in [
            (longest.clone(), true),
            ([longest, field(8, &[])].concat(), false),
            ([field(9, &[1]), field(8, &[]), field(9, &[1])].concat(), false),
            (vec![9], false),
            (vec![9, 2, 0], false),
        ] {
            let opened = sealer.opened(&with_tail(&sealer, &some(), &tail));
            assert_eq!(opened, valid.then(some).ok_or(OpenError::Invalid), "{tail:?}");
        }
    }

    /// Tokens of a former version are still out when a replica of this version starts.
    #[test]
    fn token_that_was_sealed_before_there_was_a_tail_is_opened() {
        let token = "AVcPlAUJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQm5deWNe61-ZfQSCDxocwfqKvO3mkBhneOmjRhc0yZTWII-\
                     cuvgvZhlPViO5Fzukr1nuxMtD021VN-g5n-Rxnq08iBL1uci9uXGL05lZF-OttU3FiaG39Y6lWXwvE1xT8Rb\
                     JeEMB24Go-HzYV6dO5j9nXE";
        let sealer = sealer(7, "c");
        assert_eq!(sealer.opened(token), Ok(some()));
        assert_eq!(sealer.sealed(&some(), [9; NONCE]), token, "and an older replica opens ours");
    }

    /// An older replica skips each field of the tail.
    #[test]
    fn span_of_a_fetch_is_one_field_of_the_tail() {
        let (sealer, span) = (sealer(1, "c"), [7; SPAN_BYTES]);
        let traced = Claims { span: Some(span), ..some() };
        let token = sealer.sealed(&traced, [0; NONCE]);
        assert_eq!(token, with_tail(&sealer, &some(), &field(SPAN_TAG, &span)));
        assert_eq!(sealer.opened(&token), Ok(traced));
        let without = sealer.sealed(&some(), [0; NONCE]);
        assert_eq!(token.len() - without.len(), 36, "27 bytes");
        let longer = with_tail(&sealer, &some(), &field(SPAN_TAG, &[7; SPAN_BYTES + 1]));
        assert_eq!(sealer.opened(&longer), Ok(some()), "a span of a later version");
    }

    #[test]
    fn principal_of_more_than_64_bytes_is_invalid() {
        let named = |length| Claims { principal: "p".repeat(length).into(), ..some() };
        let sealer = sealer(1, "c");
        let opened = |length| sealer.opened(&sealer.sealed(&named(length), [0; NONCE]));
        assert_eq!(opened(MAX_PRINCIPAL_BYTES), Ok(named(64)));
        assert_eq!(opened(MAX_PRINCIPAL_BYTES + 1), Err(OpenError::Invalid));
    }

    #[test]
    fn another_cluster_and_another_key_do_not_open_it() {
        let token = sealer(1, "c").sealed(&some(), [0; NONCE]);
        assert_eq!(sealer(1, "other").opened(&token), Err(OpenError::Invalid));
        assert_eq!(sealer(2, "c").opened(&token), Err(OpenError::KeyUnknown));
    }

    #[test]
    fn every_key_of_the_ring_opens_and_the_first_seals() {
        let (old, new) = (new_key_line().unwrap(), new_key_line().unwrap());
        let sealer = |text: &str| Sealer::new(KeyRing::parse(text).unwrap(), "c");
        let before = sealer(&old).sealed(&some(), [1; NONCE]);
        let rotated = sealer(&format!("# rotated\n{new}\n\n{old} # to be removed\n"));
        assert_eq!(rotated.opened(&before), Ok(some()));
        let after = rotated.sealed(&some(), [2; NONCE]);
        assert_eq!(sealer(&old).opened(&after), Err(OpenError::KeyUnknown));
        assert_eq!(sealer(&new).opened(&after), Ok(some()));
    }

    #[test]
    fn a_frame_is_opened_on_its_channel_alone_and_is_no_token() {
        let (ours, other) = (sealer(1, "c"), sealer(1, "other"));
        let frame = ours.seal_frame("a.settle", b"hello", [5; NONCE]);
        assert_eq!(key_of_frame(&frame), Some(ours.ring().sealing_id()));
        assert_eq!(key_of_frame(&frame[..HEAD]), None);
        assert_eq!(ours.open_frame("a.settle", &frame), Ok(([5; NONCE], b"hello".to_vec())));
        for (sealer, channel) in [(&ours, "b.settle"), (&other, "a.settle")] {
            assert_eq!(sealer.open_frame(channel, &frame), Err(OpenError::Invalid));
        }
        assert_eq!(ours.opened(&URL_SAFE_NO_PAD.encode(&frame)), Err(OpenError::Invalid));
        let token = URL_SAFE_NO_PAD.decode(ours.sealed(&some(), [6; NONCE])).unwrap();
        assert_eq!(ours.open_frame("", &token), Err(OpenError::Invalid));
    }

    #[test]
    fn any_key_of_the_ring_may_be_told_to_seal() {
        let (old, new) = (new_key_line().unwrap(), new_key_line().unwrap());
        let ring = |text: &str| KeyRing::parse(text).unwrap();
        let ids = ring(&format!("{new}\n{old}")).ids();
        let waiting = Sealer::new(ring(&format!("{new}\n{old}")).sealing_with(ids[1]), "c");
        let token = waiting.sealed(&some(), [4; NONCE]);
        assert_eq!(Sealer::new(ring(&old), "c").opened(&token), Ok(some()));
        let unknown = ring(&new).sealing_with([0; KEY_ID]);
        assert_eq!(unknown.ids(), [ids[0]], "a key that is not there changes nothing");
    }

    #[test]
    fn a_wrong_key_file_is_told_by_its_line_and_never_shown() {
        let key = new_key_line().unwrap();
        let error = |text: &str| KeyRing::parse(text).unwrap_err();
        assert_eq!(error("# nothing\n"), KeyRingError::Empty);
        assert_eq!(error(&format!("{key}\nc2hvcnQ=\n")), KeyRingError::NotAKey(2));
        assert_eq!(error(&format!("{key}\n{key}\n")), KeyRingError::Duplicate(2));
        let zeros = STANDARD.encode([0; 32]);
        assert_eq!(error(&format!("{key}\n{zeros}\n")), KeyRingError::Guessable(2));
        let ring = KeyRing::parse(&key).unwrap();
        assert!(!format!("{ring:?}{}", error("secret")).contains("secret"));
    }

    /// A rolling update needs this: the token was sealed with another library.
    #[test]
    fn a_token_of_an_older_version_opens_and_is_sealed_the_same_way() {
        let older = "AY_K2f5kZWZnaGlqa2xtbm9wcXJzdHV2d3h5ent9cfq0-iiOiocwnT-mb73jW7tT0vxwmrCMVWSnK154F6sScU4e\
                     gNr22ytWLABmMGte1eovr-g0uetFWGa6y_VCGYGAoII9ilqBf9fxv9S_ZcHDsgu6zfb7mDzH_ojpkdo5DqpnQB82C7\
                     m1goWE6t-ww9s";
        let key = std::array::from_fn(|index| index as u8);
        let sealer = Sealer::new(KeyRing::single(key), "c");
        let claims = Claims {
            owner: InstanceId([1, 2, 3, 4, 5, 6, 7, 8]),
            lease: 42,
            settle_by: 1_800_000_000_000,
            leader: 7,
            created: "2026-11-30T08:00:00Z".into(),
            ack_subject: "$JS.ACK.ORDERS.worker.1.2.3.4.5".into(),
            principal: "anonymous".into(),
            span: None,
        };
        assert_eq!(sealer.opened(older), Ok(claims.clone()));
        assert_eq!(sealer.sealed(&claims, std::array::from_fn(|index| 100 + index as u8)), older);
    }

    #[test]
    fn a_token_tells_nothing_of_what_is_inside() {
        let token = sealer(1, "c").sealed(&some(), [3; NONCE]);
        let bytes = URL_SAFE_NO_PAD.decode(token).unwrap();
        let shown = String::from_utf8_lossy(&bytes).into_owned();
        assert!(!shown.contains("ORDERS") && !shown.contains("anonymous"));
        assert!(!format!("{:?}", some()).contains("ORDERS"));
    }
}
