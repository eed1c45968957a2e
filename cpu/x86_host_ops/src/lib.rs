//! Vector and x87 arithmetic by running the host processor's own instructions.
//!
//! Called by `x86_emulate`'s vector and x87 families; the only assembly of the interpreter. Every function
//! is safe to call: a thunk loads its operands from memory, runs one instruction on them with all exceptions
//! masked and stores the result. What the host processor lacks, [`supported`] does not list, and a CPU
//! model that promises it must be refused.
//!
//! - `list`: which instructions, by shape. `kernel`: their thunks. `special`: those with general registers
//!   or flags as operands. `x87`: the 80-bit unit.
#![no_std]

#[cfg(not(target_arch = "x86_64"))]
compile_error!("x86_host_ops runs the host's own instructions: it needs an x86-64 host");

#[macro_use]
mod list;
#[macro_use]
mod kernel;
mod special;
mod supported;
mod x87;

pub use kernel::{Entry, Environment, Form, Kernel, Lanes, Operands, Shape, Source, V};
pub use special::Special;
pub use supported::{executed, supported};
pub use x87::{
    Extended, X87_MASKS, X87Image, X87Instruction, X87Result, run_x87, x87_compute, x87_load, x87_store,
};
