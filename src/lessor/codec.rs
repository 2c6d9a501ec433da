//! Whether a payload is what its reader asked for. Pure.

use serde::de::IgnoredAny;

use crate::broker::Delivery;

/// Headers of a message without a payload, by which JetStream and its clients say that no payload
/// was meant to be there: the name, and the values that say so. No value listed: any.
const WITHOUT_PAYLOAD: [(&str, &[&str]); 3] = [
    // A consumer of headers only leaves the payload out, and tells its size.
    ("Nats-Msg-Size", &[]),
    // The stream stores it where the last message of a subject has aged, or was removed.
    ("Nats-Marker-Reason", &[]),
    // A client of a key-value bucket stores it where a key is deleted.
    ("KV-Operation", &["DEL", "PURGE"]),
];

/// How a Fetch wants its payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// As they are.
    #[default]
    Raw,
    /// As UTF-8 text; anything else is terminated.
    Text,
    /// As JSON text (RFC 8259, in UTF-8); anything else is terminated.
    Json,
    /// As text where it is UTF-8, as bytes where not; nothing is terminated.
    Auto,
}

impl Codec {
    /// Judges the payload of a delivery, unless there was none to deliver.
    ///
    /// # Errors
    /// What is wrong with the payload, for people.
    pub(super) fn check(self, delivery: &Delivery) -> Result<(), String> {
        if delivery.payload.is_empty() && is_without_payload(delivery) {
            return Ok(());
        }
        self.check_payload(&delivery.payload)
    }

    fn check_payload(self, payload: &[u8]) -> Result<(), String> {
        match self {
            Self::Raw | Self::Auto => Ok(()),
            Self::Text => match std::str::from_utf8(payload) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("not UTF-8 text: {error}")),
            },
            Self::Json => match serde_json::from_slice::<IgnoredAny>(payload) {
                // IgnoredAny does not look inside strings, but text on the wire must be UTF-8.
                Ok(_) => Self::Text.check_payload(payload),
                Err(error) => Err(format!("not JSON: {error}")),
            },
        }
    }
}

/// Whether a header says that no payload belongs to this message.
fn is_without_payload(delivery: &Delivery) -> bool {
    delivery.headers.iter().any(|(name, values)| {
        WITHOUT_PAYLOAD.iter().any(|(header, meant)| {
            let told = |value: &String| meant.is_empty() || meant.contains(&value.as_str());
            name == header && values.iter().any(told)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_text_say_what_is_wrong_and_raw_and_auto_take_anything() {
        assert!(Codec::Json.check_payload(br#"{"a":[1,2,{"b":null}]}"#).is_ok());
        assert!(Codec::Json.check_payload(b"").unwrap_err().starts_with("not JSON"));
        assert!(Codec::Json.check_payload(b"{} {}").is_err());
        assert!(Codec::Json.check_payload(b"\"\xff\"").is_err());
        assert!(Codec::Text.check_payload("größe".as_bytes()).is_ok());
        assert!(Codec::Text.check_payload(b"\xff").unwrap_err().starts_with("not UTF-8"));
        for codec in [Codec::Raw, Codec::Auto] {
            assert!(codec.check_payload(b"\xff\x00").is_ok());
        }
    }

    #[test]
    fn json_of_any_depth_is_checked_without_recursion() {
        let deep = [vec![b'['; 1_000_000], vec![b']'; 1_000_000]].concat();
        assert!(Codec::Json.check_payload(&deep).is_ok());
    }
}
