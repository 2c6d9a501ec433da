//! Answers of one connection that are not written yet, and the end of those that make no progress.
//!
//! ```text
//!  begun ─▶ written bit by bit ─▶ written                  (or its client cancels)
//!             └ too little in 10 s, or all its leases ended ─▶ its stream is reset
//!                                                  └ its stream is over for hyper ─▶ the connection is cut
//! ```
//! A stream is reset by dropping the task that answers on it. hyper's task ends when the last piece of
//! an answer is handed to h2, and only the end of the connection frees a piece that stays there.

use std::{
    cell::RefCell,
    collections::HashMap,
    future::{Future, poll_fn},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

use crate::clock;

/// An answer that is not written by less than [`MIN_WRITTEN_BYTES`] within this time is dropped.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes that a client must read of an answer within [`WRITE_TIMEOUT`], or all that is left. The rate is
/// far below that of any link, and above that of a client who wants to hold memory.
const MIN_WRITTEN_BYTES: u64 = 64 * 1024;
/// The time from one look at the answers of a connection to the next.
const WRITE_CHECK_INTERVAL: Duration = Duration::from_secs(2);

tokio::task_local! {
    /// The answer that the task of a stream has made.
    static MADE: RefCell<Option<Arc<UnwrittenAnswer>>>;
}

/// The answers of one connection that are not written.
#[derive(Debug, Default)]
pub(super) struct Unwritten {
    answers: Mutex<Answers>,
    /// There are answers, and nobody looks at them yet.
    begun: Notify,
}

#[derive(Debug, Default)]
struct Answers {
    by_number: HashMap<u64, Watch>,
    last: u64,
    /// Somebody looks at them from time to time.
    looked_at: bool,
}

/// An answer, and the last time at which it had made progress.
#[derive(Debug)]
struct Watch {
    answer: Arc<UnwrittenAnswer>,
    written: u64,
    at: Instant,
}

/// How far one answer is.
#[derive(Debug)]
pub(super) struct UnwrittenAnswer {
    /// Bytes made and not written.
    outstanding: AtomicUsize,
    written: AtomicU64,
    /// All its leases have ended by then.
    until: Option<Instant>,
    /// The task of its stream is to end.
    ended: AtomicBool,
    /// The task of its stream has ended.
    over: AtomicBool,
    task: AtomicWaker,
}

/// An answer that counts as unwritten until this is dropped.
#[derive(Debug)]
pub(super) struct StartedAnswer {
    unwritten: Arc<Unwritten>,
    number: u64,
    answer: Arc<UnwrittenAnswer>,
}

impl Unwritten {
    /// One more answer, made by the present task. Nobody needs it after `until`.
    pub(super) fn begin(self: &Arc<Self>, until: Option<Instant>) -> StartedAnswer {
        let answer = Arc::new(UnwrittenAnswer {
            outstanding: AtomicUsize::new(0),
            written: AtomicU64::new(0),
            until,
            ended: AtomicBool::new(false),
            over: AtomicBool::new(false),
            task: AtomicWaker::new(),
        });
        // HTTP/1 has no task for each answer.
        let known = MADE.try_with(|made| made.replace(Some(answer.clone()))).is_ok();
        answer.over.store(!known, Ordering::Relaxed);
        let mut answers = self.answers();
        answers.last += 1;
        let number = answers.last;
        let watch = Watch { answer: answer.clone(), written: 0, at: clock::now() };
        answers.by_number.insert(number, watch);
        if !std::mem::replace(&mut answers.looked_at, true) {
            self.begun.notify_one();
        }
        drop(answers);
        StartedAnswer { unwritten: self.clone(), number, answer }
    }

    /// Looks at the answers for as long as there are any, and ends those that make no progress.
    /// Returns when one of them cannot be ended but with the connection.
    pub(super) async fn stuck(&self) {
        loop {
            self.begun.notified().await;
            loop {
                tokio::time::sleep(WRITE_CHECK_INTERVAL).await;
                match self.look(clock::now()) {
                    WriteProgress::Some => {}
                    WriteProgress::None => break,
                    WriteProgress::Stuck => return,
                }
            }
        }
    }

    fn look(&self, now: Instant) -> WriteProgress {
        let mut answers = self.answers();
        if answers.by_number.is_empty() {
            answers.looked_at = false;
            return WriteProgress::None;
        }
        let mut seen = WriteProgress::Some;
        for watch in answers.by_number.values_mut() {
            if watch.is_stuck(now) && !watch.answer.end() {
                seen = WriteProgress::Stuck;
            }
        }
        seen
    }

    fn answers(&self) -> MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The outcome of one look at all answers.
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
    /// So many bytes are to be written.
    pub(super) fn made(&self, bytes: usize) {
        self.outstanding.fetch_add(bytes, Ordering::Relaxed);
    }

    /// So many of them are written.
    pub(super) fn wrote(&self, bytes: usize) {
        self.outstanding.fetch_sub(bytes, Ordering::Relaxed);
        self.written.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Ends the task of its stream; false where there is none any more.
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

/// Runs the task of one stream, until it is over or its answer is to end.
pub(super) async fn until_ended(task: impl Future) {
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

    /// Runs a task that makes an answer and writes nothing of it; whether the task was ended.
    async fn is_ended(unwritten: &Arc<Unwritten>, most: Duration, until: Option<Instant>) -> bool {
        let task = until_ended(async {
            let begun = unwritten.begin(until);
            begun.made(100);
            std::future::pending::<()>().await;
        });
        tokio::time::timeout(most, task).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_without_progress_ends_its_task_and_not_the_connection() {
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
    async fn an_answer_ends_with_its_leases() {
        let unwritten = Arc::<Unwritten>::default();
        let until = Some(clock::now() + Duration::from_secs(1));
        tokio::select! {
            () = unwritten.stuck() => panic!("the connection is cut"),
            ended = is_ended(&unwritten, 2 * WRITE_CHECK_INTERVAL, until) => assert!(ended),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_whose_task_is_over_ends_the_connection() {
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
    async fn an_answer_that_is_read_or_has_nothing_to_be_read_goes_on() {
        let unwritten = Arc::<Unwritten>::default();
        // One is a stream that says nothing for long.
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
