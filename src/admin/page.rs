//! Pages: their sizes, and the tokens that say where the next page begins. A token is not sealed, because it tells
//! nothing that its reader does not know. It is checked: a token of another list or of another filter is refused.
//! Pure.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};

use super::filter::refused;
use crate::{api_error::ApiError, token::InstanceId};

/// Rows of a page if the caller asks for no number, and the most rows.
const ROWS: u32 = 100;
/// The most rows of a page.
pub(super) const MOST_ROWS: usize = 500;
/// Longest token, in characters: the names of a stream and of a consumer have 255 bytes each.
const LONGEST_TOKEN: usize = 1024;

/// The list that a token belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum PagedList {
    /// ListLeases.
    Leases = 1,
    /// ListConnections.
    Connections = 2,
    /// ListConsumers.
    Consumers = 3,
}

/// A place in a list whose rows are numbered at each replica: after this row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    /// The replica.
    pub(super) replica: InstanceId,
    /// The number of the row. 0: before the first row.
    pub(super) after: u64,
}

/// The rows of a page.
pub(super) fn rows(asked: u32) -> usize {
    let rows = if asked == 0 { ROWS } else { asked };
    usize::try_from(rows).unwrap_or(MOST_ROWS).min(MOST_ROWS)
}

/// The token for a place.
pub(super) fn token(list: PagedList, filter: &[u8], place: Place) -> String {
    let place = [&place.replica.0[..], &place.after.to_be_bytes()].concat();
    written(list, filter, &place)
}

/// The place in a token. `None`: the list begins.
///
/// # Errors
/// It is no token of this list with this filter.
pub(super) fn place(
    list: PagedList,
    filter: &[u8],
    token: &str,
) -> Result<Option<Place>, ApiError> {
    let Some(place) = read(list, filter, token)? else { return Ok(None) };
    let (replica, after) = place.split_first_chunk().ok_or_else(wrong)?;
    let after = <[u8; 8]>::try_from(after).map_err(|_| wrong())?;
    Ok(Some(Place { replica: InstanceId(*replica), after: u64::from_be_bytes(after) }))
}

/// The token for the place after this consumer.
pub(super) fn token_of_consumer(filter: &[u8], (stream, consumer): (&str, &str)) -> String {
    // No name of a stream has a zero byte.
    written(PagedList::Consumers, filter, format!("{stream}\0{consumer}").as_bytes())
}

/// The consumer in a token. `None`: the list begins.
///
/// # Errors
/// It is no token of this list with this filter.
pub(super) fn consumer(filter: &[u8], token: &str) -> Result<Option<(String, String)>, ApiError> {
    let Some(place) = read(PagedList::Consumers, filter, token)? else { return Ok(None) };
    let names = String::from_utf8(place).map_err(|_| wrong())?;
    let (stream, consumer) = names.split_once('\0').ok_or_else(wrong)?;
    Ok(Some((stream.to_owned(), consumer.to_owned())))
}

fn written(list: PagedList, filter: &[u8], place: &[u8]) -> String {
    let bytes = [&[list as u8][..], &digest(filter), place].concat();
    URL_SAFE_NO_PAD.encode(bytes)
}

fn read(list: PagedList, filter: &[u8], token: &str) -> Result<Option<Vec<u8>>, ApiError> {
    if token.is_empty() {
        return Ok(None);
    }
    if token.len() > LONGEST_TOKEN {
        return Err(wrong());
    }
    let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_| wrong())?;
    let rest = bytes.strip_prefix(&[list as u8]).ok_or_else(wrong)?;
    let place = rest.strip_prefix(&digest(filter)).ok_or_else(wrong)?;
    Ok(Some(place.to_vec()))
}

fn wrong() -> ApiError {
    refused("page_token", "must be the next_page_token of a page of the same list and filter")
}

/// FNV-1a and not the standard library's hash, because any replica may be asked for the next page.
fn digest(filter: &[u8]) -> [u8; 8] {
    let digest = filter.iter().fold(0xcbf2_9ce4_8422_2325_u64, |digest, byte| {
        (digest ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    });
    digest.to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn token_is_read_as_it_was_written_and_other_texts_are_refused(
            replica in any::<[u8; 8]>(),
            after in any::<u64>(),
            text in "[ -~]{0,60}",
            names in ("[^\0]{0,20}", "[^\0]{0,20}"),
            cut in any::<prop::sample::Index>(),
        ) {
            let here = Place { replica: InstanceId(replica), after };
            let written = token(PagedList::Leases, b"f", here);
            prop_assert_eq!(place(PagedList::Leases, b"f", &written).unwrap(), Some(here));
            prop_assert!(place(PagedList::Connections, b"f", &written).is_err());
            prop_assert!(place(PagedList::Leases, b"g", &written).is_err());
            let short = &written[..1 + cut.index(written.len() - 1)];
            prop_assert!(place(PagedList::Leases, b"f", short).is_err());
            prop_assert!(consumer(b"f", &written).is_err());
            // Nothing that a stranger makes up is a panic.
            let _ = place(PagedList::Leases, b"f", &text);
            let _ = consumer(b"f", &text);
            let written = token_of_consumer(b"f", (&names.0, &names.1));
            prop_assert_eq!(consumer(b"f", &written).unwrap(), Some(names));
        }
    }

    #[test]
    fn rows_have_a_default_and_a_most() {
        assert_eq!([0, 1, 500, 501, u32::MAX].map(rows), [100, 1, 500, 500, 500]);
        assert_eq!(place(PagedList::Leases, b"", "").unwrap(), None);
        assert!(place(PagedList::Leases, b"", &"A".repeat(5000)).is_err());
    }
}
