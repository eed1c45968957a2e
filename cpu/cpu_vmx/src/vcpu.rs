//! The loop of a vCPU: into the guest, out of it, and what the exit means.
//!
//! Called by: `cpu_soft`'s run loop, with all state in the core. General registers and the VMCS's are back in the core
//! after every exit; extended state and the MSRs of system calls stay in the processor until [`Hardware::park`], the
//! VMCS itself until [`Hardware::leave`].

use crate::controls::primary;
use crate::engine::PartitionShared;
use crate::switch::{self, Current, Entered};
use crate::vmcs::{Fields, Region, control, guest, told};
use crate::{exit, host, registers};
use alloc::boxed::Box;
use alloc::format;
use alloc::sync::Arc;
use cpu_hardware::at_once::{Answers, XSAVE_LEAF, access_port};
use cpu_hardware::exit::LOOKED_AT;
use cpu_hardware::extended::XsaveArea;
use cpu_hardware::processor::{self, DR7_ENABLED};
use cpu_hardware::{Exit, Gate, Ground};
use cpu_soft::SoftCore;
use cpu_soft::hardware::{Hardware, Left, WANTED};
use x86_defs::control::{CR4_OSXSAVE, XCR0_AVX};
use x86_defs::{Exception, flags, msr};
use x86_emulate::Cpu;
use x86_emulate::cpu::{Msrs, reg};

/// PAUSEs in a row that are no exit, in ticks, and the ticks between two that end a row (as KVM has them).
const PAUSE_WINDOW: u64 = 4096;
const PAUSE_GAP: u64 = 128;
/// Interruptibility: blocked for one instruction.
const SHADOW: u64 = 3;

/// See the module's header.
pub struct VmxVcpu {
    shared: Arc<PartitionShared>,
    _vmcs: Box<Region>,
    /// Its physical address.
    at: u64,
    vpid: u32,
    /// The processor works on it.
    current: Option<Current>,
    /// Its constant fields are written.
    prepared: bool,
    /// It was launched since it became current.
    launched: bool,
    area: Box<XsaveArea>,
    /// The guest's extended state and its MSRs are in the processor.
    live: bool,
    /// The processor may hold translations that do not hold any more.
    flush: bool,
    /// Where it ran last: another processor knows nothing of its translations.
    ran_on: Option<u32>,
    answers: Answers,
    /// What the TSC's offset was made of.
    tsc_basis: Option<(u64, u64)>,
    /// When the guest's time is over, in ticks of the processor's TSC.
    deadline: Option<u64>,
}

impl VmxVcpu {
    /// One that has not run.
    pub fn new(shared: Arc<PartitionShared>, vpid: u32) -> Self {
        let vmcs = Box::new(Region::new(shared.engine.vmx.revision));
        let at = shared.engine.ground.physical()((&raw const *vmcs).addr());
        Self {
            shared,
            _vmcs: vmcs,
            at,
            vpid,
            current: None,
            prepared: false,
            launched: false,
            area: Box::default(),
            live: false,
            flush: true,
            ran_on: None,
            answers: Answers::default(),
            tsc_basis: None,
            deadline: None,
        }
    }

    /// Makes its VMCS this processor's current one.
    fn arrive(&mut self) {
        if self.current.is_some() {
            return;
        }
        // SAFETY: VMX is on wherever a vCPU runs; the VMCS is this vCPU's alone, and no processor's since `leave`.
        let mut fields = unsafe {
            if !self.prepared {
                switch::vmclear(self.at);
            }
            Current::load(self.at)
        };
        if !self.prepared {
            prepare(&mut fields, &self.shared, self.vpid);
            self.prepared = true;
        }
        // SAFETY: the host runs in 64-bit mode at level 0 and has loaded its task register (`metal::arch`).
        unsafe { host::write(&mut fields) };
        self.current = Some(fields);
        self.launched = false;
        let here = Some(host::processor_number());
        self.flush |= self.ran_on != here;
        self.ran_on = here;
    }

    /// What changes from entry to entry.
    fn load(&mut self, core: &mut SoftCore) {
        let vmx = self.shared.engine.vmx;
        let Some(fields) = &mut self.current else { return };
        let stale = registers::load(&core.cpu, fields) | core.take_paging_touched();
        let window = if core.interrupt_waits() { primary::INTERRUPT_WINDOW } else { 0 };
        let guest = &self.shared.guest;
        let wanted = vmx.primary(guest.tsc.native, guest.vcpus) | window;
        fields.set(control::PRIMARY, u64::from(wanted));
        if core::mem::take(&mut self.flush) || stale {
            flush(&self.shared, self.vpid);
        }
        if guest.tsc.native && self.tsc_basis != Some(core.tsc_basis()) {
            self.tsc_basis = Some(core.tsc_basis());
            fields.set(control::TSC_OFFSET, guest.tsc.of(core));
        }
        fields.set(control::PIN, u64::from(vmx.pin(self.deadline.is_some())));
        switch::set_cr2(core.cpu.cr2);
        if core.cpu.dr[7] & DR7_ENABLED != 0 {
            let [a, b, c, d, ..] = core.cpu.dr;
            // SAFETY: the host uses no breakpoints.
            unsafe { processor::set_breakpoints([a, b, c, d]) };
        }
        if !self.live {
            self.area.set(&core.cpu.x, vmx.xcr0 & XCR0_AVX != 0);
            // SAFETY: `Vmx::enable` switched all of `xcr0` on; what the guest enables is checked against its CPU model,
            // which the engine's features bound. The host's code leaves vector registers alone, and makes no system calls.
            unsafe {
                processor::load_extended(&self.area, vmx.xcr0, core.cpu.xcr0 & vmx.xcr0 | 1);
                load_msrs(&core.cpu.msrs, vmx.has_rdtscp());
            }
            self.live = true;
        }
    }

    /// Enters the guest, and again after exits that are served at once. Then its registers are back in the core. `None`:
    /// it was kept out.
    fn enter(&mut self, core: &mut SoftCore, ground: &dyn Ground) -> Option<Result<Exit, u64>> {
        self.answers.forget();
        let shared = self.shared.clone();
        loop {
            let Some(fields) = &mut self.current else { return None };
            if let Some(deadline) = self.deadline {
                let ticks = deadline.saturating_sub(processor::tsc());
                fields.set(guest::PREEMPTION_TIMER, shared.engine.vmx.timer_value(ticks));
            }
            let (gpr, attention) = core.registers_and_attention();
            let gate = Gate { attention, mask: WANTED, interrupted: ground.interrupted() };
            // SAFETY: the VMCS is complete (`prepare`, `arrive`, `load`), its bitmaps and tables live as long as the
            // partition, and map the guest's RAM alone.
            let entered = unsafe { switch::enter(gpr, self.launched, &gate) };
            if entered == Entered::Refused {
                return Some(Err(fields.get(told::INSTRUCTION_ERROR)));
            }
            if entered == Entered::KeptOut {
                take_back(fields, &mut core.cpu);
                return None;
            }
            let exit = exit::decode(fields);
            self.launched |= exit != Exit::Invalid;
            shared.guest.exits.count(&exit);
            if !serve_at_once(fields, core, &mut self.answers, &exit) {
                match exit::of_the_machine(fields) {
                    Some(Exception::MachineCheck) => processor::take_machine_check(),
                    Some(_) => switch::take_nmi(),
                    None => {}
                }
                take_back(fields, &mut core.cpu);
                return Some(Ok(exit));
            }
        }
    }

    /// Does what the exit asks for.
    fn serve(&mut self, core: &mut SoftCore, exit: Exit) -> Left {
        let Some(fields) = &self.current else { return Left::Service };
        // The interpreter delivers it, before anything else.
        if let Some(exception) = exit::exception(fields, &exit, core.cpu.cr2) {
            core.cpu.exc = exception;
            return Left::Service;
        }
        match exit {
            Exit::Host | Exit::Window | Exit::Timer => Left::Service,
            Exit::Pause => Left::Spins,
            Exit::TripleFault => Left::TripleFault,
            Exit::Invalid => {
                let (cpu, reason) = (&core.cpu, fields.get(told::REASON));
                let (what, rights) = (
                    fields.get(told::QUALIFICATION),
                    [0, 1, 2, 3, 4, 5, 6, 7].map(|n| fields.get(guest::rights(n))),
                );
                Left::Failed(format!(
                    "VM entry refuses the state (reason {reason:#x}, {what:#x}): cr0 {:#x} cr3 {:#x} cr4 {:#x} efer {:#x} \
                     rflags {:#x} rights {rights:x?}",
                    cpu.cr0,
                    cpu.cr3,
                    cpu.cr4,
                    cpu.efer,
                    fields.get(guest::RFLAGS)
                ))
            }
            _ => Left::Interpret,
        }
    }
}

/// What the guest left, CR2 included: before an entry that was kept out it may have run.
fn take_back(fields: &impl Fields, cpu: &mut Cpu) {
    cpu.cr2 = switch::cr2();
    registers::store(fields, cpu);
}

/// Port accesses and CPUID, without moving the guest's state; `false`: nothing was done.
fn serve_at_once(fields: &mut impl Fields, core: &mut SoftCore, answers: &mut Answers, exit: &Exit) -> bool {
    if !matches!(exit, Exit::Port(_) | Exit::Cpuid) {
        return false;
    }
    let debugged = fields.get(guest::RFLAGS) & flags::TF != 0 || fields.get(guest::DR7) & DR7_ENABLED != 0;
    if debugged || exit::interrupted(fields).is_valid() {
        return false;
    }
    let (rax, rcx) = (core.cpu.gpr[reg::RAX], core.cpu.gpr[reg::RCX]);
    let next = match exit {
        Exit::Port(port) if !port.string => {
            core.cpu.gpr[reg::RAX] = access_port(core, port, rax);
            port.next_rip
        }
        Exit::Cpuid if rax as u32 != XSAVE_LEAF => {
            let question = (rax as u32, rcx as u32, core.cpu.cr4 & CR4_OSXSAVE != 0);
            let [eax, ebx, ecx, edx] = answers.get(core, question).map(u64::from);
            let gpr = &mut core.cpu.gpr;
            (gpr[reg::RAX], gpr[reg::RBX], gpr[reg::RCX], gpr[reg::RDX]) = (eax, ebx, ecx, edx);
            exit::next_rip(fields)
        }
        _ => return false,
    };
    fields.set(guest::RIP, next);
    fields.set(guest::RFLAGS, fields.get(guest::RFLAGS) & !flags::RF);
    let blocked = fields.get(guest::INTERRUPTIBILITY);
    if blocked & SHADOW != 0 {
        fields.set(guest::INTERRUPTIBILITY, blocked & !SHADOW);
    }
    true
}

/// Drops all translations of one vCPU, and of its partition's memory, on this processor.
fn flush(shared: &PartitionShared, vpid: u32) {
    let vmx = &shared.engine.vmx;
    let (one_ept, one_vpid) = vmx.flush_one;
    // SAFETY: VMX is on wherever a vCPU runs, and the processor has these kinds.
    unsafe {
        switch::invept(one_ept.then(|| shared.ept_pointer()));
        if vmx.controls.has_vpid() {
            switch::invvpid(one_vpid.then_some(vpid));
        }
    }
}

/// MSRs that guests reach without an exit and that are no fields.
pub(crate) const MSRS: [u32; 5] = [msr::STAR, msr::LSTAR, msr::CSTAR, msr::SFMASK, msr::KERNEL_GS_BASE];

/// # Safety
/// The host makes no system calls, and swaps no GS.
unsafe fn load_msrs(msrs: &Msrs, tsc_aux: bool) {
    let values = [msrs.star, msrs.lstar, msrs.cstar, msrs.sfmask, msrs.kernel_gs_base];
    // SAFETY: every 64-bit processor has them; the interpreter has checked what the guest wrote.
    MSRS.iter().zip(values).for_each(|(number, value)| unsafe { processor::write_msr(*number, value) });
    if tsc_aux {
        // SAFETY: a processor with RDTSCP has it.
        unsafe { processor::write_msr(msr::TSC_AUX, msrs.tsc_aux) };
    }
}

fn store_msrs(msrs: &mut Msrs) {
    // SAFETY: as above.
    let [star, lstar, cstar, sfmask, gs] = MSRS.map(|number| unsafe { processor::read_msr(number) });
    (msrs.star, msrs.lstar, msrs.cstar, msrs.sfmask, msrs.kernel_gs_base) = (star, lstar, cstar, sfmask, gs);
}

/// What stays as it is from entry to entry.
fn prepare(fields: &mut impl Fields, shared: &PartitionShared, vpid: u32) {
    let (engine, physical) = (&shared.engine, shared.engine.ground.physical());
    let (vmx, controls) = (&engine.vmx, &engine.vmx.controls);
    let io = physical((&raw const *engine.io_bitmaps).addr());
    for (field, value) in [
        (control::PIN, u64::from(vmx.pin(false))),
        (control::PRIMARY, u64::from(vmx.primary(shared.guest.tsc.native, shared.guest.vcpus))),
        (control::SECONDARY, u64::from(vmx.secondary(shared.guest.vcpus))),
        (control::EXIT, u64::from(controls.leave)),
        (control::ENTRY, u64::from(controls.enter)),
        (control::EXCEPTIONS, u64::from(LOOKED_AT)),
        (control::PAGE_FAULT_MASK, 0),
        (control::PAGE_FAULT_MATCH, 0),
        (control::CR3_TARGETS, 0),
        (control::EXIT_MSR_STORES, 0),
        (control::EXIT_MSR_LOADS, 0),
        (control::ENTRY_MSR_LOADS, 0),
        (control::ENTRY_EVENT, 0),
        (control::CR0_MASK, !registers::CR0_OWN),
        (control::CR4_MASK, !registers::CR4_OWN),
        (control::IO_BITMAP_A, io),
        (control::IO_BITMAP_B, io + 4096),
        (control::MSR_BITMAP, physical((&raw const *engine.msr_bitmap).addr())),
        (control::TSC_OFFSET, 0),
        (control::EPT_POINTER, shared.ept_pointer()),
        (guest::LINK, u64::MAX),
        (guest::DEBUGCTL, 0),
        (guest::ACTIVITY, 0),
    ] {
        fields.set(field, value);
    }
    if controls.has_vpid() {
        fields.set(control::VPID, u64::from(vpid));
    }
    if vmx.pause_loop {
        fields.set(control::PAUSE_GAP, PAUSE_GAP);
        fields.set(control::PAUSE_WINDOW, PAUSE_WINDOW);
    }
}

impl Hardware for VmxVcpu {
    fn run(&mut self, core: &mut SoftCore) -> Left {
        let ground = self.shared.engine.ground.clone();
        // The guest's own timer is the processor's to watch where it can; the ground watches the turn.
        let timer = self.shared.engine.vmx.controls.has_preemption_timer();
        let due_in = core.timer_due_in();
        self.deadline = due_in.filter(|_| timer).map(|ns| {
            let ticks = u128::from(ns) * u128::from(ground.tsc_khz()) / 1_000_000;
            processor::tsc().saturating_add(u64::try_from(ticks).unwrap_or(u64::MAX))
        });
        if !ground.before_entry(due_in.filter(|_| !timer)) {
            return Left::Yield;
        }
        self.arrive();
        self.load(core);
        match self.enter(core, &*ground) {
            None => Left::Service,
            Some(Ok(exit)) => self.serve(core, exit),
            Some(Err(error)) => Left::Failed(format!("VM entry fails with error {error}")),
        }
    }

    fn park(&mut self, core: &mut SoftCore) {
        if core::mem::take(&mut self.live) {
            // SAFETY: as for loading; what is in the registers is this guest's.
            unsafe { processor::store_extended(&mut self.area, self.shared.engine.vmx.xcr0) };
            core.cpu.x = self.area.state();
            store_msrs(&mut core.cpu.msrs);
        }
    }

    fn leave(&mut self, core: &mut SoftCore) {
        self.park(core);
        if self.current.take().is_some() {
            // SAFETY: VMX is on here, and the VMCS is this vCPU's. It is in memory then, for any processor.
            unsafe { switch::vmclear(self.at) };
        }
    }

    fn forget(&mut self) {
        self.flush = true;
        self.tsc_basis = None;
        self.live = false;
    }
}

impl Drop for VmxVcpu {
    fn drop(&mut self) {
        debug_assert!(self.current.is_none(), "the processor keeps a VMCS whose memory is freed");
        self.shared.engine.vpids.give_back(self.vpid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controls::{pin, secondary};
    use crate::engine::tests::partition;
    use crate::vmcs::tests::Table;

    fn prepared(tsc_khz: u32) -> Table {
        let mut table = Table::default();
        prepare(&mut table, &partition(tsc_khz), 7);
        table
    }

    #[test]
    fn the_controls_keep_the_guest_inside() {
        let table = prepared(1_000_000);
        let has = |field, bits: u32| table.get(field) & u64::from(bits) == u64::from(bits);
        assert!(has(control::PIN, pin::EXTERNAL_INTERRUPT | pin::NMI));
        assert!(has(
            control::PRIMARY,
            primary::HLT | primary::IO_BITMAPS | primary::MSR_BITMAPS | primary::MOV_DR
        ));
        assert!(has(control::PRIMARY, primary::RDTSC), "another rate than the processor's");
        assert!(!prepared(2_000_000).get(control::PRIMARY) & u64::from(primary::RDTSC) != 0);
        assert!(has(
            control::SECONDARY,
            secondary::EPT | secondary::UNRESTRICTED_GUEST | secondary::PAUSE_LOOP
        ));
        assert_eq!(table.get(control::EPT_POINTER) & 0xFFF, 0x5E);
        assert_eq!((table.get(control::VPID), table.get(guest::LINK)), (7, u64::MAX));
        assert_eq!(table.get(control::IO_BITMAP_B), table.get(control::IO_BITMAP_A) + 4096);
        assert_eq!(table.get(control::EXCEPTIONS), 1 << 1 | 1 << 17 | 1 << 18);
        assert_eq!(table.get(control::CR0_MASK) & 1 << 5, 1 << 5, "NE is VMX's");
    }

    #[test]
    fn a_vmcs_lies_where_the_processor_finds_it() {
        let vcpu = VmxVcpu::new(partition(1_000_000), 3);
        assert_eq!(vcpu.at, (&raw const *vcpu._vmcs).addr() as u64);
        assert!(vcpu.at.is_multiple_of(4096));
    }
}
