//! Decides which stored messages the client library cannot read. Pure.
//!
//! JetStream stores any headers. The library hangs up, or panics, at headers that it cannot parse. The
//! function here walks through raw headers as the library does, and uses the library's own checks of
//! names, values and statuses. A test compares it with the library.

use std::str::FromStr as _;

use async_nats::{
    StatusCode,
    header::{HeaderName, HeaderValue},
};

/// The reason why no connection survives the delivery of this message. `None`: the message is readable.
/// `headers` are the raw bytes of its header block, and empty if it has no headers.
pub fn unreadable(subject: &str, headers: &[u8]) -> Option<&'static str> {
    // A message without headers comes as another protocol operation, which is split at spaces only.
    if headers.is_empty() {
        return None;
    }
    if subject.contains(char::is_whitespace) {
        return Some("white space in the subject");
    }
    let Ok(text) = std::str::from_utf8(headers) else { return Some("not UTF-8") };
    let mut lines = text.lines().peekable();
    let Some(version) = lines.next().and_then(|line| line.strip_prefix("NATS/1.0")) else {
        return Some("no version in the first line");
    };
    let status = version.trim();
    let status = status.split_once(' ').map_or(status, |(status, _)| status.trim());
    if !status.is_empty() && status.parse::<StatusCode>().is_err() {
        return Some("a status that is none");
    }
    while let Some(line) = lines.next() {
        if line.is_empty() {
            continue;
        }
        let Some((name, first)) = line.split_once(':') else { return Some("a line without colon") };
        if HeaderName::from_str(name).is_err() {
            return Some("a name that is no token");
        }
        let mut value = first.trim_start().to_owned();
        while let Some(more) = lines.next_if(|line| line.starts_with(char::is_whitespace)) {
            value.push_str(more);
        }
        if HeaderValue::from_str(value.trim_end()).is_err() {
            return Some("a lone CR in a value");
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_unreadable_form_has_a_reason_and_readable_ones_have_none() {
        let why = |headers: &str| unreadable("s", headers.as_bytes());
        assert_eq!(why(""), None);
        assert_eq!(why("NATS/1.0\r\nA: b\r\n c\r\n\r\n"), None);
        assert_eq!(why("NATS/1.0 408 evil\r\n\r\n"), None);
        assert_eq!(why("NATS/1.0\r\nA: b\rc\r\n\r\n"), Some("a lone CR in a value"));
        assert_eq!(why("NATS/1.0\r\nA b\r\n\r\n"), Some("a line without colon"));
        assert_eq!(why("NATS/1.0\r\nA b: c\r\n\r\n"), Some("a name that is no token"));
        assert_eq!(why("NATS/1.0 evil\r\n\r\n"), Some("a status that is none"));
        assert_eq!(why("HTTP/1.0\r\n\r\n"), Some("no version in the first line"));
        assert_eq!(unreadable("s", b"NATS/1.0\r\nA: \xff\r\n\r\n"), Some("not UTF-8"));
        assert_eq!(unreadable("a\u{a0}b", b"NATS/1.0\r\n\r\n"), Some("white space in the subject"));
        assert_eq!(unreadable("a\u{a0}b", b""), None);
    }
}
