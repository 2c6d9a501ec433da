//! The page of log lines has each warning and error that the program can log, word for word, at its
//! level, and no other. Its index is rendered from its headings.

use std::{collections::BTreeSet, fmt::Write as _};

use super::{
    links, pages, prose,
    source::{self, File},
};

/// A level and a message.
type Line = (&'static str, String);

const LEVELS: [&str; 2] = ["warn", "error"];
const PAGE: &str = "docs/reference/log-lines.md";

/// The section of the page about one line.
struct Entry {
    /// The heading above it, such as `NATS`.
    about: String,
    level: String,
    message: String,
}

#[test]
fn page_of_log_lines_has_every_warning_and_error() {
    let written: Vec<Line> = source::files().iter().flat_map(logged).collect();
    assert!(written.len() > 20, "the reading is broken: {written:?}");
    let distinct: BTreeSet<&Line> = written.iter().collect();
    assert_eq!(distinct.len(), written.len(), "each line has words of its own: {written:#?}");
    let level = |entry: &Entry| LEVELS.into_iter().find(|level| *level == entry.level);
    let entries = entries(&pages::read(PAGE));
    let explained: Vec<Line> =
        entries.iter().filter_map(|entry| Some((level(entry)?, entry.message.clone()))).collect();
    let distinct_rows: BTreeSet<&Line> = explained.iter().collect();
    assert_eq!(distinct_rows.len(), explained.len(), "a line stands there twice");
    let missing: Vec<_> = distinct.difference(&distinct_rows).collect();
    let gone: Vec<_> = distinct_rows.difference(&distinct).collect();
    assert!(missing.is_empty() && gone.is_empty(), "missing: {missing:#?}\ngone: {gone:#?}");
}

#[test]
fn log_lines_are_in_plain_english() {
    for (_, message) in source::files().iter().flat_map(logged) {
        let (first, rest) = message.split_at(1);
        let sentence = format!("{}{rest}", first.to_uppercase());
        assert_eq!(prose::faults(&sentence), [false; 4], "{message}");
    }
}

/// The lines that a file can log. Macros must be named in full, so that none is overlooked.
fn logged(file: &File) -> Vec<Line> {
    let lines: Vec<String> = file.code.iter().map(|(_, line)| line.clone()).collect();
    let code = lines.join("\n");
    for other in ["event!(", "eprintln!(", "Level::", "use tracing::", "instrument"] {
        assert!(!code.contains(other), "{} has {other}: teach this test", file.path);
    }
    let mut found = Vec::new();
    for level in LEVELS {
        let (short, full) = (format!("{level}!("), format!("tracing::{level}!("));
        let calls = code.split(&full).skip(1);
        assert_eq!(calls.clone().count(), code.matches(&short).count(), "{}", file.path);
        for rest in calls {
            let message = message(rest).unwrap_or_else(|| panic!("no message: {rest}"));
            let whole = !message.contains('{');
            assert!(whole, "{}: what differs is a field: {message}", file.path);
            found.push((level, message));
        }
    }
    found
}

/// The last string among a macro's arguments, whose closing parenthesis is in `rest`.
fn message(rest: &str) -> Option<String> {
    let (mut depth, mut last) = (0, None);
    let mut characters = rest.chars();
    while let Some(character) = characters.next() {
        match character {
            '"' => last = Some(string(&mut characters)),
            '(' => depth += 1,
            ')' if depth == 0 => return last,
            ')' => depth -= 1,
            _ => {}
        }
    }
    None
}

/// The rest of a string literal; a line that ends in a backslash continues with the next word.
fn string(characters: &mut std::str::Chars) -> String {
    let mut text = String::new();
    while let Some(character) = characters.next() {
        match character {
            '"' => break,
            '\\' => match characters.next() {
                Some('\n') => {
                    let rest = characters.as_str().trim_start();
                    *characters = rest.chars();
                }
                escaped => text.extend(escaped),
            },
            _ => text.push(character),
        }
    }
    text
}

/// The sections of the page whose heading is a message. Each has its level and says what to do.
fn entries(page: &str) -> Vec<Entry> {
    let mut about = "";
    let mut entries = Vec::new();
    for section in page.split("\n#").skip(1) {
        let (title, text) = section.split_once('\n').unwrap();
        let message = title.strip_prefix("## `").and_then(|title| title.strip_suffix('`'));
        let Some(message) = message else {
            about = title.trim_start_matches(['#', ' ']);
            continue;
        };
        let level = text.trim_start().strip_prefix("**").and_then(|text| text.split_once("** · "));
        let (level, _) = level.unwrap_or_else(|| panic!("{message}: no level"));
        assert!(text.contains("\n**To do:** "), "{message}: what is to be done?");
        let [about, level, message] = [about, level, message].map(str::to_owned);
        entries.push(Entry { about, level, message });
    }
    entries
}

#[test]
fn index_of_log_lines_has_each_of_them() {
    let page = pages::read(PAGE);
    let (before, rest) = page.split_once("\n## Index\n").unwrap();
    let (_, after) = rest.split_once("\n## ").unwrap();
    let mut index = "\n## Index\n\nA test renders this index from the headings of the page: \
                     `UPDATE_DOCS=1 cargo test --test house`.\n\n\
                     | level | about | message |\n| --- | --- | --- |\n"
        .to_owned();
    for Entry { about, level, message } in entries(&page) {
        let anchor = links::anchor(&message);
        writeln!(index, "| {level} | {about} | [`{message}`](#{anchor}) |").unwrap();
    }
    pages::assert_rendered(PAGE, &format!("{before}{index}\n## {after}"));
}
