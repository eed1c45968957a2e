//! The process that holds one VM: threads, files and sockets around a machine.
//!
//! Called by the `bedplate` command (and later by the daemon, which starts it as a process of its own).
//! Wire types stop here: everything below sees plain structs.
//!
//! - [`wire`]: the VM as people write it (TOML, command line).
//! - [`services`]: time and wake-ups for devices. [`vcpu_threads`]: the threads that run vCPUs.
//! - [`exit`]: how a VM ended, as a process exit code and a sentence.
#![forbid(unsafe_code)]

pub mod exit;
pub mod services;
pub mod vcpu_threads;
pub mod wire;
