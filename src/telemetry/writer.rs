//! The path of a line to the reader of the log: a bounded queue, and a thread that writes. Owns the queue,
//! the thread, and the count of lost lines. Knows no format.
//!
//! ```text
//!  a logger ─▶ [ queue, bounded ] ─▶ thread ─▶ standard error
//!                  │ full               │ the write fails
//!                  └──▶ lost += 1 ◀─────┘
//! ```
//! 1. a logger never waits for a reader: no write happens under the lock;
//! 2. a line is written whole, or it counts as lost; a line break follows half a line;
//! 3. the count is logged when writing works again: at most once a second, and at the end.

use std::{
    cell::RefCell,
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use tracing_subscriber::fmt::MakeWriter;

use crate::{clock, lock::lock, metrics::LogMeter};

/// Most lines that wait: some seconds of a busy proxy at level debug.
const MAX_QUEUED_LINES: usize = 8192;
/// Most bytes that wait, so that long lines do not take the memory of the service.
const MAX_QUEUED_BYTES: usize = 4 << 20;
/// Least time between two lines about lost lines, and between two tries of a line that failed.
const LOSS_REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Wait before a full non-blocking pipe is tried again.
const PIPE_RETRY: Duration = Duration::from_millis(20);

/// The loggers' end of the queue. All copies share one queue.
#[derive(Debug, Clone)]
pub(super) struct Queue(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    /// Signals that a line came, or that the queue is closed.
    more: Condvar,
    /// Signals that the thread has nothing left to write, or has ended.
    idle: Condvar,
    meter: LogMeter,
}

#[derive(Debug, Default)]
struct State {
    lines: VecDeque<Box<[u8]>>,
    bytes: usize,
    lost: u64,
    writing: bool,
    closing: bool,
    ended: bool,
}

impl State {
    fn busy(&self) -> bool {
        !self.ended && (self.writing || !self.lines.is_empty())
    }
}

/// The next action of the thread.
enum Next {
    Line(Box<[u8]>),
    /// No line came for a while, and a loss is not reported yet.
    Idle,
    End,
}

thread_local! {
    /// Collects the lines of this thread in place of the queue, to make a line of its own.
    static OWN: RefCell<Option<Vec<u8>>> = const { RefCell::new(None) };
}

/// Returns the lines that `log` logs.
pub(super) fn captured(log: impl FnOnce()) -> Vec<u8> {
    OWN.with(|own| own.replace(Some(Vec::new())));
    log();
    OWN.with(RefCell::take).unwrap_or_default()
}

impl Queue {
    /// Makes a queue whose lines a new thread writes to `output`. `loss` makes the line about lost lines.
    /// If that line is empty, the loss is not reported.
    ///
    /// # Errors
    /// The system allows no further thread.
    pub(super) fn start(
        output: impl Write + Send + 'static,
        loss: impl Fn(u64) -> Vec<u8> + Send + 'static,
        meter: LogMeter,
    ) -> io::Result<Self> {
        let (more, idle) = (Condvar::new(), Condvar::new());
        let shared = Shared { state: Mutex::default(), more, idle, meter };
        let queue = Self(Arc::new(shared));
        let output = Output { output, torn: false };
        let thread = Thread { queue: queue.clone(), output, loss, told: 0, tried_at: None };
        thread::Builder::new().name("log".to_owned()).spawn(move || thread.run())?;
        Ok(queue)
    }

    /// Queues a line for the thread, or counts the line as lost. Never waits for a write.
    pub(super) fn push(&self, line: &[u8]) {
        let mut state = self.state();
        if state.lines.len() >= MAX_QUEUED_LINES || state.bytes + line.len() > MAX_QUEUED_BYTES {
            self.lose(&mut state);
            return;
        }
        state.bytes += line.len();
        state.lines.push_back(line.into());
        self.0.more.notify_one();
    }

    /// Waits until every line is written or lost, at most for `bound`.
    pub(super) fn flush(&self, bound: Duration) {
        let waited = self.0.idle.wait_timeout_while(self.state(), bound, |state| state.busy());
        drop(waited);
    }

    /// The same, and ends the thread. No line is logged afterwards.
    pub(super) fn close(&self, bound: Duration) {
        let mut state = self.state();
        state.closing = true;
        self.0.more.notify_one();
        let waited = self.0.idle.wait_timeout_while(state, bound, |state| !state.ended);
        drop(waited);
    }

    fn next(&self, told: u64) -> Next {
        let mut state = self.state();
        state.writing = false;
        loop {
            if let Some(line) = state.lines.pop_front() {
                state.bytes -= line.len();
                state.writing = true;
                return Next::Line(line);
            }
            if state.closing {
                return Next::End;
            }
            self.0.idle.notify_all();
            if state.lost == told {
                state = self.0.more.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let waited = self.0.more.wait_timeout(state, LOSS_REPORT_INTERVAL);
            let timeout;
            (state, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            if timeout.timed_out() && state.lines.is_empty() {
                return Next::Idle;
            }
        }
    }

    fn lose_one(&self) {
        self.lose(&mut self.state());
    }

    fn lose(&self, state: &mut State) {
        state.lost += 1;
        self.0.meter.dropped();
    }

    fn lost(&self) -> u64 {
        self.state().lost
    }

    fn end(&self) {
        self.state().ended = true;
        self.0.idle.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.0.state)
    }
}

/// The subscriber makes one write for each event.
impl Write for &Queue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let own = OWN.with(|own| match &mut *own.borrow_mut() {
            Some(own) => {
                own.extend_from_slice(line);
                true
            }
            None => false,
        });
        if !own {
            self.push(line);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Queue {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }

    fn make_writer_for(&'a self, event: &tracing::Metadata<'_>) -> Self::Writer {
        self.0.meter.logged(event.level().as_str());
        self
    }
}

struct Thread<W, L> {
    queue: Queue,
    output: Output<W>,
    loss: L,
    /// Number of lost lines that are reported.
    told: u64,
    /// Time of the last try to report a loss.
    tried_at: Option<Instant>,
}

impl<W: Write, L: Fn(u64) -> Vec<u8>> Thread<W, L> {
    fn run(mut self) {
        loop {
            match self.queue.next(self.told) {
                Next::Line(line) => {
                    if self.output.write(&line).is_err() {
                        self.queue.lose_one();
                    } else if self.may_try() {
                        self.tell();
                    }
                }
                Next::Idle => self.tell(),
                Next::End => {
                    self.tell();
                    return self.queue.end();
                }
            }
        }
    }

    fn may_try(&self) -> bool {
        self.queue.lost() > self.told
            && self
                .tried_at
                .is_none_or(|tried| clock::now().duration_since(tried) >= LOSS_REPORT_INTERVAL)
    }

    fn tell(&mut self) {
        let lost = self.queue.lost();
        if lost == self.told {
            return;
        }
        self.tried_at = Some(clock::now());
        if self.output.write(&(self.loss)(lost - self.told)).is_ok() {
            self.told = lost;
        }
    }
}

struct Output<W> {
    output: W,
    /// Whether the last write ended within a line.
    torn: bool,
}

impl<W: Write> Output<W> {
    /// Writes a whole line. Waits for the reader without a limit.
    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if self.torn {
            self.all(b"\n")?;
            self.torn = false;
        }
        self.all(line)
    }

    fn all(&mut self, mut rest: &[u8]) -> io::Result<()> {
        let whole = rest.len();
        while !rest.is_empty() {
            match self.output.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => rest = &rest[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(PIPE_RETRY)
                }
                Err(error) => {
                    self.torn |= rest.len() < whole;
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const BOUND: Duration = Duration::from_secs(20);

    /// Takes a given number of bytes at each write, in order, and then everything.
    struct Reader {
        takes: mpsc::Receiver<Take>,
        taken: Arc<Mutex<Vec<u8>>>,
    }

    enum Take {
        Bytes(usize),
        Error(io::ErrorKind),
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let many = match self.takes.recv() {
                Ok(Take::Error(kind)) => return Err(kind.into()),
                Ok(Take::Bytes(many)) => many,
                Err(_) => usize::MAX,
            };
            let taken = &bytes[..many.min(bytes.len())];
            self.taken.lock().unwrap().extend_from_slice(taken);
            Ok(taken.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    type Started = (Queue, mpsc::Sender<Take>, Arc<Mutex<Vec<u8>>>);

    fn start() -> Started {
        let ((tell, takes), taken) = (mpsc::channel(), Arc::default());
        let reader = Reader { takes, taken: Arc::clone(&taken) };
        let loss = |lines| format!("{lines} lost\n").into_bytes();
        (Queue::start(reader, loss, LogMeter::default()).unwrap(), tell, taken)
    }

    fn text(taken: &Mutex<Vec<u8>>) -> String {
        String::from_utf8(taken.lock().unwrap().clone()).unwrap()
    }

    #[test]
    fn lines_are_written_in_order_and_whole() {
        let (queue, takes, taken) = start();
        for take in [Take::Bytes(2), Take::Error(io::ErrorKind::Interrupted), Take::Bytes(1)] {
            takes.send(take).unwrap();
        }
        takes.send(Take::Error(io::ErrorKind::WouldBlock)).unwrap();
        drop(takes);
        queue.push(b"first\n");
        queue.push(b"second\n");
        queue.flush(BOUND);
        assert_eq!(text(&taken), "first\nsecond\n");
        queue.push(b"third\n");
        queue.close(BOUND);
        assert_eq!(text(&taken), "first\nsecond\nthird\n");
    }

    #[test]
    fn logging_never_waits_and_lost_lines_are_counted() {
        let (queue, takes, taken) = start();
        queue.push(b"taken\n");
        // The thread waits for its reader, with or without a line.
        for _ in 0..MAX_QUEUED_LINES + 10 {
            queue.push(b"x\n");
        }
        let lost = queue.lost();
        assert!((10..=11).contains(&lost), "{lost}");
        // Neither this call nor the end waits longer than its bound.
        queue.flush(Duration::from_millis(1));
        queue.close(Duration::from_millis(1));
        drop(takes);
        queue.close(BOUND);
        let said = text(&taken);
        assert!(said.contains(&format!("\n{lost} lost\n")), "{}", &said[..100]);
        assert_eq!(said.matches("x\n").count() + lost as usize, MAX_QUEUED_LINES + 10);
    }

    #[test]
    fn long_lines_count_by_their_bytes() {
        let (queue, takes, _) = start();
        let long = vec![b'x'; MAX_QUEUED_BYTES / 4];
        for _ in 0..10 {
            queue.push(&long);
        }
        let lost = queue.lost();
        assert!((5..=6).contains(&lost), "{lost}");
        queue.push(&[b'x'; MAX_QUEUED_BYTES + 1]);
        assert_eq!(queue.lost(), lost + 1);
        drop(takes);
        queue.close(BOUND);
    }

    #[test]
    fn a_write_that_fails_is_counted_and_half_a_line_is_ended() {
        let (queue, takes, taken) = start();
        for line in ["first\n", "second\n", "third\n", "fourth\n"] {
            queue.push(line.as_bytes());
        }
        takes.send(Take::Bytes(3)).unwrap();
        takes.send(Take::Error(io::ErrorKind::StorageFull)).unwrap();
        // First the line break. Then the next line, after a line break that was written.
        takes.send(Take::Error(io::ErrorKind::BrokenPipe)).unwrap();
        takes.send(Take::Bytes(1)).unwrap();
        takes.send(Take::Error(io::ErrorKind::BrokenPipe)).unwrap();
        drop(takes);
        queue.close(BOUND);
        assert_eq!(text(&taken), "fir\nfourth\n3 lost\n");
    }

    #[test]
    fn a_loss_is_said_as_soon_as_writing_works_also_when_nothing_else_is_logged() {
        let (queue, takes, taken) = start();
        takes.send(Take::Error(io::ErrorKind::BrokenPipe)).unwrap();
        takes.send(Take::Error(io::ErrorKind::BrokenPipe)).unwrap();
        drop(takes);
        queue.push(b"lost\n");
        let mut polls = 0;
        while text(&taken) != "1 lost\n" {
            polls += 1;
            assert!(polls < 2000, "{}", text(&taken));
            thread::sleep(Duration::from_millis(10));
        }
        queue.close(BOUND);
        assert_eq!(text(&taken), "1 lost\n");
    }

    #[test]
    fn captured_lines_are_not_queued() {
        let (queue, takes, taken) = start();
        drop(takes);
        let own = captured(|| {
            let _ = (&queue).write(b"own\n");
        });
        let _ = (&queue).write(b"queued\n");
        queue.close(BOUND);
        assert_eq!((own, text(&taken)), (b"own\n".to_vec(), "queued\n".to_owned()));
    }
}
