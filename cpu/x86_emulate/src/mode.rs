//! The mode key: everything besides the bytes that decides how an instruction decodes and what its
//! handler may assume. Decoded blocks are keyed by (guest-physical address, mode key).

use crate::cpu::Cpu;
use x86_defs::control::*;
use x86_defs::{SegmentIndex, flags};

/// See the module's header. Recomputed by [`Cpu::update_mode`] whenever one of its sources changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(transparent)]
pub struct ModeKey(pub u32);

impl ModeKey {
    /// 64-bit code segment.
    pub const LONG: u32 = 1 << 0;
    /// CS.D: 32-bit default sizes.
    pub const BIG_CODE: u32 = 1 << 1;
    /// SS.B: 32-bit stack pointer.
    pub const BIG_STACK: u32 = 1 << 2;
    /// Virtual-8086 mode.
    pub const V86: u32 = 1 << 5;
    /// Alignment checks are on (CR0.AM, RFLAGS.AC, CPL 3).
    pub const ALIGN: u32 = 1 << 6;
    /// Single step: blocks hold one instruction.
    pub const TRAP: u32 = 1 << 7;
    /// CR0.TS.
    pub const TS: u32 = 1 << 8;
    /// CR0.EM.
    pub const EM: u32 = 1 << 9;
    /// CR4.OSFXSR.
    pub const OSFXSR: u32 = 1 << 10;
    /// CR4.OSXSAVE and XCR0 enables SSE and AVX.
    pub const AVX: u32 = 1 << 11;
    /// DS: base 0, limit 4 GiB, writable.
    pub const FLAT_DS: u32 = 1 << 12;
    /// ES likewise.
    pub const FLAT_ES: u32 = 1 << 13;
    /// SS likewise.
    pub const FLAT_SS: u32 = 1 << 14;
    /// CS: base 0, limit 4 GiB.
    pub const FLAT_CS: u32 = 1 << 15;
    /// Protected mode (CR0.PE).
    pub const PROTECTED: u32 = 1 << 16;
    /// CR0.MP.
    pub const MP: u32 = 1 << 17;
    /// CR4.OSXSAVE.
    pub const OSXSAVE: u32 = 1 << 18;
    /// CR4.UMIP.
    pub const UMIP: u32 = 1 << 19;
    /// EFER.LMA (64-bit or compatibility mode).
    pub const LMA: u32 = 1 << 20;

    /// DR7 enables a breakpoint, or a debug trap waits: instructions run one by one.
    pub const BREAKPOINTS: u32 = 1 << 21;

    /// Whether all of `bits` are set.
    #[inline(always)]
    pub fn has(self, bits: u32) -> bool {
        self.0 & bits == bits
    }
    /// Current privilege level.
    #[inline(always)]
    pub fn cpl(self) -> u8 {
        (self.0 >> 3 & 3) as u8
    }
    /// 64-bit code.
    #[inline(always)]
    pub fn is_long(self) -> bool {
        self.has(Self::LONG)
    }
    /// Bits of the default code size, as the decoder wants it: 16, 32 or 64.
    pub fn bitness(self) -> u32 {
        match (self.has(Self::LONG), self.has(Self::BIG_CODE)) {
            (true, _) => 64,
            (false, true) => 32,
            (false, false) => 16,
        }
    }
    /// Bytes of the stack pointer: 2, 4 or 8.
    pub fn stack_bytes(self) -> u8 {
        match (self.has(Self::LONG), self.has(Self::BIG_STACK)) {
            (true, _) => 8,
            (false, true) => 4,
            (false, false) => 2,
        }
    }

    /// The key of `cpu` as it stands.
    pub fn of(cpu: &Cpu) -> Self {
        let mut key = u32::from(cpu.cpl) << 3;
        let mut set = |bit: u32, on: bool| {
            if on {
                key |= bit;
            }
        };
        let cs = &cpu.seg[SegmentIndex::Cs as usize];
        let lma = cpu.efer & EFER_LMA != 0;
        let v86 = cpu.rflags & flags::VM != 0;
        let protected = cpu.cr0 & CR0_PE != 0;
        let long = lma && cs.attributes.long() && !v86;
        set(Self::LONG, long);
        set(Self::LMA, lma);
        set(Self::BIG_CODE, cs.attributes.big() && !long);
        set(Self::BIG_STACK, cpu.seg[SegmentIndex::Ss as usize].attributes.big());
        set(Self::V86, v86);
        set(Self::ALIGN, cpu.cr0 & CR0_AM != 0 && cpu.rflags & flags::AC != 0 && cpu.cpl == 3);
        set(Self::TRAP, cpu.rflags & flags::TF != 0);
        // The top bit of what waits is no trap, but the lack of one.
        let waits = cpu.pending_debug << 1 != 0;
        set(Self::BREAKPOINTS, waits || crate::system::debug::breakpoints_enabled(cpu));
        set(Self::TS, cpu.cr0 & CR0_TS != 0);
        set(Self::EM, cpu.cr0 & CR0_EM != 0);
        set(Self::MP, cpu.cr0 & CR0_MP != 0);
        set(Self::OSFXSR, cpu.cr4 & CR4_OSFXSR != 0);
        let osxsave = cpu.cr4 & CR4_OSXSAVE != 0;
        set(Self::OSXSAVE, osxsave);
        set(Self::AVX, osxsave && cpu.xcr0 & (XCR0_SSE | XCR0_AVX) == XCR0_SSE | XCR0_AVX);
        set(Self::UMIP, cpu.cr4 & CR4_UMIP != 0);
        set(Self::PROTECTED, protected);
        if !long {
            set(Self::FLAT_DS, is_flat_data(cpu, SegmentIndex::Ds, protected && !v86));
            set(Self::FLAT_ES, is_flat_data(cpu, SegmentIndex::Es, protected && !v86));
            set(Self::FLAT_SS, is_flat_data(cpu, SegmentIndex::Ss, protected && !v86));
            set(Self::FLAT_CS, protected && !v86 && cs.base == 0 && cs.limit == u32::MAX);
        }
        Self(key)
    }
}

fn is_flat_data(cpu: &Cpu, index: SegmentIndex, protected: bool) -> bool {
    protected && cpu.seg[index as usize].base == 0 && is_open(cpu, index)
}

/// Whether all 4 GiB of a segment can be read and written, in protected mode: its base alone matters.
pub(crate) fn is_open(cpu: &Cpu, index: SegmentIndex) -> bool {
    let seg = &cpu.seg[index as usize];
    let a = seg.attributes;
    !seg.unusable
        && seg.limit == u32::MAX
        && !a.is_code()
        && a.readable_or_writable()
        && !a.conforming_or_expand_down()
}
