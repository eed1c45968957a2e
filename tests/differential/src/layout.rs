//! Where everything lies in the address space of a case. All of it is below 2 GiB, so that 32-bit addresses and
//! 32-bit code reach it.

/// Bytes of a page.
pub const PAGE: u64 = 0x1000;
/// First address of the arena.
pub const ARENA: u64 = 0x1000_0000;

/// What a page of the arena allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Not mapped.
    Absent,
    /// Reads only.
    ReadOnly,
    /// Reads and writes.
    ReadWrite,
}

/// The pages of the arena: each kind meets each other kind in both orders.
pub const PAGES: [Access; 8] = [
    Access::Absent,
    Access::ReadWrite,
    Access::ReadWrite,
    Access::Absent,
    Access::ReadOnly,
    Access::ReadWrite,
    Access::ReadOnly,
    Access::Absent,
];
/// Bytes of the arena.
pub const ARENA_BYTES: u64 = PAGES.len() as u64 * PAGE;
/// The page boundary in the middle of memory that can be read and written.
pub const QUIET_BOUNDARY: u64 = ARENA + 2 * PAGE;

/// A case sees this much memory, half of it on each side of a page boundary.
pub const WINDOW: usize = 2048;

/// Base of FS.
pub const FS_BASE: u64 = 0x0080_0000;
/// Base of GS.
pub const GS_BASE: u64 = 0x0100_0000;

/// Code: a slot for each case of a batch.
pub const CODE: u64 = 0x2000_0000;
/// Bytes of a slot.
pub const SLOT: u64 = 128;
/// The instruction's place in its slot.
pub const INSTRUCTION: u64 = 16;
/// The place in a slot where branches go.
pub const TAKEN: u64 = 64;
/// Cases of a batch.
pub const BATCH: usize = 256;
/// Behind the slots: the 64-bit stubs that 32-bit code leaves through.
pub const EXITS: u64 = CODE + SLOT * BATCH as u64;
/// Bytes of code.
pub const CODE_BYTES: u64 = SLOT * BATCH as u64 + PAGE;

/// Selectors of Linux user mode.
pub const CS64: u16 = 0x33;
/// 32-bit code.
pub const CS32: u16 = 0x23;
/// Data and stack.
pub const DS: u16 = 0x2B;

/// The descriptors that both sides know: Linux's flat segments for kernel and user, from selector 0.
pub const GDT: [u64; 7] = [
    0,
    0x00CF_9B00_0000_FFFF,
    0x00AF_9B00_0000_FFFF,
    0x00CF_9300_0000_FFFF,
    0x00CF_FB00_0000_FFFF,
    0x00CF_F300_0000_FFFF,
    0x00AF_FB00_0000_FFFF,
];
/// Limit of Linux's GDT.
pub const GDT_LIMIT: u16 = 127;
