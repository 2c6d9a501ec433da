//! The queue of a flow, which its call and the task of its consumer share, and the credit of its messages. Knows
//! neither of the two: it tells the task through a function.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    sync::{Arc, Mutex},
    time::Instant,
};

use tokio::sync::Notify;

use super::{Error, delivery::GrantedDelivery};
use crate::{lease::LeaseId, lock::lock, pump::Credit};

/// Most messages of one frame.
const MAX_FRAME_MESSAGES: usize = 256;
/// A frame takes no further message beyond this many bytes. A client's window has about as much.
const MAX_FRAME_BYTES: u64 = 64 * 1024;

/// The end of a flow, from the side of its consumer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FlowEnd {
    /// The replica is draining. All that was to come is here.
    Over,
    /// It has failed.
    Failed(Error),
}

/// A lease that the client of a flow has no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EndedLease {
    /// The number of its delivery.
    pub number: u64,
    /// The id of the lease.
    pub lease: u64,
}

/// What the task of the consumer is told.
#[derive(Debug)]
pub(super) enum FlowNews {
    /// Credit was freed, or is about to be, as the account says.
    Freed,
    /// Nobody has taken these deliveries.
    GiveBack(Vec<GrantedDelivery>),
}

type Tell = Box<dyn Fn(FlowNews) + Send + Sync>;

/// What a flow has freed, and what it holds.
pub(super) struct FlowAccount {
    tell: Tell,
    state: Mutex<AccountState>,
    /// Rings for the call when something has come or ended.
    bell: Notify,
}

#[derive(Debug, Default)]
struct AccountState {
    /// The credit of leases, and of messages that wait to be taken.
    used: Credit,
    /// What the task does not know yet.
    freed: Credit,
    /// The number of leases that are being settled.
    settling: u64,
    /// The task has been told, and has not looked yet.
    told: bool,
    /// The leases of the client, by their numbers.
    leases: BTreeMap<u64, LeaseId>,
    /// Those that the client has no more.
    ended: Vec<EndedLease>,
}

/// The credit that one message uses until this is dropped.
#[derive(Debug)]
pub(super) struct Debit {
    account: Arc<FlowAccount>,
    bytes: u64,
    number: u64,
}

/// Leases are being settled until this is dropped. The task pulls the messages that follow them.
pub struct Settling {
    account: Arc<FlowAccount>,
    leases: u64,
}

/// A message that was handed to the flow.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) granted: GrantedDelivery,
    pub(super) debit: Debit,
    size: u64,
    at: Instant,
}

/// The queue of a flow, which its call and the task of its consumer share.
#[derive(Debug)]
pub(super) struct FlowQueue {
    pub(super) account: Arc<FlowAccount>,
    state: Mutex<QueueState>,
}

#[derive(Debug, Default)]
struct QueueState {
    handed: VecDeque<Handed>,
    end: Option<FlowEnd>,
    /// The call has gone.
    closed: bool,
}

impl FlowAccount {
    /// Waits until something has come or ended.
    pub(super) async fn changed(&self) {
        self.bell.notified().await;
    }

    /// The credit of the leases, and of the messages that wait to be taken.
    pub(super) fn used(&self) -> Credit {
        lock(&self.state).used
    }

    /// The leases.
    pub(super) fn leased(&self) -> usize {
        lock(&self.state).leases.len()
    }

    /// The leases, in the order of their numbers.
    pub(super) fn leases(&self) -> Vec<LeaseId> {
        lock(&self.state).leases.values().copied().collect()
    }

    /// The leases that the client has no more since the last call.
    pub(super) fn take_ended(&self) -> Vec<EndedLease> {
        std::mem::take(&mut lock(&self.state).ended)
    }

    /// What was freed since the last look, and the number of leases that are being settled now.
    pub(super) fn take_freed(&self) -> (Credit, u64) {
        let mut state = lock(&self.state);
        state.told = false;
        (std::mem::take(&mut state.freed), state.settling)
    }

    /// So many leases of the flow are being settled.
    pub(super) fn settling(self: &Arc<Self>, leases: u64) -> Settling {
        self.change(|state| state.settling += leases);
        Settling { account: self.clone(), leases }
    }

    /// Changes what the task is to know, and tells it once.
    fn change<T>(&self, change: impl FnOnce(&mut AccountState) -> T) -> T {
        let (changed, told) = {
            let mut state = lock(&self.state);
            (change(&mut state), std::mem::replace(&mut state.told, true))
        };
        if !told {
            (self.tell)(FlowNews::Freed);
        }
        changed
    }
}

impl Drop for Settling {
    fn drop(&mut self) {
        self.account.change(|state| state.settling -= self.leases);
    }
}

impl Debit {
    fn new(account: &Arc<FlowAccount>, bytes: u64) -> Self {
        let mut state = lock(&account.state);
        state.used.messages += 1;
        state.used.bytes += bytes;
        drop(state);
        Self { account: account.clone(), bytes, number: 0 }
    }

    /// The number of the delivery. 0: it has none yet.
    pub(super) fn number(&self) -> u64 {
        self.number
    }

    /// The message is leased to the client under this number.
    pub(super) fn lease(mut self, number: u64, lease: LeaseId) -> Self {
        lock(&self.account.state).leases.insert(number, lease);
        self.number = number;
        self
    }

    /// Whether it is credit of this flow.
    pub(super) fn is_of(&self, account: &Arc<FlowAccount>) -> bool {
        Arc::ptr_eq(&self.account, account)
    }
}

impl Drop for Debit {
    fn drop(&mut self) {
        let account = &self.account;
        let rings = account.change(|state| {
            state.used.messages -= 1;
            state.used.bytes -= self.bytes;
            state.freed.messages += 1;
            state.freed.bytes += self.bytes;
            let lease = state.leases.remove(&self.number);
            let ended = |lease: LeaseId| EndedLease { number: self.number, lease: lease.get() };
            state.ended.extend(lease.map(ended));
            lease.is_some() || state.used.messages == 0
        });
        if rings {
            account.bell.notify_one();
        }
    }
}

impl FlowQueue {
    pub(super) fn new(tell: Tell) -> Self {
        let account = FlowAccount { tell, state: Mutex::default(), bell: Notify::new() };
        Self { account: Arc::new(account), state: Mutex::default() }
    }

    /// Adds messages with their sizes. If the call has gone, they come back as a command.
    pub(super) fn deliver(&self, messages: Vec<(GrantedDelivery, u64)>, now: Instant) {
        let handed = messages.into_iter().map(|(granted, size)| {
            let debit = Debit::new(&self.account, size);
            Handed { granted, debit, size, at: now }
        });
        let handed: Vec<Handed> = handed.collect();
        let mut state = lock(&self.state);
        if state.closed {
            drop(state);
            return self.give_back(handed);
        }
        state.handed.extend(handed);
        drop(state);
        self.account.bell.notify_one();
    }

    /// Since when the oldest message waits to be taken. `None`: no message waits.
    pub(super) fn waits_since(&self) -> Option<Instant> {
        lock(&self.state).handed.front().map(|handed| handed.at)
    }

    /// Why nothing more comes.
    pub(super) fn ended(&self) -> Option<FlowEnd> {
        lock(&self.state).end.clone()
    }

    /// The flow gets nothing more.
    pub(super) fn end(&self, end: FlowEnd) {
        lock(&self.state).end.get_or_insert(end);
        self.account.bell.notify_one();
    }

    /// Gives back all that was not taken.
    pub(super) fn clear(&self, close: bool) {
        let mut state = lock(&self.state);
        state.closed |= close;
        let handed: Vec<Handed> = state.handed.drain(..).collect();
        drop(state);
        self.give_back(handed);
    }

    fn give_back(&self, handed: Vec<Handed>) {
        let (granted, debits): (Vec<_>, Vec<_>) =
            handed.into_iter().map(|handed| (handed.granted, handed.debit)).unzip();
        drop(debits);
        (self.account.tell)(FlowNews::GiveBack(granted));
    }

    /// The next messages for a frame of at most `most` bytes: first those that fit, or else a message that is too large
    /// even alone.
    pub(super) fn next_frame(&self, most: u64, leases: usize) -> (Vec<Handed>, Option<Handed>) {
        let mut state = lock(&self.state);
        let (mut messages, mut bytes) = (Vec::new(), 0);
        let limit = MAX_FRAME_BYTES.min(most);
        while let Some(first) = state.handed.front() {
            let full = !messages.is_empty() && bytes + first.size > limit;
            if full || messages.len() >= MAX_FRAME_MESSAGES.min(leases) {
                break;
            }
            let too_large = first.size > most;
            if too_large && !messages.is_empty() {
                break;
            }
            let Some(handed) = state.handed.pop_front() else { break };
            if too_large {
                return (messages, Some(handed));
            }
            bytes += handed.size;
            messages.push(handed);
        }
        (messages, None)
    }
}

impl fmt::Debug for FlowAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowAccount").field("state", &self.state).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod debits;
#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn many_debits_are_told_once_and_none_is_lost() {
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let queue = FlowQueue::new(Box::new(move |_| _ = count.fetch_add(1, Ordering::Relaxed)));
        let told = || told.swap(0, Ordering::Relaxed);
        let account = queue.account.clone();
        let mut debits: Vec<Debit> = (1..=10).map(|bytes| Debit::new(&account, bytes)).collect();
        let lease = |number| LeaseId::new(number).unwrap();
        debits.push(Debit::new(&account, 100).lease(3, lease(30)));
        debits.truncate(10);
        debits.push(Debit::new(&account, 100).lease(4, lease(40)));
        assert_eq!((account.used().messages, account.leases()), (11, vec![lease(40)]));
        drop(debits);
        assert_eq!(told(), 1, "the task is told once before it looks");
        assert_eq!(account.take_freed(), (Credit { messages: 12, bytes: 55 + 200 }, 0));
        assert_eq!(account.take_freed(), (Credit::default(), 0));
        drop(Debit::new(&account, 1));
        assert_eq!(told(), 1, "the task has looked, and hears again");
        let ended = |number, lease| EndedLease { number, lease };
        assert_eq!(account.take_ended(), [ended(3, 30), ended(4, 40)]);
        assert_eq!((account.used(), account.leased()), (Credit::default(), 0));
    }

    #[test]
    fn task_hears_of_settlements_that_begin_and_end() {
        let told = Arc::new(AtomicUsize::new(0));
        let count = told.clone();
        let queue = FlowQueue::new(Box::new(move |_| _ = count.fetch_add(1, Ordering::Relaxed)));
        let account = queue.account.clone();
        let settling = [account.settling(1), account.settling(2)];
        assert_eq!((told.swap(0, Ordering::Relaxed), account.take_freed().1), (1, 3));
        drop(settling);
        assert_eq!((told.swap(0, Ordering::Relaxed), account.take_freed().1), (1, 0));
    }
}
