//! The interpreter's side: a case over a model of the arena, at CPL 3.

use crate::layout::*;
use crate::state::{Case, Outcome, Raised, Registers};
use std::sync::LazyLock;
use x86_decode::Decoded;
use x86_defs::cpuid::{Feature, FeatureSet};
use x86_defs::{SegmentAttributes, control, flags};
use x86_emulate::core::PagingChange;
use x86_emulate::cpu::{F80, RIP};
use x86_emulate::lower::{LowerContext, lower};
use x86_emulate::{Core, Cpu, Fault, Step, Word};

/// Features of the CPU model under test: all that the interpreter may have and this host has.
pub fn features() -> FeatureSet {
    static FEATURES: LazyLock<FeatureSet> = LazyLock::new(|| {
        let mut set = x86_host_ops::supported();
        for &feature in Feature::ALL {
            if !x86_host_ops::executed().has(feature) && host_has(feature) {
                set.insert(feature);
            }
        }
        set
    });
    *FEATURES
}

fn host_has(feature: Feature) -> bool {
    use core::arch::x86_64::__cpuid_count;
    let (leaf, subleaf, register, bit) = feature.place();
    if __cpuid_count(leaf & 0x8000_0000, 0).eax < leaf {
        return false;
    }
    let r = __cpuid_count(leaf, subleaf);
    [r.eax, r.ebx, r.ecx, r.edx][register as usize] >> bit & 1 != 0
}

/// Where the model's GDT is.
const GDT_AT: u64 = 0xFFFF_8000_0000_0000;

/// The model: a CPU and the case's window of the arena.
struct Model {
    cpu: Cpu,
    window_at: u64,
    window: [u8; WINDOW],
}

/// Runs a case. `None`: the interpreter did not come to an end, or touched memory beside the window.
pub fn run(case: &Case) -> Option<Outcome> {
    let mut model = Model { cpu: cpu_of(case), window_at: case.window_at, window: case.window };
    let rip = case.registers.rip;
    let bitness = if case.code.is_32 { 32 } else { 64 };
    let code = &case.code.bytes[..case.code.len as usize];
    let ctx = LowerContext { mode: model.cpu.mode, features: features(), at: 0, live_flags: flags::STATUS };
    let op = match x86_decode::decode(code, bitness, 0, features()) {
        Decoded::Instruction(insn) => lower::<Model>(&insn, &ctx),
        _ => x86_emulate::lower::undefined(case.code.len as u8, &ctx),
    };
    // A repeated string instruction comes back for the rest.
    for _ in 0..64 {
        match (op.run)(&mut model, &op) {
            Step::Next => {
                model.cpu.gpr[RIP] = op.next_ip(&model);
                return Some(outcome_of(&model, None));
            }
            Step::Branch if model.cpu.gpr[RIP] == rip => {}
            Step::Branch | Step::Exit => return Some(outcome_of(&model, None)),
            Step::Fault => {
                let exc = model.cpu.exc;
                let raised = Raised {
                    vector: exc.vector.map_or(Raised::NONE, |v| v.vector().into()),
                    error: exc.error_code.into(),
                    address: exc.address,
                };
                return Some(outcome_of(&model, Some(raised)));
            }
        }
    }
    None
}

fn cpu_of(case: &Case) -> Cpu {
    let r = &case.registers;
    let mut cpu = Cpu {
        cr0: control::CR0_PE
            | control::CR0_MP
            | control::CR0_ET
            | control::CR0_NE
            | control::CR0_WP
            | control::CR0_AM
            | control::CR0_PG,
        cr4: control::CR4_PAE
            | control::CR4_OSFXSR
            | control::CR4_OSXMMEXCPT
            | control::CR4_OSXSAVE
            | control::CR4_FSGSBASE
            | control::CR4_PGE,
        efer: control::EFER_LME | control::EFER_LMA | control::EFER_SCE | control::EFER_NXE,
        xcr0: control::XCR0_X87 | control::XCR0_SSE | control::XCR0_AVX,
        cpl: 3,
        gdtr: x86_defs::DescriptorTable { base: GDT_AT, limit: GDT_LIMIT },
        ..Cpu::default()
    };
    let long = !case.code.is_32;
    for (i, seg) in cpu.seg.iter_mut().enumerate() {
        // Accessed, DPL 3, present, 4 KiB units; code is readable.
        let (selector, attributes) = match i {
            1 if long => (CS64, 0xAFB),
            1 => (CS32, 0xCFB),
            2 => (DS, 0xCF3),
            0 | 3 => (DS, 0xCF3),
            _ => (0, 0xCF3),
        };
        *seg = x86_defs::Segment {
            selector,
            attributes: SegmentAttributes(attributes),
            limit: u32::MAX,
            base: [0, 0, 0, 0, FS_BASE, GS_BASE][i],
            unusable: i > 3,
        };
    }
    cpu.ldtr.unusable = true;
    cpu.gpr[..16].copy_from_slice(&r.gpr);
    cpu.gpr[RIP] = r.rip;
    cpu.set_rflags_all(r.flags);
    cpu.x.mxcsr = r.mxcsr();
    for (i, ymm) in cpu.x.ymm.iter_mut().enumerate() {
        *ymm = r.ymm(i);
    }
    let x87 = &mut cpu.x.x87;
    (x87.control, x87.status, x87.in_use) = (r.x87_control(), r.x87_status(), r.x87_in_use());
    let top = usize::from(x87.status >> 11 & 7);
    for i in 0..8 {
        let (mantissa, sign_exponent) = r.st(i);
        x87.regs[(top + i) & 7] = F80 { mantissa, sign_exponent };
    }
    cpu.refresh();
    cpu
}

fn outcome_of(model: &Model, raised: Option<Raised>) -> Outcome {
    let cpu = &model.cpu;
    let mut r = Registers::new();
    r.gpr.copy_from_slice(&cpu.gpr[..16]);
    r.rip = cpu.gpr[RIP];
    r.flags = cpu.rflags_all();
    for (i, seg) in cpu.seg.iter().enumerate() {
        r.selectors[i] = if i == 1 { 0 } else { seg.selector };
    }
    r.bases = [cpu.seg[4].base, cpu.seg[5].base];
    r.set_mxcsr(cpu.x.mxcsr);
    for (i, ymm) in cpu.x.ymm.iter().enumerate() {
        r.set_ymm(i, *ymm);
    }
    let x87 = &cpu.x.x87;
    r.set_x87(x87.control, x87.status, x87.in_use);
    let top = usize::from(x87.status >> 11 & 7);
    for i in 0..8 {
        let f = x87.regs[(top + i) & 7];
        r.set_st(i, (f.mantissa, f.sign_exponent));
    }
    let raised = raised.unwrap_or(Raised { vector: Raised::NONE, ..Raised::default() });
    Outcome { registers: r, window: model.window, raised }
}

fn is_canonical(linear: u64) -> bool {
    matches!(linear as i64 >> 47, 0 | -1)
}

impl Model {
    /// Checks an access page by page, as the processor's paging would; returns the place in the window.
    fn check(&mut self, linear: u64, len: u64, write: bool) -> Result<usize, Fault> {
        if !is_canonical(linear) {
            return Err(self.gp(0));
        }
        let mut at = linear;
        while at < linear.wrapping_add(len) {
            let page = at.wrapping_sub(ARENA) / PAGE;
            let access = PAGES.get(page as usize).copied().unwrap_or(Access::Absent);
            let error = 4 | u32::from(write) << 1;
            match access {
                Access::Absent => return Err(self.page_fault(at, error)),
                Access::ReadOnly if write => return Err(self.page_fault(at, error | 1)),
                _ => {}
            }
            at = (at & !(PAGE - 1)) + PAGE;
        }
        let place = linear.wrapping_sub(self.window_at);
        if place.checked_add(len).is_none_or(|end| end > WINDOW as u64) {
            // The generator keeps accesses inside; show a stray one as a fault that no host raises.
            return Err(self.raise(x86_defs::Exception::MachineCheck, 0));
        }
        Ok(place as usize)
    }

    /// #AC.
    fn check_alignment<T: Word>(&mut self, linear: u64) -> Result<(), Fault> {
        let misaligned = linear & u64::from(T::BYTES - 1) != 0;
        // #GP for an address that is not canonical comes first.
        if misaligned && is_canonical(linear) && self.cpu.mode.has(x86_emulate::ModeKey::ALIGN) {
            return Err(self.raise(x86_defs::Exception::AlignmentCheck, 0));
        }
        Ok(())
    }

    fn word(&self, at: usize, len: usize) -> u64 {
        self.window[at..at + len].iter().rev().fold(0, |acc, &b| acc << 8 | u64::from(b))
    }
}

impl Core for Model {
    fn cpu(&self) -> &Cpu {
        &self.cpu
    }
    fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }
    fn load<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        self.check_alignment::<T>(linear)?;
        let at = self.check(linear, T::BYTES.into(), false)?;
        Ok(T::from_u64(self.word(at, T::BYTES as usize)))
    }
    fn store<T: Word>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        self.check_alignment::<T>(linear)?;
        self.store_bytes(linear, &value.zext().to_le_bytes()[..T::BYTES as usize])
    }
    fn modify<T: Word>(&mut self, linear: u64, f: impl FnOnce(T) -> T) -> Result<T, Fault> {
        self.check_alignment::<T>(linear)?;
        let at = self.check(linear, T::BYTES.into(), true)?;
        let old = T::from_u64(self.word(at, T::BYTES as usize));
        self.store(linear, f(old))?;
        Ok(old)
    }
    fn modify_locked<T: Word>(&mut self, linear: u64, f: impl FnMut(T) -> T) -> Result<T, Fault> {
        self.modify(linear, f)
    }
    fn compare_exchange_16(&mut self, linear: u64, expected: u128, new: u128) -> Result<u128, Fault> {
        let at = self.check(linear, 16, true)?;
        let old = u128::from(self.word(at, 8)) | u128::from(self.word(at + 8, 8)) << 64;
        let new = if old == expected { new } else { old };
        self.window[at..at + 16].copy_from_slice(&new.to_le_bytes());
        Ok(old)
    }
    fn load_bytes(&mut self, linear: u64, buf: &mut [u8]) -> Result<(), Fault> {
        let at = self.check(linear, buf.len() as u64, false)?;
        buf.copy_from_slice(&self.window[at..at + buf.len()]);
        Ok(())
    }
    fn store_bytes(&mut self, linear: u64, buf: &[u8]) -> Result<(), Fault> {
        let at = self.check(linear, buf.len() as u64, true)?;
        self.window[at..at + buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn probe(&mut self, linear: u64, len: u64, write: bool) -> Result<(), Fault> {
        self.check(linear, len, write).map(|_| ())
    }
    fn load_system<T: Word>(&mut self, linear: u64) -> Result<T, Fault> {
        let at = linear.wrapping_sub(GDT_AT);
        match GDT.get((at / 8) as usize) {
            Some(descriptor) if at % 8 + u64::from(T::BYTES) <= 8 => {
                Ok(T::from_u64(descriptor >> (8 * (at % 8))))
            }
            // No TSS and no IDT: nothing that is run looks there.
            _ => Err(self.gp(0)),
        }
    }
    fn store_system<T: Word>(&mut self, _: u64, _: T) -> Result<(), Fault> {
        Err(self.gp(0))
    }
    fn load_physical(&mut self, _: u64) -> u64 {
        0
    }
    fn copy(&mut self, to: u64, from: u64, len: u64) -> Result<u64, Fault> {
        // As little as the contract allows: the shortest run that both pages hold.
        let run = (PAGE - to % PAGE).min(PAGE - from % PAGE).min(len);
        let source = self.check(from, run, false)?;
        let target = self.check(to, run, true)?;
        for i in 0..run as usize {
            self.window[target + i] = self.window[source + i];
        }
        Ok(run)
    }
    fn fill<T: Word>(&mut self, to: u64, value: T, len: u64) -> Result<u64, Fault> {
        self.check_alignment::<T>(to)?;
        let bytes = u64::from(T::BYTES);
        let room = PAGE - to % PAGE;
        let run = if room < bytes { bytes } else { room.min(len) / bytes * bytes };
        let at = self.check(to, run, true)?;
        for chunk in self.window[at..at + run as usize].chunks_exact_mut(bytes as usize) {
            chunk.copy_from_slice(&value.zext().to_le_bytes()[..bytes as usize]);
        }
        Ok(run)
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
    fn has_feature(&self, feature: Feature) -> bool {
        features().has(feature)
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
