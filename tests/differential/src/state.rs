//! Registers and memory of a case, in the layout that the native side loads and stores directly.

use crate::layout::WINDOW;

/// The user-visible registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Registers {
    /// The standard XSAVE format: x87 and SSE (512 bytes), header (64), upper YMM halves (256).
    pub xsave: [u8; 832],
    /// RAX to R15 by encoding.
    pub gpr: [u64; 16],
    /// RFLAGS.
    pub flags: u64,
    /// RIP.
    pub rip: u64,
    /// ES, CS, SS, DS, FS, GS; CS and the rest of the array stay zero.
    pub selectors: [u16; 8],
    /// Bases of FS and GS.
    pub bases: [u64; 2],
}

impl Registers {
    /// All zero, control words at their reset values.
    pub fn new() -> Self {
        let mut r =
            Self { xsave: [0; 832], gpr: [0; 16], flags: 0x202, rip: 0, selectors: [0; 8], bases: [0; 2] };
        r.set_u16(0, 0x37F);
        r.xsave[24..28].copy_from_slice(&0x1F80u32.to_le_bytes());
        r.xsave[512] = 7;
        r
    }

    fn u16_at(&self, at: usize) -> u16 {
        u16::from_le_bytes([self.xsave[at], self.xsave[at + 1]])
    }
    fn set_u16(&mut self, at: usize, value: u16) {
        self.xsave[at..at + 2].copy_from_slice(&value.to_le_bytes());
    }
    fn u64_at(&self, at: usize) -> u64 {
        self.xsave[at..at + 8].iter().rev().fold(0, |acc, &b| acc << 8 | u64::from(b))
    }

    /// MXCSR.
    pub fn mxcsr(&self) -> u32 {
        self.u64_at(24) as u32
    }
    /// Sets MXCSR.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.xsave[24..28].copy_from_slice(&value.to_le_bytes());
    }
    /// x87 control word.
    pub fn x87_control(&self) -> u16 {
        self.u16_at(0)
    }
    /// x87 status word.
    pub fn x87_status(&self) -> u16 {
        self.u16_at(2)
    }
    /// One bit for each x87 register in use.
    pub fn x87_in_use(&self) -> u8 {
        self.xsave[4]
    }
    /// Sets control, status and tags of the x87 unit.
    pub fn set_x87(&mut self, control: u16, status: u16, in_use: u8) {
        self.set_u16(0, control);
        self.set_u16(2, status);
        self.xsave[4] = in_use;
    }
    /// ST(i): significand, sign and exponent.
    pub fn st(&self, i: usize) -> (u64, u16) {
        (self.u64_at(32 + 16 * i), self.u16_at(40 + 16 * i))
    }
    /// Sets ST(i).
    pub fn set_st(&mut self, i: usize, (mantissa, sign_exponent): (u64, u16)) {
        self.xsave[32 + 16 * i..40 + 16 * i].copy_from_slice(&mantissa.to_le_bytes());
        self.set_u16(40 + 16 * i, sign_exponent);
    }
    /// YMM register `i`.
    pub fn ymm(&self, i: usize) -> [u64; 4] {
        let (low, high) = (160 + 16 * i, 576 + 16 * i);
        [self.u64_at(low), self.u64_at(low + 8), self.u64_at(high), self.u64_at(high + 8)]
    }
    /// Sets YMM register `i`.
    pub fn set_ymm(&mut self, i: usize, value: [u64; 4]) {
        for (at, word) in [160, 168, 576, 584].iter().zip(value) {
            self.xsave[at + 16 * i..at + 8 + 16 * i].copy_from_slice(&word.to_le_bytes());
        }
    }
}

impl Default for Registers {
    fn default() -> Self {
        Self::new()
    }
}

/// Where and how a case's code runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct Code {
    /// The instruction.
    pub bytes: [u8; 16],
    /// Its length.
    pub len: u32,
    /// The slot that it was encoded for.
    pub slot: u32,
    /// 32-bit code instead of 64-bit.
    pub is_32: bool,
}

/// Input of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Case {
    /// Registers before.
    pub registers: Registers,
    /// First address of the window.
    pub window_at: u64,
    /// Memory before.
    pub window: [u8; WINDOW],
    /// What runs.
    pub code: Code,
}

/// What an instruction raised.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Raised {
    /// Vector, or `NONE`.
    pub vector: u64,
    /// Error code.
    pub error: u64,
    /// CR2 of a page fault.
    pub address: u64,
}

impl Raised {
    /// `vector` if nothing was raised.
    pub const NONE: u64 = u64::MAX;
}

/// Outcome of a case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C, align(64))]
pub struct Outcome {
    /// Registers after.
    pub registers: Registers,
    /// Memory after.
    pub window: [u8; WINDOW],
    /// Exception.
    pub raised: Raised,
}

impl Outcome {
    /// An outcome to be overwritten.
    pub fn empty() -> Self {
        Self { registers: Registers::new(), window: [0; WINDOW], raised: Raised::default() }
    }
}
