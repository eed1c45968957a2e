//! What an engine on hardware needs of the ground that it stands on.

use core::sync::atomic::AtomicU32;

/// Whoever owns the machine.
pub trait Ground: Send + Sync {
    /// Physical address of the hypervisor's own memory.
    fn physical(&self) -> fn(usize) -> u64;
    /// Rate of the processors' TSC.
    fn tsc_khz(&self) -> u32;
    /// Called before the guest is entered: an interrupt is to come at the latest `due_in` nanoseconds from now, or
    /// whenever the ground wants its processor back. `false`: it wants it at once.
    fn before_entry(&self, due_in: Option<u64>) -> bool;
    /// Set by every interrupt that is to be seen before a guest is entered; cleared by `before_entry`.
    fn interrupted(&self) -> &AtomicU32;
}

/// What keeps the guest out.
pub struct Gate<'a> {
    /// Bits of it that are in `mask`.
    pub attention: &'a AtomicU32,
    /// See there.
    pub mask: u32,
    /// Anything but zero.
    pub interrupted: &'a AtomicU32,
}
