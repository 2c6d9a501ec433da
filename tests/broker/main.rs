//! What the broker port promises, kept by the real broker and by the scripted one alike, so that
//! the fake cannot lie; and what the lessor makes of a broker's faults, which only a fake can script.

#[path = "../support/mod.rs"]
mod support;

mod contract;
mod fake;
mod faults;
