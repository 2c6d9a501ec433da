//! What the broker port promises, kept by the real broker and by the scripted one alike, so that
//! the fake cannot lie; and what the lessor makes of a broker's faults, which only a fake can script.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod contract;
mod faults;
mod leading;
mod places;
mod poison;
mod returning;
mod unreadable;
