//! The promises of the broker port. The real broker and the scripted broker keep them alike, so
//! that the fake cannot lie. Only the fake can script the faults that the lessor is tested with.

#![allow(clippy::disallowed_methods, reason = "tests live in real time, and outlive their tasks")]

mod attempts;
mod books;
mod budget;
mod contract;
mod faults;
mod leading;
mod poison;
mod returning;
#[path = "../simulation"]
mod simulation {
    #![allow(dead_code, unused_imports, reason = "the simulation uses the rest")]

    pub mod history;
    pub mod jetstream;
    pub mod net;
}
mod unreadable;
