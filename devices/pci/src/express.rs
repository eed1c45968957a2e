//! The PCI Express capability (PCI Express Base Specification 5.0, 7.5.3).

use crate::config::ConfigSpace;
use crate::regs::CAP_EXPRESS;

/// What kind of function it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// An endpoint below a root port.
    Endpoint,
    /// An endpoint on bus 0: it has no link.
    RootComplexEndpoint,
    /// A root port.
    RootPort {
        /// Number of its physical slot.
        slot: u16,
        /// Functions may come and go.
        hot_plug: bool,
    },
}

/// Offsets in the capability.
pub(crate) mod offset {
    pub const DEVICE_CONTROL: u16 = 0x08;
    pub const DEVICE_STATUS: u16 = 0x0A;
    pub const LINK_CAPABILITIES: u16 = 0x0C;
    pub const LINK_CONTROL: u16 = 0x10;
    pub const LINK_STATUS: u16 = 0x12;
    pub const SLOT_CAPABILITIES: u16 = 0x14;
    pub const SLOT_CONTROL: u16 = 0x18;
    pub const SLOT_STATUS: u16 = 0x1A;
    pub const ROOT_CONTROL: u16 = 0x1C;
    pub const ROOT_STATUS: u16 = 0x20;
    pub const DEVICE_CONTROL_2: u16 = 0x28;
    pub const LINK_CAPABILITIES_2: u16 = 0x2C;
    pub const LINK_CONTROL_2: u16 = 0x30;
}

/// Body length of a version 2 capability.
const BODY_BYTES: usize = 0x3C - 2;
/// 2.5 GT/s, one lane.
const LINK_X1_GEN1: u64 = 1 << 4 | 1;
/// Link capabilities: reports that the data link layer is active.
const LINK_REPORTS_ACTIVE: u64 = 1 << 20;
/// Link status: the data link layer is active.
pub(crate) const LINK_ACTIVE: u64 = 1 << 13;
/// Slot status: something is plugged.
pub(crate) const SLOT_PRESENCE: u64 = 1 << 6;
/// Slot capabilities: hot-plug capable.
pub(crate) const SLOT_HOT_PLUG: u64 = 1 << 6;
/// Slot capabilities: commands complete at once, without an event.
const SLOT_NO_COMMAND_COMPLETED: u64 = 1 << 18;

/// Adds the capability; returns its offset.
pub fn add(config: &mut ConfigSpace, kind: PortKind) -> u16 {
    use offset::*;
    let at = config.add_capability(CAP_EXPRESS, &[0; BODY_BYTES]);
    let (port_type, has_link) = match kind {
        PortKind::Endpoint => (0, true),
        PortKind::RootPort { .. } => (4, true),
        PortKind::RootComplexEndpoint => (9, false),
    };
    let slot_implemented = u64::from(matches!(kind, PortKind::RootPort { .. }));
    config.init(at + 2, 2, 2 | port_type << 4 | slot_implemented << 8);
    // Role-based error reporting; payloads of 128 bytes; no function-level reset.
    config.init(at + 4, 4, 1 << 15);
    config.allow(at + DEVICE_CONTROL, 2, 0x7FFF & !0x00E0);
    config.allow_clear(at + DEVICE_STATUS, 2, 0xF);
    config.allow(at + DEVICE_CONTROL_2, 2, 0x3F);
    if has_link {
        config.init(at + LINK_CAPABILITIES, 4, LINK_X1_GEN1);
        config.allow(at + LINK_CONTROL, 2, 0x01CB);
        config.init(at + LINK_STATUS, 2, LINK_X1_GEN1);
        config.init(at + LINK_CAPABILITIES_2, 4, 1 << 1);
        config.init(at + LINK_CONTROL_2, 2, 1);
    }
    if let PortKind::RootPort { slot, hot_plug } = kind {
        let number = u64::from(slot & 0x1FFF);
        config.init(at + LINK_CAPABILITIES, 4, LINK_X1_GEN1 | LINK_REPORTS_ACTIVE | (number & 0xFF) << 24);
        let plug = if hot_plug { SLOT_HOT_PLUG } else { 0 };
        config.init(at + SLOT_CAPABILITIES, 4, number << 19 | SLOT_NO_COMMAND_COMPLETED | plug);
        config.allow(at + SLOT_CONTROL, 2, 0x17FF);
        config.allow_clear(at + SLOT_STATUS, 2, 0x011F);
        config.allow(at + ROOT_CONTROL, 2, 0x1F);
        config.allow_clear(at + ROOT_STATUS, 4, 1 << 16);
    }
    at
}
