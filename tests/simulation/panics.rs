//! Panics of a run. A runtime drops the panic of a task, and the test harness prints it for another test. So
//! each thread keeps the panics of its own run.

use std::{
    cell::RefCell,
    panic::{self, AssertUnwindSafe},
    sync::Once,
};

/// Most panics that a run keeps. A lock that a panic has poisoned causes many others.
const MOST: usize = 3;

thread_local! {
    /// `None`: no run is on this thread.
    static PANICS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

/// Runs a function, and returns the panics of this thread meanwhile. The result is `None` if the function
/// itself panicked.
pub fn catch<R>(act: impl FnOnce() -> R) -> (Option<R>, Vec<String>) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panicked| {
            let kept = PANICS.with_borrow_mut(|panics| {
                let Some(panics) = panics else { return false };
                if panics.len() < MOST {
                    panics.push(panicked.to_string().replace(":\n", ": "));
                }
                true
            });
            if !kept {
                before(panicked);
            }
        }));
    });
    PANICS.set(Some(Vec::new()));
    let result = panic::catch_unwind(AssertUnwindSafe(act)).ok();
    (result, PANICS.take().unwrap_or_default())
}

#[test]
fn panic_of_a_task_is_kept_and_that_of_another_thread_is_not() {
    let (result, panics) = catch(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ended = runtime.block_on(async { tokio::spawn(async { panic!("first") }).await });
        assert!(ended.is_err());
        let other = std::thread::spawn(|| panic::resume_unwind(Box::new("unseen")));
        assert!(other.join().is_err());
        7
    });
    assert_eq!(result, Some(7));
    assert!(panics.len() == 1 && panics[0].contains("first"), "{panics:?}");
}

#[test]
fn panic_of_the_run_itself_leaves_no_result() {
    let (result, panics) = catch(|| -> u32 { panic!("second") });
    assert_eq!(result, None);
    assert!(panics.len() == 1 && panics[0].contains("second"), "{panics:?}");
    assert_eq!(catch(|| 8), (Some(8), Vec::new()));
}
