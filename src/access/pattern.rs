//! Patterns: `*` is any run of characters, also none; `?` is one character; all else is itself. `*` matches
//! `/` and `.` too. There is no escape.

use std::fmt;

/// Longest pattern, in bytes. It is the longest identity.
const MAX_PATTERN_BYTES: usize = 2048;

/// A pattern, always matched against a whole text, in which capitals count.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Pattern {
    text: Box<str>,
    is_literal: bool,
}

impl Pattern {
    /// Reads a pattern.
    ///
    /// # Errors
    /// The mistake, for people.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a pattern must not be empty".to_owned());
        }
        if text.len() > MAX_PATTERN_BYTES {
            return Err(format!("a pattern must be at most {MAX_PATTERN_BYTES} bytes long"));
        }
        if text.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err("a pattern must have no space and no control character".to_owned());
        }
        Ok(Self { text: text.into(), is_literal: !text.contains(['*', '?']) })
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// The only text that it matches, if there is only one.
    pub fn literal(&self) -> Option<&str> {
        self.is_literal.then_some(&*self.text)
    }

    /// Whether every text matches.
    pub fn is_any(&self) -> bool {
        self.text.chars().all(|one| one == '*')
    }

    /// Whether the whole text matches.
    pub fn matches(&self, text: &str) -> bool {
        if self.is_literal { *self.text == *text } else { glob(&self.text, text, |_| true) }
    }

    /// Whether each text that `other` matches matches this pattern too. Some rare pairs are not found, like
    /// `?*` and `*a`: then the answer is false.
    pub fn covers(&self, other: &Self) -> bool {
        glob(&ordered(&self.text), &ordered(&other.text), |one| one != '*')
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// Matches without recursion: only the last `*` is tried again with a longer run. `is_one` says which
/// characters of the text a `?` matches.
fn glob(pattern: &str, text: &str, is_one: impl Fn(char) -> bool) -> bool {
    let (mut pattern, mut text) = (pattern, text);
    // The pattern after the last `*`, and the text after the run that this `*` has matched.
    let mut retry: Option<(&str, &str)> = None;
    loop {
        let (mut wanted, mut given) = (pattern.chars(), text.chars());
        let matched = match (wanted.next(), given.next()) {
            (Some('*'), _) => {
                pattern = wanted.as_str();
                retry = Some((pattern, text));
                continue;
            }
            (None, None) => return true,
            (Some('?'), Some(one)) => is_one(one),
            (Some(one), Some(other)) => one == other,
            (Some(_), None) | (None, Some(_)) => false,
        };
        if matched {
            (pattern, text) = (wanted.as_str(), given.as_str());
            continue;
        }
        let Some((after, from)) = retry else { return false };
        let mut from = from.chars();
        if from.next().is_none() {
            return false;
        }
        (pattern, text) = (after, from.as_str());
        retry = Some((pattern, text));
    }
}

/// The same pattern with each run of wildcards in one order: each `?` first, then at most one `*`.
fn ordered(pattern: &str) -> String {
    let (mut written, mut star) = (String::with_capacity(pattern.len()), false);
    for one in pattern.chars() {
        if one == '*' {
            star = true;
            continue;
        }
        if star && one != '?' {
            written.push('*');
            star = false;
        }
        written.push(one);
    }
    if star {
        written.push('*');
    }
    written
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        Pattern::parse(text).unwrap()
    }

    /// The definition of a pattern, by recursion.
    fn naive(pattern: &[char], text: &[char]) -> bool {
        match (pattern, text) {
            ([], []) => true,
            (['*', rest @ ..], _) => {
                naive(rest, text)
                    || text.split_first().is_some_and(|(_, tail)| naive(pattern, tail))
            }
            (['?', rest @ ..], [_, tail @ ..]) => naive(rest, tail),
            ([one, rest @ ..], [other, tail @ ..]) => one == other && naive(rest, tail),
            _ => false,
        }
    }

    fn naively(pattern: &str, text: &str) -> bool {
        let chars = |text: &str| text.chars().collect::<Vec<_>>();
        naive(&chars(pattern), &chars(text))
    }

    #[test]
    fn pattern_matches_a_whole_text_and_nothing_else() {
        for (of, text, matches) in [
            ("*", "ORDERS", true),
            ("worker-*", "worker-", true),
            ("worker-*", "worker", false),
            ("worker", "worker-1", false),
            ("worker", "Worker", false),
            ("worker-?", "worker-10", false),
            ("spiffe://a/ns/*", "spiffe://a/ns/b/sa/c", true),
            ("*.example", "a.b.example", true),
            ("a*b*c", "a-b-b-c-c", true),
            ("?", "é", true),
        ] {
            assert_eq!(pattern(of).matches(text), matches, "{of} and {text}");
        }
        for text in ["", "a b", "a\u{7}", &"a".repeat(2049)] {
            assert!(Pattern::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn covering_pattern_is_found() {
        for (of, other, covers) in [
            ("*", "key:*", true),
            ("key:*", "key:a?", true),
            ("key:a", "key:a", true),
            ("*?", "?*", true),
            ("**", "*", true),
            ("key:?", "key:a", true),
            ("key:a", "key:?", false),
            ("key:?", "key:*", false),
            ("key:a*", "key:*", false),
            ("k8s:*", "key:*", false),
        ] {
            assert_eq!(pattern(of).covers(&pattern(other)), covers, "{of} and {other}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn matcher_agrees_with_the_naive_matcher(of in "[ab*?é]{1,9}", text in "[abé*]{0,12}") {
            prop_assert_eq!(pattern(&of).matches(&text), naively(&of, &text));
        }

        #[test]
        fn covered_pattern_matches_no_more_than_its_cover(
            of in "[ab*?]{1,6}", other in "[ab*?]{1,6}", text in "[ab]{0,8}",
        ) {
            let (of, other) = (pattern(&of), pattern(&other));
            prop_assert!(!of.covers(&other) || !other.matches(&text) || of.matches(&text));
            prop_assert!(of.covers(&of), "{}", of);
        }
    }

    #[test]
    fn long_pattern_of_stars_is_matched_in_few_steps() {
        let text = "a".repeat(500);
        let steps = std::cell::Cell::new(0);
        let count = |_| {
            steps.set(steps.get() + 1);
            true
        };
        assert!(!glob(&format!("{}b", "*?".repeat(200)), &text, count));
        assert!(steps.get() < 200 * 500, "{}", steps.get());
    }
}
