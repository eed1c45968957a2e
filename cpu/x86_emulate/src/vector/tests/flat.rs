//! A CPU with 64 KiB of flat memory, for the tests of vector and x87 instructions.

extern crate std;

use crate::core::{Core, Fault, PagingChange, Word};
use crate::cpu::Cpu;
use crate::lower::{LowerContext, lower};
use crate::op::Step;
use std::vec::Vec;
use x86_decode::{Decoded, decode};
use x86_defs::control::*;
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::{Exception, SegmentAttributes};

/// See the module's header.
pub struct Flat {
    pub cpu: Cpu,
    pub ram: Vec<u8>,
}

impl Flat {
    /// 64-bit mode at CPL 0, everything enabled.
    pub fn long() -> Self {
        let mut cpu = Cpu {
            cr0: CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_PG,
            cr4: CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE,
            efer: EFER_LME | EFER_LMA,
            xcr0: XCR0_X87 | XCR0_SSE | XCR0_AVX,
            ..Cpu::default()
        };
        cpu.seg[1].attributes = SegmentAttributes(0xA9B);
        cpu.seg[1].base = 0;
        cpu.seg[1].selector = 8;
        cpu.x.x87.control = 0x37F;
        cpu.gpr[crate::cpu::RIP] = 0x1000;
        cpu.refresh();
        Self { cpu, ram: std::vec![0; 0x1_0000] }
    }

    /// Real mode: CS = 0x100, the others 0.
    pub fn real() -> Self {
        let mut flat = Self::long();
        flat.cpu =
            Cpu { cr4: CR4_OSFXSR | CR4_OSXSAVE, xcr0: XCR0_X87 | XCR0_SSE | XCR0_AVX, ..Cpu::default() };
        flat.cpu.seg[1].selector = 0x100;
        flat.cpu.seg[1].base = 0x1000;
        flat.cpu.x.x87.control = 0x37F;
        flat.cpu.gpr[crate::cpu::RIP] = 0x20;
        flat.cpu.refresh();
        flat
    }

    /// Runs one instruction: the exception that it raised, if any.
    pub fn run(&mut self, code: &[u8]) -> Option<Exception> {
        let features = FeatureSet::of(Feature::ALL);
        self.cpu.refresh();
        let mode = self.cpu.mode;
        let ctx = LowerContext { mode, features, at: 0, live_flags: !0 };
        let Decoded::Instruction(insn) = decode(code, mode.bitness(), 0, features) else {
            return Some(Exception::InvalidOpcode);
        };
        let op = lower::<Self>(&insn, &ctx);
        match (op.run)(self, &op) {
            Step::Fault => self.cpu.exc.vector,
            _ => None,
        }
    }

    /// Runs instructions that raise nothing.
    pub fn run_all(&mut self, codes: &[&[u8]]) {
        for code in codes {
            assert_eq!(self.run(code), None, "{code:02x?}");
        }
    }

    pub fn word<T: Word>(&mut self, at: u64) -> T {
        self.load(at).unwrap()
    }

    fn place(&mut self, linear: u64, len: usize) -> Result<usize, Fault> {
        let end = linear.checked_add(len as u64).filter(|end| *end <= self.ram.len() as u64);
        end.map(|_| linear as usize).ok_or(()).map_err(|()| self.page_fault(linear, 0))
    }
}

impl Core for Flat {
    fn cpu(&self) -> &Cpu {
        &self.cpu
    }
    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        let mut bytes = [0; 8];
        self.load_bytes(linear, &mut bytes[..T::BYTES as usize])?;
        Ok(T::from_u64(u64::from_le_bytes(bytes)))
    }
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.store_bytes(linear, &value.zext().to_le_bytes()[..T::BYTES as usize])
    }
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault> {
        let old = self.load(linear)?;
        self.store(linear, f(old))?;
        Ok(old)
    }
    fn modify_locked<T: Word>(&mut self, linear: u64, f: impl FnMut(T) -> T) -> Result<T, Fault> {
        self.modify(linear, f)
    }
    fn compare_exchange_16(&mut self, linear: u64, _: u128, _: u128) -> Result<u128, Fault> {
        Err(self.page_fault(linear, 0))
    }
    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let at = self.place(linear, buf.len())?;
        buf.copy_from_slice(&self.ram[at..at + buf.len()]);
        Ok(())
    }
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault> {
        let at = self.place(linear, buf.len())?;
        self.ram[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn probe(&mut self, linear: u64, len: u64, _: bool) -> Result<(), Fault> {
        self.place(linear, len as usize).map(|_| ())
    }
    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.load(linear)
    }
    fn store_system<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.store(linear, value)
    }
    fn load_physical(&mut self, _: u64) -> u64 {
        0
    }
    fn copy(&mut self, to: u64, _: u64, _: u64) -> Result<u64, Fault> {
        Err(self.page_fault(to, 0))
    }
    fn fill<T: Word>(&mut self, to: u64, _: T, _: u64) -> Result<u64, Fault> {
        Err(self.page_fault(to, 0))
    }
    fn port_in(&mut self, _: u16, _: u8) -> u32 {
        0
    }
    fn port_out(&mut self, _: u16, _: u8, _: u32) {}
    fn tsc(&mut self) -> u64 {
        0
    }
    fn random(&mut self) -> u64 {
        0
    }
    fn cpuid(&mut self, _: u32, _: u32) -> [u32; 4] {
        [0; 4]
    }
    fn has_feature(&self, _: Feature) -> bool {
        true
    }
    fn engine_msr_read(&mut self, _: u32) -> Option<Result<u64, Fault>> {
        None
    }
    fn engine_msr_write(&mut self, _: u32, _: u64) -> Option<Result<(), Fault>> {
        None
    }
    fn tpr(&mut self) -> u8 {
        0
    }
    fn set_tpr(&mut self, _: u8) {}
    fn paging_changed(&mut self, _: PagingChange) {}
    fn invalidate_page(&mut self, _: u64) {}
    fn pause(&mut self) {}
}
