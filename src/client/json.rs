//! Renders answers for programs: the contract's JSON as protobuf maps it, the same that grpcurl prints.
//! Names are lowerCamelCase, 64-bit numbers and bytes are strings, fields with their default are left out.

use prost::Message;
use prost_reflect::{DescriptorPool, DynamicMessage};

use crate::pb;

/// The JSON of a `fetchproxy.v1` message of this name, on one line.
///
/// # Errors
/// The contract has no such message: a bug.
pub(super) fn json(name: &str, message: &impl Message) -> Result<String, String> {
    json_lines(name, std::slice::from_ref(message))
}

/// The same for messages of one name, each on one line.
///
/// # Errors
/// The contract has no such message: a bug.
pub(super) fn json_lines(name: &str, messages: &[impl Message]) -> Result<String, String> {
    let wrong = |error: &dyn std::fmt::Display| format!("the answer has no JSON: {error}");
    let pool = DescriptorPool::decode(pb::FILE_DESCRIPTOR_SET).map_err(|error| wrong(&error))?;
    let kind = pool.get_message_by_name(&format!("fetchproxy.v1.{name}"));
    let kind = kind.ok_or_else(|| wrong(&name))?;
    let line = |message: &_| {
        let message = DynamicMessage::decode(kind.clone(), &*Message::encode_to_vec(message));
        let message = message.map_err(|error| wrong(&error))?;
        serde_json::to_string(&message).map_err(|error| wrong(&error))
    };
    let lines: Result<Vec<String>, String> = messages.iter().map(line).collect();
    Ok(lines?.join("\n"))
}
