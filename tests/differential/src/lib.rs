//! The interpreter against the host processor: random cases for every user-mode instruction form.
//!
//! `cargo test` runs a few seeded cases a form; the binary runs campaigns. The host runs the cases natively in
//! one sandboxed child process (`native`), the interpreter over a model of the same memory (`interpreted`).
//!
//! `tests/float_model` compares float arithmetic with a model instead, which needs no host.
//!
//! - `forms`: which instructions there are, and which are left out, with the reason.
//! - `generate`: a random case of a form. `values`: random numbers with a taste for corners.
//! - `sweep`: the whole opcode map, for what is refused.
//! - `state`: registers and memory of a case. `compare`: what must be equal. `minimise`: a failing case cut
//!   down to what it needs. `campaign`: all of it together.

pub mod campaign;
pub mod compare;
pub mod forms;
pub mod generate;
pub mod interpreted;
pub mod layout;
pub mod minimise;
pub mod native;
pub mod state;
pub mod sweep;
pub mod values;
