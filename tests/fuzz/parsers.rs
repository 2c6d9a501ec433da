//! The parsers of text that strangers or operators write, and the promises that hold for any input. A parser
//! ends with a value or an error: a panic is a fault.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::BytesMut;
use fetch_proxy::{
    access::{ApiKeys, Credential, KeySet, Policy, Rights, warnings},
    nats::take_op,
    tls::certified_client,
};

/// A parser, by the name of its folder in `corpus`.
pub type Parser = (&'static str, fn(&[u8]));

pub const ALL: [Parser; 7] = [
    ("api-keys", api_keys),
    ("bearer", bearer),
    ("certificate", certificate),
    ("key-set", key_set),
    ("nats", nats),
    ("policy", policy),
    ("token", token),
];

fn bearer(input: &[u8]) {
    let once = Credential::read([input]);
    assert_ne!(once, Ok(Credential::Missing), "a header that is there is never missing");
    assert!(Credential::read([input, input]).is_err(), "two headers are never accepted");
}

fn policy(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    // YAML ends a line in more ways than Rust does.
    let lines = text.split(['\n', '\r', '\u{85}', '\u{2028}', '\u{2029}']).count();
    match Policy::parse(text) {
        Ok(policy) => {
            for warning in warnings(&policy) {
                assert!(warning.line <= lines, "{warning}");
            }
            let again = Policy::parse(text).expect("the same text, the same policy");
            assert_eq!(policy.digest(), again.digest());
        }
        Err(mistake) => {
            assert!(mistake.line >= 1 && mistake.column >= 1, "{mistake}");
            // The end of a text may count as a line of its own.
            assert!(mistake.line <= lines + 1, "{mistake}");
        }
    }
}

fn api_keys(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if let Ok(keys) = ApiKeys::parse(text) {
        assert!(keys.len() <= text.lines().count());
    }
}

fn certificate(input: &[u8]) {
    let Ok(certificate) = certified_client(input) else { return };
    for identity in certificate.identities.iter().map(|identity| identity.as_str()) {
        assert!(identity.starts_with("spiffe://") || identity.starts_with("dns:"), "{identity}");
        assert!(identity.len() <= input.len() + "dns:".len());
    }
}

fn key_set(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if let Ok(keys) = KeySet::parse(text) {
        assert!(keys.len() <= 64);
    }
}

/// The bytes of a NATS server. In any pieces, the operations are the same, and nothing is lost.
fn nats(input: &[u8]) {
    let ops = |pieces: &[&[u8]]| {
        let (mut buffer, mut ops) = (BytesMut::new(), Vec::new());
        for piece in pieces {
            buffer.extend_from_slice(piece);
            loop {
                let before = buffer.len();
                match take_op(&mut buffer) {
                    Ok(Some(op)) => ops.push(op),
                    Ok(None) => break,
                    Err(malformed) => return (ops, Err(malformed)),
                }
                assert!(buffer.len() < before, "an operation has bytes");
            }
        }
        (ops, Ok(buffer))
    };
    let whole = ops(&[input]);
    let (first, second) = input.split_at(input.len() / 2);
    assert_eq!(ops(&[first, second]), whole, "split in the middle");
    let single: Vec<&[u8]> = input.chunks(1).take(256).collect();
    let rest = &input[single.len()..];
    assert_eq!(ops(&[&single[..], &[rest]].concat()), whole, "byte by byte");
}

/// The header of a token in a line, and its claims in the next line. A signature of zeros is never accepted.
fn token(input: &[u8]) {
    const POLICY: &str = "
version: 1
authenticate: {jwt: [{name: a, issuer: i, audiences: [a], keys: {file: f}}]}
principals: [{name: a, match: ['*']}]
";
    const KEYS: &str = include_str!("corpus/key-set/kinds");
    let keys = Arc::new(KeySet::parse(KEYS).expect("a key set"));
    assert!(!keys.is_empty(), "a key that tokens can name");
    let policy = Policy::parse(POLICY).expect("a policy");
    let rights = Rights::new(policy, ApiKeys::default(), 1);
    let rights = rights.with_key_sets(BTreeMap::from([("a".into(), keys)]));
    let parts = input.splitn(2, |byte| *byte == b'\n').map(|part| URL_SAFE_NO_PAD.encode(part));
    let signature = URL_SAFE_NO_PAD.encode([0; 64]);
    let token = parts.chain([signature]).collect::<Vec<_>>().join(".");
    let Ok(credential) = Credential::read([format!("Bearer {token}").as_bytes()]) else { return };
    let caller = rights.caller(credential, Duration::from_secs(1_800_000_000));
    assert!(caller.is_err(), "a token without a signature");
}
