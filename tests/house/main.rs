//! The house rules that a machine can hold: which room may name what, and how large a file may be.
//! Pages say what the code says, and prose is plain English.

mod faults;
mod links;
mod log;
mod monitoring;
mod pages;
mod prose;
mod questions;
mod quotes;
mod repeatable;
mod rooms;
mod source;
