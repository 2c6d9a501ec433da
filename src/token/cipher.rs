//! The cipher of tokens and frames: XChaCha20-Poly1305, and the nonces for it.
//!
//! ```text
//!  key, nonce[..16] ──HChaCha20──▶ subkey ─┐
//!                     nonce[16..] ─────────┴─▶ ChaCha20-Poly1305 of ring
//! ```
//! ring has assembly for each processor, and no extended nonce. A subkey costs as much as the rest. The tokens of an answer
//! share theirs, and are often settled together: so it is [remembered](Subkey) for as long as a call lasts.

use std::fmt;

use chacha20::{R20, hchacha};
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, UnboundKey};

pub(super) const NONCE: usize = 24;
pub(super) const TAG: usize = 16;
/// The bytes of a nonce that make the subkey.
const SUBKEY_NONCE: usize = 16;

/// A number that seals one token or one frame, and no other.
pub type Nonce = [u8; NONCE];

/// The nonces of one answer, counted from a random number of 192 bits. So chance never repeats a nonce, at any number
/// of replicas. Nothing is kept from one answer to the next: a copy of the whole process, as from a snapshot of its
/// machine, draws other numbers.
#[derive(Debug)]
pub struct Nonces {
    next: Nonce,
    /// The subkey of all of them.
    pub(super) subkey: Subkey,
}

impl Nonces {
    /// All nonces from this random number on.
    pub fn from(random: Nonce) -> Self {
        Self { next: random, subkey: Subkey::default() }
    }
}

impl Iterator for Nonces {
    type Item = Nonce;

    fn next(&mut self) -> Option<Nonce> {
        let nonce = self.next;
        let count = self.next.last_chunk_mut::<{ NONCE - SUBKEY_NONCE }>()?;
        *count = u64::from_be_bytes(*count).wrapping_add(1).to_be_bytes();
        Some(nonce)
    }
}

/// The last subkey that was made, with the key and the part of the nonce that made it.
#[derive(Debug, Default)]
pub struct Subkey(Option<(Cipher, [u8; SUBKEY_NONCE], LessSafeKey)>);

/// One key.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Cipher([u8; 32]);

impl Cipher {
    pub(super) fn new(key: [u8; 32]) -> Self {
        Self(key)
    }

    /// Encrypts `body`, and returns its tag. `None`: the text has 256 GiB or more.
    pub(super) fn seal(
        &self,
        nonce: Nonce,
        subkey: &mut Subkey,
        associated: &[u8],
        body: &mut [u8],
    ) -> Option<[u8; TAG]> {
        let (key, short) = self.at(nonce, subkey)?;
        let tag = key.seal_in_place_separate_tag(short, Aad::from(associated), body).ok()?;
        tag.as_ref().try_into().ok()
    }

    /// Decrypts `body`. `None`: nobody with the key has sealed it so.
    pub(super) fn open(
        &self,
        nonce: Nonce,
        subkey: &mut Subkey,
        associated: &[u8],
        body: &mut [u8],
        tag: [u8; TAG],
    ) -> Option<()> {
        let (key, short) = self.at(nonce, subkey)?;
        let (associated, tag) = (Aad::from(associated), tag.into());
        key.open_in_place_separate_tag(short, associated, tag, body, 0..).ok().map(drop)
    }

    /// The subkey and the short nonce.
    fn at(
        self,
        nonce: Nonce,
        Subkey(last): &mut Subkey,
    ) -> Option<(&LessSafeKey, ring::aead::Nonce)> {
        let (prefix, rest) = nonce.split_first_chunk::<SUBKEY_NONCE>()?;
        let mut short = [0; NONCE_LEN];
        short[NONCE_LEN - rest.len()..].copy_from_slice(rest);
        if !last.as_ref().is_some_and(|(cipher, of, _)| (cipher, of) == (&self, prefix)) {
            let subkey = hchacha::<R20>(&self.0.into(), &(*prefix).into());
            let key = UnboundKey::new(&CHACHA20_POLY1305, &subkey).ok()?;
            *last = Some((self, *prefix, LessSafeKey::new(key)));
        }
        let (_, _, key) = last.as_ref()?;
        Some((key, ring::aead::Nonce::assume_unique_for_key(short)))
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the draft of XChaCha20-Poly1305 (draft-irtf-cfrg-xchacha-03, appendix A.3.1).
    #[test]
    fn example_of_the_draft_is_sealed_as_it_says_and_opens() {
        let key: [u8; 32] = std::array::from_fn(|index| 0x80 + index as u8);
        let nonce: Nonce = std::array::from_fn(|index| 0x40 + index as u8);
        let associated = [0x50, 0x51, 0x52, 0x53, 0xc0, 0xc1, 0xc2, 0xc3, 0xc4, 0xc5, 0xc6, 0xc7];
        let text =
            b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the \
                     future, sunscreen would be it.";
        let mut body = *text;
        let tag =
            Cipher::new(key).seal(nonce, &mut Subkey::default(), &associated, &mut body).unwrap();
        assert_eq!(body[..4], [0xbd, 0x6d, 0x17, 0x9d]);
        assert_eq!(tag, 0xc087_5924_c1c7_9879_47de_afd8_780a_cf49_u128.to_be_bytes());
        assert_eq!(
            Cipher::new(key).open(nonce, &mut Subkey::default(), &associated, &mut body, tag),
            Some(())
        );
        assert_eq!(body, *text);
    }

    #[test]
    fn remembered_subkey_serves_only_its_own_key_and_nonces() {
        let mut subkey = Subkey::default();
        let nonce = |prefix: u8, count: u8| {
            std::array::from_fn(|at| if at < SUBKEY_NONCE { prefix } else { count })
        };
        for (key, prefix, count) in [(7, 1, 1), (7, 1, 2), (8, 1, 2), (7, 1, 2), (7, 2, 2)] {
            let (cipher, nonce) = (Cipher::new([key; 32]), nonce(prefix, count));
            let (mut here, mut fresh) = (*b"text", *b"text");
            let tag = cipher.seal(nonce, &mut subkey, b"", &mut here).unwrap();
            assert_eq!(cipher.seal(nonce, &mut Subkey::default(), b"", &mut fresh), Some(tag));
            assert_eq!(here, fresh, "{key} {prefix} {count}");
            assert_eq!(cipher.open(nonce, &mut subkey, b"", &mut here, tag), Some(()));
        }
    }

    #[test]
    fn nonces_of_an_answer_differ_and_begin_anywhere() {
        let counted = |first: u8| Nonces::from([first; NONCE]).take(3).collect::<Vec<_>>();
        let with_last = |bytes: [u8; 8]| {
            let mut nonce = [255; NONCE];
            nonce[SUBKEY_NONCE..].copy_from_slice(&bytes);
            nonce
        };
        let expected =
            [with_last([255; 8]), with_last([0; 8]), with_last([0, 0, 0, 0, 0, 0, 0, 1])];
        assert_eq!(counted(255), expected);
        assert!(counted(1).iter().all(|nonce| nonce[..23] == [1; 23]));
    }
}
