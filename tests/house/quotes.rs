//! Tests quote the log. A quote that no line of the program holds any more makes a `!log.contains(…)` always
//! true, so each quote must stand in the sources.

use std::{fmt::Write as _, fs, path::Path};

use super::source;

/// Calls that look for a text in a log.
const CALLS: [&str; 4] =
    ["log().contains(\"", "log().matches(\"", "said().contains(\"", "log.contains(\""];

/// Texts that stand in no source of ours. The program must never write them, or NATS writes them.
const FOREIGN: [&str; 3] = ["panicked", "hunter2", "authorization violation"];

/// The sources as one text, with strings that a backslash continues on the next line made whole.
fn sources() -> String {
    let mut whole = String::new();
    for file in source::files() {
        for part in file.text.split("\\\n") {
            whole += part.trim_start();
        }
        whole.push('\n');
    }
    whole
}

/// The texts that `code` looks for in a log. A text with an escaped quote is JSON around a field or a message:
/// the words inside count.
fn quotes(code: &str) -> Vec<String> {
    let mut quotes = Vec::new();
    for call in CALLS {
        for rest in code.split(call).skip(1) {
            let json = rest.replace("\\\"", "\u{0}");
            let Some((quote, _)) = json.split_once('"') else { continue };
            let words = quote.split(['\u{0}', ':']).map(str::trim).filter(|word| !word.is_empty());
            quotes.extend(words.map(str::to_owned));
        }
    }
    quotes
}

#[test]
fn log_texts_that_tests_quote_stand_in_the_sources() {
    let (sources, mut files) = (sources(), Vec::new());
    super::prose::walk(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), &mut files);
    let (mut count, mut gone) = (0, String::new());
    for file in files.iter().filter(|file| file.extension().is_some_and(|end| end == "rs")) {
        for quote in quotes(&fs::read_to_string(file).unwrap()) {
            count += 1;
            if !FOREIGN.contains(&&*quote) && !sources.contains(&quote) {
                let _ = writeln!(gone, "{}: {quote}", file.display());
            }
        }
    }
    assert!(count > 50, "the reading is broken: {count} quotes");
    assert!(gone.is_empty(), "the program writes none of these any more:\n{gone}");
}

#[test]
fn quotes_of_a_log_are_found() {
    let code = r#"assert!(!proxy.log().contains("cut off")); log.contains("\"name\":\"a b\"");"#;
    assert_eq!(quotes(code), ["cut off", "name", "a b"]);
}
