//! `make test-deploy`: what `deploy` holds, as far as that can be shown without a cluster. The
//! tests cover the chart and the plain manifests as they are rendered, and the image as it is built and
//! run. They cover a small rolling update with processes for pods, and the files for NATS, KEDA and
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
