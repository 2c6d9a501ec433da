//! The lines of the worker, as text and as JSON. Pure.

use std::{fmt::Write as _, time::Duration};

use serde_json::json;

use super::{
    captured::Captured,
    desk::{SettledMessage, WorkOutcome},
};
use crate::client::plain;

/// How many messages have left the worker, by their outcomes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct WorkCounts {
    acked: u64,
    nacked: u64,
    terminated: u64,
    given_back: u64,
    lost: u64,
}

impl WorkCounts {
    pub(super) fn count(&mut self, outcome: WorkOutcome) {
        let count = match outcome {
            WorkOutcome::Acked => &mut self.acked,
            WorkOutcome::Nacked => &mut self.nacked,
            WorkOutcome::Terminated => &mut self.terminated,
            WorkOutcome::GivenBack => &mut self.given_back,
            WorkOutcome::Lost => &mut self.lost,
        };
        *count += 1;
    }

    /// All counts, in words.
    pub(super) fn text(&self) -> String {
        let Self { acked, nacked, terminated, given_back, lost } = self;
        format!(
            "{acked} acked, {nacked} nacked, {terminated} terminated, {given_back} given back, \
             {lost} lost"
        )
    }
}

/// The work on a message that has ended.
#[derive(Debug)]
pub(super) struct DoneWork {
    /// How long it took.
    pub(super) took: Duration,
    /// Standard output and standard error.
    pub(super) output: Option<(Captured, Captured)>,
}

fn name(outcome: WorkOutcome) -> &'static str {
    match outcome {
        WorkOutcome::Acked => "acked",
        WorkOutcome::Nacked => "nacked",
        WorkOutcome::Terminated => "terminated",
        WorkOutcome::GivenBack => "given-back",
        WorkOutcome::Lost => "lost",
    }
}

/// The line of a message, and the lines of its output below it, if they are to be shown.
pub(super) fn text(message: &SettledMessage, work: Option<DoneWork>, shows_output: bool) -> String {
    let SettledMessage { outcome, subject, sequence, attempt, why, .. } = message;
    let (outcome, subject) = (name(*outcome), plain(subject));
    let mut text = format!("{outcome:10}  {subject}  sequence {sequence}, attempt {attempt}");
    if let Some(work) = &work {
        let _ = write!(text, ", {:.2} s", work.took.as_secs_f64());
    }
    if !why.is_empty() {
        let _ = write!(text, ": {}", plain(why));
    }
    text.push('\n');
    let output = work.and_then(|work| work.output).filter(|_| shows_output);
    for (captured, mark) in output.into_iter().flat_map(|(out, error)| [(out, "|"), (error, "!")]) {
        let (lines, left_out) = captured.lines();
        if left_out > 0 {
            let _ = writeln!(text, "  {mark} … {left_out} bytes are left out");
        }
        for line in lines {
            let _ = writeln!(text, "  {mark} {}", plain(&line.replace('\t', "    ")));
        }
    }
    text
}

/// The same as one JSON object.
pub(super) fn json(message: &SettledMessage, work: Option<DoneWork>, shows_output: bool) -> String {
    let SettledMessage { outcome, subject, sequence, attempt, why, .. } = message;
    let mut object = json!({
        "outcome": name(*outcome),
        "subject": subject,
        "sequence": sequence,
        "attempt": attempt,
    });
    if !why.is_empty() {
        object["why"] = why.as_str().into();
    }
    if let Some(work) = work {
        object["seconds"] = work.took.as_secs_f64().into();
        let output = work.output.filter(|_| shows_output);
        let named =
            output.into_iter().flat_map(|(out, error)| [("stdout", out), ("stderr", error)]);
        for (name, captured) in named {
            let (lines, left_out) = captured.lines();
            object[name] = lines.join("\n").into();
            if left_out > 0 {
                object[format!("{name}_left_out_bytes")] = left_out.into();
            }
        }
    }
    format!("{object}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(text: &str) -> Captured {
        let mut captured = Captured::new(8);
        captured.take(text.as_bytes());
        captured
    }

    fn work() -> Option<DoneWork> {
        let output = Some((captured("one\ntwo\nthree\n"), captured("\u{1b}[2J\n")));
        Some(DoneWork { took: Duration::from_millis(1234), output })
    }

    fn message() -> SettledMessage {
        SettledMessage {
            key: 1,
            outcome: WorkOutcome::Nacked,
            subject: "a\u{1b}b".to_owned(),
            sequence: 7,
            attempt: 2,
            why: "exit code 1; again in 2s".to_owned(),
        }
    }

    #[test]
    fn message_has_one_line_and_its_output_below_and_controls_no_terminal() {
        let line =
            "nacked      a\\u{1b}b  sequence 7, attempt 2, 1.23 s: exit code 1; again in 2s\n";
        assert_eq!(text(&message(), work(), false), line);
        let output = "  | … 6 bytes are left out\n  | o\n  | three\n  ! \\u{1b}[2J\n";
        assert_eq!(text(&message(), work(), true), format!("{line}{output}"));
        let acked = SettledMessage { outcome: WorkOutcome::Acked, why: String::new(), ..message() };
        assert_eq!(text(&acked, None, true), "acked       a\\u{1b}b  sequence 7, attempt 2\n");
    }

    #[test]
    fn message_is_one_object_on_one_line() {
        let line = json(&message(), work(), true);
        assert_eq!(line.matches('\n').count(), 1);
        let object: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(object["outcome"], "nacked");
        assert_eq!(object["stdout"], "o\nthree");
        assert_eq!(object["stdout_left_out_bytes"], 6);
        assert_eq!(object["seconds"], 1.234);
    }

    #[test]
    fn each_outcome_has_its_count() {
        let mut counts = WorkCounts::default();
        for outcome in
            [WorkOutcome::Acked, WorkOutcome::Acked, WorkOutcome::Lost, WorkOutcome::GivenBack]
        {
            counts.count(outcome);
        }
        assert_eq!(counts.text(), "2 acked, 0 nacked, 0 terminated, 1 given back, 1 lost");
    }
}
