//! Creates a stream and a consumer, and publishes samples to the stream: only for `fetch-proxy dev`. The
//! service itself never creates or changes a stream or a consumer.

use async_nats::{
    HeaderMap,
    jetstream::{self, consumer, stream},
};
use bytes::Bytes;

/// The stream and the consumer to create, if they do not exist yet.
pub struct Provisioned<'n> {
    /// The stream's name.
    pub stream: &'n str,
    /// The subjects that the stream collects, like `tasks.>`.
    pub subjects: &'n str,
    /// The durable consumer's name.
    pub consumer: &'n str,
}

/// A message to publish: its subject, headers and payload.
pub type Sample = (String, Vec<(String, String)>, Bytes);

/// Creates the missing stream and consumer, and publishes the samples. Waits for each confirmation.
///
/// # Errors
/// The error of NATS, in its words.
pub async fn provision(
    url: &str,
    what: &Provisioned<'_>,
    samples: Vec<Sample>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let client = async_nats::connect(url).await?;
    let jetstream = jetstream::new(client);
    let stream = jetstream
        .get_or_create_stream(stream::Config {
            name: what.stream.to_owned(),
            subjects: vec![what.subjects.to_owned()],
            ..stream::Config::default()
        })
        .await?;
    let pull = consumer::pull::Config {
        durable_name: Some(what.consumer.to_owned()),
        ..consumer::pull::Config::default()
    };
    stream.get_or_create_consumer(what.consumer, pull).await?;
    for (subject, headers, payload) in samples {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.as_str(), value.as_str());
        }
        jetstream.publish_with_headers(subject, map, payload).await?.await?;
    }
    Ok(())
}
