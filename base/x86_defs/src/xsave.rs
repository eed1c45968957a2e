//! Byte offsets in an XSAVE area of standard form (SDM vol. 1, 10.5.1 and 13.4).

/// x87 control word, 16 bits.
pub const FCW: usize = 0;
/// x87 status word, 16 bits.
pub const FSW: usize = 2;
/// Which x87 registers are in use, a bit each.
pub const FTW: usize = 4;
/// Opcode of the last x87 instruction, 11 bits.
pub const FOP: usize = 6;
/// Its address, 64 bits (REX.W form).
pub const FIP: usize = 8;
/// Its operand's address, 64 bits.
pub const FDP: usize = 16;
/// MXCSR, 32 bits.
pub const MXCSR: usize = 24;
/// ST(0), 80 bits; the others follow 16 bytes apart.
pub const ST0: usize = 32;
/// XMM0; the others follow.
pub const XMM0: usize = 160;
/// Which components are there, 64 bits.
pub const XSTATE_BV: usize = 512;
/// Upper half of YMM0; the others follow 16 bytes apart.
pub const YMM_HIGH: usize = 576;
