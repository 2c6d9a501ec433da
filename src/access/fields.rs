//! The fields of a policy file, each read with its bounds. A mistake is found at its own field, so that the
//! YAML library adds the place.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize,
    de::{Deserializer, Error, SeqAccess, Visitor},
};

use super::{identity::is_name, pattern::Pattern, verbs::VerbSet};

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
