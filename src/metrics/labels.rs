//! The values that labels may have. All of them are known before anything happens, so their series start at 0.

/// A label whose values are known.
pub(super) trait Label: Copy + 'static {
    /// All values, in the order of their numbers.
    const ALL: &'static [Self];

    /// The value as a scraper sees it.
    fn value(self) -> &'static str;

    /// Its place in [`Label::ALL`].
    fn number(self) -> usize;
}

macro_rules! label {
    ($(#[$doc:meta])* $vis:vis $name:ident { $($variant:ident = $value:literal,)* }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        $vis enum $name {
            $(#[doc = concat!("`", $value, "`")] $variant,)*
        }

        impl Label for $name {
            const ALL: &'static [Self] = &[$(Self::$variant),*];

            fn value(self) -> &'static str {
                match self {
                    $(Self::$variant => $value,)*
                }
            }

            fn number(self) -> usize {
                self as usize
            }
        }
    };
}

label! {
    /// The end of a Fetch.
    pub FetchResult {
        Messages = "messages",
        NoMessages = "no_messages",
        MaxAckPending = "max_ack_pending",
        Paused = "paused",
        Draining = "draining",
        Rejected = "rejected",
        Repeated = "repeated",
        AttemptOver = "attempt_over",
        Refused = "refused",
        Left = "left",
    }
}

label! {
    /// The reason why a message could not be given.
    pub RejectionCause {
        Codec = "codec",
        TooLarge = "too_large",
    }
}

label! {
    /// The end of a pull.
    pub PullResult {
        Full = "full",
        Done = "done",
        Spent = "spent",
        RequestsPending = "requests_pending",
        TooLarge = "too_large",
        Refused = "refused",
        Unheard = "unheard",
        Lost = "lost",
    }
}

label! {
    /// The end of a lease.
    pub LeaseEnd {
        Ack = "ack",
        Nak = "nak",
        Term = "term",
        Lapsed = "lapsed",
        Lost = "lost",
        Overtaken = "overtaken",
        GivenBack = "given_back",
        Moved = "moved",
    }
}

label! {
    /// The reason of a Nak by the proxy.
    pub ReleaseCause {
        Surplus = "surplus",
        Lapsed = "lapsed",
        Drain = "drain",
        Operator = "operator",
        GivenBack = "given_back",
    }
}

label! {
    /// The result of progress.
    pub ProgressResult {
        Confirmed = "confirmed",
        Denied = "denied",
        Unconfirmed = "unconfirmed",
        Unsent = "unsent",
    }
}

label! {
    /// An action on a lease.
    pub SettlementKind {
        Ack = "ack",
        Nak = "nak",
        Term = "term",
        Extend = "extend",
    }
}

label! {
    /// The result of an Ack, a Nak or a Term.
    pub SettlementResult {
        Confirmed = "confirmed",
        Sent = "sent",
        Duplicate = "duplicate",
        Extended = "extended",
        Expired = "expired",
        Settled = "settled",
        Busy = "busy",
        Denied = "denied",
        Unsent = "unsent",
        Unconfirmed = "unconfirmed",
        NotAllowed = "not_allowed",
    }
}

label! {
    /// The reason why nothing is served on a connection.
    pub ConnectionRefusal {
        Limit = "limit",
        Silent = "silent",
        Protocol = "protocol",
        PlaintextOnTls = "plaintext_on_tls",
        TlsOnPlaintext = "tls_on_plaintext",
        Version = "version",
        Handshake = "handshake",
    }
}

label! {
    /// The end of a connection that was open.
    pub ConnectionClose {
        Peer = "peer",
        Unread = "unread",
        Age = "age",
        CertificateExpired = "certificate_expired",
        AuthorityRemoved = "authority_removed",
        Refusals = "refusals",
        Idle = "idle",
        Drain = "drain",
        Cut = "cut",
    }
}

label! {
    /// The purpose of a connection to NATS.
    pub NatsRole {
        Deliveries = "deliveries",
        Settling = "settling",
    }
}

label! {
    /// A right that the server has refused.
    pub NatsRight {
        Publish = "publish",
        Subscribe = "subscribe",
    }
}

label! {
    /// The way of a token to its lease.
    pub SettlementRoute {
        Here = "here",
        Forwarded = "forwarded",
        Orphan = "orphan",
    }
}

label! {
    /// The reason why no replica answers.
    pub ForwardFailure {
        Nobody = "nobody",
        Silent = "silent",
        Unsent = "unsent",
    }
}

label! {
    /// The level of a line of the log.
    pub(super) Severity {
        Error = "error",
        Warn = "warn",
        Info = "info",
        Debug = "debug",
        Trace = "trace",
    }
}
