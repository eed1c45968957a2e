//! The loop of a vCPU: into the guest, out of it, and what the exit means.
//!
//! Called by: `cpu_soft`'s run loop, with all state in the core. General registers and the VMCB's are back in the core
//! after every exit; extended state stays in the processor until [`Hardware::park`].

use crate::at_once;
use crate::engine::PartitionShared;
use crate::exit;
use crate::processor::host_area;
use crate::registers;
use crate::switch;
use crate::vmcb::control::{intercept_1, intercept_2};
use crate::vmcb::{Vmcb, control};
use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use cpu_hardware::at_once::Answers;
use cpu_hardware::exit::LOOKED_AT;
use cpu_hardware::extended::XsaveArea;
use cpu_hardware::processor::{self, DR7_ENABLED};
use cpu_hardware::{Exit, Gate, Ground};
use cpu_soft::SoftCore;
use cpu_soft::hardware::{Hardware, Left, WANTED};
use x86_emulate::Core;

/// PAUSEs in a row that are no exit, and the cycles between two that end a row (as KVM has them). Processors without
/// the filter exit at each.
const PAUSES: u16 = 3000;
const PAUSE_GAP: u16 = 128;

/// See the module's header.
pub struct SvmVcpu {
    shared: Arc<PartitionShared>,
    vmcb: Box<Vmcb>,
    /// Its physical address.
    at: u64,
    asid: u32,
    area: Box<XsaveArea>,
    /// The guest's extended state is in the processor.
    live: bool,
    /// The processor may hold translations that do not hold any more.
    flush: bool,
    /// The host's area of the processor where it ran last: another one knows nothing of its translations.
    ran_at: u64,
    answers: Answers,
    /// What the TSC's offset was made of.
    tsc_basis: Option<(u64, u64)>,
}

impl SvmVcpu {
    /// One that has not run.
    pub fn new(shared: Arc<PartitionShared>, asid: u32) -> Self {
        let mut vmcb = Box::new(Vmcb::default());
        let physical = shared.engine.ground.physical();
        prepare(&mut vmcb, &shared, asid);
        let at = physical((&raw const *vmcb).addr());
        Self {
            shared,
            vmcb,
            at,
            asid,
            area: Box::default(),
            live: false,
            flush: true,
            ran_at: 0,
            answers: Answers::default(),
            tsc_basis: None,
        }
    }

    /// What changes from entry to entry.
    fn load(&mut self, core: &mut SoftCore) {
        let stale = registers::load(&core.cpu, &mut self.vmcb) | core.take_paging_touched();
        let waits = core.interrupt_waits();
        let tpr = core.tpr() >> 4;
        let window = if waits { control::V_IRQ | control::V_IGNORE_TPR } else { 0 };
        let vmcb = &mut *self.vmcb;
        vmcb.set(control::V_CONTROL, control::V_INTR_MASKING | window | u32::from(tpr & 15));
        vmcb.switch(control::INTERCEPT_1, intercept_1::VINTR, waits);
        vmcb.switch(control::INTERCEPT_1, intercept_1::IRET, core.cpu.nmi_blocked);
        // SAFETY: SVM is on wherever a vCPU runs.
        let here = unsafe { host_area() };
        let flush = stale || core::mem::take(&mut self.flush) || self.ran_at != here;
        self.ran_at = here;
        let how =
            if self.shared.engine.svm.flush_by_asid { control::FLUSH_GUEST } else { control::FLUSH_ALL };
        vmcb.set(control::TLB_CONTROL, if flush { how } else { 0 });
        if self.shared.guest.tsc.native && self.tsc_basis != Some(core.tsc_basis()) {
            self.tsc_basis = Some(core.tsc_basis());
            vmcb.set(control::TSC_OFFSET, self.shared.guest.tsc.of(core));
        }
        if core.cpu.dr[7] & DR7_ENABLED != 0 {
            let [a, b, c, d, ..] = core.cpu.dr;
            // SAFETY: the host uses no breakpoints.
            unsafe { processor::set_breakpoints([a, b, c, d]) };
        }
        if !self.live {
            let all = self.shared.engine.svm.xcr0;
            self.area.set(&core.cpu.x, all & x86_defs::control::XCR0_AVX != 0);
            // SAFETY: `Svm::enable` switched all of `all` on; what the guest enables is checked against its CPU model,
            // which the engine's features bound. The host's code leaves vector registers alone.
            unsafe { processor::load_extended(&self.area, all, core.cpu.xcr0 & all | 1) };
            self.live = true;
        }
    }

    /// Enters the guest, and again after exits that are served at once. Then its registers are back in the core.
    /// `None`: it was kept out.
    fn enter(&mut self, core: &mut SoftCore, ground: &dyn Ground) -> Option<Exit> {
        let next_rip = self.shared.engine.svm.next_rip;
        self.answers.forget();
        loop {
            let (gpr, attention) = core.registers_and_attention();
            let gate = Gate { attention, mask: WANTED, interrupted: ground.interrupted() };
            // SAFETY: the VMCB is complete (`prepare`, `load`), its maps and tables live as long as the partition, and
            // map the guest's RAM alone.
            let ran = unsafe { switch::enter(gpr, &mut self.vmcb, self.at, &gate) };
            if !ran {
                self.keep_flush();
                self.store(core);
                return None;
            }
            match at_once::serve(&mut self.vmcb, core, &mut self.answers, next_rip) {
                Some(exit) => self.count(&exit),
                None => {
                    self.store(core);
                    return Some(self.exit());
                }
            }
        }
    }

    /// The gate was shut: what VMRUN was to flush is flushed by the next one.
    fn keep_flush(&mut self) {
        self.flush |= self.vmcb.get(control::TLB_CONTROL) != 0;
    }

    fn count(&self, exit: &Exit) {
        self.shared.guest.exits.count(exit);
    }

    /// Takes back what the guest left.
    fn store(&mut self, core: &mut SoftCore) {
        if registers::store(&self.vmcb, &mut core.cpu) {
            let at = core.cpu.cr3 & !31;
            core.cpu.pdpte = core::array::from_fn(|n| core.load_physical(at + 8 * n as u64));
        }
        // QEMU's TCG does not intercept XSETBV.
        // SAFETY: XSAVE is on since `Svm::enable`, before which no vCPU exists.
        core.cpu.xcr0 = unsafe { processor::xcr0() } & self.shared.engine.svm.xcr0;
        let tpr = self.vmcb.get(control::V_TPR) & 15;
        if tpr != core.tpr() >> 4 {
            core.set_tpr(tpr << 4);
        }
    }

    /// Why the guest was left.
    fn exit(&mut self) -> Exit {
        let (info_1, info_2) = (self.vmcb.get(control::EXIT_INFO_1), self.vmcb.get(control::EXIT_INFO_2));
        let code = self.vmcb.get(control::EXIT_CODE);
        if code == exit::MACHINE_CHECK {
            processor::take_machine_check();
        }
        let exit = exit::decode(code, info_1, info_2);
        self.count(&exit);
        exit
    }

    /// Does what the exit asks for.
    fn serve(&mut self, core: &mut SoftCore, exit: Exit) -> Left {
        // The interpreter delivers it.
        if let Some(exception) = exit::exception(&self.vmcb, &exit) {
            core.cpu.exc = exception;
            return Left::Service;
        }
        match exit {
            Exit::Host | Exit::Window => Left::Service,
            Exit::Pause => Left::Spins,
            Exit::TripleFault => Left::TripleFault,
            Exit::Invalid => {
                let cpu = &core.cpu;
                Left::Failed(format!(
                    "VMRUN refuses the state: cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x}",
                    cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer
                ))
            }
            _ => Left::Interpret,
        }
    }
}

/// What stays as it is from entry to entry.
fn prepare(vmcb: &mut Vmcb, shared: &PartitionShared, asid: u32) {
    use intercept_1::*;
    let physical = shared.engine.ground.physical();
    let tsc = |bits| if shared.guest.tsc.native { 0 } else { bits };
    let first =
        INTR | NMI | SMI | INIT | tsc(RDTSC) | RDPMC | CPUID | RSM | INVD | HLT | INVLPGA | IOIO | MSR;
    // A vCPU that waits for another one gives up its turn; processors that count let it try for a while.
    let spins = if shared.guest.vcpus > 1 { PAUSE } else { 0 };
    vmcb.set(control::INTERCEPT_1, first | spins | TASK_SWITCH | FERR_FREEZE | SHUTDOWN);
    vmcb.set(control::PAUSE_COUNT, PAUSES);
    vmcb.set(control::PAUSE_THRESHOLD, PAUSE_GAP);
    let second =
        intercept_2::SVM_INSTRUCTIONS | intercept_2::RDTSCP | intercept_2::WBINVD | intercept_2::MONITOR;
    vmcb.set(control::INTERCEPT_2, second | intercept_2::MWAIT | intercept_2::XSETBV);
    vmcb.set(control::INTERCEPT_EXCEPTIONS, LOOKED_AT);
    vmcb.set(control::INTERCEPT_DR_READ, 0xFFFF);
    vmcb.set(control::INTERCEPT_DR_WRITE, 0xFFFF);
    vmcb.set(control::IOPM_BASE, physical((&raw const *shared.engine.io_map).addr()));
    vmcb.set(control::MSRPM_BASE, physical((&raw const *shared.engine.msr_map).addr()));
    vmcb.set(control::ASID, asid);
    vmcb.set(control::NESTED_PAGING, 1);
    vmcb.set(control::NESTED_CR3, shared.guest.tables.root());
}

impl Hardware for SvmVcpu {
    fn run(&mut self, core: &mut SoftCore) -> Left {
        let ground = self.shared.engine.ground.clone();
        if !ground.before_entry(core.timer_due_in()) {
            return Left::Yield;
        }
        self.load(core);
        match self.enter(core, &*ground) {
            Some(exit) => self.serve(core, exit),
            None => Left::Service,
        }
    }

    fn park(&mut self, core: &mut SoftCore) {
        if core::mem::take(&mut self.live) {
            // SAFETY: as for loading; what is in the registers is this guest's.
            unsafe { processor::store_extended(&mut self.area, self.shared.engine.svm.xcr0) };
            core.cpu.x = self.area.state();
        }
    }

    fn forget(&mut self) {
        self.flush = true;
        self.tsc_basis = None;
        self.live = false;
    }
}

impl Drop for SvmVcpu {
    fn drop(&mut self) {
        self.shared.engine.asids.give_back(self.asid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::tests::partition;

    #[test]
    fn a_flush_that_did_not_happen_is_not_forgotten() {
        let mut vcpu = SvmVcpu::new(partition(1_000_000), 3);
        for (wanted, carried) in [(control::FLUSH_ALL, true), (0, false)] {
            vcpu.vmcb.set(control::TLB_CONTROL, wanted);
            vcpu.flush = false;
            vcpu.keep_flush();
            assert_eq!(vcpu.flush, carried);
        }
    }

    #[test]
    fn the_control_area_keeps_the_guest_inside() {
        let vcpu = SvmVcpu::new(partition(1_000_000), 3);
        let vmcb = &vcpu.vmcb;
        let first = vmcb.get(control::INTERCEPT_1);
        let needed = intercept_1::INTR
            | intercept_1::IOIO
            | intercept_1::MSR
            | intercept_1::CPUID
            | intercept_1::SHUTDOWN;
        assert_eq!(first & needed, needed);
        assert_ne!(first & intercept_1::RDTSC, 0, "another rate than the processor's");
        assert_ne!(vmcb.get(control::INTERCEPT_2) & intercept_2::VMRUN, 0, "VMRUN must be intercepted");
        assert_eq!(vmcb.get(control::INTERCEPT_EXCEPTIONS), 1 << 1 | 1 << 17 | 1 << 18);
        assert_eq!((vmcb.get(control::ASID), vmcb.get(control::NESTED_PAGING)), (3, 1));
        assert_eq!(vmcb.get(control::NESTED_CR3), vcpu.shared.guest.tables.root());
        assert_eq!(vcpu.at, (&raw const *vcpu.vmcb).addr() as u64);
        assert_ne!(first & intercept_1::PAUSE, 0, "several vCPUs may share a processor");
        let same_rate = SvmVcpu::new(partition(2_000_000), 1);
        assert_eq!(same_rate.vmcb.get(control::INTERCEPT_1) & intercept_1::RDTSC, 0);
    }
}
