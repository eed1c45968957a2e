//! RFLAGS and MXCSR bits (SDM vol. 1, 3.4.3 and 10.2.3).

/// Carry.
pub const CF: u64 = 1 << 0;
/// Always one.
pub const FIXED_1: u64 = 1 << 1;
/// Parity of the low byte.
pub const PF: u64 = 1 << 2;
/// Carry out of bit 3.
pub const AF: u64 = 1 << 4;
/// Zero.
pub const ZF: u64 = 1 << 6;
/// Sign.
pub const SF: u64 = 1 << 7;
/// Trap: single step.
pub const TF: u64 = 1 << 8;
/// Interrupts enabled.
pub const IF: u64 = 1 << 9;
/// Direction of string operations.
pub const DF: u64 = 1 << 10;
/// Signed overflow.
pub const OF: u64 = 1 << 11;
/// I/O privilege level (two bits).
pub const IOPL: u64 = 3 << 12;
/// Position of IOPL.
pub const IOPL_SHIFT: u32 = 12;
/// Nested task.
pub const NT: u64 = 1 << 14;
/// Resume: suppresses instruction breakpoints once.
pub const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub const VM: u64 = 1 << 17;
/// Alignment check, and SMAP override.
pub const AC: u64 = 1 << 18;
/// Virtual interrupt flag.
pub const VIF: u64 = 1 << 19;
/// Virtual interrupt pending.
pub const VIP: u64 = 1 << 20;
/// CPUID available.
pub const ID: u64 = 1 << 21;
/// The six arithmetic flags.
pub const STATUS: u64 = CF | PF | AF | ZF | SF | OF;
/// Every flag that exists.
pub const ALL: u64 = STATUS | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

/// MXCSR at reset: all exceptions masked.
pub const MXCSR_RESET: u32 = 0x1F80;
/// MXCSR bits that may be written.
pub const MXCSR_MASK: u32 = 0xFFFF;
