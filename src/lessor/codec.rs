//! Whether a payload is what its reader asked for. Pure.

use serde::de::IgnoredAny;

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
    /// # Errors
    /// What is wrong with the payload, for people.
    pub(super) fn check(self, payload: &[u8]) -> Result<(), String> {
        match self {
            Self::Raw | Self::Auto => Ok(()),
            Self::Text => match std::str::from_utf8(payload) {
                Ok(_) => Ok(()),
                Err(error) => Err(format!("not UTF-8 text: {error}")),
            },
            Self::Json => match serde_json::from_slice::<IgnoredAny>(payload) {
                // IgnoredAny does not look inside strings, but text on the wire must be UTF-8.
                Ok(_) => Self::Text.check(payload),
                Err(error) => Err(format!("not JSON: {error}")),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_and_text_say_what_is_wrong_and_raw_and_auto_take_anything() {
        assert!(Codec::Json.check(br#"{"a":[1,2,{"b":null}]}"#).is_ok());
        assert!(Codec::Json.check(b"").unwrap_err().starts_with("not JSON"));
        assert!(Codec::Json.check(b"{} {}").is_err());
        assert!(Codec::Json.check(b"\"\xff\"").is_err());
        assert!(Codec::Text.check("größe".as_bytes()).is_ok());
        assert!(Codec::Text.check(b"\xff").unwrap_err().starts_with("not UTF-8"));
        for codec in [Codec::Raw, Codec::Auto] {
            assert!(codec.check(b"\xff\x00").is_ok());
        }
    }

    #[test]
    fn json_of_any_depth_is_checked_without_recursion() {
        let deep = [vec![b'['; 1_000_000], vec![b']'; 1_000_000]].concat();
        assert!(Codec::Json.check(&deep).is_ok());
    }
}
