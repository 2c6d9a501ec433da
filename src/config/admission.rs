//! No unsafe default: a replica that other machines can reach needs credentials and TLS, or a word of admission
//! for each of them that is missing. Loopback is a default and no credential: only the refusal to start looks
//! at it. Pure.

/// An admission with which a replica listens beyond loopback. Each is a warning at every start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Callers need no credential.
    Insecure,
    /// Callers need credentials, and there is no TLS.
    Plaintext,
}

/// The facts that decide whether a replica may start.
#[derive(Debug, Clone, Copy)]
pub(super) struct Exposure {
    /// Other machines may reach it.
    pub(super) beyond: bool,
    /// It speaks TLS.
    pub(super) tls: bool,
    /// Each caller needs a credential.
    pub(super) authenticates: bool,
}

impl Exposure {
    /// The admission that is needed to start, if any is.
    ///
    /// # Errors
    /// The admission is missing: the ways out, for people.
    pub(super) fn admit(
        self,
        insecure: bool,
        plaintext: bool,
    ) -> Result<Option<Admission>, String> {
        match self {
            Self { beyond: false, .. } | Self { tls: true, authenticates: true, .. } => Ok(None),
            Self { authenticates: false, .. } if insecure => Ok(Some(Admission::Insecure)),
            Self { authenticates: true, .. } if insecure || plaintext => {
                Ok(Some(Admission::Plaintext))
            }
            Self { authenticates: true, .. } => Err(
                "--listen is beyond loopback, and there is no TLS on this port. Give --tls-cert and --tls-key, or listen \
                 on 127.0.0.1. If something in front of the port speaks TLS, give --plaintext \
                 (FETCH_PROXY_PLAINTEXT=true)"
                    .to_owned(),
            ),
            Self { authenticates: false, .. } => Err(
                "--listen is beyond loopback, and callers need no credential. Give a --policy-file with credentials, or \
                 a --tls-client-ca, or listen on 127.0.0.1. With --insecure (FETCH_PROXY_INSECURE=true), everybody \
                 who reaches the port can take and settle messages"
                    .to_owned(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_missing_protection_needs_its_own_admission() {
        let none = (false, false);
        for (beyond, tls, authenticates, (insecure, plaintext), admitted) in [
            (false, false, false, none, Some(None)),
            (false, true, true, none, Some(None)),
            (true, true, true, none, Some(None)),
            (true, false, true, none, None),
            (true, false, true, (false, true), Some(Some(Admission::Plaintext))),
            (true, false, true, (true, false), Some(Some(Admission::Plaintext))),
            (true, true, false, none, None),
            (true, true, false, (false, true), None),
            (true, true, false, (true, false), Some(Some(Admission::Insecure))),
            (true, false, false, none, None),
            (true, false, false, (false, true), None),
            (true, false, false, (true, false), Some(Some(Admission::Insecure))),
        ] {
            let exposure = Exposure { beyond, tls, authenticates };
            assert_eq!(exposure.admit(insecure, plaintext).ok(), admitted, "{exposure:?}");
        }
    }
}
