//! Values as words for people: names of strangers, times and lengths of time. Pure.

use std::{
    fmt::Write as _,
    time::{Duration, UNIX_EPOCH},
};

/// A text of strangers in which no character is invisible or turns its neighbours around. The page escapes it, too.
pub(super) fn visible(text: &str) -> String {
    let mut visible = String::with_capacity(text.len());
    for c in text.chars() {
        let hidden = c.is_control()
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}');
        if hidden {
            let _ = write!(visible, "{}", c.escape_unicode());
        } else {
            visible.push(c);
        }
    }
    visible
}

/// A length of time in its two largest units.
pub(super) fn length(of: Duration) -> String {
    let seconds = of.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

/// A length of time below a second, and longer ones as [`length`] tells them.
pub(super) fn short(of: Duration) -> String {
    if of < Duration::from_secs(1) {
        format!("{:.1} ms", of.as_secs_f64() * 1000.0)
    } else {
        length(of)
    }
}

/// A time of day in UTC, to the second.
pub(super) fn time(unix: Duration) -> String {
    let at = UNIX_EPOCH + Duration::from_secs(unix.as_secs());
    humantime::format_rfc3339_seconds(at).to_string().replace('T', " ").replace('Z', " UTC")
}

/// A number with a space between thousands.
pub(super) fn number(value: u64) -> String {
    let digits = value.to_string();
    let mut grouped = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            // A space that does not break, and is narrow.
            grouped.push('\u{202f}');
        }
        grouped.push(digit);
    }
    grouped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_strangers_hide_nothing() {
        assert_eq!(visible("größe-1/ü"), "größe-1/ü");
        assert_eq!(visible("a\nb\t\u{202e}c\u{200b}"), "a\\u{a}b\\u{9}\\u{202e}c\\u{200b}");
        assert_eq!(visible("a\u{7f}\u{feff}"), "a\\u{7f}\\u{feff}");
    }

    #[test]
    fn lengths_have_two_units() {
        for (seconds, said) in [
            (0, "0 s"),
            (59, "59 s"),
            (61, "1 min 1 s"),
            (3599, "59 min 59 s"),
            (3660, "1 h 1 min"),
            (90_061, "1 d 1 h"),
        ] {
            assert_eq!(length(Duration::from_secs(seconds)), said);
        }
        assert_eq!(short(Duration::from_micros(420)), "0.4 ms");
        assert_eq!(short(Duration::from_secs(2)), "2 s");
    }

    #[test]
    fn numbers_are_grouped_by_thousands() {
        assert_eq!(number(0), "0");
        assert_eq!(number(999), "999");
        assert_eq!(number(1_234_567), "1\u{202f}234\u{202f}567");
        assert_eq!(time(Duration::from_secs(1_767_225_600)), "2026-01-01 00:00:00 UTC");
    }
}
