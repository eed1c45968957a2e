//! The modes of a processor, and memory that fits them: descriptor tables, gates, page tables.
//!
//! Low memory: IVT or IDT, GDT, TSS; then page tables; code from [`CODE`] on, which is also where every gate leads.

use arbitrary::Arbitrary;
use hypervisor::VcpuState;
use x86_defs::control::*;
use x86_defs::{DescriptorTable, Segment, SegmentAttributes, flags};

/// A mode of operation.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Mode {
    Real,
    V86,
    Protected16,
    Protected32,
    User32,
    Paging32,
    Pae,
    Compatibility,
    Long,
    User64,
}

/// Where code and data are.
pub const CODE: u64 = 0x1_0000;
/// Top of the stack.
pub const STACK: u64 = 0x1_8000;
const IDT: u64 = 0x1000;
const GDT: u64 = 0x2000;
const TSS: u64 = 0x3000;
const ROOT: u64 = 0x4000;
const LOWER: u64 = 0x5000;
const LOWEST: u64 = 0x6000;
/// Bytes that [`Mode::memory`] fills.
pub const MEMORY: usize = 0x8000;

const CODE16: u16 = 0x09B;
const CODE32: u16 = 0xC9B;
const CODE64: u16 = 0xA9B;
const DATA: u16 = 0xC93;
const USER: u16 = 0x60;
/// Attributes of the GDT's entries from 8 on; the TSS follows.
const SEGMENTS: [u16; 7] = [CODE32, CODE64, DATA, CODE32 | USER, DATA | USER, CODE64 | USER, CODE16];
const TSS_SELECTOR: u16 = 0x40;

/// Present, writable, for users, and (in directories) 2 or 4 MiB.
const PAGE: u64 = 0x87;
const TABLE: u64 = 0x07;

fn selector(attributes: u16) -> u16 {
    let index = SEGMENTS.iter().position(|a| *a == attributes).unwrap_or(0) as u16 + 1;
    (index * 8) | if attributes & USER == 0 { 0 } else { 3 }
}

fn segment(attributes: u16) -> Segment {
    let limit = if attributes == CODE16 { 0xFFFF } else { u32::MAX };
    let selector = selector(attributes);
    Segment { selector, attributes: SegmentAttributes(attributes), limit, base: 0, unusable: false }
}

impl Mode {
    fn is_long(self) -> bool {
        matches!(self, Self::Compatibility | Self::Long | Self::User64)
    }
    fn is_paged(self) -> bool {
        self.is_long() || matches!(self, Self::Paging32 | Self::Pae)
    }

    /// The first [`MEMORY`] bytes of RAM, with gates that lead to the code.
    pub fn memory(self) -> Vec<u8> {
        self.memory_with_gates(|vector| CODE + 0x40 * (vector & 7))
    }

    /// As [`Mode::memory`], with gates that lead where `gate` says.
    pub fn memory_with_gates(self, gate_to: impl Fn(u64) -> u64) -> Vec<u8> {
        let mut memory = vec![0; MEMORY];
        let mut put = |at: u64, value: u64| {
            memory[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
        };
        for vector in 0..128 {
            // Two real-mode vectors: 1000h:0000h and 1000h:0040h.
            put(vector * 8, 0x1000_0040_1000_0000);
        }
        for (i, attributes) in SEGMENTS.into_iter().enumerate() {
            let limit = if attributes == CODE16 { 0xFFFF } else { 0xF_0000_0000_FFFF };
            let a = u64::from(attributes);
            put(GDT + 8 + 8 * i as u64, limit | (a & 0xFF) << 40 | (a >> 8) << 52);
        }
        let tss_type = 0x89u64;
        put(GDT + u64::from(TSS_SELECTOR), 0x67 | TSS << 16 | tss_type << 40);
        for vector in 0..256u64 {
            let code = u64::from(selector(if self.is_long() { CODE64 } else { CODE32 }));
            let target = gate_to(vector);
            let gate = target & 0xFFFF | code << 16 | 0xEE << 40 | (target >> 16) << 48;
            put(IDT + vector * if self.is_long() { 16 } else { 8 }, gate);
        }
        // Stacks of CPL 0: long, then 32-bit.
        put(TSS + 4, if self.is_long() { STACK } else { STACK | u64::from(selector(DATA)) << 32 });
        put(
            ROOT,
            match self {
                Self::Paging32 => PAGE,
                Self::Pae => LOWER | 1,
                _ => LOWER | TABLE,
            },
        );
        put(LOWER, if self.is_long() { LOWEST | TABLE } else { PAGE });
        put(LOWEST, PAGE);
        memory
    }

    /// Registers that fit.
    pub fn state(self) -> VcpuState {
        let mut s = VcpuState::default();
        let (code, data) = match self {
            Self::Real | Self::V86 => {
                let attributes = if self == Self::V86 { 0xF3 } else { 0x93 };
                let plain = Segment {
                    selector: 0x1000,
                    attributes: SegmentAttributes(attributes),
                    limit: 0xFFFF,
                    base: CODE,
                    unusable: false,
                };
                (plain, plain)
            }
            Self::Protected16 => (Segment { base: CODE, ..segment(CODE16) }, segment(DATA)),
            Self::User32 | Self::Compatibility => (segment(CODE32 | USER), segment(DATA | USER)),
            Self::Long => (segment(CODE64), segment(DATA)),
            Self::User64 => (segment(CODE64 | USER), segment(DATA | USER)),
            Self::Protected32 | Self::Paging32 | Self::Pae => (segment(CODE32), segment(DATA)),
        };
        s.segments = [data, code, data, data, data, data];
        s.rip = CODE - code.base;
        s.gpr[4] = STACK - data.base;
        s.x87.control = 0x37F;
        s.sse.mxcsr = 0x1F80;
        s.cr4 = CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE | CR4_FSGSBASE;
        s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
        if self == Self::Real {
            s.idtr = DescriptorTable { base: 0, limit: 0x3FF };
            return s;
        }
        s.gdtr = DescriptorTable { base: GDT, limit: 0x4F };
        s.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
        s.tr = Segment {
            selector: TSS_SELECTOR,
            attributes: SegmentAttributes(0x8B),
            limit: 0x67,
            base: TSS,
            unusable: false,
        };
        s.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_MP | CR0_WP;
        if self == Self::V86 {
            s.rflags |= flags::VM;
        }
        if self.is_paged() {
            s.cr0 |= CR0_PG;
            s.cr3 = ROOT;
            s.cr4 |= CR4_PSE | if self == Self::Paging32 { 0 } else { CR4_PAE };
        }
        if self == Self::Pae {
            s.pdpte = [LOWER | 1, 0, 0, 0];
        }
        if self.is_long() {
            s.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
        }
        s
    }
}
