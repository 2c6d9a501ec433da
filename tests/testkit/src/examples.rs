//! The example workers as tests run them: how each language is built and started, the scenarios of
//! `examples/conformance.json`, and the reports of the workers.

pub mod language;
pub mod reports;
pub mod scenario;
pub mod worker;
