//! What the processor is asked to do, within what it can (SDM vol. 3D, appendix A).

/// Bits of the pin-based controls.
#[allow(missing_docs)] // the manual's names
pub mod pin {
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMIS: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
}

/// Bits of the primary processor-based controls.
#[allow(missing_docs)]
pub mod primary {
    pub const INTERRUPT_WINDOW: u32 = 1 << 2;
    pub const TSC_OFFSETTING: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const RDTSC: u32 = 1 << 12;
    pub const CR8: u32 = 1 << 19 | 1 << 20;
    pub const MOV_DR: u32 = 1 << 23;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const PAUSE: u32 = 1 << 30;
    pub const SECONDARY: u32 = 1 << 31;
}

/// Bits of the secondary processor-based controls.
#[allow(missing_docs)]
pub mod secondary {
    pub const EPT: u32 = 1 << 1;
    pub const RDTSCP: u32 = 1 << 3;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub const PAUSE_LOOP: u32 = 1 << 10;
    pub const INVPCID: u32 = 1 << 12;
}

/// Bits of the exit controls.
#[allow(missing_docs)]
pub mod leave {
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const HOST_64: u32 = 1 << 9;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
}

/// Bits of the entry controls.
#[allow(missing_docs)]
pub mod enter {
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const LONG_MODE: u32 = 1 << 9;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// A capability register: which control bits must be 1 (low half) and which may be (high half).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Allowed(pub u64);

impl Allowed {
    /// A value with all of `needed`, and of `wanted` what there is; `None` without a needed bit.
    pub fn with(self, needed: u32, wanted: u32) -> Option<u32> {
        let (must, may) = (self.0 as u32, (self.0 >> 32) as u32);
        (needed & !may == 0).then_some((must | needed | wanted) & may)
    }

    /// Whether all of `bits` may be set.
    pub fn has(self, bits: u32) -> bool {
        (self.0 >> 32) as u32 & bits == bits
    }
}

/// A processor's five capability registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Offered {
    pub pin: Allowed,
    pub primary: Allowed,
    pub secondary: Allowed,
    pub leave: Allowed,
    pub enter: Allowed,
}

/// The five sets of controls, as every guest has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Controls {
    pub pin: u32,
    pub primary: u32,
    pub secondary: u32,
    pub leave: u32,
    pub enter: u32,
}

impl Controls {
    /// Those that keep a guest inside; `None`: the processor lacks some. What a guest's kind adds is `vcpu`'s.
    pub fn of(offered: &Offered) -> Option<Self> {
        let primary_needed = primary::HLT
            | primary::MWAIT
            | primary::MONITOR
            | primary::RDPMC
            | primary::CR8
            | primary::MOV_DR
            | primary::TSC_OFFSETTING
            | primary::IO_BITMAPS
            | primary::MSR_BITMAPS
            | primary::SECONDARY;
        Some(Self {
            pin: offered
                .pin
                .with(pin::EXTERNAL_INTERRUPT | pin::NMI | pin::VIRTUAL_NMIS, pin::PREEMPTION_TIMER)?,
            primary: offered.primary.with(primary_needed, 0)?,
            secondary: offered.secondary.with(
                secondary::EPT | secondary::UNRESTRICTED_GUEST | secondary::WBINVD,
                secondary::RDTSCP | secondary::VPID | secondary::INVPCID,
            )?,
            leave: offered.leave.with(
                leave::SAVE_DEBUG | leave::HOST_64 | leave::LOAD_PAT | leave::SAVE_EFER | leave::LOAD_EFER,
                0,
            )?,
            enter: offered.enter.with(enter::LOAD_DEBUG | enter::LOAD_PAT | enter::LOAD_EFER, 0)?,
        })
    }

    /// The guest's time can end by itself.
    pub fn has_preemption_timer(&self) -> bool {
        self.pin & pin::PREEMPTION_TIMER != 0
    }

    /// Translations are tagged.
    pub fn has_vpid(&self) -> bool {
        self.secondary & secondary::VPID != 0
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A processor that has everything, with the bits that must be 1 of one with "true" controls.
    pub fn all() -> Offered {
        let with = |must: u32| Allowed(u64::from(must) | 0xFFFF_FFFF << 32);
        Offered {
            pin: with(0x16),
            primary: with(0x0400_6172),
            secondary: with(0),
            leave: with(0x0003_6DFB),
            enter: with(0x11FB),
        }
    }

    #[test]
    fn what_keeps_a_guest_inside_is_needed() {
        let controls = Controls::of(&all()).unwrap();
        assert_eq!(controls.pin, 0x16 | 1 | 1 << 3 | 1 << 5 | 1 << 6);
        assert_eq!(controls.primary & (1 << 15 | 1 << 16), 0, "CR3 is the guest's");
        assert_eq!(
            controls.primary & (primary::HLT | primary::IO_BITMAPS),
            primary::HLT | primary::IO_BITMAPS
        );
        assert!(controls.has_preemption_timer() && controls.has_vpid());
        let without = |bits: u32| Allowed(u64::from(!bits) << 32);
        let no_ept = Offered { secondary: without(secondary::EPT), ..all() };
        assert_eq!(Controls::of(&no_ept), None);
        let plain = Offered { secondary: without(secondary::VPID | secondary::INVPCID), ..all() };
        let controls = Controls::of(&plain).unwrap();
        assert!(!controls.has_vpid() && controls.secondary & secondary::RDTSCP != 0);
    }

    #[test]
    fn values_stay_within_what_is_allowed() {
        let allowed = Allowed(0x3 | 0xF3 << 32);
        assert_eq!(allowed.with(0x10, 0x100), Some(0x13));
        assert_eq!(allowed.with(0x8, 0), None);
        assert!(allowed.has(0xF0) && !allowed.has(0x4));
    }
}
