//! Compiles the contract without protoc: protox parses it, tonic-prost-build writes the Rust.

use std::{env, fs, path::PathBuf};

use protox::prost::Message as _;

const CONTRACT: [&str; 2] = ["fetchproxy/v1/fetch.proto", "fetchproxy/v1/admin.proto"];
const BETWEEN_REPLICAS: &str = "fetchproxy/peer/v1/peer.proto";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let contract = protox::compile(CONTRACT, ["proto"])?;
    // Reflection serves the same descriptors, with their comments.
    let descriptors = PathBuf::from(env::var("OUT_DIR")?).join("fetchproxy.v1.bin");
    fs::write(descriptors, contract.encode_to_vec())?;
    configured().compile_fds(contract)?;
    // This uses the contract's messages, which must not be generated twice. So it has its own folder.
    let peer = PathBuf::from(env::var("OUT_DIR")?).join("peer");
    fs::create_dir_all(&peer)?;
    configured()
        .out_dir(peer)
        .extern_path(".fetchproxy.v1", "crate::pb")
        .compile_fds(protox::compile([BETWEEN_REPLICAS], ["proto"])?)?;
    Ok(())
}

fn configured() -> tonic_prost_build::Builder {
    tonic_prost_build::configure().bytes(".").codec_path("crate::pb::codec::SizedCodec")
}
