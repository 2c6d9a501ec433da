//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. The chart
//! and the plain manifests as they are rendered, the image as it is built and run, a rolling update in
//! small with processes for pods, and what is said to NATS, to KEDA and to Compose.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/books.rs"]
mod books;
mod builder;
mod chart;
mod compose;
mod helm;
mod helm_test;
mod image;
mod keda;
#[path = "../clients/language.rs"]
mod language;
mod manifests;
mod nats;
mod notes;
mod pods;
mod refused;
mod rolling;
#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/scenario.rs"]
mod scenario;
mod ties;
mod valid;
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
