//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. They
//! cover the chart and the plain manifests as they are rendered, and the image as it is built and
//! run. They cover a small rolling update with processes for pods, and the files for NATS, KEDA and
//! Compose.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

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
#[allow(dead_code, reason = "written for more than this")]
#[path = "../clients/reports.rs"]
mod reports;
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

/// A program of these tests, by its variable in the environment.
fn tool(variable: &str) -> Command {
    Command::new(
        env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run `make test-deploy`")),
    )
}
