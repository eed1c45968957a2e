//! Register offsets and bits of the PCI headers (PCI Express Base Specification 5.0, chapter 7).

/// Vendor ID.
pub const VENDOR_ID: u16 = 0x00;
/// Device ID.
pub const DEVICE_ID: u16 = 0x02;
/// Command.
pub const COMMAND: u16 = 0x04;
/// Status.
pub const STATUS: u16 = 0x06;
/// Revision, then three bytes of class code.
pub const REVISION: u16 = 0x08;
/// Cache line size.
pub const CACHE_LINE_SIZE: u16 = 0x0C;
/// Header type.
pub const HEADER_TYPE: u16 = 0x0E;
/// First BAR.
pub const BAR0: u16 = 0x10;
/// Subsystem vendor ID (type 0).
pub const SUBSYSTEM_VENDOR_ID: u16 = 0x2C;
/// Subsystem ID (type 0).
pub const SUBSYSTEM_ID: u16 = 0x2E;
/// Offset of the first capability.
pub const CAPABILITIES: u16 = 0x34;
/// Interrupt line: a scratch register for software.
pub const INTERRUPT_LINE: u16 = 0x3C;
/// Interrupt pin: 1 = INTA.
pub const INTERRUPT_PIN: u16 = 0x3D;

/// Command: decode I/O.
pub const COMMAND_IO: u16 = 1 << 0;
/// Command: decode memory.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command: bus master.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command: parity error response.
pub const COMMAND_PARITY: u16 = 1 << 6;
/// Command: SERR# enable.
pub const COMMAND_SERR: u16 = 1 << 8;
/// Command: INTx disable.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;

/// Status: INTx is pending.
pub const STATUS_INTERRUPT: u8 = 1 << 3;
/// Status: there is a capability list.
pub const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Type 1: primary bus, then secondary, subordinate, secondary latency timer.
pub const PRIMARY_BUS: u16 = 0x18;
/// Type 1: secondary bus.
pub const SECONDARY_BUS: u16 = 0x19;
/// Type 1: subordinate bus.
pub const SUBORDINATE_BUS: u16 = 0x1A;
/// Type 1: I/O base (8 bits), then limit.
pub const IO_BASE: u16 = 0x1C;
/// Type 1: memory base, then limit.
pub const MEMORY_BASE: u16 = 0x20;
/// Type 1: prefetchable memory base, then limit.
pub const PREFETCH_BASE: u16 = 0x24;
/// Type 1: upper half of the prefetchable base, then of the limit.
pub const PREFETCH_BASE_UPPER: u16 = 0x28;
/// Type 1: upper half of the I/O base, then of the limit.
pub const IO_BASE_UPPER: u16 = 0x30;
/// Type 1: bridge control.
pub const BRIDGE_CONTROL: u16 = 0x3E;
/// End of the header's registers that say what is decoded where.
pub const DECODE_END: u16 = 0x34;

/// Capability: MSI.
pub const CAP_MSI: u8 = 0x05;
/// Capability: vendor specific.
pub const CAP_VENDOR: u8 = 0x09;
/// Capability: PCI Express.
pub const CAP_EXPRESS: u8 = 0x10;
/// Capability: MSI-X.
pub const CAP_MSIX: u8 = 0x11;
