//! The guest's time-stamp counter: the processor's, plus an offset.

use crate::processor::tsc;
use cpu_soft::SoftCore;
use sync::Mutex;
use x86_emulate::Core;

/// What the vCPUs of a partition agree on.
pub struct TscOffset {
    /// The guest's TSC runs at the processor's rate: an offset does, no exit.
    pub native: bool,
    /// Guest TSC minus the processor's, and the epoch of the guest's clock that this holds for.
    base: Mutex<Option<(u64, u64)>>,
}

impl TscOffset {
    /// `native`: see there.
    pub fn new(native: bool) -> Self {
        Self { native, base: Mutex::new(None) }
    }

    /// For a vCPU whose TSC is made of [`SoftCore::tsc_basis`]: one for all vCPUs as long as the guest's clock runs on,
    /// and on top of it the vCPU's own.
    pub fn of(&self, core: &mut SoftCore) -> u64 {
        let (epoch, own) = core.tsc_basis();
        let mut base = self.base.lock();
        let common = match *base {
            Some((of, common)) if of == epoch => common,
            _ => {
                let common = common_offset(core).wrapping_sub(own);
                *base = Some((epoch, common));
                common
            }
        };
        common.wrapping_add(own)
    }
}

/// The guest's TSC minus the processor's. Never too little: what the guest reads is not behind what it was told
/// (kvmclock). Of several looks the one that was disturbed least.
fn common_offset(core: &mut SoftCore) -> u64 {
    const LOOKS: usize = 16;
    let look = |core: &mut SoftCore| {
        let before = tsc();
        let guest = core.tsc();
        (tsc().wrapping_sub(before), guest.wrapping_sub(before))
    };
    let mut best = look(core);
    for _ in 1..LOOKS {
        best = best.min(look(core));
    }
    best.1
}
