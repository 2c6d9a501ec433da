//! Reads who a client is from the leaf of its certificate. The leaf was verified before. Pure.
//!
//! In this order:
//! 1. One URI with the scheme `spiffe` is the identity, if the certificate is an X.509-SVID of SPIFFE. Such a
//!    certificate with more URIs, or that may sign others, is refused.
//! 2. Otherwise each DNS name is an identity, as `dns:name` in lower case.
//! 3. Otherwise there is no identity. The common name is never read, nor are addresses.

use std::{sync::Arc, time::Duration};

use x509_parser::{
    certificate::{Validity, X509Certificate},
    extensions::{GeneralName, KeyUsage},
    prelude::FromDer as _,
    time::ASN1Time,
};

use crate::access::{CertifiedClient, Identity, IdentityKind};

const SPIFFE: &str = "spiffe://";
/// Longest trust domain of a SPIFFE ID, in bytes (SPIFFE-ID, section 2.1).
const MAX_TRUST_DOMAIN_BYTES: usize = 255;
/// Most DNS names of a certificate. Each of them may be looked for in the policy, at each call.
const MAX_DNS_NAMES: usize = 100;

/// The reason why a verified certificate is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnfitCertificate {
    /// It cannot be read.
    #[error("the client certificate cannot be read")]
    Unreadable,
    /// It has a SPIFFE ID and another URI.
    #[error("the client certificate has a SPIFFE ID and another URI")]
    ManyUris,
    /// Its SPIFFE ID is not well formed, or names a trust domain alone.
    #[error("the SPIFFE ID of the client certificate is not that of a workload")]
    SpiffeId,
    /// It has many names.
    #[error("the client certificate has more than {MAX_DNS_NAMES} DNS names")]
    ManyNames,
    /// It has a SPIFFE ID and may sign certificates or revocation lists.
    #[error("the client certificate has a SPIFFE ID and may sign others")]
    Signing,
}

/// Reads a leaf, as DER.
///
/// # Errors
/// See [`UnfitCertificate`].
pub fn certified_client(leaf: &[u8]) -> Result<CertifiedClient, UnfitCertificate> {
    let unreadable = |_| UnfitCertificate::Unreadable;
    let digest = digest(leaf);
    let (_, leaf) = X509Certificate::from_der(leaf).map_err(|_| UnfitCertificate::Unreadable)?;
    let not_after = seconds(leaf.validity().not_after);
    let names = leaf.subject_alternative_name().map_err(unreadable)?;
    let names = names.map_or(&[][..], |names| &names.value.general_names);
    let uris: Vec<&str> = names.iter().filter_map(uri).collect();
    let identities = if uris.iter().any(|uri| is_spiffe(uri)) {
        let [id] = *uris else { return Err(UnfitCertificate::ManyUris) };
        let authority = leaf.basic_constraints().map_err(unreadable)?;
        let usage = leaf.key_usage().map_err(unreadable)?;
        let signs = |usage: &KeyUsage| usage.key_cert_sign() || usage.crl_sign();
        if authority.is_some_and(|authority| authority.value.ca)
            || usage.is_some_and(|usage| signs(usage.value))
        {
            return Err(UnfitCertificate::Signing);
        }
        [workload(id).ok_or(UnfitCertificate::SpiffeId)?].into()
    } else {
        let identities: Arc<[Identity]> = names.iter().filter_map(dns).collect();
        if identities.len() > MAX_DNS_NAMES {
            return Err(UnfitCertificate::ManyNames);
        }
        identities
    };
    Ok(CertifiedClient { identities, not_after, digest })
}

fn digest(leaf: &[u8]) -> Arc<str> {
    let digest = ring::digest::digest(&ring::digest::SHA256, leaf);
    let digits = digest.as_ref().iter().take(8).map(|byte| format!("{byte:02x}"));
    digits.collect::<String>().into()
}

/// The begin and the end of a certificate, since the Unix epoch. `None`: it cannot be read.
pub(super) fn validity(certificate: &[u8]) -> Option<(Duration, Duration)> {
    let (_, certificate) = X509Certificate::from_der(certificate).ok()?;
    let Validity { not_before, not_after } = *certificate.validity();
    Some((seconds(not_before), seconds(not_after)))
}

fn seconds(time: ASN1Time) -> Duration {
    Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

fn uri<'n>(name: &GeneralName<'n>) -> Option<&'n str> {
    if let GeneralName::URI(uri) = name { Some(uri) } else { None }
}

/// The identity of a DNS name. A wildcard names no client.
fn dns(name: &GeneralName<'_>) -> Option<Identity> {
    let GeneralName::DNSName(name) = name else { return None };
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let whole = (1..=253).contains(&name.len()) && name.chars().all(plain);
    let name = whole.then(|| name.to_ascii_lowercase())?;
    Identity::new(IdentityKind::Dns, &name).ok()
}

/// In any case of letters: a certificate must not be read as one without a SPIFFE ID.
fn is_spiffe(uri: &str) -> bool {
    uri.get(..SPIFFE.len() - 2).is_some_and(|scheme| scheme.eq_ignore_ascii_case("spiffe:"))
}

/// The identity of a valid SPIFFE ID with a path (SPIFFE-ID, section 2). The length is that of the identity.
fn workload(id: &str) -> Option<Identity> {
    let (domain, path) = id.strip_prefix(SPIFFE)?.split_once('/')?;
    let of_domain = |c: char| matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_');
    let of_path = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let segment =
        |segment: &str| !matches!(segment, "" | "." | "..") && segment.chars().all(of_path);
    let is_whole = (1..=MAX_TRUST_DOMAIN_BYTES).contains(&domain.len())
        && domain.chars().all(of_domain)
        && path.split('/').all(segment);
    is_whole.then(|| Identity::parse(id).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType,
    };

    fn uri(text: &str) -> SanType {
        SanType::URI(text.try_into().unwrap())
    }

    fn dns(text: &str) -> SanType {
        SanType::DnsName(text.try_into().unwrap())
    }

    fn read(
        names: &[SanType],
        change: fn(&mut CertificateParams),
    ) -> Result<Vec<String>, UnfitCertificate> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = names.to_vec();
        change(&mut params);
        let leaf = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let client = certified_client(leaf.der())?;
        Ok(client.identities.iter().map(|identity| identity.as_str().to_owned()).collect())
    }

    /// The table of X.509-SVID (section 2, 4 and 5.2) and SPIFFE-ID (section 2).
    #[test]
    fn spiffe_id_is_the_identity_of_a_whole_svid_alone() {
        let id = "spiffe://prod.example/ns/orders/sa/worker";
        let own = || Ok(vec![id.to_owned()]);
        let plain: fn(&mut CertificateParams) = |_| {};
        let (many, malformed) = (Err(UnfitCertificate::ManyUris), Err(UnfitCertificate::SpiffeId));
        for (names, change, expected) in [
            (vec![uri(id)], plain, own()),
            (vec![dns("worker.example"), uri(id)], plain, own()),
            (vec![uri(id), uri(id)], plain, many.clone()),
            (vec![uri(id), uri("https://worker.example/")], plain, many.clone()),
            (vec![uri("https://worker.example/"), uri(id)], plain, many),
            (vec![uri("spiffe://prod.example")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/")], plain, malformed.clone()),
            (vec![uri("spiffe:///ns/orders")], plain, malformed.clone()),
            (vec![uri("SPIFFE://prod.example/ns")], plain, malformed.clone()),
            (vec![uri("spiffe://Prod.example/ns")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example:8443/ns")], plain, malformed.clone()),
            (vec![uri("spiffe://user@prod.example/ns")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/ns/../sa")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/ns//sa")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/ns/")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/ns?a=b")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/ns#a")], plain, malformed.clone()),
            (vec![uri("spiffe://prod.example/n%73")], plain, malformed.clone()),
            (vec![uri("spiffe:prod.example/ns")], plain, malformed.clone()),
            (vec![uri(&format!("spiffe://{}/ns", "d".repeat(256)))], plain, malformed.clone()),
            (vec![uri(&format!("spiffe://d/{}", "p".repeat(2048)))], plain, malformed),
            (
                vec![uri(id)],
                |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained),
                Err(UnfitCertificate::Signing),
            ),
            (
                vec![uri(id)],
                |params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign],
                Err(UnfitCertificate::Signing),
            ),
            (
                vec![uri(id)],
                |params| params.key_usages = vec![KeyUsagePurpose::CrlSign],
                Err(UnfitCertificate::Signing),
            ),
            (
                vec![uri(id)],
                |params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature],
                own(),
            ),
            (vec![uri(id)], |params| params.is_ca = IsCa::ExplicitNoCa, own()),
        ] {
            assert_eq!(read(&names, change), expected, "{names:?}");
        }
    }

    #[test]
    fn without_a_spiffe_id_each_dns_name_is_an_identity() {
        let plain: fn(&mut CertificateParams) = |_| {};
        let address = SanType::IpAddress([127, 0, 0, 1].into());
        let email = SanType::Rfc822Name("anna@worker.example".try_into().unwrap());
        for (names, expected) in [
            (
                vec![dns("Worker.Example"), dns("b.example")],
                vec!["dns:worker.example", "dns:b.example"],
            ),
            (vec![uri("https://worker.example/"), dns("a")], vec!["dns:a"]),
            (vec![dns("*.example"), dns("a b"), dns("")], vec![]),
            (vec![address, email], vec![]),
            (vec![], vec![]),
        ] {
            assert_eq!(read(&names, plain).unwrap(), expected, "{names:?}");
        }
        let names: Vec<_> = (0..=MAX_DNS_NAMES).map(|name| dns(&format!("w{name}"))).collect();
        assert_eq!(read(&names, plain), Err(UnfitCertificate::ManyNames));
        assert_eq!(read(&names[1..], plain).unwrap().len(), MAX_DNS_NAMES);
        let named: fn(&mut CertificateParams) =
            |params| params.distinguished_name.push(DnType::CommonName, "worker.example");
        assert_eq!(read(&[], named).unwrap(), Vec::<String>::new(), "the common name says nothing");
    }

    #[test]
    fn end_of_a_certificate_is_read() {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.not_after = rcgen::date_time_ymd(2030, 1, 1);
        let leaf = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
        let end = certified_client(leaf.der()).unwrap().not_after;
        assert_eq!(end, Duration::from_secs(1_893_456_000));
    }

    proptest::proptest! {
        #[test]
        fn certificate_of_any_bytes_harms_nothing(bytes: Vec<u8>, at: proptest::sample::Index, byte: u8) {
            let _ = certified_client(&bytes);
            let mut params = CertificateParams::new(vec!["a.example".to_owned()]).unwrap();
            params.subject_alt_names.push(uri("spiffe://d/p"));
            let leaf = params.self_signed(&KeyPair::generate().unwrap()).unwrap();
            let mut leaf = leaf.der().to_vec();
            let at = at.index(leaf.len());
            leaf[at] = byte;
            let _ = certified_client(&leaf);
            let _ = certified_client(&leaf[..at]);
        }
    }
}
