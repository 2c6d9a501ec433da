//! Checks a payload against the codec that its reader asked for. Pure.

use serde::de::IgnoredAny;

use crate::broker::Delivery;

/// The header of a headers-only consumer: the size of the payload.
const SIZE_HEADER: &str = "Nats-Msg-Size";
/// Headers by which JetStream and its clients mark a message that has no payload on purpose: the name of
/// the header, and its values. An empty list stands for any value.
const WITHOUT_PAYLOAD: [(&str, &[&str]); 3] = [
    // A headers-only consumer leaves the payload out, and gives its size.
    (SIZE_HEADER, &[]),
    // The stream stores it when the last message of a subject has expired, or was removed.
    ("Nats-Marker-Reason", &[]),
    // A client of a key-value bucket stores it when a key is deleted.
    ("KV-Operation", &["DEL", "PURGE"]),
];

/// Whether the consumer of a delivery delivers headers alone.
pub(super) fn is_headers_only(delivery: &Delivery) -> bool {
    delivery.payload.is_empty() && delivery.headers.iter().any(|(name, _)| name == SIZE_HEADER)
}

/// Makes a message a delivery of a consumer that delivers headers alone.
pub(super) fn leave_payload_out(delivery: &mut Delivery) {
    let size = std::mem::take(&mut delivery.payload).len().to_string();
    if !delivery.headers.iter().any(|(name, _)| name == SIZE_HEADER) {
        delivery.headers.push((SIZE_HEADER.to_owned(), vec![size]));
    }
}

/// The form in which a Fetch wants its payloads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Codec {
    /// Unchanged bytes.
    #[default]
    Raw,
    /// UTF-8 text. A message with another payload is terminated.
    Text,
    /// JSON text (RFC 8259, in UTF-8). A message with another payload is terminated.
    Json,
    /// Text if the payload is UTF-8, bytes otherwise. Nothing is terminated.
    Auto,
}

impl Codec {
    /// Checks the payload of a delivery, unless the message has no payload on purpose.
    ///
    /// # Errors
    /// The fault of the payload, for people.
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
                // IgnoredAny does not look inside strings, and text on the wire must be UTF-8.
                Ok(_) => Self::Text.check_payload(payload),
                Err(error) => Err(format!("not JSON: {error}")),
            },
        }
    }
}

/// Whether a header marks the message as one without a payload.
fn is_without_payload(delivery: &Delivery) -> bool {
    delivery.headers.iter().any(|(name, values)| {
        WITHOUT_PAYLOAD.iter().any(|(header, marks)| {
            let is_mark = |value: &String| marks.is_empty() || marks.contains(&value.as_str());
            name == header && values.iter().any(is_mark)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_text_name_the_fault_and_raw_and_auto_accept_anything() {
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
