//! The process that holds one VM: threads, files and sockets around a machine.
//!
//! Called by the `bedplate` command (and later by the daemon, which starts it as a process of its own).
//! Wire types stop here: everything below sees plain structs.
//!
//! - [`wire`]: the VM as people write it (TOML, command line); [`convert`] makes a machine's spec of it.
//! - [`launch`]: from a spec to a running VM; [`driver`]: the thread that changes what it is doing.
//! - [`host`]: this host as the machine's ground. [`services`]: time and wake-ups for devices. [`vcpu_threads`]:
//!   the threads that run vCPUs; [`hang_watch`]: one that does not come out of its engine. [`serial`], [`console`],
//!   [`input_gate`], [`panic_watch`], [`disk`], [`network`]: the other ends of its devices.
//! - [`control`]: a running VM looked after from outside; [`desk`] answers. [`saved_file`]: a saved VM.
//! - [`engine`]: the engines by name; [`kvm_verdict`]: what the probe of KVM found; [`doctor`]: what this host can give.
//! - [`exit`]: how a VM ended, as a process exit code and a sentence.
#![forbid(unsafe_code)]

pub mod bell;
pub mod console;
pub mod control;
pub mod convert;
pub mod desk;
pub mod disk;
pub mod doctor;
pub mod driver;
pub mod engine;
pub mod exit;
pub mod hang_watch;
pub mod host;
pub mod input_gate;
pub mod kvm_verdict;
pub mod launch;
pub mod network;
pub mod saved_file;
pub mod serial;
pub mod services;
pub mod vcpu_threads;
pub mod wire;

pub use hypervisor::Statistics;
pub use machine::Verdict;
