//! The fields of a policy file, each read with its bounds. A mistake is found at its own field, so that the
//! YAML library adds the place.

use std::{fmt, marker::PhantomData, time::Duration};

use serde::{
    Deserialize,
    de::{Deserializer, Error, SeqAccess, Visitor},
};

use super::{identity::is_name, pattern::Pattern, token_algorithm::TokenAlgorithm, verbs::VerbSet};

/// Reads a scalar as text.
fn scalar<'de, D: Deserializer<'de>, T>(
    deserializer: D,
    expected: &'static str,
    read: fn(&str) -> Result<T, String>,
) -> Result<T, D::Error> {
    struct Scalar<T>(&'static str, fn(&str) -> Result<T, String>);

    impl<T> Visitor<'_> for Scalar<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<T, E> {
            (self.1)(text).map_err(E::custom)
        }
    }
    deserializer.deserialize_str(Scalar(expected, read))
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "a pattern", Self::parse)
    }
}

impl<'de> Deserialize<'de> for VerbSet {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "a verb", Self::parse)
    }
}

/// The version of the grammar. There is one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Version;

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "the version 1", |text| match text {
            "1" => Ok(Self),
            text => Err(format!("`{text}` is no version that is known: it must be 1")),
        })
    }
}

/// The name of a principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Name(pub(super) Box<str>);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "a name", |text| match is_name(text) {
            true => Ok(Self(text.into())),
            false => Err(format!(
                "`{text}` is no name: a name has 1 to 64 of a-z, 0-9, `.`, `_` and `-`, and begins \
                 with a letter or a digit"
            )),
        })
    }
}

/// A principal in a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Whom {
    /// Each principal: `*`.
    Everybody,
    /// The principal of this name.
    Named(Box<str>),
}

impl<'de> Deserialize<'de> for Whom {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "the name of a principal", |text| match text {
            "*" => Ok(Self::Everybody),
            text if text.contains(['*', '?']) => {
                Err("a rule names principals, or is for all of them by \"*\"".to_owned())
            }
            text => Ok(Self::Named(text.into())),
        })
    }
}

/// The path of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FilePath(pub(super) Box<str>);

impl<'de> Deserialize<'de> for FilePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "the path of a file", |text| match text {
            "" => Err("the path of a file is missing".to_owned()),
            path => Ok(Self(path.into())),
        })
    }
}

impl<'de> Deserialize<'de> for TokenAlgorithm {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "an algorithm", Self::parse)
    }
}

/// The name of an issuer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct IssuerName(pub(super) Box<str>);

impl<'de> Deserialize<'de> for IssuerName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "the name of an issuer", |text| {
            let fits = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-');
            match (1..=32).contains(&text.len()) && text.bytes().all(fits) {
                true => Ok(Self(text.into())),
                false => {
                    Err(format!("`{text}` is no name: a name has 1 to 32 of a-z, 0-9 and `-`"))
                }
            }
        })
    }
}

/// A text that is not empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TextField(pub(super) Box<str>);

impl<'de> Deserialize<'de> for TextField {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "a text", |text| match text {
            "" => Err("the text is missing".to_owned()),
            text => Ok(Self(text.into())),
        })
    }
}

/// A time of `FROM` to `TO` seconds, with its unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TimeField<const FROM: u64, const TO: u64>(pub(super) Duration);

impl<'de, const FROM: u64, const TO: u64> Deserialize<'de> for TimeField<FROM, TO> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        scalar(deserializer, "a time such as 60s", |text| {
            let time = humantime::parse_duration(text).ok();
            let (least, most) = (Duration::from_secs(FROM), Duration::from_secs(TO));
            let time = time.filter(|time| (least..=most).contains(time));
            time.map(Self).ok_or_else(|| {
                let [least, most] = [least, most].map(humantime::format_duration);
                format!("`{text}` is no time from {least} to {most}, such as 60s")
            })
        })
    }
}

/// A list of `LEAST` to `MOST` entries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct List<T, const LEAST: usize, const MOST: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const LEAST: usize, const MOST: usize> Deserialize<'de>
    for List<T, LEAST, MOST>
{
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(ListVisitor(PhantomData))
    }
}

struct ListVisitor<T, const LEAST: usize, const MOST: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const LEAST: usize, const MOST: usize> Visitor<'de>
    for ListVisitor<T, LEAST, MOST>
{
    type Value = List<T, LEAST, MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list, such as [a, b]")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = list.next_element()? {
            if entries.len() == MOST {
                return Err(A::Error::custom(format!("the list has more than {MOST} entries")));
            }
            entries.push(entry);
        }
        if entries.len() < LEAST {
            return Err(A::Error::custom(format!("the list has fewer than {LEAST} entries")));
        }
        Ok(List(entries))
    }
}

/// A whole number from 1 to `MOST`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Number<const MOST: u64>(pub(super) u64);

impl<'de, const MOST: u64> Deserialize<'de> for Number<MOST> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_u64(NumberVisitor::<MOST>)
    }
}

struct NumberVisitor<const MOST: u64>;

impl<const MOST: u64> Visitor<'_> for NumberVisitor<MOST> {
    type Value = Number<MOST>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a whole number from 1 to {MOST}")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<Number<MOST>, E> {
        if (1..=MOST).contains(&number) {
            return Ok(Number(number));
        }
        Err(E::custom(format!("must be a whole number from 1 to {MOST}, not {number}")))
    }
}
