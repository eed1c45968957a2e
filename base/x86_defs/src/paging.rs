//! Page-table entry bits (SDM vol. 3, chapter 4).

/// Entry is present.
pub const PTE_P: u64 = 1 << 0;
/// Writable.
pub const PTE_W: u64 = 1 << 1;
/// User accessible.
pub const PTE_U: u64 = 1 << 2;
/// Accessed.
pub const PTE_A: u64 = 1 << 5;
/// Dirty.
pub const PTE_D: u64 = 1 << 6;
/// Page size: the entry maps a large page.
pub const PTE_PS: u64 = 1 << 7;
/// Global.
pub const PTE_G: u64 = 1 << 8;
/// No execute.
pub const PTE_NX: u64 = 1 << 63;
/// Address bits of a 64-bit entry.
pub const PTE_ADDR: u64 = 0x000F_FFFF_FFFF_F000;
/// Size of a page.
pub const PAGE_SIZE: u64 = 4096;
/// Mask of the offset in a page.
pub const PAGE_MASK: u64 = PAGE_SIZE - 1;
/// Width of a physical address: the same in every CPU model of ours (CPUID 0x80000008).
pub const PHYSICAL_ADDRESS_BITS: u32 = 46;
/// Width of a linear address.
pub const LINEAR_ADDRESS_BITS: u32 = 48;
