//! The subject that settles a delivery, in its form with nine tokens.

use fetch_proxy::broker::ConsumerName;

use super::types::DeliveryId;

/// The content of an ack subject.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckedDelivery {
    pub name: ConsumerName,
    pub delivery_count: u64,
    pub stream_sequence: u64,
    pub consumer_sequence: u64,
    pub of: DeliveryId,
}

/// Reads an ack subject.
pub fn parse(subject: &str) -> Option<AckedDelivery> {
    let tokens: Vec<&str> = subject.split('.').collect();
    let [_, _, stream, consumer, count, sequence, deliveries, published, _] = tokens[..] else {
        return None;
    };
    Some(AckedDelivery {
        name: ConsumerName { stream: stream.into(), consumer: consumer.into() },
        delivery_count: count.parse().ok()?,
        stream_sequence: sequence.parse().ok()?,
        consumer_sequence: deliveries.parse().ok()?,
        of: DeliveryId::of(published.parse().ok()?),
    })
}

/// Writes an ack subject. `published` is in nanoseconds since the Unix epoch. `left` messages are left for
/// the consumer.
pub fn subject_of(
    name: &ConsumerName,
    (count, sequence, deliveries): (u64, u64, u64),
    published: u64,
    left: u64,
) -> String {
    let ConsumerName { stream, consumer } = name;
    format!("$JS.ACK.{stream}.{consumer}.{count}.{sequence}.{deliveries}.{published}.{left}")
}
