//! The sample tasks: every outcome that a message can have, in a fixed order. Pure.

use std::ops::RangeInclusive;

use bytes::Bytes;

use crate::nats::Sample;

/// The header with the expected outcome of a sample, for tests: `acked`, `terminated` or `rejected`.
const EXPECT: &str = "Expect";

/// The samples with these numbers. In every ten, six succeed, two fail once, one never succeeds, and one
/// is not JSON.
pub(super) fn samples(numbers: RangeInclusive<u64>) -> impl Iterator<Item = Sample> {
    numbers.map(sample)
}

/// The subject of the sample with this number.
pub fn subject(id: u64) -> String {
    format!("tasks.sample.{id}")
}

fn sample(id: u64) -> Sample {
    let task = |kind: &str| format!(r#"{{"id":{id},"kind":"{kind}"}}"#);
    let (expect, payload) = match id % 10 {
        3 | 7 => ("acked", task("flaky")),
        5 => ("terminated", task("broken")),
        8 => ("rejected", format!("task {id}, but not as JSON")),
        _ => ("acked", task("ok")),
    };
    let headers = vec![(EXPECT.to_owned(), expect.to_owned())];
    (subject(id), headers, Bytes::from(payload))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_samples_have_every_outcome() {
        let of = |fate: &str| {
            let fates = samples(1..=10).map(|(_, headers, _)| headers[0].1.clone());
            fates.filter(|expected| expected == fate).count()
        };
        assert_eq!((of("acked"), of("terminated"), of("rejected")), (8, 1, 1));
    }
}
