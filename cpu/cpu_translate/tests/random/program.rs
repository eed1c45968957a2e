//! A random program.

use super::harness::images::{CODE32, DATA32, DPL3};
use super::harness::{CODE, DATA, Random, STACK, UCODE32, UDATA, segment};
use hypervisor::state::{Float80, X87State};
use std::fmt;
use x86_decode::{Decoded, FlowControl, Instruction, Mnemonic as M, Register, RflagsBits, decode};
use x86_defs::Segment;
use x86_defs::cpuid::{Feature, FeatureSet};

/// See the module's header.
pub struct Program {
    /// 64 or 32.
    bits: u32,
    /// FS and GS, in 32-bit code.
    pub segments: Option<[Segment; 2]>,
    pub code: Vec<u8>,
    /// Where it starts in its page.
    pub offset: u32,
    pub gpr: [u64; 16],
    pub xmm: [[u64; 2]; 16],
    pub x87: X87State,
    pub data: Vec<u8>,
    pub instructions: usize,
}

/// Opcodes of the one-byte map with ModRM.
const ONE: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x08, 0x09, 0x0A, 0x0B, 0x11, 0x13, 0x19, 0x1B, 0x20, 0x21, 0x22, 0x23, 0x28,
    0x29, 0x2A, 0x2B, 0x30, 0x31, 0x32, 0x33, 0x38, 0x39, 0x3A, 0x3B, 0x63, 0x69, 0x6B, 0x80, 0x81, 0x83,
    0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8B, 0x8D, 0xC0, 0xC1, 0xC6, 0xC7, 0xD0, 0xD1, 0xD2, 0xD3,
    0xF6, 0xF7, 0xFE, 0xFF,
];
/// The x87 unit's.
const UNIT: &[u8] = &[0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF];
/// Without.
const PLAIN: &[u8] = &[
    0x05, 0x0D, 0x15, 0x25, 0x2D, 0x3D, 0x50, 0x51, 0x53, 0x54, 0x56, 0x57, 0x58, 0x59, 0x5B, 0x5E, 0x5F,
    0x68, 0x6A, 0x90, 0x91, 0x97, 0x98, 0x99, 0x9C, 0xA4, 0xA5, 0xA6, 0xAA, 0xAB, 0xAE, 0xB0, 0xB8, 0xB9,
    0xBF, 0xC9, 0xF5, 0xF8, 0xF9,
];
/// What 32-bit code has besides.
const PLAIN_32: &[u8] = &[
    0x40, 0x41, 0x42, 0x43, 0x45, 0x46, 0x47, 0x48, 0x49, 0x4A, 0x4B, 0x4D, 0x4E, 0x4F, 0xA0, 0xA1, 0xA2,
    0xA3, 0xA1, 0xA3, 0x60, 0x61, 0x27, 0x2F, 0x37, 0x3F, 0xD4, 0xD5, 0x1E, 0x06, 0xD6, 0x98, 0x99,
];
/// Second bytes of the 0F map.
const TWO: &[u8] = &[
    0x10, 0x11, 0x12, 0x14, 0x16, 0x28, 0x29, 0x2A, 0x2C, 0x2D, 0x2E, 0x2F, 0x40, 0x42, 0x44, 0x46, 0x48,
    0x4C, 0x4F, 0x50, 0x51, 0x54, 0x57, 0x58, 0x59, 0x5B, 0x5C, 0x5E, 0x5F, 0x60, 0x6C, 0x6E, 0x6F, 0x70,
    0x73, 0x74, 0x7E, 0x7F, 0x90, 0x92, 0x94, 0x97, 0x9C, 0x9F, 0xA3, 0xA4, 0xA5, 0xAB, 0xAC, 0xAD, 0xAF,
    0xB0, 0xB1, 0xB3, 0xB6, 0xB7, 0xB8, 0xBA, 0xBB, 0xBC, 0xBD, 0xBE, 0xBF, 0xC0, 0xC1, 0xC4, 0xC5, 0xC6,
    0xC8, 0xCF, 0xD4, 0xD6, 0xD7, 0xDB, 0xEB, 0xEF, 0xF4, 0xFE,
];
/// Third bytes of the VEX map 0F38 for general registers, and of vector maps.
const VEX38: &[u8] = &[0xF2, 0xF3, 0xF5, 0xF6, 0xF7, 0x00, 0x18, 0x58, 0x98, 0xB8, 0x17, 0x40];

impl Program {
    pub fn random(r: &mut Random, bits: u32) -> Self {
        let mut gpr = [0; 16];
        gpr.iter_mut().for_each(|g| *g = value(r));
        gpr[4] = STACK - 0x800 + 8 * r.below(200);
        if bits == 32 && r.one_in(2) {
            // Of 64-bit code.
            gpr[4] |= r.next() << 32;
        }
        let segments = (bits == 32).then(|| [other_segment(r), other_segment(r)]);
        gpr[5] = address(r);
        gpr[6] = address(r);
        gpr[7] = address(r);
        let mut xmm = [[0; 2]; 16];
        xmm.iter_mut().flatten().for_each(|v| *v = value(r));
        let x87 = unit(r);
        let mut data = vec![0; 0x3000];
        r.fill(&mut data);
        let (code, offset) = (Vec::new(), r.below(0xF00) as u32);
        let mut p = Self { bits, segments, code, offset, gpr, xmm, x87, data, instructions: 0 };
        let count = 3 + r.below(25);
        for _ in 0..count {
            p.add(r);
        }
        p.code.push(0xF4); // hlt: #GP at CPL 3
        p
    }

    /// Address of the HLT, which raises #GP at CPL 3.
    pub fn end(&self) -> u64 {
        CODE + u64::from(self.offset) + self.code.len() as u64 - 1
    }

    fn add(&mut self, r: &mut Random) {
        let insn = instruction(r, self.bits);
        if !r.one_in(30) {
            self.make_addresses_good(r, &insn);
        }
        match r.below(12) {
            0 => self.branch_over(r, &insn),
            1 => {
                // call to the next instruction, and the return address back off.
                self.code.extend([0xE8, 0, 0, 0, 0, 0x58 | r.pick(&[0, 1, 2, 3])]);
                self.code.extend(&insn);
            }
            _ => self.code.extend(&insn),
        }
        self.instructions += 1;
        if leaves_undefined(&insn, self.bits) {
            self.code.extend([0x38, 0xC0 | r.below(64) as u8]); // cmp r8, r8
        }
    }

    /// Loads the registers that `insn` takes addresses from.
    fn make_addresses_good(&mut self, r: &mut Random, insn: &[u8]) {
        let features = FeatureSet::of(Feature::ALL);
        let Decoded::Instruction(insn) = decode(insn, self.bits, 0, features) else { return };
        if insn.is_string_instruction() {
            self.load(6, address(r));
            self.load(7, address(r));
        } else if insn.mnemonic() == M::Leave {
            self.load(5, STACK - 0x400);
        } else if insn.memory_base().is_gpr() && insn.memory_base().full_register() != Register::RSP {
            let good =
                address(r) & if insn.memory_size().size() >= 16 && !r.one_in(8) { !15 } else { u64::MAX };
            let base = insn.memory_base().full_register() as u8 - Register::RAX as u8;
            let from = match (self.segments, insn.memory_segment()) {
                (Some([fs, _]), Register::FS) => fs.base,
                (Some([_, gs]), Register::GS) => gs.base,
                _ => 0,
            };
            self.load(base, good.wrapping_sub(insn.memory_displacement64() & 15).wrapping_sub(from));
        }
    }
    /// mov r32, imm32
    fn load(&mut self, register: u8, value: u64) {
        if register >= 8 {
            self.code.push(0x41);
        }
        self.code.push(0xB8 | register & 7);
        self.code.extend((value as u32).to_le_bytes());
    }

    fn branch_over(&mut self, r: &mut Random, insn: &[u8]) {
        let jump = if r.one_in(6) { 0xEB } else { 0x70 | r.below(16) as u8 };
        self.code.extend([jump, insn.len() as u8]);
        self.code.extend(insn);
    }
}

/// The x87 unit, often with all exceptions masked.
fn unit(r: &mut Random) -> X87State {
    let mut x87 =
        X87State { in_use: r.next() as u8, status: (r.below(8) as u16) << 11, ..X87State::default() };
    if r.one_in(4) {
        x87.control = r.next() as u16 & 0xF3F | 0x40;
    }
    for register in &mut x87.registers {
        let exponent = if r.one_in(8) { r.next() as u16 } else { 0x3FF0 + r.below(40) as u16 };
        *register = Float80 { mantissa: r.next() | u64::from(!r.one_in(16)) << 63, sign_exponent: exponent };
    }
    x87
}

pub fn value(r: &mut Random) -> u64 {
    match r.below(5) {
        0 => r.below(40),
        1 => r.next() | 0x8000_0000_0000_0000,
        2 => u64::from(r.next() as u32),
        3 => (r.below(40) as i64).wrapping_neg() as u64,
        _ => r.next(),
    }
}

/// For FS or GS: mostly one whose base alone matters.
fn other_segment(r: &mut Random) -> Segment {
    let base = match r.below(4) {
        0 => 0,
        1 => DATA,
        2 => u64::from((DATA as u32).wrapping_sub(r.next() as u32)),
        _ => u64::from(r.next() as u32),
    };
    match r.below(6) {
        0 => segment(UDATA | 3, base, r.below(0x4_0000) as u32, DATA32 | DPL3),
        1 => segment(UCODE32 | 3, base, u32::MAX, CODE32 | DPL3),
        // Expands down.
        2 => segment(UDATA | 3, base, r.below(0x4_0000) as u32, DATA32 | DPL3 | 4),
        _ => segment(UDATA | 3, base, u32::MAX, DATA32 | DPL3),
    }
}

/// In the data, often near the end of a page, seldom where nothing is.
fn address(r: &mut Random) -> u64 {
    let page = DATA + 0x1000 * r.below(2);
    match r.below(8) {
        0..=3 => (page + r.below(0x1000)) & !15,
        4 => page - r.below(48),
        5 if r.one_in(4) => 0x80_0000 + r.below(0x1000),
        // Around 4 GiB, where 32-bit code wraps.
        5 if r.one_in(4) => 0xFFFF_FFFF - r.below(16),
        _ => page + r.below(0x1000),
    }
}

/// Bytes of one instruction that programs are made of.
pub fn instruction(r: &mut Random, bits: u32) -> Vec<u8> {
    loop {
        let bytes = if bits == 64 { candidate(r) } else { candidate_32(r) };
        if let Decoded::Instruction(insn) = decode(&bytes, bits, 0, FeatureSet::of(Feature::ALL))
            && wanted(&insn)
        {
            return bytes[..insn.len()].to_vec();
        }
    }
}

fn candidate(r: &mut Random) -> Vec<u8> {
    let mut b = Vec::new();
    let vector_prefix = |r: &mut Random| r.pick(&[0u8, 0x66, 0xF2, 0xF3]);
    match r.below(10) {
        0..=4 => {
            if r.one_in(8) {
                b.push(0x66);
            }
            if r.one_in(2) {
                b.push(0x40 | r.below(16) as u8);
            }
            b.push(if r.one_in(4) { r.pick(UNIT) } else { r.pick(ONE) });
        }
        5 => {
            if r.one_in(3) {
                b.push(0x40 | r.below(16) as u8);
            }
            b.push(r.pick(PLAIN));
        }
        6..=8 => {
            let p = vector_prefix(r);
            if p != 0 {
                b.push(p);
            }
            if r.one_in(2) {
                b.push(0x40 | r.below(16) as u8);
            }
            b.extend([0x0F, r.pick(TWO)]);
        }
        _ if r.one_in(2) => b.extend([0xC5, r.next() as u8, r.pick(TWO)]),
        _ => b.extend([0xC4, 0x02 | (r.next() as u8 & 0xE0), r.next() as u8, r.pick(VEX38)]),
    }
    let memory_bases = [5u8, 6, 7];
    let reg = (r.below(8) as u8) << 3;
    match r.below(4) {
        0 | 1 => b.push(0xC0 | reg | r.below(8) as u8),
        2 => b.push(reg | r.pick(&[6u8, 7])),
        _ => b.extend([0x40 | reg | r.pick(&memory_bases), r.below(64) as u8]),
    }
    let mut rest = [0; 8];
    r.fill(&mut rest);
    b.extend(rest);
    b.truncate(15);
    b
}

fn candidate_32(r: &mut Random) -> Vec<u8> {
    let mut b = Vec::new();
    if r.one_in(5) {
        b.push(r.pick(&[0x64u8, 0x65, 0x64, 0x65, 0x26, 0x2E, 0x36, 0x3E]));
    }
    if r.one_in(8) {
        b.push(0x66);
    }
    let vector_prefix = |r: &mut Random| r.pick(&[0u8, 0x66, 0xF2, 0xF3]);
    match r.below(12) {
        0..=4 => b.push(if r.one_in(4) { r.pick(UNIT) } else { r.pick(ONE) }),
        5 => b.push(r.pick(PLAIN)),
        6 | 7 => b.push(r.pick(PLAIN_32)),
        8..=10 => {
            let p = vector_prefix(r);
            if p != 0 {
                b.push(p);
            }
            b.extend([0x0F, r.pick(TWO)]);
        }
        _ if r.one_in(2) => b.extend([0xC5, r.next() as u8 | 0xC0, r.pick(TWO)]),
        _ => b.extend([0xC4, 0x02 | (r.next() as u8 | 0xC0) & 0xE0, r.next() as u8, r.pick(VEX38)]),
    }
    if matches!(b.last(), Some(0xA0..=0xA3)) {
        b.extend((address(r) as u32).to_le_bytes());
    }
    let reg = (r.below(8) as u8) << 3;
    match r.below(6) {
        0 | 1 => b.push(0xC0 | reg | r.below(8) as u8),
        2 => b.push(reg | r.pick(&[6u8, 7])),
        3 => {
            b.push(reg | 5);
            b.extend((address(r) as u32).to_le_bytes());
        }
        // An index that is no more than it happens to be.
        4 if r.one_in(4) => b.extend([0x44 | reg, r.next() as u8, r.next() as u8]),
        _ => b.extend([0x40 | reg | r.pick(&[5u8, 6, 7]), r.below(64) as u8]),
    }
    let mut rest = [0; 8];
    r.fill(&mut rest);
    b.extend(rest);
    b.truncate(15);
    b
}

fn wanted(insn: &Instruction) -> bool {
    // What some leave in registers or memory is undefined in places; others are no business of ours.
    let unwanted =
        matches!(
            insn.mnemonic(),
            M::Popf
                | M::Popfq
                | M::Popfd
                | M::Pushf
                | M::Pushfq
                | M::Pushfd
                | M::Lahf
                | M::Enter
                | M::Rdpid
                | M::Rdseed
        ) || matches!(insn.mnemonic(), M::Rcpps | M::Rcpss | M::Rsqrtps | M::Rsqrtss | M::Bsf | M::Bsr);
    let swaps_16 = insn.mnemonic() == M::Bswap && insn.op0_register().size() == 2;
    let moves_stack = insn.op0_register().full_register() == Register::RSP;
    let plain = insn.flow_control() == FlowControl::Next && !insn.is_privileged();
    plain && !unwanted && !swaps_16 && !moves_stack && !is_long_double_shift(insn)
}

/// SHLD and SHRD of 16 bits by more than that are undefined.
fn is_long_double_shift(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), M::Shld | M::Shrd)
        && (insn.op0_register().size() == 2 || insn.memory_size().size() == 2)
}

pub fn leaves_undefined(bytes: &[u8], bits: u32) -> bool {
    match decode(bytes, bits, 0, FeatureSet::of(Feature::ALL)) {
        Decoded::Instruction(insn) => {
            let shift = matches!(
                insn.mnemonic(),
                M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shld | M::Shrd
            );
            shift || insn.rflags_undefined() & !RflagsBits::AF != 0
        }
        _ => false,
    }
}

impl fmt::Display for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let start = CODE + u64::from(self.offset);
        write!(f, "at {start:#x}{}", listing(self.bits, start, &self.code))
    }
}

/// The instructions of `code`, which lies at `start`.
pub fn listing(bits: u32, start: u64, code: &[u8]) -> String {
    let (mut text, mut at) = (String::new(), 0);
    while let Decoded::Instruction(insn) =
        decode(&code[at..], bits, start + at as u64, FeatureSet::of(Feature::ALL))
    {
        let bytes = &code[at..at + insn.len()];
        text.push_str(&format!("\n  {:x}: {bytes:02x?} {:?}", insn.ip(), insn.code()));
        at += insn.len();
    }
    text
}
