//! Owns the code generated from `proto/`. Only the conversions of times in `time` are written by
//! hand. Only the modules that read or
//! write messages of the contract name this module: the rest of the program has its own types.

#![allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code is not ours to lint"
)]

pub mod codec;
pub(crate) mod time;

tonic::include_proto!("fetchproxy.v1");

/// The messages between replicas.
pub mod peer {
    /// Version 1 of these messages.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/peer/fetchproxy.peer.v1.rs"));
    }
}

/// The contract as an encoded `google.protobuf.FileDescriptorSet`, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/fetchproxy.v1.bin"));
