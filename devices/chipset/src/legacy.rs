//! Legacy replacement: while the HPET has it on, IRQ 0 and IRQ 8 are the HPET's, and the 8254 and the RTC
//! interrupt nobody (IA-PC HPET 1.0a, 2.4.5). One flag, shared by the three chips; the HPET saves it.

use alloc::sync::Arc;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// See the module's header. Clones are the same flag.
#[derive(Clone, Debug, Default)]
pub struct LegacyReplacement(Arc<AtomicBool>);

impl LegacyReplacement {
    /// Off.
    pub fn new() -> Self {
        Self::default()
    }
    /// Whether the HPET has replaced the others.
    pub fn is_on(&self) -> bool {
        self.0.load(SeqCst)
    }
    pub(crate) fn set(&self, on: bool) {
        self.0.store(on, SeqCst);
    }
}
