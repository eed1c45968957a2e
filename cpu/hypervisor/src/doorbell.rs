//! Doorbells: writes that mean only "look", taken by the engine without stopping the processor that made them.
//!
//! Implemented by engines whose host has such a thing (KVM's ioeventfd); used by `machine`, which tells them where a
//! device's notification registers stand at present. An engine without them brings each write to `VcpuIo`, as any other.

use crate::engine::EngineError;
use guest_memory::Gpa;

/// Something of the host that its kernel, or another thread, can ring.
pub trait Bell: Send + Sync {
    /// The number by which the host's kernel knows it (a file descriptor), as long as it lives.
    fn descriptor(&self) -> i32;
}

/// An engine's ability to ring bells. Callable from any thread at any time.
pub trait Doorbells: Send + Sync {
    /// From now on a write of 2 bytes at `at` (other widths, too, where the engine can) rings `bell` and does not reach
    /// `VcpuIo`. After an error it still does.
    fn attach(&self, at: Gpa, bell: &dyn Bell) -> Result<(), EngineError>;
    /// Takes back `attach`.
    fn detach(&self, at: Gpa, bell: &dyn Bell);
}
