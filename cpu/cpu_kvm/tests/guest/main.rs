//! Small guests on this host's KVM. Where there is none, each test says so and ends.

mod completion;
mod dirty_log;
mod doorbells;
mod harness;
mod interrupts;
mod modes;
mod state;
mod unsuited;
