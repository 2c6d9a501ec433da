//! The history of a run, line by line: a digest that tells two histories apart, and, where somebody wants
//! to read it, the lines.

use std::fmt::{self, Write as _};

use super::jetstream::Time;

#[derive(Debug, Clone, Default)]
pub struct History {
    digest: u64,
    count: u64,
    /// The time of the last line.
    until: Time,
    /// `None`: only the digest is kept.
    lines: Option<Vec<String>>,
}

/// FNV-1a over what is written.
struct Digest<'d>(&'d mut u64);

impl fmt::Write for Digest<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            *self.0 = (*self.0 ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        }
        Ok(())
    }
}

impl History {
    pub fn new(keep_lines: bool) -> Self {
        let lines = keep_lines.then(Vec::new);
        Self { digest: 0xcbf2_9ce4_8422_2325, count: 0, until: Time::ZERO, lines }
    }

    pub fn add(&mut self, now: Time, what: fmt::Arguments<'_>) {
        self.count += 1;
        self.until = now;
        let _ = writeln!(Digest(&mut self.digest), "{now:?} {what}");
        if let Some(lines) = &mut self.lines {
            lines.push(format!("{:>9.3} {what}", now.as_secs_f64()));
        }
    }

    /// A number that another history does not have, and how many lines there are.
    pub fn digest(&self) -> (u64, u64) {
        (self.digest, self.count)
    }

    /// How long the world has lived.
    pub fn until(&self) -> Time {
        self.until
    }

    pub fn lines(&self) -> &[String] {
        self.lines.as_deref().unwrap_or_default()
    }
}
