//! Small guest programs on the `soft` engine, through the public traits only.
//!
//! One test binary, so that it links once. `harness` is the machine around the vCPU; the other modules each
//! take one part of the architecture.

mod alignment;
mod branches;
mod breakpoints;
mod counting;
mod cpu_model;
mod faults;
mod hardware;
mod harness;
mod hostile;
mod hostile_code;
mod interrupts;
mod lockstep;
mod mixed_pages;
mod modes;
mod one_place;
mod page_ends;
mod paging;
mod segments;
mod self_modifying;
mod single_step;
mod smoke;
mod smp;
mod state;
mod system_calls;
mod timers;
