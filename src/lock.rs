//! Takes a lock in spite of an earlier panic.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks the mutex. A panic under the lock must not fail every later caller.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
