//! The settlement of a message, from how the work on it has ended: an exit code, or the answer of an HTTP server. Also
//! the delay of a Nak, which grows with each attempt. Pure.
//!
//! The exit codes 65 and 75 are EX_DATAERR and EX_TEMPFAIL of `sysexits.h`.

use std::time::Duration;

use crate::limits::LONGEST_DELAY;

/// The exit code of a message that can never be done.
const IMPOSSIBLE: i32 = 65;
/// The exit code of a message that is to come again.
const LATER: i32 = 75;

/// How the work on a message has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkEnd {
    /// The command has ended by itself.
    Exit {
        /// Its exit code.
        code: i32,
        /// The last line of its standard output.
        said: String,
        /// The last line of its standard error.
        complained: String,
    },
    /// The command was ended by the signal of this number.
    Signal(i32),
    /// The work took longer than it may.
    TimedOut(Duration),
    /// The HTTP server has answered.
    Answer {
        /// The status.
        status: u16,
        /// How long the server asks to wait.
        retry_after: Option<Duration>,
        /// The first line of the body.
        line: String,
    },
    /// The HTTP server cannot be reached, or has sent no answer. The text says why.
    NoAnswer(String),
}

/// The settlement of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkVerdict {
    /// It is done.
    Ack,
    /// It is to be delivered again.
    Nak {
        /// The time until then.
        delay: Duration,
        /// Why.
        why: String,
    },
    /// It is never to be delivered again, for this reason.
    Term(String),
}

/// Decides by the end of the work. `growing` is the delay of a Nak that names none. If `reads_delay`, the last line
/// of standard output names the delay with exit code 75.
pub fn judge(end: &WorkEnd, reads_delay: bool, growing: Duration) -> WorkVerdict {
    let nak = |delay: Option<Duration>, why: String| WorkVerdict::Nak {
        delay: delay.unwrap_or(growing).min(LONGEST_DELAY),
        why,
    };
    let or = |line: &str, other: String| if line.is_empty() { other } else { line.to_owned() };
    match end {
        WorkEnd::Exit { code: 0, .. } | WorkEnd::Answer { status: 200..=299, .. } => {
            WorkVerdict::Ack
        }
        WorkEnd::Exit { code: IMPOSSIBLE, complained, .. } => {
            WorkVerdict::Term(or(complained, format!("exit code {IMPOSSIBLE}")))
        }
        WorkEnd::Exit { code: LATER, said, .. } => {
            let named = Some(said).filter(|_| reads_delay).and_then(|line| delay_in(line));
            nak(named, format!("exit code {LATER}"))
        }
        WorkEnd::Exit { code, .. } => nak(None, format!("exit code {code}")),
        WorkEnd::Signal(signal) => nak(None, format!("ended by signal {signal}")),
        WorkEnd::TimedOut(after) => nak(None, format!("not done within {after:?}")),
        WorkEnd::Answer { status: 422, line, .. } => {
            WorkVerdict::Term(or(line, "status 422".to_owned()))
        }
        WorkEnd::Answer { status: status @ (429 | 503), retry_after, .. } => {
            nak(*retry_after, format!("status {status}"))
        }
        WorkEnd::Answer { status, .. } => nak(None, format!("status {status}")),
        WorkEnd::NoAnswer(why) => nak(None, why.clone()),
    }
}

/// A delay in a line of text: a time like `90s`, or a number of seconds.
fn delay_in(line: &str) -> Option<Duration> {
    let line = line.trim();
    let seconds = line.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    seconds.or_else(|| humantime::parse_duration(line).ok())
}

/// How long a server asks to wait (RFC 9110, section 10.2.3): a number of seconds, or a date. `now` is the time since
/// the Unix epoch. A date that has passed is no wait.
pub fn retry_after(value: &str, now: Duration) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let at = httpdate::parse_http_date(value).ok()?;
    let at = at.duration_since(std::time::UNIX_EPOCH).ok()?;
    Some(at.saturating_sub(now))
}

/// The delays of Naks that name none: each attempt of a message doubles the delay.
#[derive(Debug, Clone, Copy)]
pub struct DelayGrowth {
    /// The delay after the first attempt.
    pub first: Duration,
    /// The longest delay.
    pub most: Duration,
}

impl DelayGrowth {
    /// The delay after this attempt, from 1. It varies by a fifth with `random`, so that messages that failed together
    /// do not come back together.
    pub fn delay(&self, attempt: u32, random: u32) -> Duration {
        let doubled = 1_u32.checked_shl(attempt.saturating_sub(1)).unwrap_or(u32::MAX);
        let delay = self.first.saturating_mul(doubled).min(self.most);
        delay.mul_f64(0.8 + 0.2 * f64::from(random) / f64::from(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GROWING: Duration = Duration::from_secs(4);

    fn exit(code: i32, said: &str, complained: &str) -> WorkEnd {
        WorkEnd::Exit { code, said: said.to_owned(), complained: complained.to_owned() }
    }

    fn answer(status: u16, retry_after: Option<u64>, line: &str) -> WorkEnd {
        let retry_after = retry_after.map(Duration::from_secs);
        WorkEnd::Answer { status, retry_after, line: line.to_owned() }
    }

    fn nak(seconds: u64, why: &str) -> WorkVerdict {
        WorkVerdict::Nak { delay: Duration::from_secs(seconds), why: why.to_owned() }
    }

    #[test]
    fn each_end_has_its_settlement() {
        let term = |reason: &str| WorkVerdict::Term(reason.to_owned());
        for (end, reads, verdict) in [
            (exit(0, "75", "no"), true, WorkVerdict::Ack),
            (exit(65, "", "no such customer"), false, term("no such customer")),
            (exit(65, "said", ""), false, term("exit code 65")),
            (exit(75, "90s", ""), false, nak(4, "exit code 75")),
            (exit(75, "90s", ""), true, nak(90, "exit code 75")),
            (exit(75, " 1m 30s ", ""), true, nak(90, "exit code 75")),
            (exit(75, "7", ""), true, nak(7, "exit code 75")),
            (exit(75, "0", ""), true, nak(0, "exit code 75")),
            (exit(75, "9999h", ""), true, nak(24 * 3600, "exit code 75")),
            (exit(75, "soon", ""), true, nak(4, "exit code 75")),
            (exit(75, "-1", ""), true, nak(4, "exit code 75")),
            (exit(75, "inf", ""), true, nak(4, "exit code 75")),
            (exit(1, "90s", "x"), true, nak(4, "exit code 1")),
            (exit(127, "", ""), true, nak(4, "exit code 127")),
            (WorkEnd::Signal(9), true, nak(4, "ended by signal 9")),
            (WorkEnd::TimedOut(GROWING), false, nak(4, "not done within 4s")),
            (answer(200, None, ""), false, WorkVerdict::Ack),
            (answer(204, Some(9), ""), false, WorkVerdict::Ack),
            (answer(429, Some(9), "x"), false, nak(9, "status 429")),
            (answer(503, Some(9), "x"), false, nak(9, "status 503")),
            (answer(503, None, "x"), false, nak(4, "status 503")),
            (answer(422, None, "no such customer"), false, term("no such customer")),
            (answer(422, None, ""), false, term("status 422")),
            (answer(500, Some(9), "x"), false, nak(4, "status 500")),
            (answer(302, None, ""), false, nak(4, "status 302")),
            (answer(404, None, ""), false, nak(4, "status 404")),
            (WorkEnd::NoAnswer("refused".to_owned()), false, nak(4, "refused")),
        ] {
            assert_eq!(judge(&end, reads, GROWING), verdict, "{end:?}");
        }
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = Duration::from_secs(784_111_777);
        for (value, wait) in [
            ("120", Some(120)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:50:37 GMT", Some(60)),
            ("Sun, 06 Nov 1994 08:49:37 GMT", Some(0)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            assert_eq!(retry_after(value, now), wait.map(Duration::from_secs), "{value}");
        }
    }

    #[test]
    fn delay_doubles_up_to_the_longest_and_varies_by_a_fifth() {
        let growth = DelayGrowth { first: Duration::from_secs(1), most: Duration::from_secs(300) };
        for (attempt, seconds) in
            [(0, 1), (1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (64, 300), (u32::MAX, 300)]
        {
            let longest = Duration::from_secs(seconds);
            assert_eq!(growth.delay(attempt, u32::MAX), longest, "{attempt}");
            assert_eq!(growth.delay(attempt, 0), longest.mul_f64(0.8), "{attempt}");
        }
    }
}
