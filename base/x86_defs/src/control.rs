//! Control registers, debug registers and XCR0 (SDM vol. 3, 2.5, 2.6 and 17.2).

/// Protected mode enable.
pub const CR0_PE: u64 = 1 << 0;
/// Monitor coprocessor.
pub const CR0_MP: u64 = 1 << 1;
/// Emulate the x87 unit: #NM.
pub const CR0_EM: u64 = 1 << 2;
/// Task switched: #NM on first use.
pub const CR0_TS: u64 = 1 << 3;
/// Extension type: always one.
pub const CR0_ET: u64 = 1 << 4;
/// Native x87 error reporting (#MF instead of IRQ 13).
pub const CR0_NE: u64 = 1 << 5;
/// Supervisor writes honour read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// Alignment checks allowed.
pub const CR0_AM: u64 = 1 << 18;
/// Not write-through.
pub const CR0_NW: u64 = 1 << 29;
/// Cache disable.
pub const CR0_CD: u64 = 1 << 30;
/// Paging.
pub const CR0_PG: u64 = 1 << 31;
/// All CR0 bits that exist.
pub const CR0_ALL: u64 =
    CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_ET | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;

/// Virtual-8086 extensions.
pub const CR4_VME: u64 = 1 << 0;
/// Protected-mode virtual interrupts.
pub const CR4_PVI: u64 = 1 << 1;
/// RDTSC only at CPL 0.
pub const CR4_TSD: u64 = 1 << 2;
/// Debugging extensions: DR4/DR5 are #UD.
pub const CR4_DE: u64 = 1 << 3;
/// 4 MiB pages with 32-bit paging.
pub const CR4_PSE: u64 = 1 << 4;
/// Physical address extension.
pub const CR4_PAE: u64 = 1 << 5;
/// Machine check enable.
pub const CR4_MCE: u64 = 1 << 6;
/// Global pages.
pub const CR4_PGE: u64 = 1 << 7;
/// RDPMC at any CPL.
pub const CR4_PCE: u64 = 1 << 8;
/// FXSAVE and SSE enabled.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// Unmasked SSE exceptions raise #XM.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// User-mode instruction prevention.
pub const CR4_UMIP: u64 = 1 << 11;
/// 57-bit linear addresses.
pub const CR4_LA57: u64 = 1 << 12;
/// RDFSBASE and its like.
pub const CR4_FSGSBASE: u64 = 1 << 16;
/// Process-context identifiers.
pub const CR4_PCIDE: u64 = 1 << 17;
/// XSAVE enabled.
pub const CR4_OSXSAVE: u64 = 1 << 18;
/// Supervisor-mode execution prevention.
pub const CR4_SMEP: u64 = 1 << 20;
/// Supervisor-mode access prevention.
pub const CR4_SMAP: u64 = 1 << 21;

/// System-call extensions.
pub const EFER_SCE: u64 = 1 << 0;
/// Long mode enable.
pub const EFER_LME: u64 = 1 << 8;
/// Long mode active.
pub const EFER_LMA: u64 = 1 << 10;
/// No-execute enable.
pub const EFER_NXE: u64 = 1 << 11;

/// x87 state.
pub const XCR0_X87: u64 = 1 << 0;
/// XMM state.
pub const XCR0_SSE: u64 = 1 << 1;
/// Upper halves of YMM.
pub const XCR0_AVX: u64 = 1 << 2;

/// DR6 bits that read as one.
pub const DR6_FIXED_1: u64 = 0xFFFF_0FF0;
/// DR6: single step.
pub const DR6_BS: u64 = 1 << 14;
/// DR6: debug register access detected.
pub const DR6_BD: u64 = 1 << 13;
/// DR6: task switch.
pub const DR6_BT: u64 = 1 << 15;
/// DR7 bit that reads as one.
pub const DR7_FIXED_1: u64 = 1 << 10;
/// DR7: general detect enable.
pub const DR7_GD: u64 = 1 << 13;
