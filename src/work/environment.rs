//! The variables that a command finds in its environment, and the headers of an HTTP request: a message without its
//! payload. Pure.

use std::collections::BTreeMap;

use http::{
    HeaderMap,
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
};

use crate::pb::Delivery;

/// Each variable of a header begins like this. The worker takes inherited variables of this kind away.
pub(super) const HEADER_PREFIX: &str = "FETCH_PROXY_HEADER_";
/// Most bytes of all variables of headers, with their names. The same for the headers as JSON. A system allows 128 KiB
/// for one variable, and at least 1 MiB for arguments and variables together.
const MAX_HEADER_BYTES: usize = 32 * 1024;

/// The variables for a message, each with its name.
pub(super) fn variables(stream: &str, consumer: &str, message: &Delivery) -> Vec<(String, String)> {
    let mut variables: Vec<(String, String)> = facts(stream, consumer, message)
        .into_iter()
        .map(|(name, value)| (format!("FETCH_PROXY_{}", variable(name)), value))
        .filter(|(_, value)| !value.contains('\0'))
        .collect();
    let headers = headers(message);
    let json = serde_json::to_string(&headers).unwrap_or_default();
    let mut is_cut = json.len() > MAX_HEADER_BYTES;
    if !is_cut {
        variables.push(("FETCH_PROXY_HEADERS".to_owned(), json));
    }
    let (mut named, mut left) = (BTreeMap::new(), MAX_HEADER_BYTES);
    for (name, values) in headers {
        let (name, value) = (variable(name), values.first().map_or("", String::as_str));
        if named.contains_key(&name) {
            continue;
        }
        let size = HEADER_PREFIX.len() + name.len() + value.len() + 2;
        match left.checked_sub(size).filter(|_| !value.contains('\0')) {
            Some(rest) => {
                left = rest;
                named.insert(name, value.to_owned());
            }
            None => is_cut = true,
        }
    }
    variables
        .extend(named.into_iter().map(|(name, value)| (HEADER_PREFIX.to_owned() + &name, value)));
    if is_cut {
        variables.push(("FETCH_PROXY_HEADERS_CUT".to_owned(), "1".to_owned()));
    }
    variables
}

/// The headers of an HTTP request for a message.
pub(super) fn request_headers(stream: &str, consumer: &str, message: &Delivery) -> HeaderMap {
    let mut map = HeaderMap::new();
    map.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    let facts = facts(stream, consumer, message);
    let facts = facts.iter().map(|(name, value)| (format!("Fetch-Proxy-{name}"), value));
    let headers = headers(message).into_iter().flat_map(|(name, values)| {
        values.iter().map(move |value| (format!("Fetch-Proxy-Header-{name}"), value))
    });
    let (mut left, mut is_cut) = (MAX_HEADER_BYTES, false);
    for (name, value) in facts.chain(headers) {
        let rest = left.checked_sub(name.len() + value.len());
        let name = HeaderName::try_from(&*name).ok();
        let value = HeaderValue::from_bytes(value.as_bytes()).ok();
        match (name, value, rest) {
            (Some(name), Some(value), Some(rest)) => {
                left = rest;
                map.append(name, value);
            }
            _ => is_cut = true,
        }
    }
    if is_cut {
        let name = HeaderName::from_static("fetch-proxy-headers-cut");
        map.insert(name, HeaderValue::from_static("1"));
    }
    map
}

/// The message without its payload and its headers, each fact with its name.
pub(super) fn facts(
    stream: &str,
    consumer: &str,
    message: &Delivery,
) -> [(&'static str, String); 6] {
    [
        ("Stream", stream.to_owned()),
        ("Consumer", consumer.to_owned()),
        ("Subject", message.subject.clone()),
        ("Sequence", message.stream_sequence.to_string()),
        ("Attempt", message.delivery_count.to_string()),
        ("Max-Attempts", message.max_deliver.to_string()),
    ]
}

/// The headers in the order of their names.
pub(super) fn headers(message: &Delivery) -> BTreeMap<&str, &Vec<String>> {
    let headers = BTreeMap::from_iter(&message.headers);
    headers.into_iter().map(|(name, values)| (name.as_str(), &values.values)).collect()
}

/// A name in capitals, with `_` for all that no shell allows in the name of a variable.
fn variable(name: &str) -> String {
    name.chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pb::HeaderValues;

    fn message(headers: &[(&str, &[&str])]) -> Delivery {
        let values = |values: &[&str]| HeaderValues {
            values: values.iter().map(|&v| v.to_owned()).collect(),
        };
        Delivery {
            subject: "orders.new".to_owned(),
            stream_sequence: 7,
            delivery_count: 2,
            max_deliver: 5,
            headers: headers.iter().map(|(name, all)| ((*name).to_owned(), values(all))).collect(),
            ..Delivery::default()
        }
    }

    fn of(message: &Delivery) -> BTreeMap<String, String> {
        variables("ORDERS", "worker", message).into_iter().collect()
    }

    #[test]
    fn message_is_in_variables() {
        let found =
            of(&message(&[("Trace-Id", &["a", "b"]), ("trace.id", &["c"]), ("Größe", &["1"])]));
        for (name, value) in [
            ("STREAM", "ORDERS"),
            ("CONSUMER", "worker"),
            ("SUBJECT", "orders.new"),
            ("SEQUENCE", "7"),
            ("ATTEMPT", "2"),
            ("MAX_ATTEMPTS", "5"),
            ("HEADER_TRACE_ID", "a"),
            ("HEADER_GR__E", "1"),
            ("HEADERS", r#"{"Größe":["1"],"Trace-Id":["a","b"],"trace.id":["c"]}"#),
        ] {
            assert_eq!(found[&format!("FETCH_PROXY_{name}")], value, "{name}");
        }
        assert_eq!(found.len(), 9, "{found:?}");
    }

    #[test]
    fn large_headers_are_left_out_and_the_command_can_see_that() {
        let long = "x".repeat(MAX_HEADER_BYTES - 100);
        let found = of(&message(&[("A", &[&long]), ("B", &["small"]), ("C", &[&long])]));
        assert_eq!(found["FETCH_PROXY_HEADERS_CUT"], "1");
        assert_eq!(found["FETCH_PROXY_HEADER_B"], "small");
        assert!(
            !found.contains_key("FETCH_PROXY_HEADER_C")
                && !found.contains_key("FETCH_PROXY_HEADERS")
        );
        let size: usize = found.iter().map(|(name, value)| name.len() + value.len() + 2).sum();
        assert!(size < 2 * MAX_HEADER_BYTES + 1024, "{size}");
    }

    #[test]
    fn message_is_in_the_headers_of_a_request() {
        let long = "x".repeat(MAX_HEADER_BYTES);
        let odd = message(&[
            ("A", &["ä", "b"]),
            ("No Name", &["c"]),
            ("Line", &["d\ne"]),
            ("Z", &[&long]),
        ]);
        let map = request_headers("ORDERS", "worker", &odd);
        let all = |name: &str| {
            let values = map.get_all(name).into_iter();
            values
                .map(|value| String::from_utf8(value.as_bytes().to_vec()).unwrap())
                .collect::<Vec<_>>()
        };
        assert_eq!(all("Fetch-Proxy-Subject"), ["orders.new"]);
        assert_eq!(all("Fetch-Proxy-Attempt"), ["2"]);
        assert_eq!(all("Fetch-Proxy-Header-A"), ["ä", "b"]);
        assert_eq!(all("Fetch-Proxy-Headers-Cut"), ["1"]);
        assert_eq!(map.len(), 10, "{map:?}");
        let map = request_headers("ORDERS", "worker", &message(&[]));
        assert!(!map.contains_key("Fetch-Proxy-Headers-Cut") && map.len() == 7, "{map:?}");
    }

    #[test]
    fn value_that_no_variable_may_have_is_in_the_json_alone() {
        let found = of(&message(&[("A", &["x\0y"])]));
        assert_eq!(found["FETCH_PROXY_HEADERS"], r#"{"A":["x\u0000y"]}"#);
        assert_eq!(found["FETCH_PROXY_HEADERS_CUT"], "1");
        assert!(!found.contains_key("FETCH_PROXY_HEADER_A"));
    }
}
