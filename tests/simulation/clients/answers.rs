//! Reads the answers to settlements as a client does: what is to be done next.

use crate::watch::{Reading, Told};

/// Nothing more is to be had after this answer.
pub fn is_final(heard: &Reading) -> bool {
    const FINAL: [&str; 5] =
        ["OUTCOME_SENT", "LEASE_EXPIRED", "LEASE_SETTLED", "JETSTREAM_DENIED", "TOKEN_INVALID"];
    heard.told == Told::Applied || FINAL.contains(&&*heard.name)
}
