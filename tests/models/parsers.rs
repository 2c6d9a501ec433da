//! Each parser of the fuzzer, on its samples and on changed samples, for a moment. `make fuzz` does the same for
//! longer, and is guided by the code that an input reaches.

use std::{fs, path::Path};

use proptest::{collection::vec, prelude::*, sample::Index, test_runner::TestRunner};

#[path = "../fuzz/parsers.rs"]
mod fuzzed;

/// Changed samples for each parser: about a second in a debug build.
const CASES: u32 = 3_000;

/// One change of a sample.
#[derive(Debug, Clone)]
enum Change {
    /// Puts a byte over another.
    Byte(Index, u8),
    /// Takes bytes out.
    Cut(Index, Index),
    /// Puts bytes in.
    Insert(Index, Vec<u8>),
    /// Repeats bytes that are there.
    Repeat(Index, Index),
}

fn change() -> impl Strategy<Value = Change> {
    let place = any::<Index>;
    prop_oneof![
        (place(), any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        (place(), place()).prop_map(|(one, other)| Change::Cut(one, other)),
        (place(), vec(any::<u8>(), 1..9)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (place(), place()).prop_map(|(one, other)| Change::Repeat(one, other)),
    ]
}

fn apply(change: Change, text: &mut Vec<u8>) {
    let range = |text: &[u8], one: Index, other: Index| {
        let (one, other) = (one.index(text.len() + 1), other.index(text.len() + 1));
        one.min(other)..one.max(other)
    };
    match change {
        Change::Byte(at, byte) => {
            if !text.is_empty() {
                let at = at.index(text.len());
                text[at] = byte;
            }
        }
        Change::Cut(one, other) => drop(text.drain(range(text, one, other))),
        Change::Insert(at, bytes) => {
            let at = at.index(text.len() + 1);
            text.splice(at..at, bytes);
        }
        Change::Repeat(one, other) => {
            let range = range(text, one, other);
            let (end, bytes) = (range.end, text[range].to_vec());
            text.splice(end..end, bytes);
        }
    }
}

fn samples(parser: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(parser);
    let files = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{folder:?}: {error}"));
    let mut paths: Vec<_> = files.map(|file| file.unwrap().path()).collect();
    paths.sort();
    paths.iter().map(|path| fs::read(path).unwrap()).collect()
}

#[test]
fn a_parser_ends_with_a_value_or_an_error_on_any_input() {
    for (parser, parse) in fuzzed::ALL {
        let samples = samples(parser);
        assert!(!samples.is_empty(), "{parser} has no sample");
        samples.iter().for_each(|sample| parse(sample));
        let changed = (proptest::sample::select(samples), vec(change(), 1..8));
        let config =
            ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) };
        TestRunner::new(config)
            .run(&changed, |(mut text, changes)| {
                changes.into_iter().for_each(|change| apply(change, &mut text));
                parse(&text);
                Ok(())
            })
            .unwrap_or_else(|error| panic!("{parser}: {error}"));
    }
}
