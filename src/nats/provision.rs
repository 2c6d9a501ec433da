//! Creates a stream and a consumer, and publishes samples to the stream: only for `fetch-proxy dev`. The
//! service itself never creates or changes a stream or a consumer.

use std::{error::Error, fmt::Display};

use async_nats::{
    HeaderMap,
    jetstream::{self, consumer, stream},
};
use bytes::Bytes;

/// The stream and the consumer to create, if they do not exist yet.
pub struct Provisioned<'n> {
    /// The name of the server itself. A server with another name is left as it is.
    pub server: &'n str,
    /// The stream's name.
    pub stream: &'n str,
    /// The subjects that the stream collects, like `tasks.>`.
    pub subjects: &'n str,
    /// The durable consumer's name.
    pub consumer: &'n str,
}

/// A message to publish: its subject, headers and payload.
pub type Sample = (String, Vec<(String, String)>, Bytes);

/// Creates the missing stream and consumer, and publishes the samples that are made from the last sequence of the
/// stream. Waits for each confirmation. Returns that sequence.
///
/// # Errors
/// There is no server, or a server of another name: nothing is created. Otherwise the error of NATS, in its words.
pub async fn provision<S: Iterator<Item = Sample>>(
    url: &str,
    what: &Provisioned<'_>,
    samples: impl FnOnce(u64) -> S,
) -> Result<u64, Box<dyn Error + Send + Sync>> {
    let no_server = |why: &dyn Display| {
        format!(
            "there is no NATS server of `fetch-proxy dev` at {url}: {why}; nothing is published"
        )
    };
    let client = async_nats::connect(url).await.map_err(|error| no_server(&error))?;
    if client.server_info().server_name != what.server {
        return Err(no_server(&"another server answers").into());
    }
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
    let last = stream.cached_info().state.last_sequence;
    for (subject, headers, payload) in samples(last) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(name.as_str(), value.as_str());
        }
        jetstream.publish_with_headers(subject, map, payload).await?.await?;
    }
    Ok(last)
}
