//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. The chart
//! and the plain manifests as they are rendered, the image as it is built and run, and a rolling
//! update in small: processes for pods, a kubelet and a Service written for it.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod chart;
mod helm;
mod image;
mod manifests;
mod notes;
#[path = "../support/mod.rs"]
mod support;

use std::{env, process::Command};

/// What the environment names as one of the programs that these tests run.
fn tool(variable: &str) -> Command {
    Command::new(
        env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run `make test-deploy`")),
    )
}
