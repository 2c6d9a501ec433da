//! Writes lines, and keeps a line of progress below them on a terminal. A thread of its own writes, so that a blocked
//! terminal does not hold the worker up.

use std::{
    io::{self, IsTerminal as _, Write},
    sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel},
    thread::{self, JoinHandle},
    time::Duration,
};

/// Texts that may wait. Later texts are left out, and counted.
const MOST_TEXTS: usize = 1024;
/// How long the end of the worker waits for the last texts.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);
const FLUSH_POLL: Duration = Duration::from_millis(5);
/// Erases the line of a terminal (ECMA-48).
const ERASE: &str = "\r\x1b[K";

/// Something to write.
enum Text {
    Out(String),
    Error(String),
    Progress(String),
}

/// The sender side of the thread.
#[derive(Debug)]
pub(super) struct Printer {
    sender: Option<SyncSender<Text>>,
    thread: Option<JoinHandle<()>>,
    left_out: u64,
    /// Whether there is a line of progress.
    pub(super) has_terminal: bool,
}

impl Printer {
    pub(super) fn start() -> io::Result<Self> {
        let has_terminal = io::stderr().is_terminal();
        let (sender, texts) = sync_channel(MOST_TEXTS);
        let thread = thread::Builder::new()
            .name("printer".to_owned())
            .spawn(|| write_all(texts, io::stdout(), io::stderr()))?;
        Ok(Self { sender: Some(sender), thread: Some(thread), left_out: 0, has_terminal })
    }

    /// Writes lines to standard output.
    pub(super) fn out(&mut self, lines: String) {
        self.send(Text::Out(lines));
    }

    /// Writes a line to standard error.
    pub(super) fn error(&mut self, line: &str) {
        self.send(Text::Error(format!("{line}\n")));
    }

    /// Replaces the line of progress.
    pub(super) fn progress(&mut self, line: String) {
        if self.has_terminal {
            self.send(Text::Progress(line));
        }
    }

    fn send(&mut self, text: Text) {
        let Some(sender) = &self.sender else { return };
        let note = (self.left_out > 0)
            .then(|| Text::Error(format!("{} texts are left out here\n", self.left_out)));
        if note.is_some_and(|note| sender.try_send(note).is_ok()) {
            self.left_out = 0;
        }
        if let Err(TrySendError::Full(_)) = sender.try_send(text) {
            self.left_out += 1;
        }
    }
}

impl Drop for Printer {
    fn drop(&mut self) {
        drop(self.sender.take());
        let Some(thread) = self.thread.take() else { return };
        for _ in 0..FLUSH_TIMEOUT.as_millis() / FLUSH_POLL.as_millis() {
            if thread.is_finished() {
                return;
            }
            thread::sleep(FLUSH_POLL);
        }
    }
}

/// If an output is closed, its texts have no reader, and the work continues.
fn write_all(texts: Receiver<Text>, mut out: impl Write, mut error: impl Write) {
    let mut progress = String::new();
    for text in texts {
        if !progress.is_empty() {
            let _ = write!(error, "{ERASE}");
        }
        let _ = match text {
            Text::Out(lines) => out.write_all(lines.as_bytes()).and_then(|()| out.flush()),
            Text::Error(line) => error.write_all(line.as_bytes()),
            Text::Progress(line) => {
                progress = line;
                Ok(())
            }
        };
        let _ = error.write_all(progress.as_bytes()).and_then(|()| error.flush());
    }
    if !progress.is_empty() {
        let _ = write!(error, "{ERASE}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_of_progress_stays_below_the_lines_and_is_gone_at_the_end() {
        let (sender, texts) = sync_channel(8);
        for text in [
            Text::Out("one\n".to_owned()),
            Text::Progress("1 at work".to_owned()),
            Text::Out("two\n".to_owned()),
            Text::Error("note\n".to_owned()),
            Text::Progress("2 at work".to_owned()),
        ] {
            sender.send(text).unwrap();
        }
        drop(sender);
        let (mut out, mut error) = (Vec::new(), Vec::new());
        write_all(texts, &mut out, &mut error);
        assert_eq!(String::from_utf8(out).unwrap(), "one\ntwo\n");
        let shown =
            "1 at work\r\u{1b}[K1 at work\r\u{1b}[Knote\n1 at work\r\u{1b}[K2 at work\r\u{1b}[K";
        assert_eq!(String::from_utf8(error).unwrap(), shown);
    }

    #[test]
    fn texts_that_nobody_takes_are_counted_and_hold_nobody_up() {
        let (sender, texts) = sync_channel(2);
        let (sender, thread) = (Some(sender), None);
        let mut printer = Printer { sender, thread, left_out: 0, has_terminal: false };
        for _ in 0..5 {
            printer.error("line");
        }
        assert_eq!(printer.left_out, 3);
        assert_eq!(texts.try_iter().count(), 2);
        printer.error("line");
        let last: Vec<Text> = texts.try_iter().collect();
        let [Text::Error(note), Text::Error(_)] = &last[..] else { panic!("{}", last.len()) };
        assert_eq!(note, "3 texts are left out here\n");
    }
}
