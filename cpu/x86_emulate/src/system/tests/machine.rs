//! A small machine for the tests: flat memory with protectable pages, descriptor tables, one handler a
//! vector.

use super::std;
use super::std::collections::BTreeMap;
use super::std::vec::Vec;
use crate::core::{Core, Fault, PagingChange, Word};
use crate::cpu::{Cpu, PendingException, RIP, reg};
use crate::lower::LowerContext;
use crate::op::Step;
use crate::system::descriptor;
use crate::system::interrupts::{self, Kind, Outcome};
use x86_decode::{Decoded, decode};
use x86_defs::control::*;
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::exception::{PF_PRESENT, PF_USER, PF_WRITE};
use x86_defs::{DescriptorTable, Exception, Segment, SegmentAttributes, SegmentIndex, flags};

pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const TSS: u64 = 0x4000;
pub const TSS_B: u64 = 0x5000;
pub const LDT: u64 = 0x6000;
pub const CODE: u64 = 0x1_0000;
pub const USER_STACK: u64 = 0x2_1000;
pub const KERNEL_STACK: u64 = 0x3_1000;
pub const RING1_STACK: u64 = 0x3_5000;
pub const IST1_STACK: u64 = 0x4_1008;
pub const DATA: u64 = 0x5_0000;
pub const HANDLERS: u64 = 0x8_0000;
const RAM: usize = 0x10_0000;

/// Selectors of the GDT; those with DPL 3 carry RPL 3.
pub const CODE0: u16 = 0x08;
pub const DATA0: u16 = 0x10;
pub const CODE3_32: u16 = 0x1B;
pub const DATA3: u16 = 0x23;
pub const CODE3: u16 = 0x2B;
pub const TR: u16 = 0x30;
pub const LDTR: u16 = 0x40;
pub const CODE0_32: u16 = 0x50;
pub const CODE0_16: u16 = 0x58;
pub const CONFORMING: u16 = 0x60;
pub const ABSENT_CODE: u16 = 0x68;
pub const READ_ONLY: u16 = 0x70;
pub const ABSENT_DATA: u16 = 0x78;
pub const CODE1: u16 = 0x80;
pub const DATA1: u16 = 0x88;
pub const EXECUTE_ONLY: u16 = 0x90;
pub const STACK16: u16 = 0x98;
/// Slots of 16 bytes for a test's own descriptors.
pub const SLOT_A: u16 = 0xA0;
pub const SLOT_B: u16 = 0xB0;
pub const SLOT_C: u16 = 0xC0;
pub const GDT_LIMIT: u16 = 0xFF;
/// A selector beyond the GDT.
pub const BEYOND: u16 = 0x100;

/// Attributes (12 bits: G, D/B, L, AVL, P, DPL, S, type).
pub const A_CODE64: u16 = 0xA9B;
pub const A_CODE32: u16 = 0xC9B;
pub const A_CODE16: u16 = 0x09B;
pub const A_DATA: u16 = 0xC93;
pub const DPL1: u16 = 1 << 5;
pub const DPL3: u16 = 3 << 5;
pub const PRESENT: u16 = 0x80;

/// An 8-byte descriptor.
pub fn segment(base: u32, limit: u32, attributes: u16) -> u64 {
    let (base, limit) = (u64::from(base), u64::from(limit));
    let a = u64::from(attributes);
    limit & 0xFFFF
        | (base & 0xFF_FFFF) << 16
        | (a & 0xFF) << 40
        | (limit >> 16 & 0xF) << 48
        | (a >> 8) << 52
        | (base >> 24) << 56
}

/// The first 8 bytes of a gate.
pub fn gate(kind: u8, selector: u16, offset: u64, dpl: u8, extra: u8) -> u64 {
    offset & 0xFFFF
        | u64::from(selector) << 16
        | u64::from(extra) << 32
        | u64::from(kind | dpl << 5 | 0x80) << 40
        | (offset >> 16 & 0xFFFF) << 48
}

pub struct Machine {
    pub cpu: Cpu,
    pub ram: Vec<u8>,
    /// Pages that are not freely accessible: (present, writable, user).
    pub pages: BTreeMap<u64, (bool, bool, bool)>,
    pub features: FeatureSet,
    pub outs: Vec<(u16, u8, u32)>,
    pub ins: Vec<(u16, u8)>,
    pub in_value: u32,
    pub changes: Vec<PagingChange>,
    pub invalidated: Vec<u64>,
    pub tpr: u8,
}

impl Machine {
    fn bare() -> Self {
        let mut features = FeatureSet::of(Feature::ALL);
        features.remove(Feature::Gfni);
        Machine {
            cpu: Cpu::default(),
            ram: std::vec![0; RAM],
            pages: BTreeMap::new(),
            features,
            outs: Vec::new(),
            ins: Vec::new(),
            in_value: 0,
            changes: Vec::new(),
            invalidated: Vec::new(),
            tpr: 0,
        }
    }

    /// Real mode: CS:IP = 0:CODE would not fit, so code lies at 0x800:0x8000.
    pub fn real() -> Self {
        let mut m = Self::bare();
        let base = CODE >> 4;
        m.cpu.seg[1] = Segment { selector: base as u16, base: CODE, ..m.cpu.seg[3] };
        m.cpu.seg[2] = Segment { selector: 0x2000, base: 0x2_0000, ..m.cpu.seg[3] };
        m.cpu.gpr[reg::RSP] = 0x1000;
        m.cpu.gpr[RIP] = 0;
        m.cpu.idtr = DescriptorTable { base: 0, limit: 0x3FF };
        for vector in 0..256u64 {
            // Handlers at 0x8000:vector·16.
            m.poke(vector * 4, &((HANDLERS as u32 >> 4 << 16) | (vector as u32 * 16)).to_le_bytes());
        }
        m.cpu.refresh();
        m
    }

    fn tables(&mut self, code_attributes: u16) {
        let code = |dpl: u16| segment(0, 0xF_FFFF, code_attributes | dpl);
        let data = |dpl: u16| segment(0, 0xF_FFFF, A_DATA | dpl);
        for (selector, raw) in [
            (CODE0, code(0)),
            (DATA0, data(0)),
            (CODE3_32, segment(0, 0xF_FFFF, A_CODE32 | DPL3)),
            (DATA3, data(DPL3)),
            (CODE3, code(DPL3)),
            (CODE0_32, segment(0, 0xF_FFFF, A_CODE32)),
            (CODE0_16, segment(0, 0xFFFF, A_CODE16)),
            (CONFORMING, code(4)),
            (ABSENT_CODE, segment(0, 0xF_FFFF, code_attributes & !PRESENT)),
            (READ_ONLY, segment(0, 0xF_FFFF, 0xC91)),
            (ABSENT_DATA, segment(0, 0xF_FFFF, (A_DATA | DPL3) & !PRESENT)),
            (CODE1, code(DPL1)),
            (DATA1, data(DPL1)),
            (EXECUTE_ONLY, segment(0, 0xF_FFFF, 0xC99)),
            (STACK16, segment(0, 0xFFFF, 0x093)),
        ] {
            self.set_descriptor(selector, raw);
        }
        self.cpu.gdtr = DescriptorTable { base: GDT, limit: GDT_LIMIT };
        self.cpu.cr0 = CR0_PE | CR0_PG | CR0_ET | CR0_NE | CR0_WP;
        self.cpu.gpr[RIP] = CODE;
    }

    fn start(&mut self, cpl: u8) {
        let (code, data) = match cpl {
            0 => (CODE0, DATA0),
            1 => (CODE1 | 1, DATA1 | 1),
            _ => (CODE3, DATA3),
        };
        self.cpu.cpl = cpl;
        self.set_segment(SegmentIndex::Cs, code);
        for index in [SegmentIndex::Ss, SegmentIndex::Ds, SegmentIndex::Es] {
            self.set_segment(index, data);
        }
        for index in [SegmentIndex::Fs, SegmentIndex::Gs] {
            self.cpu.seg[index as usize] = descriptor::null_segment(0, cpl);
        }
        self.cpu.gpr[reg::RSP] = if cpl == 0 { KERNEL_STACK - 0x800 } else { USER_STACK };
        self.cpu.refresh();
    }

    /// 64-bit mode at `cpl`, with interrupt gates for all vectors (DPL 3 for 3, 4 and 0x80).
    pub fn long(cpl: u8) -> Self {
        let mut m = Self::bare();
        m.tables(A_CODE64);
        m.cpu.cr4 = CR4_PAE | CR4_PGE | CR4_OSFXSR;
        m.cpu.efer = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE;
        m.cpu.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
        for vector in 0..=255u8 {
            let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
            m.set_gate(vector, gate(0xE, CODE0, handler(vector), dpl, 0));
        }
        m.set_descriptor(TR, segment(TSS as u32, 0x67, 0x08B));
        m.set_descriptor(LDTR, segment(LDT as u32, 0xFF, 0x082));
        m.cpu.tr = Segment {
            selector: TR,
            attributes: SegmentAttributes(0x8B),
            limit: 0x67,
            base: TSS,
            unusable: false,
        };
        m.cpu.ldtr.unusable = true;
        // No I/O map.
        m.poke(TSS + 0x66, &0x68u16.to_le_bytes());
        for (offset, sp) in [(4, KERNEL_STACK), (12, RING1_STACK), (0x24, IST1_STACK)] {
            m.poke(TSS + offset, &sp.to_le_bytes());
        }
        m.start(cpl);
        m
    }

    /// 32-bit protected mode at `cpl`, flat, with 32-bit interrupt gates for all vectors.
    pub fn protected(cpl: u8) -> Self {
        let mut m = Self::bare();
        m.tables(A_CODE32);
        m.cpu.idtr = DescriptorTable { base: IDT, limit: 0x7FF };
        for vector in 0..=255u8 {
            let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
            m.set_gate(vector, gate(0xE, CODE0, handler(vector), dpl, 0));
        }
        m.set_descriptor(TR, segment(TSS as u32, 0x67, 0x08B));
        m.set_descriptor(LDTR, segment(LDT as u32, 0xFF, 0x082));
        m.cpu.tr = Segment {
            selector: TR,
            attributes: SegmentAttributes(0x8B),
            limit: 0x67,
            base: TSS,
            unusable: false,
        };
        m.cpu.ldtr.unusable = true;
        // No I/O map.
        m.poke(TSS + 0x66, &0x68u16.to_le_bytes());
        for (offset, value) in [
            (4, KERNEL_STACK as u32),
            (8, u32::from(DATA0)),
            (12, RING1_STACK as u32),
            (16, u32::from(DATA1 | 1)),
        ] {
            m.poke(TSS + offset, &value.to_le_bytes());
        }
        m.start(cpl);
        m
    }

    /// Virtual-8086 mode at CODE, with a TSS of 0x100 bytes: redirection bitmap at 0x68, I/O map at 0x88.
    pub fn v86(iopl: u64) -> Self {
        let mut m = Self::protected(3);
        m.cpu.rflags |= flags::VM | iopl << flags::IOPL_SHIFT;
        for index in 0..6 {
            m.cpu.seg[index] = descriptor::v86_segment((DATA >> 4) as u16);
        }
        m.cpu.seg[1] = descriptor::v86_segment((CODE >> 4) as u16);
        m.cpu.seg[2] = descriptor::v86_segment(0x2000);
        m.cpu.gpr[RIP] = 0;
        m.cpu.gpr[reg::RSP] = 0x1000;
        m.cpu.tr.limit = 0x188;
        m.poke(TSS + 0x66, &0x88u16.to_le_bytes());
        m.cpu.refresh();
        m
    }

    pub fn poke(&mut self, at: u64, bytes: &[u8]) {
        self.ram[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }
    pub fn peek<T: Word>(&self, at: u64) -> u64 {
        let mut raw = [0; 8];
        let n = T::BYTES as usize;
        raw[..n].copy_from_slice(&self.ram[at as usize..at as usize + n]);
        u64::from_le_bytes(raw)
    }
    pub fn set_descriptor(&mut self, selector: u16, raw: u64) {
        let table = if selector & 4 != 0 { LDT } else { GDT };
        self.poke(table + u64::from(selector & !7), &raw.to_le_bytes());
    }
    pub fn descriptor(&self, selector: u16) -> u64 {
        self.peek::<u64>(GDT + u64::from(selector & !7))
    }
    /// The IDT's entry of `vector`.
    pub fn set_gate(&mut self, vector: u8, raw: u64) {
        let size = if self.cpu.long_mode_active() { 16 } else { 8 };
        self.poke(IDT + u64::from(vector) * size, &raw.to_le_bytes());
    }
    /// Loads a segment register from the GDT without checks.
    pub fn set_segment(&mut self, index: SegmentIndex, selector: u16) {
        let d = descriptor::read(self, selector).unwrap().unwrap();
        self.cpu.seg[index as usize] = d.segment((selector & 3) as u8);
    }
    pub fn gpr(&self, register: usize) -> u64 {
        self.cpu.gpr[register]
    }
    pub fn rip(&self) -> u64 {
        self.cpu.gpr[RIP]
    }
    /// The word at RSP plus `8 · index` (or 4 or 2 with other `T`).
    pub fn stacked<T: Word>(&self, index: u64) -> u64 {
        let base = if self.cpu.mode.is_long() { 0 } else { self.cpu.seg[2].base };
        let sp = match self.cpu.mode.stack_bytes() {
            2 => self.gpr(reg::RSP) & 0xFFFF,
            _ => self.gpr(reg::RSP),
        };
        self.peek::<T>(base + sp + index * u64::from(T::BYTES))
    }
    /// Pushes words of 8 bytes, the first one ending up deepest.
    pub fn push64(&mut self, words: &[u64]) {
        for w in words {
            self.cpu.gpr[reg::RSP] -= 8;
            self.poke(self.cpu.gpr[reg::RSP], &w.to_le_bytes());
        }
    }
    pub fn push32(&mut self, words: &[u32]) {
        for w in words {
            self.cpu.gpr[reg::RSP] -= 4;
            self.poke(self.cpu.gpr[reg::RSP], &w.to_le_bytes());
        }
    }

    /// Runs one instruction; an exception comes back with RIP where the run loop would put it.
    pub fn try_step(&mut self, code: &[u8]) -> Result<Step, PendingException> {
        let bitness = self.cpu.mode.bitness();
        if let Decoded::Instruction(insn) = decode(code, bitness, 0, self.features) {
            assert_eq!(insn.len(), code.len(), "one instruction at a time");
        }
        self.try_step_any(code)
    }

    /// As `try_step`; bytes behind the instruction are ignored.
    pub fn try_step_any(&mut self, code: &[u8]) -> Result<Step, PendingException> {
        let mode = self.cpu.mode;
        let Decoded::Instruction(insn) = decode(code, mode.bitness(), 0, self.features) else {
            self.ud();
            return Err(core::mem::take(&mut self.cpu.exc));
        };
        let ctx = LowerContext { mode, features: self.features, at: 0, live_flags: flags::STATUS };
        let op = crate::lower::lower::<Machine>(&insn, &ctx);
        self.cpu.interrupt_shadow = false;
        self.cpu.shadow_blocks_debug = false;
        match (op.run)(self, &op) {
            Step::Fault => {
                let pending = core::mem::take(&mut self.cpu.exc);
                assert!(pending.vector.is_some(), "a fault says which");
                if pending.is_trap {
                    self.cpu.gpr[RIP] = op.next_ip(self);
                }
                Err(pending)
            }
            Step::Next => {
                op.end_block(self);
                Ok(Step::Next)
            }
            step => Ok(step),
        }
    }
    /// Runs one instruction that must not fault.
    pub fn step(&mut self, code: &[u8]) -> Step {
        match self.try_step(code) {
            Ok(step) => step,
            Err(e) => panic!("{code:02X?} raised {e:X?}"),
        }
    }
    /// Runs one instruction that must raise `exception(code)` and leave the registers as they were.
    #[track_caller]
    pub fn faults(&mut self, code: &[u8], exception: Exception, error_code: u32) {
        let before = std::format!("{:?}", Registers::of(&self.cpu));
        let pending = match self.try_step(code) {
            Err(pending) => pending,
            Ok(step) => panic!("{code:02X?} did not fault: {step:?}"),
        };
        assert_eq!(
            (pending.vector, pending.error_code),
            (Some(exception), error_code),
            "{code:02X?} raised {pending:X?}"
        );
        assert_eq!(before, std::format!("{:?}", Registers::of(&self.cpu)), "{code:02X?} committed something");
    }
    /// An external interrupt.
    pub fn interrupt(&mut self, vector: u8) -> Outcome {
        interrupts::deliver_interrupt(self, vector, Kind::External)
    }
    /// An exception with an error code.
    pub fn exception(&mut self, exception: Exception, error_code: u32) -> Outcome {
        self.deliver(PendingException { vector: Some(exception), error_code, address: 0, is_trap: false })
    }
    pub fn deliver(&mut self, pending: PendingException) -> Outcome {
        interrupts::deliver_exception(self, pending)
    }
    /// Asserts that the handler of `vector` was reached with `error_code` on the (32- or 64-bit) stack.
    #[track_caller]
    pub fn reached(&self, vector: u8, error_code: Option<u32>) {
        let linear = if self.cpu.mode.is_long() { 0 } else { self.cpu.seg[1].base } + self.rip();
        assert_eq!((linear.wrapping_sub(HANDLERS)) / 16, u64::from(vector), "handler at {linear:#x}");
        if let Some(code) = error_code {
            assert_eq!(self.stacked::<u32>(0), u64::from(code), "error code of vector {vector}");
        }
    }
}

/// Address of the handler of `vector`.
pub fn handler(vector: u8) -> u64 {
    HANDLERS + u64::from(vector) * 16
}

/// What a faulting instruction must leave alone.
#[derive(Debug)]
#[allow(dead_code)] // compared as text
struct Registers {
    gpr: [u64; 32],
    rflags: u64,
    cpl: u8,
    seg: [Segment; 6],
    tables: (Segment, Segment, DescriptorTable, DescriptorTable),
    control: (u64, u64, u64, u64, u64, u64),
    dr: [u64; 8],
    mode: crate::ModeKey,
}

impl Registers {
    fn of(cpu: &Cpu) -> Self {
        Self {
            gpr: cpu.gpr,
            rflags: cpu.rflags_all(),
            cpl: cpu.cpl,
            seg: cpu.seg,
            tables: (cpu.ldtr, cpu.tr, cpu.gdtr, cpu.idtr),
            control: (cpu.cr0, cpu.cr2, cpu.cr3, cpu.cr4, cpu.efer, cpu.xcr0),
            dr: cpu.dr,
            mode: cpu.mode,
        }
    }
}

impl Machine {
    fn check(&mut self, linear: u64, len: u64, write: bool, user: bool) -> Result<usize, Fault> {
        if !crate::system::is_canonical(linear) || linear.checked_add(len).is_none() {
            return Err(self.gp(0));
        }
        for page in (linear >> 12)..=(linear.wrapping_add(len - 1) >> 12) {
            let beyond = page >= (RAM as u64) >> 12;
            let (present, writable, for_user) = if beyond {
                (false, false, false)
            } else {
                *self.pages.get(&page).unwrap_or(&(true, true, true))
            };
            if !present || write && !writable || user && !for_user {
                let code = if present { PF_PRESENT } else { 0 }
                    | if write { PF_WRITE } else { 0 }
                    | if user { PF_USER } else { 0 };
                return Err(self.page_fault(linear.max(page << 12), code));
            }
        }
        Ok(linear as usize)
    }
    fn user(&self) -> bool {
        self.cpu.cpl == 3
    }
    fn get<T: Word>(&mut self, linear: u64, user: bool) -> Result<T, Fault> {
        let at = self.check(linear, u64::from(T::BYTES), false, user)?;
        Ok(T::from_u64(self.peek::<T>(at as u64)))
    }
    fn put<T: Word>(&mut self, linear: u64, value: T, user: bool) -> Result<(), Fault> {
        let at = self.check(linear, u64::from(T::BYTES), true, user)?;
        self.poke(at as u64, &value.zext().to_le_bytes()[..T::BYTES as usize]);
        Ok(())
    }
}

impl Core for Machine {
    fn cpu(&self) -> &Cpu {
        &self.cpu
    }
    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.get(linear, self.user())
    }
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.put(linear, value, self.user())
    }
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault> {
        let old = self.load(linear)?;
        self.store(linear, f(old))?;
        Ok(old)
    }
    fn modify_locked<T: Word>(&mut self, linear: u64, mut f: impl FnMut(T) -> T) -> Result<T, Fault> {
        let old = self.load(linear)?;
        self.store(linear, f(old))?;
        Ok(old)
    }
    fn compare_exchange_16(&mut self, _: u64, _: u128, _: u128) -> Result<u128, Fault> {
        unreachable!("not a system instruction")
    }
    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let at = self.check(linear, buf.len() as u64, false, self.user())?;
        buf.copy_from_slice(&self.ram[at..at + buf.len()]);
        Ok(())
    }
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault> {
        let at = self.check(linear, buf.len() as u64, true, self.user())?;
        self.poke(at as u64, buf);
        Ok(())
    }
    fn probe(&mut self, linear: u64, len: u64, write: bool) -> Result<(), Fault> {
        self.check(linear, len, write, self.user()).map(drop)
    }
    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.get(linear, false)
    }
    fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.put(linear, value, false)
    }
    fn load_physical(&mut self, gpa: u64) -> u64 {
        if gpa < RAM as u64 - 8 { self.peek::<u64>(gpa) } else { !0 }
    }
    fn copy(&mut self, _: u64, _: u64, _: u64) -> Result<u64, Fault> {
        Ok(0)
    }
    fn fill<T: Word>(&mut self, _: u64, _: T, _: u64) -> Result<u64, Fault> {
        Ok(0)
    }
    fn port_in(&mut self, port: u16, bytes: u8) -> u32 {
        self.ins.push((port, bytes));
        self.in_value
    }
    fn port_out(&mut self, port: u16, bytes: u8, value: u32) {
        self.outs.push((port, bytes, value));
    }
    fn tsc(&mut self) -> u64 {
        0x1_2345_6789
    }
    fn random(&mut self) -> u64 {
        0xFEDC_BA98_7654_3210
    }
    fn cpuid(&mut self, leaf: u32, subleaf: u32) -> [u32; 4] {
        [leaf, subleaf, 0xCCCC_CCCC, 0xDDDD_DDDD]
    }
    fn has_feature(&self, feature: Feature) -> bool {
        self.features.has(feature)
    }
    fn engine_msr_read(&mut self, msr: u32) -> Option<Result<u64, Fault>> {
        (msr == x86_defs::msr::TSC).then_some(Ok(0x1_2345_6789))
    }
    fn engine_msr_write(&mut self, msr: u32, _: u64) -> Option<Result<(), Fault>> {
        (msr == x86_defs::msr::TSC).then_some(Ok(()))
    }
    fn tpr(&mut self) -> u8 {
        self.tpr
    }
    fn set_tpr(&mut self, value: u8) {
        self.tpr = value;
    }
    fn paging_changed(&mut self, change: PagingChange) {
        self.changes.push(change);
    }
    fn invalidate_page(&mut self, linear: u64) {
        self.invalidated.push(linear);
    }
    fn pause(&mut self) {}
}
