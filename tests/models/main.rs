//! The pure parts against naive models of themselves.

#![allow(clippy::disallowed_methods, reason = "a test says itself when now is")]

mod budget;
mod lease;
mod monitor;
mod parsers;
mod pump;
mod quarantine;
mod work;
