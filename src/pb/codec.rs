//! How messages of the contract are written and read in gRPC. A message is written into memory of its own size: a buffer
//! that grows copies each answer twice more.

use std::marker::PhantomData;

use prost::Message;
use tonic::{
    Status,
    codec::{BufferSettings, Codec, EncodeBuf, Encoder},
};
use tonic_prost::{ProstCodec, ProstDecoder};

/// Bytes of a buffer before its message is known. The answer to an Ack fits.
const FIRST: usize = 64;
/// A buffer with more bytes is sent before the next message of a stream is written. As in tonic.
const FULL: usize = 32 * 1024;

/// The codec of all methods: writes messages `T`, reads messages `U`.
#[derive(Debug)]
pub struct SizedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for SizedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for SizedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = SizedEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> SizedEncoder<T> {
        SizedEncoder(PhantomData)
    }

    fn decoder(&mut self) -> ProstDecoder<U> {
        ProstCodec::<T, U>::raw_decoder(BufferSettings::default())
    }
}

/// Writes messages `T`.
#[derive(Debug)]
pub struct SizedEncoder<T>(PhantomData<T>);

impl<T: Message> Encoder for SizedEncoder<T> {
    type Item = T;
    type Error = Status;

    fn encode(&mut self, message: T, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.reserve(message.encoded_len());
        message.encode(buffer).map_err(|error| Status::internal(error.to_string()))
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::new(FIRST, FULL)
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, pin::pin};

    use futures_util::stream;
    use http_body::Body as _;
    use tonic::codec::EncodeBody;

    use super::*;
    use crate::pb::Rejected;

    fn message(size: usize) -> Rejected {
        Rejected { data: vec![b'x'; size].into(), ..Rejected::default() }
    }

    /// The parts of a body with messages of these sizes, each part with the bytes of memory that it has.
    async fn parts(sizes: &[usize]) -> Vec<(Vec<u8>, usize)> {
        let messages = stream::iter(sizes.iter().map(|size| Ok(message(*size))));
        let encoder = SizedCodec::<Rejected, Rejected>::default().encoder();
        let mut frames = Vec::new();
        {
            let mut body = pin!(EncodeBody::new_client(encoder, messages, None, None));
            while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
                frames.push(frame.unwrap().into_data().unwrap());
            }
        }
        let memory = |bytes: bytes::Bytes| {
            let content = bytes.to_vec();
            (content, bytes.try_into_mut().unwrap().capacity())
        };
        frames.into_iter().map(memory).collect()
    }

    fn written(size: usize) -> Vec<u8> {
        let bytes = message(size).encode_to_vec();
        [&[0][..], &(bytes.len() as u32).to_be_bytes(), &bytes].concat()
    }

    #[tokio::test]
    async fn message_has_memory_of_its_own_size() {
        for size in [0, 100, 5_000, 1_000_000] {
            let parts = parts(&[size]).await;
            let (content, memory) = &parts[0];
            assert_eq!((parts.len(), content), (1, &written(size)));
            assert!(*memory <= content.len().max(2 * FIRST), "{memory} for {}", content.len());
        }
    }

    #[tokio::test]
    async fn messages_that_are_ready_together_are_sent_together() {
        let parts = parts(&[10, 20, FULL, 10]).await;
        let content: Vec<Vec<u8>> = parts.into_iter().map(|(content, _)| content).collect();
        let first = [written(10), written(20), written(FULL)].concat();
        assert_eq!(content, [first, written(10)]);
    }
}
