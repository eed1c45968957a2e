//! host_io: everything a hosted Bedplate asks of Linux, behind small interfaces that devices and engines never see.
//!
//! Called by: `vmm` (the process that holds one VM), and `disk_formats` for file locks and the block store trait.
//!
//! Invariants:
//! - A guest never blocks on this crate: consoles, disks and networks take what fits their bounded buffers and say `Busy`.
//! - Whatever arrives from outside (frames, sockets, terminals) is hostile: lengths are capped, nothing panics.
//! - `unsafe` stands only around system calls that rustix does not make safe, each with its reason.
#![deny(unsafe_code)]

pub mod block_pool;
pub mod block_store;
pub mod clock;
pub mod event_loop;
pub mod file_lock;
pub mod net;
pub mod ram;
pub mod serial;
pub mod signals;
pub mod usernet;
pub mod wake;
