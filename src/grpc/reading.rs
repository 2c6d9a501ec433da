//! Reads a request of one message in whole, within a time, a size and a budget, before anything is
//! done with it. Owns those bounds; knows no field but how many settlements there are.
//!
//! tonic would read it too, but without a time limit, and a few KB of gzip cost it megabytes. So this
//! room unpacks gzip itself, and hands on a message that is not compressed.

use std::{
    io::Read as _,
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use flate2::read::GzDecoder;
use http::{HeaderMap, HeaderName};
use http_body::{Body, Frame};
use prost::encoding::{DecodeContext, WireType, decode_key, skip_field};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::budget::Taken;
use crate::{
    api_error::{ApiError, BudgetKind},
    limits::MOST_SETTLEMENTS,
    reason::Reason,
};

/// A request must be there in whole this long after its headers, whatever trickles.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The flag and the length in front of a message.
const MESSAGE_PREFIX_BYTES: usize = 5;
/// A compressed message may grow by this factor, beyond [`GROWTH_FREE`] bytes. Tokens are sealed bytes,
/// which do not shrink, so no real request comes near it.
const GROWTH: usize = 20;
/// Bytes that any compressed message may have.
const GROWTH_FREE: usize = 64 * 1024;
/// Fields of a Settle that repeat: `settlements`.
const SETTLEMENTS: u32 = 1;
/// Header of the compression.
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// The bounds of one request.
pub(super) struct Bounds<'b> {
    /// Most bytes of its message.
    pub(super) most: usize,
    /// Its settlements are counted.
    pub(super) settle: bool,
    /// The bytes that it has taken of the budget; `None`: it is not counted.
    pub(super) taken: Option<&'b mut Taken>,
}

impl Bounds<'_> {
    fn charge(&mut self, bytes: usize) -> Result<(), ApiError> {
        let Some(taken) = &mut self.taken else { return Ok(()) };
        taken.grow(bytes).map_err(|short| ApiError::ByteLimit(BudgetKind::Requests, short))
    }
}

/// Reads the request, and answers with its message as tonic reads it: not compressed. One that tonic
/// will refuse is handed on as it is.
///
/// # Errors
/// The reasons `REQUEST_TIMEOUT`, `REQUEST_TOO_LARGE`, `BYTE_LIMIT`, `MALFORMED` and `INVALID_FIELD`.
pub(super) async fn read<B>(
    headers: &HeaderMap,
    body: B,
    mut bounds: Bounds<'_>,
) -> Result<Bytes, ApiError>
where
    B: Body<Data = Bytes>,
{
    let gzip = match headers.get(ENCODING).map(|encoding| encoding.as_bytes()) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        // tonic refuses it by its header.
        Some(_) => return Ok(Bytes::new()),
    };
    let whole = tokio::time::timeout(REQUEST_TIMEOUT, whole(body, &mut bounds)).await;
    let whole = whole.map_err(|_| ApiError::RequestTimeout(REQUEST_TIMEOUT))??;
    let whole =
        if gzip && whole.first() == Some(&1) { unpacked(&whole, &mut bounds)? } else { whole };
    if bounds.settle && whole.first() == Some(&0) {
        let count = settlements(&whole[MESSAGE_PREFIX_BYTES.min(whole.len())..]);
        if count > MOST_SETTLEMENTS {
            let why = format!("must be 1 to {MOST_SETTLEMENTS}, not {count}");
            return Err(ApiError::Field { field: "settlements".into(), why });
        }
    }
    Ok(whole)
}

/// All bytes of the body, which are at most those of one message.
async fn whole<B: Body<Data = Bytes>>(body: B, bounds: &mut Bounds<'_>) -> Result<Bytes, ApiError> {
    let mut body = pin!(body);
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        // The client has gone, or sends what is not HTTP/2; nobody hears the answer.
        let frame = frame.map_err(|_| malformed("the request ended early"))?;
        let Ok(data) = frame.into_data() else { continue };
        bounds.charge(data.len())?;
        if first.is_empty() {
            first = data;
        } else {
            if rest.is_empty() {
                rest.reserve(first.len() + data.len());
                rest.put_slice(&first);
            }
            rest.put_slice(&data);
        }
        let so_far = if rest.is_empty() { &first[..] } else { &rest[..] };
        if so_far.first().is_some_and(|flag| *flag > 1) {
            return Err(malformed("a message begins with 0, or with 1 where it is compressed"));
        }
        let Some(length) = length(so_far) else { continue };
        if length > bounds.most {
            return Err(too_large(&format!("{length} bytes are more than {}", bounds.most)));
        }
        if so_far.len() > MESSAGE_PREFIX_BYTES + length {
            return Err(malformed("there is something behind the message"));
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

/// The length that stands in front of a message.
fn length(bytes: &[u8]) -> Option<usize> {
    let (_, length) = bytes.get(..MESSAGE_PREFIX_BYTES)?.split_last_chunk()?;
    Some(u32::from_be_bytes(*length) as usize)
}

/// The same message, not compressed.
fn unpacked(whole: &[u8], bounds: &mut Bounds<'_>) -> Result<Bytes, ApiError> {
    let packed = &whole[MESSAGE_PREFIX_BYTES.min(whole.len())..];
    let most = bounds.most.min(GROWTH_FREE + packed.len() * GROWTH);
    let mut message = vec![0; MESSAGE_PREFIX_BYTES];
    let unpacked = GzDecoder::new(packed).take(most as u64 + 1).read_to_end(&mut message);
    unpacked.map_err(|error| malformed(&format!("the gzip cannot be read: {error}")))?;
    let length = message.len() - MESSAGE_PREFIX_BYTES;
    if length > most {
        let packed = packed.len();
        return Err(too_large(&format!("{packed} bytes of gzip unpack to more than {most}")));
    }
    bounds.charge(length)?;
    // At most 4 MiB, so it fits.
    message[1..MESSAGE_PREFIX_BYTES]
        .copy_from_slice(&u32::try_from(length).unwrap_or_default().to_be_bytes());
    Ok(message.into())
}

/// How many settlements a Settle has: two bytes each can be millions of them, at 70 bytes when they
/// are decoded. What cannot be read is for tonic to refuse.
fn settlements(mut message: &[u8]) -> usize {
    let mut count = 0;
    while message.has_remaining() {
        let Ok((tag, kind)) = decode_key(&mut message) else { break };
        if tag == SETTLEMENTS && kind == WireType::LengthDelimited {
            count += 1;
        }
        if skip_field(kind, tag, &mut message, DecodeContext::default()).is_err() {
            break;
        }
    }
    count
}

fn malformed(why: &str) -> ApiError {
    ApiError::Foreign(Reason::Malformed, why.to_owned())
}

fn too_large(why: &str) -> ApiError {
    ApiError::Foreign(Reason::RequestTooLarge, why.to_owned())
}

/// A request that has been read, as a body.
pub(super) struct Read(Option<Bytes>);

impl Read {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self(Some(bytes))
    }
}

impl Body for Read {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }
}

/// The requests of one stream of reflection, which has a time and a size.
pub(super) struct Limited<B> {
    inner: Pin<Box<B>>,
    left: usize,
    end: Pin<Box<Sleep>>,
}

impl<B> Limited<B> {
    /// At most `most` bytes, and for at most `time`.
    pub(super) fn new(inner: B, most: usize, time: Duration) -> Self {
        Self { inner: Box::pin(inner), left: most, end: Box::pin(sleep(time)) }
    }
}

impl<B: Body<Data = Bytes>> Body for Limited<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Some(Err(Status::deadline_exceeded("the stream is too old"))));
        }
        let frame = ready!(self.inner.as_mut().poll_frame(cx));
        let bytes = match &frame {
            Some(Ok(frame)) => frame.data_ref().map_or(0, Bytes::len),
            Some(Err(_)) | None => 0,
        };
        let Some(left) = self.left.checked_sub(bytes) else {
            return Poll::Ready(Some(Err(Status::resource_exhausted("the stream is too long"))));
        };
        self.left = left;
        Poll::Ready(frame.map(|frame| frame.map_err(|error| Status::from_error(error.into()))))
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, io::Write as _};

    use flate2::{Compression, write::GzEncoder};
    use http::HeaderValue;

    use super::*;
    use crate::grpc::budget::MemoryBudget;

    /// A body that comes in parts, one a second.
    struct Slowly(VecDeque<Bytes>, Pin<Box<Sleep>>);

    impl Body for Slowly {
        type Data = Bytes;
        type Error = std::convert::Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
            ready!(self.1.as_mut().poll(cx));
            self.1 = Box::pin(sleep(Duration::from_secs(1)));
            Poll::Ready(self.0.pop_front().map(|part| Ok(Frame::data(part))))
        }
    }

    fn frame(flag: u8, message: &[u8]) -> Bytes {
        let length = u32::try_from(message.len()).unwrap().to_be_bytes();
        [&[flag][..], &length, message].concat().into()
    }

    fn packed(message: &[u8]) -> Bytes {
        let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
        gzip.write_all(message).unwrap();
        frame(1, &gzip.finish().unwrap())
    }

    async fn reads(body: Bytes, gzip: bool) -> Result<Bytes, Reason> {
        let mut headers = HeaderMap::new();
        if gzip {
            headers.insert(ENCODING, HeaderValue::from_static("gzip"));
        }
        let bounds = Bounds { most: 4 << 20, settle: true, taken: None };
        read(&headers, Read::new(body), bounds).await.map_err(|refused| refused.reason())
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_trickles_is_given_up_ten_seconds_after_its_headers() {
        // The end of the body comes a second after its last byte.
        for (bytes, expected) in [(8, None), (11, Some(Reason::RequestTimeout))] {
            let whole = frame(0, &vec![0; bytes - MESSAGE_PREFIX_BYTES]);
            let parts = (0..bytes).map(|at| whole.slice(at..=at)).collect();
            let body = Slowly(parts, Box::pin(sleep(Duration::from_secs(1))));
            let bounds = Bounds { most: 100, settle: false, taken: None };
            let read = read(&HeaderMap::new(), body, bounds).await;
            assert_eq!(read.err().map(|refused| refused.reason()), expected);
        }
    }

    #[tokio::test]
    async fn gzip_is_unpacked_within_its_bounds() {
        // Random bytes do not shrink, like tokens.
        let mut message = vec![0; 300_000];
        getrandom::fill(&mut message).unwrap();
        assert_eq!(reads(packed(&message), true).await, Ok(frame(0, &message)));
        let zeros = |length: usize| packed(&vec![0; length]);
        assert_eq!(reads(zeros(GROWTH_FREE), true).await, Ok(frame(0, &vec![0; GROWTH_FREE])));
        let bomb = zeros(4 << 20);
        assert!(bomb.len() < 5000);
        assert_eq!(reads(bomb, true).await, Err(Reason::RequestTooLarge));
        assert_eq!(reads(frame(1, b"oops"), true).await, Err(Reason::Malformed));
    }

    #[tokio::test]
    async fn settlements_are_counted_before_they_are_decoded() {
        let settle = |count: usize| frame(0, &[0x0a, 0].repeat(count));
        assert_eq!(reads(settle(1000), false).await, Ok(settle(1000)));
        assert_eq!(reads(settle(1001), false).await, Err(Reason::InvalidField));
        // A field that is not known is no settlement.
        let other = frame(0, &[0x7a, 0].repeat(1001));
        assert_eq!(reads(other.clone(), false).await, Ok(other));
    }

    #[tokio::test]
    async fn bytes_are_taken_as_they_come_and_those_beyond_the_budget_refused() {
        let mut taken = MemoryBudget::new(1000).share().take(0).unwrap();
        for (length, expected) in [(600, None), (600, Some(Reason::ByteLimit))] {
            let bounds = Bounds { most: 4 << 20, settle: false, taken: Some(&mut taken) };
            let body = Read::new(frame(0, &vec![0; length]));
            let read = read(&HeaderMap::new(), body, bounds).await;
            assert_eq!(read.err().map(|refused| refused.reason()), expected);
        }
    }
}
