//! The house rules that a machine can hold: which room may name what, how large a file may be, that
//! pages are what the code says, and that prose is plain English.

mod links;
mod log;
mod pages;
mod prose;
mod rooms;
mod source;
