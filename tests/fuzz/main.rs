//! The fuzzer. `PARSER` names the parser, and the arguments are those of libFuzzer.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

mod parsers;

static PARSE: LazyLock<fn(&[u8])> = LazyLock::new(|| {
    let wanted = std::env::var("PARSER").unwrap_or_default();
    let found = parsers::ALL.iter().find(|(name, _)| *name == wanted);
    let names = || parsers::ALL.map(|(name, _)| name).join(", ");
    found.unwrap_or_else(|| panic!("PARSER must be one of {}", names())).1
});

fuzz_target!(|input: &[u8]| PARSE(input));
