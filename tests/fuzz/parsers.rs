//! The parsers of text that strangers or operators write, and the promises that hold for any input. A parser
//! ends with a value or an error: a panic is a fault.

use fetch_proxy::{
    access::{ApiKeys, Credential, Policy, warnings},
    tls::certified_client,
};

/// A parser, by the name of its folder in `corpus`.
pub type Parser = (&'static str, fn(&[u8]));

pub const ALL: [Parser; 4] =
    [("api-keys", api_keys), ("bearer", bearer), ("certificate", certificate), ("policy", policy)];

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
