//! The output of a command, as much of its end as may be kept. Pure.

/// Longest line that is looked at, in bytes. A reason of a Term has no more.
const MAX_CAPTURED_LINE: usize = 1024;

/// The end of an output.
#[derive(Debug, Clone)]
pub(super) struct Captured {
    most: usize,
    bytes: Vec<u8>,
    total: u64,
}

impl Captured {
    /// Nothing yet. At most the last `most` bytes are kept.
    pub(super) fn new(most: usize) -> Self {
        Self { most, bytes: Vec::new(), total: 0 }
    }

    /// Takes what came next.
    pub(super) fn take(&mut self, bytes: &[u8]) {
        self.total += bytes.len() as u64;
        self.bytes.extend_from_slice(&bytes[bytes.len().saturating_sub(self.most)..]);
        // Bytes move once for each time that the buffer fills, not for each piece.
        if self.bytes.len() > 2 * self.most {
            self.cut();
        }
    }

    fn cut(&mut self) {
        let surplus = self.bytes.len().saturating_sub(self.most);
        self.bytes.drain(..surplus);
    }

    /// The lines that are kept, and the number of bytes before them that are not.
    pub(super) fn lines(mut self) -> (Vec<String>, u64) {
        self.cut();
        let left_out = self.total - self.bytes.len() as u64;
        let text = String::from_utf8_lossy(&self.bytes);
        (text.lines().map(str::to_owned).collect(), left_out)
    }

    /// The first line of what is kept that is not blank, without blanks around it. At most its first 1024 bytes.
    pub(super) fn first_line(&self) -> String {
        line_of(self.kept().split(|byte| *byte == b'\n'))
    }

    /// The last line that is not blank, without blanks around it. At most the first 1024 bytes of what is kept of it.
    pub(super) fn last_line(&self) -> String {
        line_of(self.kept().split(|byte| *byte == b'\n').rev())
    }

    fn kept(&self) -> &[u8] {
        &self.bytes[self.bytes.len().saturating_sub(self.most)..]
    }
}

fn line_of<'a>(lines: impl Iterator<Item = &'a [u8]>) -> String {
    let mut lines = lines.map(<[u8]>::trim_ascii).filter(|line| !line.is_empty());
    let line = String::from_utf8_lossy(lines.next().unwrap_or_default());
    line[..line.floor_char_boundary(MAX_CAPTURED_LINE)].to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_bytes_are_kept_and_the_rest_is_counted() {
        let mut captured = Captured::new(8);
        captured.take(b"one\ntwo\n");
        assert_eq!(captured.clone().lines(), (vec!["one".to_owned(), "two".to_owned()], 0));
        captured.take(b"three\n");
        assert_eq!(captured.last_line(), "three");
        assert_eq!(captured.lines(), (vec!["o".to_owned(), "three".to_owned()], 6));
    }

    #[test]
    fn endless_output_takes_no_more_memory_than_two_caps() {
        let mut captured = Captured::new(1000);
        for _ in 0..10_000 {
            captured.take(&[b'x'; 777]);
            assert!(captured.bytes.len() <= 2000);
        }
        captured.take(&[b'y'; 100_000]);
        let (lines, left_out) = captured.lines();
        assert_eq!((lines, left_out), (vec!["y".repeat(1000)], 7_770_000 + 99_000));
    }

    #[test]
    fn last_line_is_the_last_that_is_not_blank() {
        let of = |text: &[u8]| {
            let mut captured = Captured::new(10_000);
            captured.take(text);
            captured.last_line()
        };
        assert_eq!(of(b""), "");
        assert_eq!(of(b"one\n  two \r\n\n \n"), "two");
        assert_eq!(of(b"no end"), "no end");
        let mut captured = Captured::new(10_000);
        captured.take(b"\n  first \r\nsecond\n");
        assert_eq!(captured.first_line(), "first");
        assert_eq!(of(b"\xff\n"), "\u{fffd}");
        let long = "ü".repeat(1000);
        assert_eq!(of(long.as_bytes()), "ü".repeat(512));
    }
}
