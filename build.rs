//! Compiles the contract without protoc: protox parses it, tonic-prost-build writes the Rust.

use std::{env, fs, path::PathBuf};

use protox::prost::Message as _;

const CONTRACT: &str = "fetchproxy/v1/fetch.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let contract = protox::compile([CONTRACT], ["proto"])?;
    // Reflection serves the same descriptors, comments included.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("fetchproxy.v1.bin");
    fs::write(descriptors, contract.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(contract)?;
    Ok(())
}
