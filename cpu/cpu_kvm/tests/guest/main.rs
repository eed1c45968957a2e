//! Small guests on this host's KVM. Where there is none, each test says so and ends.

mod completion;
mod coverage;
mod dirty_log;
mod doorbells;
mod harness;
mod instruction_classes;
mod interrupts;
mod kvmclock;
mod modes;
mod state;
mod unsuited;
