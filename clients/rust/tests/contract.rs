//! The generated code is that of the contract.

use std::{env, fs, path::Path};

/// `UPDATE=1 cargo test --test contract` writes it.
#[test]
fn generated_code_is_that_of_the_contract() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = tempfile::tempdir().unwrap();
    let contract = protox::compile(["fetchproxy/v1/fetch.proto"], [here.join("../../proto")]);
    let generator = tonic_prost_build::configure().bytes(".").out_dir(made.path());
    generator.compile_fds(contract.unwrap()).unwrap();
    let name = "fetchproxy.v1.rs";
    let (made, kept) = (made.path().join(name), here.join("src/gen").join(name));
    if env::var_os("UPDATE").is_some() {
        fs::copy(&made, &kept).unwrap();
    }
    assert!(
        fs::read(made).unwrap() == fs::read(kept).unwrap(),
        "src/gen is not that of proto: run `UPDATE=1 cargo test --test contract` here"
    );
}
