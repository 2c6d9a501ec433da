//! Whether all replicas obey the same policy. They may differ while a new policy reaches one after the other. A
//! difference that lasts is told once, and its end once. Pure.

use std::time::{Duration, Instant};

use bytes::Bytes;

/// A difference that lasts for longer is told. The file of a ConfigMap reaches all pods within a minute.
const DIFFERENCE_PATIENCE: Duration = Duration::from_secs(60);
const DIGEST_BYTES: usize = 8;

/// The policy of a replica, by the begin of its SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum ObeyedPolicy {
    /// Its version has no policies.
    Unknown,
    /// It has none.
    #[default]
    Absent,
    /// This one.
    Digest([u8; DIGEST_BYTES]),
}

impl ObeyedPolicy {
    /// Reads the field of a heartbeat.
    pub(super) fn read(field: Option<&Bytes>) -> Self {
        match field {
            None => Self::Unknown,
            Some(digest) if digest.is_empty() => Self::Absent,
            Some(digest) => {
                // A newer version may send more bytes.
                let mut bytes = [0; DIGEST_BYTES];
                bytes.iter_mut().zip(digest).for_each(|(byte, sent)| *byte = *sent);
                Self::Digest(bytes)
            }
        }
    }

    /// The field of a heartbeat.
    pub(super) fn to_wire(self) -> Option<Bytes> {
        match self {
            Self::Unknown => None,
            Self::Absent => Some(Bytes::new()),
            Self::Digest(digest) => Some(Bytes::copy_from_slice(&digest)),
        }
    }

    /// The digits for the log. Empty: there is no policy.
    pub(super) fn digits(self) -> String {
        match self {
            Self::Unknown | Self::Absent => String::new(),
            Self::Digest(digest) => digest.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }

    /// Whether another replica obeys another policy. A version without policies is no difference: a rolling
    /// update ends it.
    pub(super) fn differs(self, other: Self) -> bool {
        other != Self::Unknown && other != self
    }
}

/// News about the policies of all replicas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AgreementNews {
    /// They have differed for a minute.
    Differ,
    /// They agree again.
    Agree,
}

/// Since when the policies of the replicas differ.
#[derive(Debug, Default)]
pub(super) struct PolicyAgreement {
    differ_since: Option<Instant>,
    told: bool,
}

impl PolicyAgreement {
    /// Takes note of whether a replica obeys another policy than this one.
    pub(super) fn observe(&mut self, differ: bool, now: Instant) -> Option<AgreementNews> {
        if !differ {
            self.differ_since = None;
            return std::mem::take(&mut self.told).then_some(AgreementNews::Agree);
        }
        let since = *self.differ_since.get_or_insert(now);
        let lasts = now.saturating_duration_since(since) > DIFFERENCE_PATIENCE;
        let tell = lasts && !self.told;
        self.told |= lasts;
        tell.then_some(AgreementNews::Differ)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn difference_is_told_once_after_a_minute_and_its_end_once() {
        let (mut agreement, start) = (PolicyAgreement::default(), clock::now());
        let seconds = |seconds| start + Duration::from_secs(seconds);
        for (at, differ, news) in [
            (0, false, None),
            (1, true, None),
            (50, false, None),
            (51, true, None),
            (111, true, None),
            (112, true, Some(AgreementNews::Differ)),
            (113, true, None),
            (300, true, None),
            (301, false, Some(AgreementNews::Agree)),
            (302, false, None),
            (303, true, None),
            (364, true, Some(AgreementNews::Differ)),
        ] {
            assert_eq!(agreement.observe(differ, seconds(at)), news, "{at}");
        }
    }

    #[test]
    fn policy_reads_back_as_it_was_sent() {
        let digest = ObeyedPolicy::Digest([1, 2, 3, 4, 5, 6, 7, 8]);
        for policy in [ObeyedPolicy::Unknown, ObeyedPolicy::Absent, digest] {
            assert_eq!(ObeyedPolicy::read(policy.to_wire().as_ref()), policy);
        }
        for (sent, digits) in [(&[0xab; 3][..], "ababab0000000000"), (&[1; 9], "0101010101010101")]
        {
            let read = ObeyedPolicy::read(Some(&Bytes::copy_from_slice(sent)));
            assert_eq!(read.digits(), digits, "such a replica knows policies");
        }
    }

    #[test]
    fn replica_without_a_policy_differs_and_a_version_without_policies_does_not() {
        let [one, other] = [1, 2].map(|byte| ObeyedPolicy::Digest([byte; 8]));
        assert!(one.differs(other) && one.differs(ObeyedPolicy::Absent));
        assert!(ObeyedPolicy::Absent.differs(one));
        assert!(!one.differs(one) && !one.differs(ObeyedPolicy::Unknown));
    }
}
