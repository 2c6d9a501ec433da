//! Places in a policy file: the line and the column of a mistake, and of any entry by its path.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

/// A mistake in a policy file, with its place. The first line and the first column are 1.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {message}")]
pub struct PolicyError {
    /// The line.
    pub line: usize,
    /// The column.
    pub column: usize,
    /// The mistake, for people.
    pub message: String,
}

impl PolicyError {
    /// A mistake in the entry at this path.
    pub(super) fn at(text: &str, path: &[PathStep<'_>], message: impl Into<String>) -> Self {
        let (line, column) = locate(text, path);
        Self { line, column, message: message.into() }
    }

    /// A mistake that the YAML library found.
    pub(super) fn of_yaml(error: &yaml_serde::Error) -> Self {
        let (line, column) = place(error);
        let mut message = without_places(&error.to_string());
        // An unquoted star begins an alias in YAML.
        if message.contains("alias") || message.contains("unknown anchor") {
            message += "; quote a pattern that begins with a star: \"*\"";
        }
        Self { line, column, message }
    }
}

/// One step on the way to an entry.
#[derive(Debug, Clone, Copy)]
pub(super) enum PathStep<'s> {
    /// The value of a key.
    Key(&'s str),
    /// The entry of a list.
    Entry(usize),
}

/// The line and the column of an entry. The YAML library tells a place only with an error. So the file is
/// read again, up to an error at the entry.
pub(super) fn locate(text: &str, path: &[PathStep<'_>]) -> (usize, usize) {
    let read = Walk(path).deserialize(yaml_serde::Deserializer::from_str(text));
    read.err().map_or((1, 1), |error| place(&error))
}

fn place(error: &yaml_serde::Error) -> (usize, usize) {
    error.location().map_or((1, 1), |place| (place.line(), place.column()))
}

/// The message without the places that the library writes into it.
fn without_places(message: &str) -> String {
    let mut pieces = message.split(" at line ");
    let mut cleaned = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let rest = piece.trim_start_matches(|c: char| c.is_ascii_digit());
        let rest = rest.strip_prefix(" column ").unwrap_or(rest);
        cleaned += rest.trim_start_matches(|c: char| c.is_ascii_digit());
    }
    cleaned
}

/// Walks to an entry, and fails there.
struct Walk<'w>(&'w [PathStep<'w>]);

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        match self.0.first() {
            // A path that the file does not have ends early, at the last entry that it has.
            None => deserializer.deserialize_any(self),
            Some(PathStep::Key(_)) => deserializer.deserialize_map(self),
            Some(PathStep::Entry(_)) => deserializer.deserialize_seq(self),
        }
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("another entry")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        if let Some((PathStep::Key(wanted), rest)) = self.0.split_first() {
            while let Some(key) = map.next_key::<String>()? {
                if key == *wanted {
                    return map.next_value_seed(Walk(rest));
                }
                map.next_value::<IgnoredAny>()?;
            }
        }
        Err(A::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        if let Some((PathStep::Entry(wanted), rest)) = self.0.split_first() {
            for _ in 0..*wanted {
                list.next_element::<IgnoredAny>()?;
            }
            list.next_element_seed(Walk(rest))?;
        }
        Err(A::Error::custom("here"))
    }
}
