//! The jail of the process that holds a VM: what each of its threads may still ask of Linux.
//!
//! A guest that breaks out of the machine model finds a thread with a short list of system calls (seccomp), no files to
//! open (landlock), and the rights of nobody. Files, sockets and devices were opened before, and are descriptors.
//!
//! - [`table`]: who may do what. `filter` makes the kernel's programs of it; [`violation`] answers a forbidden call.
//! - `files`: files by name. `user`: user and capabilities.
//! - `enter`: [`arm`], then every thread calls [`enter`] when it starts, and the main thread [`close`].
//!
//! Called by: `host_io` and `vmm` on their threads. Where nobody armed the jail nothing happens.

mod enter;
mod files;
mod filter;
pub mod table;
mod user;
pub mod violation;

pub use enter::{Support, arm, close, enter, inherit, is_armed, support};

use std::path::PathBuf;

/// The kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thread {
    /// Builds, saves, resets and moves the machine.
    Main,
    /// Listens on the control socket, or serves a client there.
    Control,
    /// Runs a vCPU.
    Vcpu,
    /// The event loop: devices' wake-ups and timers.
    Events,
    /// Carries out requests against disk images.
    Disk,
    /// One end of a console.
    Console,
    /// The user-mode network.
    Network,
    /// Watches how KVM serves the guest.
    Watch,
}

impl Thread {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Main,
        Self::Control,
        Self::Vcpu,
        Self::Events,
        Self::Disk,
        Self::Console,
        Self::Network,
        Self::Watch,
    ];

    /// Its bit in a set.
    pub const fn bit(self) -> table::Threads {
        1 << self as u8
    }

    /// In a sentence.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Main => "the main thread",
            Self::Control => "a control thread",
            Self::Vcpu => "a vCPU thread",
            Self::Events => "the event loop",
            Self::Disk => "a disk thread",
            Self::Console => "a console thread",
            Self::Network => "a network thread",
            Self::Watch => "KVM's watch",
        }
    }
}

/// What may be done with files by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileUse {
    /// This file, or those below this folder, can be read.
    Read(PathBuf),
    /// Files can be removed from this folder.
    RemoveIn(PathBuf),
}

/// Why a thread is not in the jail.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The user.
    #[error("the jail: cannot give up root's rights: {0}")]
    User(std::io::Error),
    /// No new privileges, capabilities, or the handler.
    #[error("the jail: cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: std::io::Error,
    },
    /// The files.
    #[error("the jail: landlock: {0}")]
    Files(#[from] landlock::RulesetError),
    /// The list of calls is wrong.
    #[error("the jail: the list of system calls: {0}")]
    List(#[from] seccompiler::BackendError),
    /// The kernel did not take it.
    #[error("the jail: seccomp: {0}")]
    Calls(#[from] seccompiler::Error),
    /// A thread stays outside.
    #[error("the jail: thread {name} did not go in; --no-sandbox runs without it")]
    Outside {
        /// Its name.
        name: String,
    },
    /// Another thread's failure.
    #[error("{0}; --no-sandbox runs without it")]
    Other(String),
}
