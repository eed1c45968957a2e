//! A guest may put anything into its tables and registers: nothing here may panic or overflow, and a fault
//! always says which.

use super::machine::*;
use crate::cpu::{RIP, reg};
use crate::system::debug;
use crate::system::interrupts::{self, Kind, Outcome};
use x86_defs::control::*;
use x86_defs::{Exception, flags};

/// xorshift64*: enough disorder, and a seed is a case.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// Small, selector-like, an address of the machine, or anything.
    fn value(&mut self) -> u64 {
        match self.below(5) {
            0 => self.below(16),
            1 => self.below(0x108),
            2 => self.below(0x11_0000),
            3 => 1u64.rotate_left(self.below(64) as u32).wrapping_sub(self.below(3)),
            _ => self.next(),
        }
    }
}

/// Every instruction of `system`, with operands in RAX, RCX, RDX and memory at [RBX].
const CODE_BYTES: &[&[u8]] = &[
    &[0xCF],
    &[0x48, 0xCF],
    &[0x66, 0xCF],
    &[0xCB],
    &[0x48, 0xCB],
    &[0xCA, 4, 0],
    &[0xFF, 0x1B],
    &[0xFF, 0x2B],
    &[0x48, 0xFF, 0x1B],
    &[0x66, 0xFF, 0x2B],
    &[0xCD, 0x21],
    &[0xCC],
    &[0xF1],
    &[0xCE],
    &[0x0F, 0x05],
    &[0x0F, 0x07],
    &[0x48, 0x0F, 0x07],
    &[0x0F, 0x34],
    &[0x0F, 0x35],
    &[0x8E, 0xD8],
    &[0x8E, 0xD0],
    &[0x8E, 0x23],
    &[0x0F, 0xA1],
    &[0x17],
    &[0xC5, 0x03],
    &[0x0F, 0xB2, 0x03],
    &[0x0F, 0x01, 0x13],
    &[0x0F, 0x01, 0x1B],
    &[0x0F, 0x01, 0x03],
    &[0x0F, 0x00, 0xD0],
    &[0x0F, 0x00, 0xD8],
    &[0x0F, 0x02, 0xC1],
    &[0x0F, 0x03, 0xC1],
    &[0x0F, 0x00, 0xE1],
    &[0x0F, 0x00, 0xE9],
    &[0x63, 0xC8],
    &[0x0F, 0x22, 0xC0],
    &[0x0F, 0x22, 0xD8],
    &[0x0F, 0x22, 0xE0],
    &[0x0F, 0x23, 0xC0],
    &[0x0F, 0x23, 0xF8],
    &[0x0F, 0x30],
    &[0x0F, 0x32],
    &[0x0F, 0x01, 0xD1],
    &[0x0F, 0x01, 0xF0],
    &[0x9C],
    &[0x9D],
    &[0x66, 0x9D],
    &[0xFA],
    &[0xFB],
    &[0xEE],
    &[0xED],
    &[0xF3, 0x6E],
    &[0xF3, 0x6D],
    &[0x0F, 0x01, 0x3B],
    &[0x66, 0x0F, 0x38, 0x82, 0x03],
    &[0xF4],
    &[0x0F, 0xAE, 0x3B],
];

fn disorder(m: &mut Machine, r: &mut Random) {
    for table in [GDT, LDT, TSS, TSS_B] {
        for _ in 0..r.below(12) {
            let at = table + r.below(0x108);
            let byte = r.next() as u8;
            m.poke(at, &[byte]);
        }
    }
    for _ in 0..r.below(64) {
        let at = IDT + r.below(0x1000);
        m.poke(at, &[r.next() as u8]);
    }
    for _ in 0..r.below(3) {
        let page = r.below(0x100);
        m.pages.insert(page, (r.below(2) == 0, r.below(2) == 0, r.below(2) == 0));
    }
    for register in [reg::RAX, reg::RCX, reg::RDX, reg::RSI, reg::RDI] {
        m.cpu.gpr[register] = r.value();
    }
    m.cpu.gpr[reg::RBX] = if r.below(8) == 0 { r.value() } else { DATA };
    if r.below(4) == 0 {
        m.cpu.gpr[reg::RSP] = r.value();
    }
    let sp = m.cpu.gpr[reg::RSP] & 0xE_FFC0;
    for at in [DATA, sp] {
        for i in 0..10 {
            let bytes = r.value().to_le_bytes();
            m.poke(at + 8 * i, &bytes);
        }
    }
    if r.below(3) == 0 {
        m.cpu.tr.limit = r.below(0x200) as u32;
    }
    m.cpu.ldtr = x86_defs::Segment { base: LDT, limit: 0xFF, unusable: r.below(2) == 0, ..m.cpu.ldtr };
    m.cpu.dr[7] = DR7_FIXED_1 | (r.next() & 0xFFFF_03FF);
    let keep = flags::VM | flags::FIXED_1;
    let image = m.cpu.rflags & keep | r.next() & flags::ALL & !keep;
    m.cpu.set_rflags_all(image);
}

fn machine(r: &mut Random) -> Machine {
    match r.below(6) {
        0 => Machine::long(0),
        1 => Machine::long(3),
        2 => Machine::protected(0),
        3 => Machine::protected(3),
        4 => {
            let mut m = Machine::v86(r.below(4));
            m.cpu.cr4 |= CR4_VME;
            m
        }
        _ => Machine::real(),
    }
}

#[test]
fn disorderly_tables_and_registers_never_panic() {
    for seed in 1..4000u64 {
        let mut r = Random(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15));
        let mut m = machine(&mut r);
        disorder(&mut m, &mut r);
        for _ in 0..12 {
            let outcome = match r.below(8) {
                0 => m.interrupt(r.next() as u8),
                1 => interrupts::deliver_interrupt(&mut m, 2, Kind::Nmi),
                _ => {
                    let code = CODE_BYTES[r.below(CODE_BYTES.len() as u64) as usize];
                    let before = m.cpu.gpr[RIP];
                    let tf = m.cpu.rflags & flags::TF != 0;
                    match m.try_step_any(code) {
                        Ok(_) => debug::after_instruction(&mut m.cpu, tf, true)
                            .map_or(Outcome::Delivered, |trap| m.deliver(trap)),
                        Err(fault) => {
                            assert!(fault.is_trap || m.cpu.gpr[RIP] == before, "seed {seed}: {code:02X?}");
                            m.deliver(fault)
                        }
                    }
                }
            };
            if outcome == Outcome::TripleFault {
                break;
            }
            check(&m, seed);
        }
    }
}

/// What must hold of any state.
fn check(m: &Machine, seed: u64) {
    let cpu = &m.cpu;
    let long = cpu.efer & EFER_LMA != 0;
    assert_eq!(long, cpu.efer & EFER_LME != 0 && cpu.cr0 & CR0_PG != 0, "seed {seed}");
    assert!(cpu.cr0 & CR0_PG == 0 || cpu.cr0 & CR0_PE != 0, "seed {seed}");
    assert!(!long || cpu.rflags & flags::VM == 0, "seed {seed}");
    assert!(
        cpu.rflags & flags::FIXED_1 != 0 && cpu.rflags & !(flags::ALL | flags::FIXED_1) == 0,
        "seed {seed}"
    );
    assert!(cpu.rflags & flags::VM == 0 || cpu.cpl == 3, "seed {seed}");
    assert_eq!(cpu.mode, crate::ModeKey::of(cpu), "seed {seed}");
    for i in 0..6 {
        assert_eq!(cpu.seg_base[i], cpu.seg[i].base, "seed {seed}");
    }
    assert_eq!(cpu.gpr[17..], [0; 15], "seed {seed}");
    assert_eq!(cpu.exc.vector, None::<Exception>, "seed {seed}");
}
