//! The page for operators has each warning and error that the program can log, word for word, at its
//! level, and no other.

use std::{collections::BTreeSet, fs, path::Path};

/// A level and a message.
type Line = (&'static str, String);

const LEVELS: [&str; 2] = ["warn", "error"];

#[test]
fn the_page_for_operators_has_every_warning_and_error() {
    let written: Vec<Line> = super::rooms().iter().flat_map(|room| logged(room)).collect();
    assert!(written.len() > 20, "the reading is broken: {written:?}");
    let distinct: BTreeSet<&Line> = written.iter().collect();
    assert_eq!(distinct.len(), written.len(), "each line has words of its own: {written:#?}");
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md");
    let explained = rows(&fs::read_to_string(page).unwrap());
    let distinct_rows: BTreeSet<&Line> = explained.iter().collect();
    assert_eq!(distinct_rows.len(), explained.len(), "a row stands there twice");
    let missing: Vec<_> = distinct.difference(&distinct_rows).collect();
    let gone: Vec<_> = distinct_rows.difference(&distinct).collect();
    assert!(missing.is_empty() && gone.is_empty(), "missing: {missing:#?}\ngone: {gone:#?}");
}

/// The lines that a file can log. Macros must be named in full, so that none is overlooked.
fn logged(file: &Path) -> Vec<Line> {
    let lines: Vec<String> = super::code(file).into_iter().map(|(_, line)| line).collect();
    let code = lines.join("\n");
    for other in ["event!(", "eprintln!(", "Level::", "use tracing::", "instrument"] {
        assert!(!code.contains(other), "{} has {other}: teach this test", file.display());
    }
    let mut found = Vec::new();
    for level in LEVELS {
        let (short, full) = (format!("{level}!("), format!("tracing::{level}!("));
        let calls = code.split(&full).skip(1);
        assert_eq!(calls.clone().count(), code.matches(&short).count(), "{}", file.display());
        for rest in calls {
            let message = message(rest).unwrap_or_else(|| panic!("no message: {rest}"));
            let whole = !message.contains('{');
            assert!(whole, "{}: what differs is a field: {message}", file.display());
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

/// Every row that begins with a level and a message.
fn rows(page: &str) -> Vec<Line> {
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        let level = cells.next()?;
        let level = LEVELS.into_iter().find(|known| *known == level)?;
        let message = cells.next()?.strip_prefix('`')?.strip_suffix('`')?;
        let advice = cells.filter(|cell| !cell.trim_matches(['|', ' ']).is_empty()).count();
        assert_eq!(advice, 2, "what it means, and what to do: {line}");
        Some((level, message.to_owned()))
    };
    page.lines().filter_map(row).collect()
}
