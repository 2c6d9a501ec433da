//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. The
//! tests cover the chart and the plain manifests as they are rendered, and the image as it is built and
//! run. They cover the artifacts of a release as they are installed. They cover a small rolling update with processes for pods, and the files for NATS, KEDA and
//! Compose. And they look at the page for people in a browser.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod access;
mod browser;
mod builder;
mod chart;
mod compose;
mod helm;
mod helm_test;
mod image;
mod keda;
mod manifests;
mod monitoring;
mod mounted;
mod nats;
mod notes;
mod page;
mod pods;
mod refused;
mod release;
mod rolling;
mod scraped;
mod ties;
mod valid;

use std::{env, process::Command};

/// A program of these tests, by its variable in the environment.
fn tool(variable: &str) -> Command {
    Command::new(
        env::var(variable)
            .unwrap_or_else(|_| panic!("{variable} is not set: run `make test-deploy`")),
    )
}

/// What a command prints. Its failure fails the test.
fn said(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether this machine has the program.
fn has(program: &str) -> bool {
    let look = format!("command -v {program}");
    Command::new("sh").args(["-c", &look]).output().unwrap().status.success()
}
