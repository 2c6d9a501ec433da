//! Owns the code generated from `proto/`. Nothing is written here by hand, and only `grpc`, the
//! examples and the tests may name it: the rest of the program speaks its own words.

#![allow(
    missing_docs,
    unused_qualifications,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated code is not ours to lint"
)]

tonic::include_proto!("fetchproxy.v1");

/// What replicas tell each other.
pub mod peer {
    /// In its first version.
    pub mod v1 {
        include!(concat!(env!("OUT_DIR"), "/peer/fetchproxy.peer.v1.rs"));
    }
}

/// The contract as an encoded `google.protobuf.FileDescriptorSet`, for reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] =
    include_bytes!(concat!(env!("OUT_DIR"), "/fetchproxy.v1.bin"));
