//! Tracks the answers of one connection that are not written yet, and ends answers without progress.
//!
//! ```text
//!  begun ─▶ written bit by bit ─▶ written                  (or its client cancels)
//!             └ too little in 10 s, or all its leases ended ─▶ its stream is reset
//!                                                  └ its stream is over for hyper ─▶ the connection is cut
//! ```
//! A stream is reset by dropping the task that answers on it. That task of hyper ends when h2 has the last
//! piece of the answer. A piece that stays in h2 is freed only by the end of the connection.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::{clock, lock::lock};

/// An answer of which less than [`MIN_WRITTEN_BYTES`] are written within this time is ended.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that a client must read of an answer within [`WRITE_TIMEOUT`], or else all that is left. This rate
/// is far below the rate of any link. It stops a client that reads slowly to make us hold memory.
const MIN_WRITTEN_BYTES: u64 = 64 * 1024;
/// The time from one check of the answers of a connection to the next.
const WRITE_CHECK_INTERVAL: Duration = Duration::from_secs(2);

tokio::task_local! {
    /// The answer that the current task of a stream has begun.
    static MADE: RefCell<Option<Arc<UnwrittenAnswer>>>;
}

/// The unwritten answers of one connection.
#[derive(Debug, Default)]
pub(crate) struct Unwritten {
    answers: Mutex<Answers>,
    /// Wakes [`Unwritten::stuck`] for the first answer.
    begun: Notify,
}

#[derive(Debug, Default)]
struct Answers {
    by_number: BTreeMap<u64, Watch>,
    last: u64,
    /// Whether [`Unwritten::stuck`] checks them from time to time.
    checked: bool,
}

/// An answer, and its last known progress.
#[derive(Debug)]
struct Watch {
    answer: Arc<UnwrittenAnswer>,
    /// Bytes written at `at`.
    written: u64,
    at: Instant,
}

/// The progress of one answer.
#[derive(Debug)]
pub(crate) struct UnwrittenAnswer {
    /// Bytes that are made and not written.
    outstanding: AtomicUsize,
    written: AtomicU64,
    /// The end of its last lease.
    until: Option<Instant>,
    /// Whether the task of its stream is to end.
    ended: AtomicBool,
    /// Whether the task of its stream has ended.
    over: AtomicBool,
    task: AtomicWaker,
}

/// An answer that counts as unwritten until this is dropped.
#[derive(Debug)]
pub(crate) struct StartedAnswer {
    unwritten: Arc<Unwritten>,
    number: u64,
    answer: Arc<UnwrittenAnswer>,
}

impl Unwritten {
    /// Begins an answer, made by the current task. The answer is of no use after `until`.
    pub(crate) fn begin(self: &Arc<Self>, until: Option<Instant>) -> StartedAnswer {
        let answer = Arc::new(UnwrittenAnswer {
            outstanding: AtomicUsize::new(0),
            written: AtomicU64::new(0),
            until,
            ended: AtomicBool::new(false),
            over: AtomicBool::new(false),
            task: AtomicWaker::new(),
        });
        // Over HTTP/1 there is no task for each answer.
        let known = MADE.try_with(|made| made.replace(Some(answer.clone()))).is_ok();
        answer.over.store(!known, Ordering::Relaxed);
        let mut answers = self.answers();
        answers.last += 1;
        let number = answers.last;
        let watch = Watch { answer: answer.clone(), written: 0, at: clock::now() };
        answers.by_number.insert(number, watch);
        if !std::mem::replace(&mut answers.checked, true) {
            self.begun.notify_one();
        }
        drop(answers);
        StartedAnswer { unwritten: self.clone(), number, answer }
    }

    /// Checks the answers while there are any, and ends answers without progress. Returns when only the end
    /// of the connection can end such an answer.
    pub(crate) async fn stuck(&self) {
        loop {
            self.begun.notified().await;
            loop {
                tokio::time::sleep(WRITE_CHECK_INTERVAL).await;
                match self.check(clock::now()) {
                    WriteProgress::Some => {}
                    WriteProgress::None => break,
                    WriteProgress::Stuck => return,
                }
            }
        }
    }

    fn check(&self, now: Instant) -> WriteProgress {
        let mut answers = self.answers();
        if answers.by_number.is_empty() {
            answers.checked = false;
            return WriteProgress::None;
        }
        let mut progress = WriteProgress::Some;
        for watch in answers.by_number.values_mut() {
            if watch.is_stuck(now) && !watch.answer.end() {
                progress = WriteProgress::Stuck;
            }
        }
        progress
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        lock(&self.answers)
    }
}

/// The outcome of one check of all answers.
#[derive(Debug, PartialEq, Eq)]
enum WriteProgress {
    None,
    Some,
    Stuck,
}

impl Watch {
    fn is_stuck(&mut self, now: Instant) -> bool {
        let written = self.answer.written.load(Ordering::Relaxed);
        if self.answer.outstanding.load(Ordering::Relaxed) == 0
            || written >= self.written + MIN_WRITTEN_BYTES
        {
            (self.written, self.at) = (written, now);
        }
        let over = self.answer.until.is_some_and(|until| until <= now);
        over || now.saturating_duration_since(self.at) >= WRITE_TIMEOUT
    }
}

impl UnwrittenAnswer {
    /// Adds bytes that are to be written.
    pub(crate) fn made(&self, bytes: usize) {
        self.outstanding.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Moves bytes to the written ones.
    pub(crate) fn wrote(&self, bytes: usize) {
        self.outstanding.fetch_sub(bytes, Ordering::Relaxed);
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Ends the task of its stream. Returns false if that task has ended before.
    fn end(&self) -> bool {
        self.ended.store(true, Ordering::Release);
        self.task.wake();
        !self.over.load(Ordering::Acquire)
    }
}

impl std::ops::Deref for StartedAnswer {
    type Target = UnwrittenAnswer;

    fn deref(&self) -> &UnwrittenAnswer {
        &self.answer
    }
}

impl Drop for StartedAnswer {
    fn drop(&mut self) {
        self.unwritten.answers().by_number.remove(&self.number);
    }
}

/// Runs the task of one stream until it ends, or until its answer is to end.
pub(crate) async fn until_ended(task: impl Future) {
    let ending = async move {
        let mut task = pin!(task);
        poll_fn(|cx| {
            if task.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            MADE.with(|made| {
                let made = made.borrow();
                let Some(answer) = &*made else { return Poll::Pending };
                answer.task.register(cx.waker());
                let ended = answer.ended.load(Ordering::Acquire);
                if ended { Poll::Ready(()) } else { Poll::Pending }
            })
        })
        .await;
        if let Some(answer) = MADE.with(RefCell::take) {
            answer.over.store(true, Ordering::Release);
        }
    };
    MADE.scope(RefCell::default(), ending).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a task that begins an answer and writes nothing. Returns whether the task was ended.
    async fn is_ended(unwritten: &Arc<Unwritten>, most: Duration, until: Option<Instant>) -> bool {
        let task = until_ended(async {
            let begun = unwritten.begin(until);
            begun.made(100);
            std::future::pending::<()>().await;
        });
        tokio::time::timeout(most, task).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn answer_without_progress_ends_its_task_and_keeps_the_connection() {
        let unwritten = Arc::<Unwritten>::default();
        tokio::select! {
            () = unwritten.stuck() => panic!("the connection is cut"),
            () = async {
                assert!(!is_ended(&unwritten, WRITE_TIMEOUT - WRITE_CHECK_INTERVAL, None).await, "too soon");
                assert!(is_ended(&unwritten, WRITE_TIMEOUT + 2 * WRITE_CHECK_INTERVAL, None).await);
            } => {}
        }
    }

    #[tokio::test(start_paused = true)]
    async fn answer_ends_with_its_leases() {
        let unwritten = Arc::<Unwritten>::default();
        let until = Some(clock::now() + Duration::from_secs(1));
        tokio::select! {
            () = unwritten.stuck() => panic!("the connection is cut"),
            ended = is_ended(&unwritten, 2 * WRITE_CHECK_INTERVAL, until) => assert!(ended),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_answer_without_a_task_ends_the_connection() {
        let unwritten = Arc::<Unwritten>::default();
        let kept = Mutex::new(None);
        until_ended(async {
            let begun = unwritten.begin(None);
            begun.made(100);
            *kept.lock().unwrap() = Some(begun);
        })
        .await;
        tokio::time::timeout(WRITE_TIMEOUT + 2 * WRITE_CHECK_INTERVAL, unwritten.stuck())
            .await
            .unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn answer_that_is_read_or_has_nothing_to_read_continues() {
        let unwritten = Arc::<Unwritten>::default();
        // The silent answer is a stream without messages for a long time.
        let (slow, silent) = (unwritten.begin(None), unwritten.begin(None));
        silent.made(100);
        silent.wrote(100);
        slow.made(10 << 20);
        tokio::select! {
            () = unwritten.stuck() => panic!("the connection is cut"),
            () = async {
                for _ in 0..20 {
                    tokio::time::sleep(WRITE_TIMEOUT / 2).await;
                    slow.wrote(64 * 1024);
                }
            } => {}
        }
    }
}
