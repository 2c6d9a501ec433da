//! Makes a stream and a consumer, and publishes samples to it: only for `fetch-proxy dev`. The
//! service itself never makes or changes either.

use async_nats::{
    HeaderMap,
    jetstream::{self, consumer, stream},
};
use bytes::Bytes;

/// What to make, if it is not there yet.
pub struct Provisioned<'n> {
    /// The stream's name.
    pub stream: &'n str,
    /// What it collects, like `tasks.>`.
    pub subjects: &'n str,
    /// The durable consumer's name.
    pub consumer: &'n str,
}

/// A message to publish: subject, headers, payload.
pub type Sample = (String, Vec<(String, String)>, Bytes);

/// Makes what is missing and publishes the samples, each confirmed.
///
/// # Errors
/// Whatever NATS says, in its words.
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
