//! Reads a request of one message as a whole, within a time, a size and a budget, before anything else is
//! done with it. Owns those bounds. Knows no field of a message except the number of settlements.
//!
//! tonic would read the request without a time limit, and a few KB of gzip would cost it megabytes. So this
//! module unpacks gzip itself and passes on a message that is not compressed.

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

use crate::{
    api_error::{ApiError, BudgetKind},
    grpc::budget::Taken,
    limits::MOST_SETTLEMENTS,
    reason::Reason,
};

/// Longest time from the headers of a request to its end.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// The flag and the length in front of a message.
const MESSAGE_PREFIX_BYTES: usize = 5;
/// The factor by which a compressed message may grow, beyond [`GROWTH_FREE`] bytes. Tokens are sealed bytes
/// and do not shrink, so no real request comes near this factor.
const GROWTH: usize = 20;
/// Bytes that every compressed message may unpack to.
const GROWTH_FREE: usize = 64 * 1024;
/// The header that names the compression.
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

/// The bounds of one request.
pub(super) struct RequestBounds<'b> {
    /// Most bytes of its message.
    pub(super) most: usize,
    /// The number of its field with settlements, which are counted.
    pub(super) settlements: Option<u32>,
    /// The bytes that it has taken of the budget. `None`: its bytes are not counted.
    pub(super) taken: Option<&'b mut Taken>,
}

impl RequestBounds<'_> {
    fn charge(&mut self, bytes: usize) -> Result<(), ApiError> {
        let Some(taken) = &mut self.taken else { return Ok(()) };
        taken.grow(bytes).map_err(|short| ApiError::ByteLimit(BudgetKind::Requests, short))
    }
}

/// A request that has been read.
#[derive(Debug, PartialEq)]
pub(super) struct ReadRequest {
    /// Its message as tonic reads it, not compressed.
    pub(super) message: Bytes,
    /// The number of its settlements.
    pub(super) settlements: usize,
}

/// Reads the request. A message that tonic will refuse is returned unchanged.
///
/// # Errors
/// The reasons `REQUEST_TIMEOUT`, `REQUEST_TOO_LARGE`, `BYTE_LIMIT`, `MALFORMED` and `INVALID_FIELD`.
pub(super) async fn read<B>(
    headers: &HeaderMap,
    body: B,
    mut bounds: RequestBounds<'_>,
) -> Result<ReadRequest, ApiError>
where
    B: Body<Data = Bytes>,
{
    let gzip = match headers.get(ENCODING).map(|encoding| encoding.as_bytes()) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        // tonic refuses the request for its header.
        Some(_) => return Ok(ReadRequest { message: Bytes::new(), settlements: 0 }),
    };
    let whole = tokio::time::timeout(REQUEST_TIMEOUT, whole(body, &mut bounds)).await;
    let whole = whole.map_err(|_| ApiError::RequestTimeout(REQUEST_TIMEOUT))??;
    let message =
        if gzip && whole.first() == Some(&1) { unpacked(&whole, &mut bounds)? } else { whole };
    let field = bounds.settlements.filter(|_| message.first() == Some(&0));
    let count = |field| settlements(&message[MESSAGE_PREFIX_BYTES.min(message.len())..], field);
    let settlements = field.map_or(0, count);
    if settlements > MOST_SETTLEMENTS {
        let why = format!("must be at most {MOST_SETTLEMENTS}, not {settlements}");
        return Err(ApiError::Field { field: "settlements".into(), why });
    }
    Ok(ReadRequest { message, settlements })
}

/// All bytes of the body, which has one message at most.
async fn whole<B: Body<Data = Bytes>>(
    body: B,
    bounds: &mut RequestBounds<'_>,
) -> Result<Bytes, ApiError> {
    let mut body = pin!(body);
    let (mut first, mut rest) = (Bytes::new(), BytesMut::new());
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        // The client has gone or has broken the protocol, so nobody reads this answer.
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

/// The length in front of a message.
fn length(bytes: &[u8]) -> Option<usize> {
    let (_, length) = bytes.get(..MESSAGE_PREFIX_BYTES)?.split_last_chunk()?;
    Some(u32::from_be_bytes(*length) as usize)
}

/// The message without its compression.
fn unpacked(whole: &[u8], bounds: &mut RequestBounds<'_>) -> Result<Bytes, ApiError> {
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

/// The number of settlements of a message, which are in the field of this number. Millions of settlements of two bytes
/// each fit a request, and each takes 70 bytes when decoded. tonic refuses an unreadable message.
fn settlements(mut message: &[u8], field: u32) -> usize {
    let mut count = 0;
    while message.has_remaining() {
        let Ok((tag, kind)) = decode_key(&mut message) else { break };
        if tag == field && kind == WireType::LengthDelimited {
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
pub(super) struct WholeRequest(Option<Bytes>);

impl WholeRequest {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self(Some(bytes))
    }
}

impl Body for WholeRequest {
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

/// Refuses a stream of compressed frames. Nothing bounds what they would grow to.
///
/// # Errors
/// The reason `UNSUPPORTED`.
pub(super) fn refuse_compressed(headers: &HeaderMap) -> Result<(), ApiError> {
    match headers.get(ENCODING).map(|encoding| encoding.as_bytes()) {
        None | Some(b"identity") => Ok(()),
        Some(_) => {
            let why = "the frames of a Consume must not be compressed".to_owned();
            Err(ApiError::Foreign(Reason::Unsupported, why))
        }
    }
}

/// The frames of one stream, each within a size. Their bytes are not changed.
pub(super) struct LimitedFrames<B> {
    inner: Pin<Box<B>>,
    most: usize,
    /// The bytes of the present prefix that have come.
    prefix: Vec<u8>,
    /// The bytes of the present message that have not come.
    left: usize,
}

impl<B> LimitedFrames<B> {
    /// Frames of at most `most` bytes.
    pub(super) fn new(inner: B, most: usize) -> Self {
        let prefix = Vec::with_capacity(MESSAGE_PREFIX_BYTES);
        Self { inner: Box::pin(inner), most, prefix, left: 0 }
    }

    /// Counts bytes that have come.
    ///
    /// # Errors
    /// A message is too large.
    fn count(&mut self, mut bytes: &[u8]) -> Result<(), Status> {
        while !bytes.is_empty() {
            if self.left > 0 {
                let skipped = self.left.min(bytes.len());
                (self.left, bytes) = (self.left - skipped, &bytes[skipped..]);
                continue;
            }
            let (begun, rest) =
                bytes.split_at((MESSAGE_PREFIX_BYTES - self.prefix.len()).min(bytes.len()));
            self.prefix.extend_from_slice(begun);
            bytes = rest;
            if let Some(length) = length(&self.prefix) {
                self.prefix.clear();
                self.left = length;
            }
            if self.left > self.most {
                let why = format!("a frame of {} bytes: at most {} are read", self.left, self.most);
                return Err(Status::out_of_range(why));
            }
        }
        Ok(())
    }
}

impl<B: Body<Data = Bytes>> Body for LimitedFrames<B>
where
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(self.inner.as_mut().poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(bytes) = frame.data_ref()
        {
            let counted = self.count(bytes);
            if let Err(refused) = counted {
                return Poll::Ready(Some(Err(refused)));
            }
        }
        Poll::Ready(frame.map(|frame| frame.map_err(|error| Status::from_error(error.into()))))
    }
}

/// The requests of one reflection stream, within a time and a size.
pub(super) struct LimitedStream<B> {
    inner: Pin<Box<B>>,
    left: usize,
    end: Pin<Box<Sleep>>,
}

impl<B> LimitedStream<B> {
    /// At most `most` bytes, for at most `time`.
    pub(super) fn new(inner: B, most: usize, time: Duration) -> Self {
        Self { inner: Box::pin(inner), left: most, end: Box::pin(sleep(time)) }
    }
}

impl<B: Body<Data = Bytes>> Body for LimitedStream<B>
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

    /// A body of several parts, one a second.
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
        let bounds = RequestBounds { most: 4 << 20, settlements: Some(1), taken: None };
        let read = read(&headers, WholeRequest::new(body), bounds).await;
        read.map(|read| read.message).map_err(|refused| refused.reason())
    }

    #[tokio::test(start_paused = true)]
    async fn slow_request_is_refused_ten_seconds_after_its_headers() {
        // The end of the body comes a second after its last byte.
        for (bytes, expected) in [(8, None), (11, Some(Reason::RequestTimeout))] {
            let whole = frame(0, &vec![0; bytes - MESSAGE_PREFIX_BYTES]);
            let parts = (0..bytes).map(|at| whole.slice(at..=at)).collect();
            let body = Slowly(parts, Box::pin(sleep(Duration::from_secs(1))));
            let bounds = RequestBounds { most: 100, settlements: None, taken: None };
            let read = read(&HeaderMap::new(), body, bounds).await;
            assert_eq!(read.err().map(|refused| refused.reason()), expected);
        }
    }

    #[test]
    fn each_frame_of_a_stream_is_measured_however_it_is_cut() {
        let (small, large) = (frame(0, &[7; 100]), frame(0, &[7; 101]));
        for cut in 1..40 {
            let mut frames = LimitedFrames::new((), 100);
            let good = [&small[..], &frame(0, &[]), &small[..]].concat();
            for part in good.chunks(cut) {
                frames.count(part).unwrap();
            }
            let refused = large.chunks(cut).find_map(|part| frames.count(part).err());
            assert!(refused.is_some(), "cut into {cut} bytes");
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
        // An unknown field is no settlement.
        let other = frame(0, &[0x7a, 0].repeat(1001));
        assert_eq!(reads(other.clone(), false).await, Ok(other));
        // Each method has its own field.
        for (field, expected) in [(Some(14), Ok(1000)), (Some(1), Ok(0)), (None, Ok(0))] {
            let message = frame(0, &[0x72, 0].repeat(1000));
            let bounds = RequestBounds { most: 4 << 20, settlements: field, taken: None };
            let read = read(&HeaderMap::new(), WholeRequest::new(message), bounds).await;
            assert_eq!(read.map(|read| read.settlements), expected, "{field:?}");
        }
    }

    #[tokio::test]
    async fn bytes_are_taken_on_arrival_and_refused_beyond_the_budget() {
        let mut taken = MemoryBudget::new(1000).share().take(0).unwrap();
        for (length, expected) in [(600, None), (600, Some(Reason::ByteLimit))] {
            let bounds =
                RequestBounds { most: 4 << 20, settlements: None, taken: Some(&mut taken) };
            let body = WholeRequest::new(frame(0, &vec![0; length]));
            let read = read(&HeaderMap::new(), body, bounds).await;
            assert_eq!(read.err().map(|refused| refused.reason()), expected);
        }
    }
}
