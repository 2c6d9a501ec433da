//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. The chart
//! and the plain manifests as they are rendered, the image as it is built and run, and a rolling
//! update in small: processes for pods, a kubelet and a Service written for it.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/books.rs"]
mod books;
mod chart;
mod helm;
mod image;
#[path = "../clients/language.rs"]
mod language;
mod manifests;
mod notes;
mod pods;
mod rolling;
#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/scenario.rs"]
mod scenario;
#[path = "../support/mod.rs"]
mod support;
#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/worker.rs"]
mod worker;

use std::{env, process::Command};

/// What the environment names as one of the programs that these tests run.
fn tool(variable: &str) -> Command {
    Command::new(
        env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run `make test-deploy`")),
    )
}
