//! Compiles the contract without protoc: protox parses it, tonic-prost-build writes the Rust.

use std::{env, fs, path::PathBuf};

use protox::prost::Message as _;

const CONTRACT: &str = "fetchproxy/v1/fetch.proto";
const BETWEEN_REPLICAS: &str = "fetchproxy/peer/v1/peer.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let contract = protox::compile([CONTRACT], ["proto"])?;
    // Reflection serves the same descriptors, comments included.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("fetchproxy.v1.bin");
    fs::write(descriptors, contract.encode_to_vec())?;
    tonic_prost_build::configure().bytes(".").compile_fds(contract)?;
    // Built on the contract's messages, which are not generated twice: hence a folder of its own.
    let peer = PathBuf::from(env::var("OUT_DIR")?).join("peer");
    fs::create_dir_all(&peer)?;
    tonic_prost_build::configure()
        .out_dir(peer)
        .bytes(".")
        .extern_path(".fetchproxy.v1", "crate::pb")
        .compile_fds(protox::compile([BETWEEN_REPLICAS], ["proto"])?)?;
    Ok(())
}
