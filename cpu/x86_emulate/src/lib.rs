//! The x86 interpreter: what each instruction does, over any memory.
//!
//! `cpu_soft` runs whole guests with it (soft TLB, block cache); the hardware engines complete single
//! instructions with it. It is generic over [`Core`], the vCPU's memory, ports and clock.
//!
//! - [`cpu`]: the architectural state. [`core`]: what an engine provides. [`op`]: a decoded operation.
//! - `lower`: iced's instruction → [`op::Op`] with its handler chosen for operand form, width and whether
//!   its flags are read.
//! - `integer/`, `vector/`, `x87/`, `system/`: the handlers, a file per instruction family.
#![no_std]
#![forbid(unsafe_code)]

pub mod core;
pub mod cpu;
pub mod flags;
pub mod integer;
pub mod lower;
pub mod mode;
pub mod op;
pub mod system;
pub mod vector;
pub mod x87;

pub use crate::core::{Core, Fault, Word};
pub use cpu::Cpu;
pub use mode::ModeKey;
pub use op::{Handler, Op, Step};
