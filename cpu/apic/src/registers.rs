//! Register numbers (MMIO offset / 16 = x2APIC MSR − 0x800) and bits (SDM vol. 3, tables 11-1 and 11-6).

/// Physical address of the registers after reset.
pub const DEFAULT_BASE: u64 = 0xFEE0_0000;

pub(crate) const ID: u32 = 0x02;
pub(crate) const VERSION: u32 = 0x03;
pub(crate) const TPR: u32 = 0x08;
pub(crate) const ARBITRATION: u32 = 0x09;
pub(crate) const PPR: u32 = 0x0A;
pub(crate) const EOI: u32 = 0x0B;
pub(crate) const REMOTE_READ: u32 = 0x0C;
pub(crate) const LDR: u32 = 0x0D;
pub(crate) const DFR: u32 = 0x0E;
pub(crate) const SVR: u32 = 0x0F;
pub(crate) const ISR: u32 = 0x10;
pub(crate) const TMR: u32 = 0x18;
pub(crate) const IRR: u32 = 0x20;
pub(crate) const IRR_LAST: u32 = 0x27;
pub(crate) const ESR: u32 = 0x28;
pub(crate) const ICR: u32 = 0x30;
pub(crate) const ICR_HIGH: u32 = 0x31;
pub(crate) const LVT_TIMER: u32 = 0x32;
pub(crate) const LVT_ERROR: u32 = 0x37;
pub(crate) const INITIAL_COUNT: u32 = 0x38;
pub(crate) const CURRENT_COUNT: u32 = 0x39;
pub(crate) const DIVIDE: u32 = 0x3E;
pub(crate) const SELF_IPI: u32 = 0x3F;

/// Indices of the local vector table.
pub(crate) mod lvt {
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
    /// Mask bit.
    pub const MASKED: u32 = 1 << 16;
    /// Bits that software may set, by entry (timer, thermal, performance, LINT0, LINT1, error).
    pub const WRITABLE: [u32; COUNT] = [0x7_00FF, 0x1_07FF, 0x1_07FF, 0x1_A7FF, 0x1_A7FF, 0x1_00FF];
    /// Read-only bits, which a write may carry: delivery status, remote IRR.
    pub const READ_ONLY: u32 = 1 << 12 | 1 << 14;
}

/// Version 0x14 with six LVT entries, no EOI-broadcast suppression.
pub(crate) const VERSION_VALUE: u32 = 0x14 | (lvt::COUNT as u32 - 1) << 16;
/// SVR: the APIC is enabled by software.
pub(crate) const SVR_ENABLE: u32 = 1 << 8;
/// SVR after reset: disabled, vector 0xFF.
pub(crate) const SVR_RESET: u32 = 0xFF;
/// SVR bits that software may set.
pub(crate) const SVR_WRITABLE: u32 = 0x3FF;
/// ICR bits that software may set.
pub(crate) const ICR_WRITABLE: u32 = 0x000C_CFFF;
/// ICR delivery status: always idle.
pub(crate) const ICR_BUSY: u32 = 1 << 12;
/// Divide configuration bits.
pub(crate) const DIVIDE_WRITABLE: u32 = 0b1011;
/// DFR bits that are not the model.
pub(crate) const DFR_ONES: u32 = 0x0FFF_FFFF;

/// ESR: we sent an illegal vector.
pub(crate) const ESR_SEND_VECTOR: u32 = 1 << 5;
/// ESR: we received an illegal vector.
pub(crate) const ESR_RECEIVE_VECTOR: u32 = 1 << 6;
/// ESR: access to a register that is not there.
pub(crate) const ESR_REGISTER: u32 = 1 << 7;

/// The lowest vector that is not reserved.
pub(crate) const FIRST_VECTOR: u8 = 16;

/// Timer mode in its LVT entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
}

impl TimerMode {
    pub(crate) fn of(entry: u32) -> Self {
        match entry >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            _ => Self::TscDeadline,
        }
    }
}
