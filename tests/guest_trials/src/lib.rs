//! Guest trials: real operating systems boot in a virtual machine and are scripted over their consoles.
//!
//! What it is: a harness ([`Vm`], [`Console`], [`Shell`]), a table of rows ([`rows::all`]) and a runner ([`run`]).
//! Called by `cargo xtask test`, `campaign` and `trials`. Every row runs against Bedplate; those that need nothing
//! of Bedplate's own also run against QEMU, which checks the row itself.
//!
//! Invariants:
//! - A row passes, fails with the end of the console's transcript, or says why it did not run. Nothing is silent.
//! - Deadlines only catch hangs; no row asserts how fast something was.
//! - Every process that a row starts is ended with it, by its own handle.

#![forbid(unsafe_code)]

mod config;
mod console;
mod expected;
mod http;
pub mod lab;
pub mod rows;
mod runner;
mod shell;
mod stage;
mod tftp;
mod vm;

pub use config::{Boot, DiskUse, NetUse, TERMINAL_CHANGED, VmConfig, Vmm};
pub use console::{Console, ConsoleError};
pub use expected::{checksum_job, pattern, pattern_sum};
pub use http::FileServer;
pub use runner::{Outcome, Report, RowReport, Selection, run};
pub use shell::Shell;
pub use stage::{Failure, Stage, Tier};
pub use vm::{Exit, Vm};
