//! Where things lie in a test's memory, and the selectors of its GDT.

/// Global descriptor table.
pub const GDT: u64 = 0x1000;
/// Interrupt descriptor table.
pub const IDT: u64 = 0x2000;
/// Task state segment (64-bit, 32-bit), with an I/O permission map behind it.
pub const TSS: u64 = 0x3000;
/// Eight bytes for each vector: a stub that halts.
pub const STUBS: u64 = 0x4000;
/// Code of the test.
pub const CODE: u64 = 0x1_0000;
/// Top of the stack.
pub const STACK: u64 = 0x2_0000;
/// Top of the stack that the TSS names for CPL 0.
pub const KERNEL_STACK: u64 = 0x2_8000;
/// Data of the test.
pub const DATA: u64 = 0x3_0000;
/// Page tables are taken from here upwards.
pub const TABLES: u64 = 0x10_0000;
/// RAM from address 0.
pub const RAM_BYTES: u64 = 4 << 20;
/// RAM at the reset vector.
pub const ROM: u64 = 0xFFFF_0000;
pub const ROM_BYTES: u64 = 64 << 10;
/// Frequency of the TSC: one tick is a nanosecond.
pub const TSC_KHZ: u32 = 1_000_000;

pub const KCODE32: u16 = 0x08;
pub const KCODE64: u16 = 0x10;
pub const KDATA: u16 = 0x18;
pub const UCODE32: u16 = 0x20;
pub const UDATA: u16 = 0x28;
pub const UCODE64: u16 = 0x30;
pub const KCODE16: u16 = 0x38;
pub const KDATA16: u16 = 0x40;
pub const TSS_SELECTOR: u16 = 0x48;
/// Free for the test: 0x58 up to 0xF8.
pub const FREE_SELECTOR: u16 = 0x58;
pub const GDT_LIMIT: u16 = 0xFF;

/// Writing here ends the test (all vCPUs).
pub const PORT_DONE: u16 = 0xF4;
