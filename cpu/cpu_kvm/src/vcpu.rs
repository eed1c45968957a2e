//! A vCPU: KVM_RUN, and what it returns for.
//!
//! A halted vCPU, and one that waits for SIPI, sleeps in KVM_RUN: `run` never returns `Halted`.
//!
//! Invariant: `run` returns `Kicked` only when KVM_RUN was interrupted; then port and memory accesses that were under
//! way are complete (api.rst, KVM_RUN), and the state is whole.

use crate::complete::{CompleteError, Completion};
use crate::engine::host;
use crate::ioctls::{self, Exit, error};
use crate::msr::{KeptMsrs, MC_BANKS};
use crate::partition::{Shared, VcpuCell};
use crate::state::{ApicPage, Processor, msrs_of};
use crate::statistics::thread_ns;
use crate::time::{Frozen, TscControl, get_msr, set_msr};
use crate::watch::{Count, EMULATED};
use apic::ApicState;
use hypervisor::state::RunState;
use hypervisor::{EngineError, Gpa, Kicker, Msi, Vcpu, VcpuExit, VcpuIo, VcpuState};
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_sync_regs};
use kvm_ioctls::VcpuFd;
use saved_state::{RestoreError, from_blob, to_blob};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, IntoRawFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;
use x86_defs::msr;

/// Exits between two looks at the thread's processor time.
const COUNT_EVERY: u64 = 256;

/// See the module's header.
pub struct KvmVcpu {
    fd: VcpuFd,
    id: u32,
    shared: Arc<Shared>,
    kept: KeptMsrs,
    completion: Option<Box<Completion>>,
    /// In shutdown: only INIT, a reset or another state leads out of it.
    shutdown: bool,
    /// Only another state or a reset lets it go on.
    stuck: bool,
    /// Its thread's processor time when that was last counted.
    counted_ns: u64,
}

// SAFETY: the run structure that `VcpuFd` points to belongs to the vCPU, not to a thread; KVM lets any thread run it.
unsafe impl Send for KvmVcpu {}

impl KvmVcpu {
    /// Creates vCPU `id`, as after power-up.
    pub fn create(shared: &Arc<Shared>, id: u32) -> Result<Self, EngineError> {
        let cell = shared.vcpus.get(id as usize).filter(|cell| cell.fd.get().is_none());
        let cell = cell.ok_or(EngineError::VcpuNumber(id))?;
        let mut vcpu = Self::open(shared, id, cell).map_err(host)?;
        vcpu.power_up().map_err(host)?;
        Ok(vcpu)
    }

    fn open(shared: &Arc<Shared>, id: u32, cell: &VcpuCell) -> io::Result<Self> {
        let layout = &shared.layout;
        let mut fd = shared.vm.create_vcpu(id.into()).map_err(error)?;
        if let Some(khz) = shared.scale {
            fd.set_tsc_khz(khz).map_err(error)?;
        }
        let table = crate::cpuid::table(&layout.cpu_model, id, layout.vcpus, layout.tsc_khz)?;
        fd.set_cpuid2(&table).map_err(error)?;
        ioctls::setup_mce(&fd, MC_BANKS.into())?;
        if shared.msrs.get().is_none() {
            let here = msrs_of(&fd)?;
            shared.msrs.call_once(|| here);
        }
        // SAFETY: `fd` is open during the call.
        let again = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) }.try_clone_to_owned()?;
        // SAFETY: a vCPU's file of this VM, which nobody else owns.
        let second = unsafe { shared.vm.create_vcpu_from_rawfd(again.into_raw_fd()) }.map_err(error)?;
        cell.emulated
            .call_once(|| ioctls::statistics_file(&fd).and_then(|file| Count::find(file, EMULATED)).ok());
        cell.fd.call_once(|| second);
        cell.kick.set_flag(Some(NonNull::from(&mut fd.get_kvm_run().immediate_exit)));
        if let Some(rings) = &shared.rings {
            rings.lock().add(&fd)?;
        }
        shared.start_time(cell)?;
        let kept = KeptMsrs::new(layout.cpu_model.features);
        Ok(Self {
            fd,
            id,
            shared: shared.clone(),
            kept,
            completion: None,
            shutdown: false,
            stuck: false,
            counted_ns: 0,
        })
    }

    fn cell(&self) -> &VcpuCell {
        &self.shared.vcpus[self.id as usize]
    }

    fn processor(&self) -> Processor<'_> {
        processor(&self.fd, &self.shared)
    }

    /// As after power-up, like on every engine.
    fn power_up(&mut self) -> io::Result<()> {
        let mut state = cpu_soft::power_up_state(&self.shared.layout, self.id);
        if self.shared.tsc_control() == TscControl::Fixed {
            state.tsc_offset = self.cell().times.lock().tsc_offset;
        }
        let apic = self.apic_of(&state).map_err(io::Error::other)?;
        self.set_state(&state, &apic)
    }

    fn apic_of(&self, state: &VcpuState) -> Result<ApicState, RestoreError> {
        match &state.apic {
            Some(blob) => from_blob(blob),
            None => self.apic_of(&cpu_soft::power_up_state(&self.shared.layout, self.id)),
        }
    }

    fn set_state(&mut self, state: &VcpuState, apic: &ApicState) -> io::Result<()> {
        processor(&self.fd, &self.shared).write(state, None, &mut self.kept)?;
        set_msr(&self.fd, msr::APIC_BASE, apic.base)?;
        let mut page = ApicPage(self.fd.get_lapic().map_err(error)?);
        page.set_state(apic);
        self.fd.set_lapic(&page.0).map_err(error)?;
        // Absent where the CPU model lacks it.
        let _ = set_msr(&self.fd, msr::TSC_ADJUST, state.tsc_adjust);
        self.processor().write_events(state)?;
        self.cell().extint.store(apic.extint, Ordering::SeqCst);
        *self.cell().times.lock() = Frozen {
            tsc_offset: state.tsc_offset,
            expires: apic.expires,
            tsc_deadline: apic.tsc_deadline,
            stopped: true,
        };
        self.shared.forget_time();
        for msi in apic.posted_messages() {
            self.shared.signal(Msi { address: msi.0, data: msi.1 });
        }
        self.shutdown = state.run_state == RunState::Shutdown;
        self.stuck = false;
        Ok(())
    }

    fn state(&self) -> io::Result<VcpuState> {
        let mut state = self.processor().read(&self.kept)?;
        let base = get_msr(&self.fd, msr::APIC_BASE)?;
        let times = *self.cell().times.lock();
        let mut apic = ApicState {
            expires: times.expires,
            tsc_deadline: times.tsc_deadline,
            extint: self.cell().extint.load(Ordering::SeqCst),
            ..ApicPage(self.fd.get_lapic().map_err(error)?).state(self.id, base)
        };
        state.interrupt = state.interrupt.filter(|vector| !ApicPage::unacknowledge(&mut apic, *vector));
        state.apic = Some(to_blob(&apic));
        state.tsc_offset = times.tsc_offset;
        state.tsc_adjust = get_msr(&self.fd, msr::TSC_ADJUST).unwrap_or(0);
        if self.shutdown {
            state.run_state = RunState::Shutdown;
        }
        Ok(state)
    }

    fn run_guest(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit {
        loop {
            if let Some(reason) = self.shared.counters.take_failure() {
                return VcpuExit::Fatal(reason);
            }
            if let Err(error) = self.offer_interrupt(io) {
                return VcpuExit::Fatal(format!("an interrupt cannot be given to KVM: {error}"));
            }
            match self.fd.run().map(drop) {
                Ok(()) => {
                    let exits = self.shared.counters.exits.fetch_add(1, Ordering::Relaxed);
                    if exits.is_multiple_of(COUNT_EVERY) {
                        self.count_time();
                    }
                    if let Some(exit) = self.serve(io) {
                        return exit;
                    }
                }
                Err(error) if error.errno() == libc::EINTR => {
                    if self.cell().kick.take() {
                        return VcpuExit::Kicked;
                    }
                    if let Some(reason) = self.shared.unsuited.take() {
                        let sound = self.shared.sound.load(Ordering::Relaxed);
                        return VcpuExit::Unsuited { reason, sound, stuck: false };
                    }
                }
                // A processor that was started by SIPI: once more.
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) => return VcpuExit::Fatal(format!("KVM_RUN: {error}")),
            }
        }
    }

    fn count_time(&mut self) {
        let now = thread_ns();
        self.shared.counters.busy(now.saturating_sub(self.counted_ns));
        self.counted_ns = now;
    }

    /// Gives the 8259's interrupt to the processor, or asks to be told when it takes one.
    fn offer_interrupt(&mut self, io: &Arc<dyn VcpuIo>) -> io::Result<()> {
        let cell = &self.shared.vcpus[self.id as usize];
        let line = self.id == 0 && self.shared.pic_line.load(Ordering::SeqCst);
        let asks = line || cell.extint.load(Ordering::SeqCst);
        let run = self.fd.get_kvm_run();
        run.request_interrupt_window = asks.into();
        if !asks || run.ready_for_interrupt_injection == 0 {
            return Ok(());
        }
        // What was known holds for one interrupt.
        run.ready_for_interrupt_injection = 0;
        cell.extint.store(false, Ordering::SeqCst);
        let Some(vector) = io.pic_ack() else { return Ok(()) };
        // As one under way, not by KVM_INTERRUPT: that could not be read back.
        let mut events = self.fd.get_vcpu_events().map_err(error)?;
        events.interrupt.injected = 1;
        events.interrupt.nr = vector;
        events.interrupt.soft = 0;
        self.fd.set_vcpu_events(&events).map_err(error)?;
        self.fd.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).map_err(error)
    }

    /// Does what KVM_RUN returned for; `Some`: `run` returns.
    fn serve(&mut self, io: &Arc<dyn VcpuIo>) -> Option<VcpuExit> {
        let mapped = self.shared.vm.run_size();
        let run = self.fd.get_kvm_run();
        match ioctls::exit(run) {
            Exit::Pio { write, port, size, count, offset } => {
                let Some(data) = ioctls::pio_data(run, offset, size * count, mapped) else {
                    return Some(VcpuExit::Fatal("KVM's data of a port access is out of place".into()));
                };
                for element in data.chunks_exact_mut(size.max(1)) {
                    if write {
                        io.pio_write(port, element);
                    } else {
                        io.pio_read(port, element);
                    }
                }
            }
            Exit::Mmio { write: true, at, len, data } => io.mmio_write(Gpa(at), &data[..len]),
            Exit::Mmio { write: false, at, len, mut data } => {
                io.mmio_read(Gpa(at), &mut data[..len]);
                ioctls::answer_mmio(run, data);
            }
            Exit::Eoi(vector) => io.eoi(vector),
            Exit::ReadMsr(number) => ioctls::answer_msr(run, self.kept.guest_read(number)),
            Exit::WriteMsr(number, value) => {
                let done = self.kept.guest_write(number, value);
                ioctls::answer_msr(run, done.map(|()| value));
            }
            Exit::Window | Exit::Nothing => {}
            Exit::DirtyRingFull => {
                if let Err(error) = self.shared.empty_full_ring(self.id) {
                    return Some(VcpuExit::Fatal(format!("KVM's dirty ring cannot be emptied: {error}")));
                }
            }
            Exit::NotEmulated => return self.complete(io),
            Exit::Shutdown if self.shared.doubted.load(Ordering::Relaxed) => {
                return Some(self.give_up("the processor went into shutdown", false));
            }
            Exit::Shutdown => {
                self.shutdown = true;
                return Some(VcpuExit::TripleFault);
            }
            Exit::Debug => return Some(VcpuExit::DebugStop),
            Exit::Halt => return Some(VcpuExit::Halted { wake_at: None }),
            Exit::Other(reason, [a, b]) => {
                let reason = format!("KVM stopped for reason {reason} ({a:#x}, {b:#x})");
                return Some(match self.shared.doubted.load(Ordering::Relaxed) {
                    true => self.give_up(&reason, false),
                    false => VcpuExit::Fatal(reason),
                });
            }
        }
        None
    }

    /// This KVM cannot go on with the guest. `sound`: the state is that before an instruction.
    fn give_up(&mut self, reason: &str, sound: bool) -> VcpuExit {
        self.stuck = true;
        let sound = sound && self.shared.sound.load(Ordering::Relaxed);
        VcpuExit::Unsuited { reason: format!("on this host's KVM {reason}"), sound, stuck: true }
    }

    fn complete(&mut self, io: &Arc<dyn VcpuIo>) -> Option<VcpuExit> {
        let since = Instant::now();
        let (shared, id) = (&self.shared, self.id);
        let completion = self.completion.get_or_insert_with(|| Box::new(Completion::new(shared, id, io)));
        let processor = Processor { synced: synced(&mut self.fd, shared), ..processor(&self.fd, shared) };
        let tsc_offset = shared.vcpus[id as usize].times.lock().tsc_offset;
        match completion.run(&processor, &mut self.kept, tsc_offset) {
            Ok((mnemonic, shutdown)) => {
                if shared.counters.complete(&mnemonic, since) {
                    (shared.log)(&format!(
                        "this host's KVM does not execute {mnemonic}; the interpreter does"
                    ));
                }
                self.shutdown = shutdown;
                shutdown.then_some(VcpuExit::TripleFault)
            }
            Err(error) => {
                // A state that KVM took in part is neither that before the instruction nor that behind it.
                let sound = !matches!(error, CompleteError::State(_));
                Some(self.give_up(&format!("an instruction cannot be completed: {error}"), sound))
            }
        }
    }
}

fn processor<'a>(fd: &'a VcpuFd, shared: &'a Shared) -> Processor<'a> {
    let msrs: &[u32] = shared.msrs.get().map_or(&[], Vec::as_slice);
    Processor { fd, msrs, xsave_beyond: shared.xsave_beyond, synced: None }
}

/// Registers and events that came with the exit KVM_RUN just returned for. Asked for from the first instruction on that
/// has to be completed: on a KVM without such no exit pays for them.
fn synced(fd: &mut VcpuFd, shared: &Shared) -> Option<kvm_sync_regs> {
    const ALL: u32 = kvm_bindings::KVM_SYNC_X86_VALID_FIELDS;
    let run = fd.get_kvm_run();
    let came = run.kvm_valid_regs == u64::from(ALL);
    if !came && shared.vm.check_extension_raw(kvm_bindings::KVM_CAP_SYNC_REGS.into()) as u32 & ALL == ALL {
        run.kvm_valid_regs = ALL.into();
    }
    came.then(|| fd.sync_regs())
}

impl Vcpu for KvmVcpu {
    fn id(&self) -> u32 {
        self.id
    }

    fn run(&mut self, io: &Arc<dyn VcpuIo>) -> VcpuExit {
        if self.shutdown {
            return VcpuExit::TripleFault;
        }
        if self.stuck {
            self.cell().kick.wait();
            return VcpuExit::Kicked;
        }
        if let Err(error) = self.shared.thaw() {
            return VcpuExit::Fatal(format!("KVM's clocks cannot be set: {error}"));
        }
        self.cell().kick.enter();
        self.counted_ns = thread_ns();
        let exit = self.run_guest(io);
        self.count_time();
        self.cell().kick.leave();
        match self.shared.freeze(self.cell()) {
            Ok(()) => exit,
            Err(error) => VcpuExit::Fatal(format!("KVM's clocks cannot be read: {error}")),
        }
    }

    fn kicker(&self) -> Kicker {
        Kicker::new(self.cell().kick.clone())
    }

    fn save(&mut self) -> Result<VcpuState, EngineError> {
        self.state().map_err(host)
    }

    fn restore(&mut self, state: &VcpuState) -> Result<(), RestoreError> {
        let apic = self.apic_of(state)?;
        let refuse = |reason| Err(RestoreError::Value { tag: 0, reason });
        if apic.id != self.id {
            return refuse("the APIC id of another processor");
        }
        if !self.shared.takes_tsc(self.cell(), state.tsc_offset) {
            return refuse("this host's KVM cannot set the guest's TSC");
        }
        self.completion = None;
        match self.set_state(state, &apic) {
            Ok(()) => Ok(()),
            Err(error) => {
                self.shared.counters.fail(format!("vCPU {}: {error}", self.id));
                refuse("KVM does not take it")
            }
        }
    }

    fn reset(&mut self) {
        if let Err(error) = self.power_up() {
            self.shared.counters.fail(format!("vCPU {} cannot be reset: {error}", self.id));
        }
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        self.cell().kick.set_flag(None);
    }
}
