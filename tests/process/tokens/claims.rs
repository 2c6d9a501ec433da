//! Each claim of a token, each field of its header, and each kind of key.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use fetch_proxy::access::{
    ApiKeys, BearerCache, Credential, KeySet, KeySetError, NotAccepted, Policy, Rights,
    Unauthenticated,
};
use proptest::prelude::*;
use serde_json::{Value, json};
use testkit::issuer::{TokenKey, key_set};

const NOW: u64 = 1_800_000_000;
const ISSUER: &str = "https://login.example/";

const POLICY: &str = "
version: 1
authenticate:
  jwt:
  - name: corp
    issuer: https://login.example/
    audiences: [fetch-proxy, other]
    keys: {file: keys}
    algorithms: [RS256, RS384, RS512, PS256, PS384, PS512, ES256, ES384, EdDSA]
  - {name: narrow, issuer: narrow, audiences: [a], keys: {file: keys}, subject: email}
  kubernetes:
    issuer: https://kubernetes.default.svc.cluster.local
    audiences: [fetch-proxy]
    keys: {file: keys}
principals: [{name: a, match: ['*']}]
";

/// Rights by which the keys are those of all issuers.
fn rights(keys: &[&TokenKey]) -> Rights {
    let keys = Arc::new(KeySet::parse(&key_set(keys)).unwrap());
    let names = ["corp", "narrow", "kubernetes"];
    let keys = names.map(|name| (name.into(), keys.clone()));
    let policy = Policy::parse(POLICY).unwrap();
    Rights::new(policy, ApiKeys::default(), 1).with_key_sets(BTreeMap::from(keys))
}

/// The identity that a token gives, and the second at which it ends; or why it is refused.
fn accepted_at(rights: &Rights, token: &str, now: Duration) -> Result<(String, u64), NotAccepted> {
    let header = format!("Bearer {token}");
    let credential = Credential::read([header.as_bytes()])?;
    let caller = rights.caller(credential, now)?;
    Ok((caller.identity.to_string(), caller.until.unwrap().as_secs()))
}

fn accepted(rights: &Rights, token: &str) -> Result<(String, u64), NotAccepted> {
    accepted_at(rights, token, Duration::from_secs(NOW))
}

fn good() -> Value {
    json!({ "iss": ISSUER, "sub": "svc", "aud": "fetch-proxy", "iat": NOW - 10, "exp": NOW + 600 })
}

/// Good claims with other values. A value of null takes the claim out.
fn with(changes: Value) -> Value {
    changed(good(), changes)
}

fn changed(mut claims: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(name);
        } else {
            claims[name] = value.clone();
        }
    }
    claims
}

fn refused(why: Unauthenticated) -> Result<(String, u64), NotAccepted> {
    Err(why.into())
}

#[test]
fn each_claim_that_is_missing_or_wrong_is_refused_by_its_name() {
    let key = TokenKey::rsa("k");
    let rights = rights(&[&key]);
    let identity = |name: &str| Ok((format!("jwt:corp/{name}"), NOW + 660));
    for (changes, outcome) in [
        (json!({}), identity("svc")),
        (json!({ "sub": "a b" }), identity("a%20b")),
        (json!({ "sub": "k8s:a/b" }), identity("k8s:a/b")),
        (json!({ "aud": ["x", "other"] }), identity("svc")),
        (json!({ "extra": { "iss": "x" } }), identity("svc")),
        (json!({ "iss": null }), refused(Unauthenticated::Malformed)),
        (json!({ "iss": 1 }), refused(Unauthenticated::Malformed)),
        (json!({ "iss": [ISSUER] }), refused(Unauthenticated::Malformed)),
        (json!({ "iss": "https://login.example" }), refused(Unauthenticated::Issuer)),
        (json!({ "iss": "HTTPS://login.example/" }), refused(Unauthenticated::Issuer)),
        (json!({ "aud": null }), refused(Unauthenticated::Claim("aud"))),
        (json!({ "aud": "fetch-proxy-2" }), refused(Unauthenticated::Audience)),
        (json!({ "aud": [] }), refused(Unauthenticated::Audience)),
        (json!({ "aud": ["x", 1] }), refused(Unauthenticated::Audience)),
        (json!({ "aud": { "fetch-proxy": 1 } }), refused(Unauthenticated::Audience)),
        (json!({ "exp": null }), refused(Unauthenticated::Claim("exp"))),
        (json!({ "exp": "tomorrow" }), refused(Unauthenticated::Claim("exp"))),
        (json!({ "exp": -1 }), refused(Unauthenticated::Claim("exp"))),
        (json!({ "exp": 1e300 }), refused(Unauthenticated::Claim("exp"))),
        (json!({ "exp": u64::MAX }), refused(Unauthenticated::Claim("exp"))),
        (json!({ "nbf": "now" }), refused(Unauthenticated::Claim("nbf"))),
        (json!({ "iat": [] }), refused(Unauthenticated::Claim("iat"))),
        (json!({ "sub": null }), refused(Unauthenticated::Claim("subject"))),
        (json!({ "sub": "" }), refused(Unauthenticated::Claim("subject"))),
        (json!({ "sub": 5 }), refused(Unauthenticated::Claim("subject"))),
        (json!({ "sub": "x".repeat(600) }), refused(Unauthenticated::Claim("subject"))),
    ] {
        let token = key.token("RS256", &with(changes.clone()));
        assert_eq!(accepted(&rights, &token), outcome, "{changes}");
    }
}

#[test]
fn subject_is_the_claim_that_the_policy_names() {
    let key = TokenKey::p256("k");
    let rights = rights(&[&key]);
    let claims = with(json!({ "iss": "narrow", "aud": "a", "email": "anna@ops.example" }));
    let outcome = accepted(&rights, &key.token("ES256", &claims));
    assert_eq!(outcome.unwrap().0, "jwt:narrow/anna@ops.example");
    let claims = with(json!({ "iss": "narrow", "aud": "a" }));
    let outcome = accepted(&rights, &key.token("ES256", &claims));
    assert_eq!(outcome, refused(Unauthenticated::Claim("subject")));
    let claims = with(json!({ "iss": "narrow", "email": "anna@ops.example" }));
    let outcome = accepted(&rights, &key.token("ES256", &claims));
    assert_eq!(outcome, refused(Unauthenticated::Audience), "the audience of another issuer");
}

#[test]
fn times_count_to_the_second_with_the_skew_of_the_policy() {
    let key = TokenKey::p256("k");
    let rights = rights(&[&key]);
    let ok = |until: u64| Ok(("jwt:corp/svc".to_owned(), until));
    let day = 24 * 3600;
    for (changes, outcome) in [
        // The skew is 60 s.
        (json!({ "exp": NOW - 59 }), ok(NOW + 1)),
        (json!({ "exp": NOW - 60 }), refused(Unauthenticated::Expired)),
        (json!({ "exp": NOW - 61 }), refused(Unauthenticated::Expired)),
        (json!({ "exp": NOW as f64 - 59.5 }), ok(NOW)),
        (json!({ "nbf": NOW + 59 }), ok(NOW + 660)),
        (json!({ "nbf": NOW + 60 }), ok(NOW + 660)),
        (json!({ "nbf": NOW + 61 }), refused(Unauthenticated::NotYetValid)),
        (json!({ "iat": NOW + 60 }), ok(NOW + 660)),
        (json!({ "iat": NOW + 61 }), refused(Unauthenticated::NotYetValid)),
        (json!({ "iat": NOW, "exp": NOW + day }), ok(NOW + day + 60)),
        (json!({ "iat": NOW, "exp": NOW + day + 1 }), refused(Unauthenticated::Lifetime)),
        (json!({ "iat": null, "exp": NOW + day }), ok(NOW + day + 60)),
        (json!({ "iat": null, "exp": NOW + day + 1 }), refused(Unauthenticated::Lifetime)),
        (json!({ "iat": 0 }), refused(Unauthenticated::Lifetime)),
    ] {
        let token = key.token("ES256", &with(changes.clone()));
        assert_eq!(accepted(&rights, &token), outcome, "{changes}");
    }
    let token = key.token("ES256", &good());
    let last = Duration::from_secs(NOW + 660);
    assert!(accepted_at(&rights, &token, last - Duration::from_nanos(1)).is_ok());
    assert_eq!(accepted_at(&rights, &token, last), refused(Unauthenticated::Expired));
}

#[test]
fn each_algorithm_is_accepted_with_its_own_kind_of_key() {
    let keys = [
        TokenKey::rsa("rsa"),
        TokenKey::p256("p256"),
        TokenKey::p384("p384"),
        TokenKey::ed25519("ed"),
    ];
    let rights = rights(&keys.each_ref());
    let fitting = [
        &["RS256", "RS384", "RS512", "PS256", "PS384", "PS512"][..],
        &["ES256"],
        &["ES384"],
        &["EdDSA"],
    ];
    let all = fitting.concat();
    for (key, fitting) in keys.iter().zip(fitting) {
        for algorithm in &all {
            let outcome = accepted(&rights, &key.token(algorithm, &good()));
            let fits = fitting.contains(algorithm);
            assert_eq!(outcome.is_ok(), fits, "{algorithm}: {outcome:?}");
            assert!(fits || outcome == refused(Unauthenticated::Algorithm), "{algorithm}");
        }
    }
}

#[test]
fn algorithm_that_the_policy_does_not_name_is_refused() {
    let key = TokenKey::rsa("k");
    let rights = rights(&[&key]);
    let narrow = with(json!({ "iss": "narrow", "aud": "a", "email": "x" }));
    assert!(accepted(&rights, &key.token("RS256", &narrow)).is_ok());
    let algorithm = refused(Unauthenticated::Algorithm);
    assert_eq!(accepted(&rights, &key.token("RS512", &narrow)), algorithm);
    for name in ["none", "None", "HS256", "HS384", "HS512", "rs256", "ES512", "ES256K", ""] {
        assert_eq!(accepted(&rights, &key.token(name, &good())), algorithm, "{name}");
    }
}

#[test]
fn token_without_a_signature_is_refused() {
    let key = TokenKey::rsa("k");
    let rights = rights(&[&key]);
    for algorithm in ["none", "RS256"] {
        let token = key.token(algorithm, &good());
        let (unsigned, _) = token.rsplit_once('.').unwrap();
        let malformed = refused(Unauthenticated::Malformed);
        assert_eq!(accepted(&rights, &format!("{unsigned}.")), malformed, "{algorithm}");
        assert!(accepted(&rights, &format!("{unsigned}.AAAA")).is_err(), "{algorithm}");
    }
}

#[test]
fn published_rsa_key_is_no_shared_secret() {
    let key = TokenKey::rsa("k");
    let outcome = accepted(&rights(&[&key]), &key.forged_by_modulus(&good()));
    assert_eq!(outcome, refused(Unauthenticated::Algorithm));
}

#[test]
fn shared_secret_in_a_key_set_verifies_nothing() {
    let secret = json!({ "kty": "oct", "kid": "k", "k": "c2VjcmV0", "alg": "HS256" });
    let keys = json!({ "keys": [secret] }).to_string();
    assert!(KeySet::parse(&keys).unwrap().is_empty());
}

#[test]
fn rsa_token_that_names_a_key_on_a_curve_is_refused() {
    let (rsa, curve) = (TokenKey::rsa("rsa"), TokenKey::p256("curve"));
    let rights = rights(&[&rsa, &curve]);
    let header = json!({ "alg": "RS256", "kid": "curve" });
    let outcome = accepted(&rights, &rsa.token_with(&header, &good()));
    assert_eq!(outcome, refused(Unauthenticated::Algorithm));
    let header = json!({ "alg": "ES256", "kid": "rsa" });
    let outcome = accepted(&rights, &curve.token_with(&header, &good()));
    assert_eq!(outcome, refused(Unauthenticated::Algorithm));
}

#[test]
fn signature_by_another_key_or_over_other_claims_is_refused() {
    let (key, other) = (TokenKey::p256("k"), TokenKey::p256("k"));
    let rights = rights(&[&key]);
    let forged = accepted(&rights, &other.token("ES256", &good()));
    assert_eq!(forged, refused(Unauthenticated::Signature));
    let token = key.token("ES256", &good());
    let [header, _, signature] = token.split('.').collect::<Vec<_>>()[..] else {
        panic!("{token}")
    };
    let claims = URL_SAFE_NO_PAD.encode(with(json!({ "sub": "admin" })).to_string());
    let forged = accepted(&rights, &format!("{header}.{claims}.{signature}"));
    assert_eq!(forged, refused(Unauthenticated::Signature));
    let expired = other.token("ES256", &with(json!({ "exp": 1, "aud": "x" })));
    let why = accepted(&rights, &expired);
    assert_eq!(why, refused(Unauthenticated::Signature), "a guesser hears of no claim");
}

#[test]
fn key_is_found_by_its_name_or_is_the_only_one_of_its_kind() {
    let keys = [TokenKey::p256("a"), TokenKey::p256("b"), TokenKey::rsa("r")];
    let all = rights(&keys.each_ref());
    let unknown = Err(NotAccepted::UnknownKey("corp".into()));
    let named = |id: &str| json!({ "alg": "ES256", "kid": id });
    assert!(accepted(&all, &keys[1].token_with(&named("b"), &good())).is_ok());
    assert_eq!(accepted(&all, &keys[1].token_with(&named("c"), &good())), unknown);
    let signature = refused(Unauthenticated::Signature);
    assert_eq!(accepted(&all, &keys[1].token_with(&named("a"), &good())), signature);
    let nameless = json!({ "alg": "ES256" });
    assert_eq!(accepted(&all, &keys[1].token_with(&nameless, &good())), unknown, "two would fit");
    let only = rights(&[&keys[1], &keys[2]]);
    assert!(accepted(&only, &keys[1].token_with(&nameless, &good())).is_ok());
    let unnamed = TokenKey::p256("x").unnamed();
    let outcome = accepted(&rights(&[&unnamed]), &unnamed.token_with(&named("x"), &good()));
    assert_eq!(outcome, unknown, "a key without a name has none");
    assert!(accepted(&rights(&[&unnamed]), &unnamed.token("ES256", &good())).is_ok());
}

#[test]
fn header_with_a_critical_extension_is_refused_and_keys_in_it_do_not_count() {
    let (key, own) = (TokenKey::p256("k"), TokenKey::p256("own"));
    let rights = rights(&[&key]);
    for critical in [json!(["exp"]), json!([]), json!(["b64"])] {
        let header = json!({ "alg": "ES256", "kid": "k", "crit": critical, "b64": true });
        let outcome = accepted(&rights, &key.token_with(&header, &good()));
        assert_eq!(outcome, refused(Unauthenticated::Malformed), "{critical}");
    }
    let header =
        json!({ "alg": "ES256", "kid": "k", "jwk": own.jwk(), "jku": "http://127.0.0.1:1/" });
    let outcome = accepted(&rights, &own.token_with(&header, &good()));
    assert_eq!(outcome, refused(Unauthenticated::Signature));
}

#[test]
fn keys_of_another_kind_use_or_size_are_left_out() {
    let good = TokenKey::p256("k").jwk();
    let changed = |name: &str, value: Value| {
        let mut key = good.clone();
        key[name] = value;
        key
    };
    let rsa = TokenKey::rsa("k").jwk();
    let small = URL_SAFE_NO_PAD.encode([0xff; 128]);
    let small = json!({ "kty": "RSA", "n": small, "e": rsa["e"] });
    let count = |keys: Value| KeySet::parse(&json!({ "keys": keys }).to_string()).unwrap().len();
    assert_eq!(count(json!([good, rsa])), 2);
    assert_eq!(
        count(json!([changed("use", json!("sig")), changed("key_ops", json!(["verify"]))])),
        2
    );
    for key in [
        changed("use", json!("enc")),
        changed("key_ops", json!(["sign"])),
        changed("crv", json!("P-521")),
        changed("crv", json!("P-384")),
        changed("x", json!("AAAA")),
        changed("x", json!("!")),
        changed("kty", json!("AKP")),
        small,
        json!({}),
        json!("key"),
        Value::Null,
    ] {
        assert_eq!(count(json!([key])), 0, "{key}");
    }
    let many = |count: usize| KeySet::parse(&json!({ "keys": vec![&good; count] }).to_string());
    assert_eq!(many(64).unwrap().len(), 64);
    assert_eq!(many(65).unwrap_err(), KeySetError::Many);
    for text in ["", "{}", "[]", "null", "{\"keys\": 5}", "<html>", "{\"keys\": []"] {
        assert_eq!(KeySet::parse(text).unwrap_err(), KeySetError::NotAKeySet, "{text}");
    }
}

#[test]
fn key_that_names_its_algorithm_is_for_that_one() {
    let key = TokenKey::rsa("k");
    let mut jwk = key.jwk();
    jwk["alg"] = "RS256".into();
    let keys = KeySet::parse(&json!({ "keys": [jwk] }).to_string()).unwrap();
    let keys = BTreeMap::from([("corp".into(), Arc::new(keys))]);
    let rights = rights(&[]).with_key_sets(keys);
    assert!(accepted(&rights, &key.token("RS256", &good())).is_ok());
    let outcome = accepted(&rights, &key.token("PS256", &good()));
    assert_eq!(outcome, refused(Unauthenticated::Algorithm));
}

#[test]
fn issuer_whose_keys_are_not_here_is_away_and_no_other() {
    let key = TokenKey::p256("k");
    let rights = rights(&[&key]);
    let mut keys = rights.key_sets().clone();
    keys.remove("corp");
    let rights = rights.with_key_sets(keys);
    let away = Err(NotAccepted::KeysAway("corp".into()));
    assert_eq!(accepted(&rights, &key.token("ES256", &good())), away);
    let narrow = with(json!({ "iss": "narrow", "aud": "a", "email": "x" }));
    assert!(accepted(&rights, &key.token("ES256", &narrow)).is_ok());
}

#[test]
fn last_four_tokens_of_a_connection_are_known_until_they_end_or_the_rights_change() {
    let key = TokenKey::p256("k");
    let rights = rights(&[&key]);
    let now = Duration::from_secs(NOW);
    let (mut cache, mut headers) = (BearerCache::default(), Vec::new());
    for number in 0..5 {
        let token = key.token("ES256", &with(json!({ "sub": format!("svc-{number}") })));
        let header = format!("Bearer {token}").into_bytes();
        let caller = rights.caller(Credential::read([&*header]).unwrap(), now).unwrap();
        cache.keep(&header, 7, &caller);
        headers.push(header);
    }
    let known = |cache: &mut BearerCache, generation, now| {
        let known = headers.iter().map(|header| cache.find(header, generation, now));
        let known = known.map(|caller| caller.map(|caller| caller.identity.to_string()));
        known.collect::<Vec<_>>()
    };
    let name = |number: u32| Some(format!("jwt:corp/svc-{number}"));
    assert_eq!(known(&mut cache, 7, now), [None, name(1), name(2), name(3), name(4)]);
    let end = Duration::from_secs(NOW + 660);
    assert_eq!(known(&mut cache, 7, end - Duration::from_nanos(1))[4], name(4));
    assert_eq!(known(&mut cache, 7, end), [const { None }; 5], "expired");
    assert_eq!(known(&mut cache, 7, now)[4], name(4));
    assert_eq!(known(&mut cache, 8, now), [const { None }; 5], "other rights");
    assert_eq!(known(&mut cache, 7, now), [const { None }; 5], "dropped");
    let open = Rights::open();
    let anybody = open.caller(Credential::Missing, now).unwrap();
    cache.keep(b"Bearer x", 7, &anybody);
    assert!(cache.find(b"Bearer x", 7, now).is_none(), "no token, so nothing is kept");
}

/// The claims of a projected service account token, as the docs of Kubernetes show them.
fn service_account() -> Value {
    json!({
        "aud": ["fetch-proxy"],
        "exp": NOW + 3600,
        "iat": NOW,
        "iss": "https://kubernetes.default.svc.cluster.local",
        "jti": "ea28ed49-2e11-4280-9ec5-bc3d1d84661a",
        "kubernetes.io": {
            "namespace": "orders",
            "node": { "name": "127.0.0.1", "uid": "58456cb0-dd00-45ed-b797-5578fdceaced" },
            "pod": { "name": "worker-69cbfb9798-jv9gn", "uid": "778a530c-b3f4-47c0-9cd5-ab018fb64f33" },
            "serviceaccount": { "name": "worker", "uid": "a087d5a0-e1dd-43ec-93ac-f13d89cd13af" },
            "warnafter": NOW + 3000,
        },
        "nbf": NOW,
        "sub": "system:serviceaccount:orders:worker",
    })
}

#[test]
fn service_account_is_named_by_both_its_claims() {
    let key = TokenKey::rsa("k");
    let rights = rights(&[&key]);
    let outcome = |claims: &Value| accepted(&rights, &key.token("RS256", claims));
    assert_eq!(outcome(&service_account()), Ok(("k8s:orders/worker".to_owned(), NOW + 3660)));
    let private = Unauthenticated::Claim("kubernetes.io");
    let account = |namespace: Value, name: Value| json!({ "kubernetes.io": { "namespace": namespace, "serviceaccount": { "name": name } } });
    for (changes, why) in [
        (json!({ "kubernetes.io": null }), private),
        (json!({ "kubernetes.io": "orders" }), private),
        (json!({ "kubernetes.io": { "namespace": "orders" } }), private),
        (account(json!("orders"), json!(5)), private),
        (account(json!("orders"), json!("")), private),
        (account(json!("orders/worker"), json!("x")), private),
        (account(json!("orders:worker"), json!("x")), private),
        (account(json!("orders"), json!("admin")), Unauthenticated::Claim("sub")),
        (account(json!("other"), json!("worker")), Unauthenticated::Claim("sub")),
        (json!({ "sub": null }), Unauthenticated::Claim("sub")),
        (json!({ "sub": "orders:worker" }), Unauthenticated::Claim("sub")),
        (json!({ "aud": ["https://kubernetes.default.svc"] }), Unauthenticated::Audience),
        (json!({ "exp": NOW + 366 * 24 * 3600 }), Unauthenticated::Lifetime),
    ] {
        let claims = changed(service_account(), changes.clone());
        assert_eq!(outcome(&claims), refused(why), "{changes}");
    }
    // Another issuer cannot name a service account.
    let claims = changed(service_account(), json!({ "iss": ISSUER, "aud": "other" }));
    let (identity, _) = outcome(&claims).unwrap();
    assert_eq!(identity, "jwt:corp/system:serviceaccount:orders:worker");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn any_bearer_is_judged_without_a_panic_and_is_not_accepted(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        text in "[A-Za-z0-9_-]{0,60}\\.[A-Za-z0-9_-]{0,60}\\.[A-Za-z0-9_-]{0,60}",
        at in any::<prop::sample::Index>(),
        byte: u8,
    ) {
        let key = TokenKey::p256("k");
        let rights = rights(&[&key]);
        let judge = |header: &[u8]| {
            let credential = Credential::read([header])?;
            rights.caller(credential, Duration::from_secs(NOW))
        };
        let accepts = |token: &[u8]| judge(&[b"Bearer ", token].concat()).is_ok();
        prop_assert!(judge(&bytes).is_err());
        prop_assert!(!accepts(&bytes) && !accepts(text.as_bytes()));
        // Three parts, each of which is any bytes.
        let parts: Vec<_> = bytes.chunks(100).map(|part| URL_SAFE_NO_PAD.encode(part)).collect();
        prop_assert!(!accepts(parts.join(".").as_bytes()));
        // A good token with one other byte. Bits at the end of base64 that are not used are refused too.
        let good = key.token("ES256", &good()).into_bytes();
        prop_assert!(accepts(&good));
        let mut changed = good.clone();
        let at = at.index(changed.len());
        changed[at] = byte;
        prop_assert_eq!(accepts(&changed), changed == good);
    }

    #[test]
    fn any_key_set_is_read_without_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..300),
        numbers in prop::collection::vec("[A-Za-z0-9_-]{0,90}", 3),
        at in any::<prop::sample::Index>(),
        byte: u8,
    ) {
        let token = TokenKey::p256("k").token("ES256", &good());
        let judge = |text: &str| {
            let Ok(keys) = KeySet::parse(text) else { return false };
            let keys = BTreeMap::from([("corp".into(), Arc::new(keys))]);
            accepted(&rights(&[]).with_key_sets(keys), &token).is_ok()
        };
        prop_assert!(!judge(&String::from_utf8_lossy(&bytes)));
        let [x, y, n] = &numbers[..] else { unreachable!() };
        let keys = json!({ "keys": [
            { "kty": "EC", "crv": "P-256", "kid": "k", "x": x, "y": y },
            { "kty": "RSA", "kid": "k", "n": n, "e": x },
            { "kty": "OKP", "crv": "Ed25519", "x": x },
        ] });
        prop_assert!(!judge(&keys.to_string()));
        let mut good = key_set(&[&TokenKey::rsa("k"), &TokenKey::p256("k")]).into_bytes();
        let at = at.index(good.len());
        good[at] = byte;
        prop_assert!(!judge(&String::from_utf8_lossy(&good)));
    }
}

#[test]
fn largest_bearer_and_largest_key_set_are_judged_in_bounded_time() {
    let key = TokenKey::rsa("k");
    let token = key.token("RS256", &with(json!({ "sub": "s", "pad": "x".repeat(5000) })));
    assert!(token.len() < 8 * 1024 - 7 && accepted(&rights(&[&key]), &token).is_ok());
    let deep = format!("{}{}", "[".repeat(5000), "]".repeat(5000));
    let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
    let bearer = format!("{}.{}.AAAA", part("{\"alg\":\"RS256\"}"), part(&deep[..5000]));
    assert_eq!(accepted(&rights(&[&key]), &bearer), refused(Unauthenticated::Malformed));
    let too_long = key.token("RS256", &with(json!({ "pad": "x".repeat(9000) })));
    assert_eq!(accepted(&rights(&[&key]), &too_long), refused(Unauthenticated::Malformed));
    // 256 KiB of brackets: the reader of JSON has a bound of its own.
    assert_eq!(KeySet::parse(&"[".repeat(256 * 1024)).unwrap_err(), KeySetError::NotAKeySet);
    let nested = format!("{{\"keys\": [{}]}}", "{\"a\":".repeat(50_000));
    assert_eq!(KeySet::parse(&nested).unwrap_err(), KeySetError::NotAKeySet);
}
