//! Public keys of issuers, and signatures of tokens. The only file that names the library of tokens. The library brings
//! no cryptography of its own here: it asks the verifiers of this file, which are those of ring.

use jsonwebtoken::{
    Algorithm, AlgorithmFamily, DecodingKey, DecodingKeyKind, Validation,
    crypto::{CryptoProvider, JwtVerifier, KeyUtils},
    decode,
    errors::{ErrorKind, new_error},
    jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse},
    signature::{self as traits, Verifier},
};
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256,
    RSA_PSS_2048_8192_SHA384, RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents,
    UnparsedPublicKey, VerificationAlgorithm,
};

use super::token_algorithm::{KeyFamily, TokenAlgorithm};

/// The claims of a token.
pub(super) type Claims = serde_json::Map<String, serde_json::Value>;

/// Sizes of the modulus of RSA keys that ring accepts, in bytes.
const RSA_BYTES: std::ops::RangeInclusive<usize> = 256..=1024;

/// The library asks this for all cryptography. It signs nothing.
static RING: CryptoProvider = CryptoProvider {
    signer_factory: |_, _| Err(new_error(ErrorKind::UnsupportedAlgorithm)),
    verifier_factory: verifier,
    key_utils: KeyUtils::new_unimplemented(),
};

/// A public key that signatures are checked with.
pub(super) struct VerifyingKey {
    key: DecodingKey,
    family: KeyFamily,
    /// The name of the key in the header of a token.
    id: Option<Box<str>>,
    /// The one algorithm that the key is for, if it says so.
    algorithm: Option<Box<str>>,
}

/// The reason why a token has no claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SignatureFault {
    /// The token cannot be read.
    Malformed,
    /// The signature is not by this key.
    Signature,
}

impl VerifyingKey {
    /// Reads a key of a key set. `None`: it cannot verify a signature that is accepted here.
    pub(super) fn read(jwk: &serde_json::Value) -> Option<Self> {
        // The library has one provider in a process. A second call changes nothing.
        let _ = RING.install_default();
        let parsed: Jwk = serde_json::from_value(jwk.clone()).ok()?;
        let common = &parsed.common;
        if common.public_key_use.as_ref().is_some_and(|usage| *usage != PublicKeyUse::Signature)
            || common
                .key_operations
                .as_ref()
                .is_some_and(|all| !all.contains(&KeyOperations::Verify))
        {
            return None;
        }
        let key = DecodingKey::from_jwk(&parsed).ok()?;
        let family = family(&parsed.algorithm, key.kind())?;
        let algorithm = jwk.get("alg").and_then(|name| name.as_str()).map(Box::from);
        Some(Self { key, family, id: common.key_id.as_deref().map(Box::from), algorithm })
    }

    /// Whether a token may name the key by this.
    pub(super) fn has_id(&self, id: &str) -> bool {
        self.id.as_deref() == Some(id)
    }

    /// Whether the key is for this algorithm.
    pub(super) fn fits(&self, algorithm: TokenAlgorithm) -> bool {
        let declared = self.algorithm.as_deref().is_none_or(|name| name == algorithm.name());
        declared && self.family == algorithm.family()
    }

    /// The claims of a token with this algorithm in its header, if the key has signed it. No claim is judged.
    ///
    /// # Errors
    /// See [`SignatureFault`].
    pub(super) fn claims(
        &self,
        token: &str,
        algorithm: TokenAlgorithm,
    ) -> Result<Claims, SignatureFault> {
        let mut signature_alone = Validation::new(library(algorithm));
        signature_alone.required_spec_claims.clear();
        signature_alone.validate_exp = false;
        signature_alone.validate_nbf = false;
        signature_alone.validate_aud = false;
        let token = decode::<Claims>(token, &self.key, &signature_alone);
        token.map(|token| token.claims).map_err(|error| {
            let forged = matches!(error.kind(), ErrorKind::InvalidSignature);
            if forged { SignatureFault::Signature } else { SignatureFault::Malformed }
        })
    }
}

/// The kind of a key, if its curve and its size are accepted.
fn family(parameters: &AlgorithmParameters, key: &DecodingKeyKind) -> Option<KeyFamily> {
    match (parameters, key) {
        (AlgorithmParameters::RSA(_), DecodingKeyKind::RsaModulusExponent { n, .. }) => {
            RSA_BYTES.contains(&without_zeros(n).len()).then_some(KeyFamily::Rsa)
        }
        (AlgorithmParameters::EllipticCurve(key), DecodingKeyKind::SecretOrDer(point)) => {
            // A point is a byte and two coordinates.
            match (&key.curve, point.len()) {
                (EllipticCurve::P256, 65) => Some(KeyFamily::P256),
                (EllipticCurve::P384, 97) => Some(KeyFamily::P384),
                _ => None,
            }
        }
        (AlgorithmParameters::OctetKeyPair(key), DecodingKeyKind::SecretOrDer(point)) => {
            let fits = key.curve == EllipticCurve::Ed25519 && point.len() == 32;
            fits.then_some(KeyFamily::Ed25519)
        }
        // A key set can hold shared secrets too. No token is checked by one.
        _ => None,
    }
}

fn library(algorithm: TokenAlgorithm) -> Algorithm {
    match algorithm {
        TokenAlgorithm::Rs256 => Algorithm::RS256,
        TokenAlgorithm::Rs384 => Algorithm::RS384,
        TokenAlgorithm::Rs512 => Algorithm::RS512,
        TokenAlgorithm::Ps256 => Algorithm::PS256,
        TokenAlgorithm::Ps384 => Algorithm::PS384,
        TokenAlgorithm::Ps512 => Algorithm::PS512,
        TokenAlgorithm::Es256 => Algorithm::ES256,
        TokenAlgorithm::Es384 => Algorithm::ES384,
        TokenAlgorithm::EdDsa => Algorithm::EdDSA,
    }
}

/// Checks the signatures of one algorithm by one key.
struct RingVerifier {
    algorithm: Algorithm,
    scheme: Scheme,
    key: DecodingKey,
}

/// The implementation of an algorithm.
#[derive(Clone, Copy)]
enum Scheme {
    Rsa(&'static RsaParameters),
    Curve(&'static dyn VerificationAlgorithm),
}

fn verifier(
    algorithm: &Algorithm,
    key: &DecodingKey,
) -> jsonwebtoken::errors::Result<Box<dyn JwtVerifier>> {
    let scheme = scheme(*algorithm).filter(|_| key.family() == algorithm.family());
    let scheme = scheme.ok_or_else(|| new_error(ErrorKind::InvalidAlgorithm))?;
    Ok(Box::new(RingVerifier { algorithm: *algorithm, scheme, key: key.clone() }))
}

fn scheme(algorithm: Algorithm) -> Option<Scheme> {
    if algorithm.family() == AlgorithmFamily::Hmac {
        return None;
    }
    let named = |known: &TokenAlgorithm| library(*known) == algorithm;
    Some(match TokenAlgorithm::ALL.into_iter().find(named)? {
        TokenAlgorithm::Rs256 => Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA256),
        TokenAlgorithm::Rs384 => Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA384),
        TokenAlgorithm::Rs512 => Scheme::Rsa(&RSA_PKCS1_2048_8192_SHA512),
        TokenAlgorithm::Ps256 => Scheme::Rsa(&RSA_PSS_2048_8192_SHA256),
        TokenAlgorithm::Ps384 => Scheme::Rsa(&RSA_PSS_2048_8192_SHA384),
        TokenAlgorithm::Ps512 => Scheme::Rsa(&RSA_PSS_2048_8192_SHA512),
        TokenAlgorithm::Es256 => Scheme::Curve(&ECDSA_P256_SHA256_FIXED),
        TokenAlgorithm::Es384 => Scheme::Curve(&ECDSA_P384_SHA384_FIXED),
        TokenAlgorithm::EdDsa => Scheme::Curve(&ED25519),
    })
}

impl Verifier<Vec<u8>> for RingVerifier {
    fn verify(&self, message: &[u8], signature: &Vec<u8>) -> Result<(), traits::Error> {
        let verified = match (self.scheme, self.key.kind()) {
            (Scheme::Rsa(parameters), DecodingKeyKind::RsaModulusExponent { n, e }) => {
                // ring wants numbers without zeros in front. Some issuers write them.
                let key = RsaPublicKeyComponents { n: without_zeros(n), e: without_zeros(e) };
                key.verify(parameters, message, signature)
            }
            (Scheme::Curve(curve), DecodingKeyKind::SecretOrDer(point)) => {
                UnparsedPublicKey::new(curve, point).verify(message, signature)
            }
            (Scheme::Rsa(_), DecodingKeyKind::SecretOrDer(_))
            | (Scheme::Curve(_), DecodingKeyKind::RsaModulusExponent { .. }) => {
                return Err(traits::Error::new());
            }
        };
        verified.map_err(|_| traits::Error::new())
    }
}

impl JwtVerifier for RingVerifier {
    fn algorithm(&self) -> Algorithm {
        self.algorithm
    }
}

fn without_zeros(number: &[u8]) -> &[u8] {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    &number[zeros..]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn key_and_algorithm_of_two_families_make_no_verifier() {
        let rsa = DecodingKey::from_rsa_raw_components(&[1; 256], &[1, 0, 1]);
        let curve = DecodingKey::from_ec_der(&[4; 65]);
        let secret = DecodingKey::from_secret(b"secret").unwrap();
        assert!(verifier(&Algorithm::RS256, &rsa).is_ok());
        assert!(verifier(&Algorithm::ES256, &curve).is_ok());
        for (algorithm, key) in [
            (Algorithm::HS256, &rsa),
            (Algorithm::HS256, &curve),
            (Algorithm::HS256, &secret),
            (Algorithm::HS512, &secret),
            (Algorithm::RS256, &curve),
            (Algorithm::RS256, &secret),
            (Algorithm::ES256, &rsa),
            (Algorithm::EdDSA, &curve),
        ] {
            assert!(verifier(&algorithm, key).is_err(), "{algorithm:?}");
        }
    }
}
