//! A KVM vCPU's state, to and from `VcpuState`.
//!
//! The order of a restore, and why:
//! 1. XCR0, then the extended state that it covers;
//! 2. control registers, segments, EFER and APIC_BASE: the local APIC's mode comes before its registers;
//! 3. general registers (setting them clears what is pending), debug registers;
//! 4. plain MSRs;
//! 5. the local APIC, its timer not yet running;
//! 6. the run state (HLT, waiting for SIPI);
//! 7. events (interrupt shadow, NMI, exceptions, interrupts under way), which everything before may disturb;
//! 8. messages that the APIC had not taken, as interrupt messages;
//! 9. time (TSC, deadlines, kvmclock) when it runs next: `time.rs`.
//!
//! What KVM holds otherwise than the manual: an interrupt that it acknowledged but did not deliver goes back into the
//! APIC's request register; INT n and INT3 under way are executed anew; the selectors of the last x87 instruction are
//! lost, as on processors that have deprecated them.

mod events;
mod extended;
mod lapic;
mod registers;
#[cfg(test)]
mod tests;

pub use lapic::ApicPage;

use crate::ioctls::{error, get_sregs2, set_sregs2};
use crate::msr::{self, KeptMsrs};
use hypervisor::VcpuState;
use hypervisor::state::RunState;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use std::io;

/// What of a state KVM holds, without the APIC and time.
pub struct Processor<'a> {
    /// The vCPU.
    pub fd: &'a VcpuFd,
    /// MSRs that KVM has.
    pub msrs: &'a [u32],
    /// Words of the extended state's area beyond `kvm_xsave`; `None` where KVM has no KVM_GET_XSAVE2.
    pub xsave_beyond: Option<usize>,
    /// What came with the exit that KVM_RUN just returned for: not asked for again.
    pub synced: Option<kvm_sync_regs>,
}

impl Processor<'_> {
    /// The same, asking KVM for everything.
    pub fn asked(&self) -> Self {
        Self { synced: None, ..*self }
    }

    /// Reads it. `kept`: MSRs that KVM does not have.
    pub fn read(&self, kept: &KeptMsrs) -> io::Result<VcpuState> {
        let mut state = VcpuState::default();
        // First: older kernels move the cause of a pending fault into CR2 and DR6 when they are asked for it.
        let events = match &self.synced {
            Some(synced) => synced.events,
            None => self.fd.get_vcpu_events().map_err(error)?,
        };
        let regs = match &self.synced {
            Some(synced) => synced.regs,
            None => self.fd.get_regs().map_err(error)?,
        };
        let sregs = match self.synced.and_then(|synced| registers::without_pdptes(&synced.sregs)) {
            Some(sregs) => sregs,
            None => get_sregs2(self.fd)?,
        };
        registers::read(&mut state, &regs, &sregs);
        registers::read_debug(&mut state, &self.fd.get_debug_regs().map_err(error)?);
        state.xcr0 = extended::xcr0(&self.fd.get_xcrs().map_err(error)?);
        extended::read(&mut state, &self.extended_area()?.as_fam_struct_ref().xsave);
        state.msrs = self.read_msrs(kept)?;
        state.run_state = match self.fd.get_mp_state().map_err(error)?.mp_state {
            KVM_MP_STATE_HALTED => RunState::Halted,
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => {
                RunState::WaitForSipi
            }
            _ => RunState::Running,
        };
        events::read(&mut state, &events)?;
        Ok(state)
    }

    /// Writes what differs from `old` (all of it without one). The MSRs that KVM refuses go to `kept`.
    pub fn write(&self, state: &VcpuState, old: Option<&VcpuState>, kept: &mut KeptMsrs) -> io::Result<()> {
        let differs = |part: fn(&VcpuState, &VcpuState) -> bool| old.is_none_or(|old| part(state, old));
        if differs(|a, b| a.xcr0 != b.xcr0) {
            self.fd.set_xcrs(&extended::to_xcrs(state.xcr0)).map_err(error)?;
        }
        if differs(|a, b| (&a.x87, &a.sse, &a.avx) != (&b.x87, &b.sse, &b.avx)) {
            self.write_extended(state)?;
        }
        if differs(registers::system_differs) {
            let mut sregs = get_sregs2(self.fd)?;
            registers::to_sregs(state, &mut sregs);
            set_sregs2(self.fd, &sregs)?;
            // A KVM without a processor's virtualization drops what it cannot do, and does not say so.
            registers::must_control(&get_sregs2(self.fd)?, state)?;
        }
        if differs(|a, b| (a.gpr, a.rip, a.rflags) != (b.gpr, b.rip, b.rflags)) {
            self.fd.set_regs(&registers::to_regs(state)).map_err(error)?;
        }
        if differs(|a, b| a.dr != b.dr) {
            self.fd.set_debug_regs(&registers::to_debug(state)).map_err(error)?;
        }
        if differs(|a, b| a.msrs != b.msrs) {
            self.write_msrs(state, old, kept)?;
        }
        Ok(())
    }

    /// Run state and events: after the APIC.
    pub fn write_events(&self, state: &VcpuState) -> io::Result<()> {
        let mp_state = match state.run_state {
            RunState::Halted => KVM_MP_STATE_HALTED,
            RunState::WaitForSipi => KVM_MP_STATE_INIT_RECEIVED,
            RunState::Running | RunState::Shutdown => KVM_MP_STATE_RUNNABLE,
        };
        self.fd.set_mp_state(kvm_mp_state { mp_state }).map_err(error)?;
        let here = self.fd.get_vcpu_events().map_err(error)?;
        self.fd.set_vcpu_events(&events::to_kvm(state, here.flags)).map_err(error)
    }

    fn write_extended(&self, state: &VcpuState) -> io::Result<()> {
        // What of the area is not ours stays as it is.
        let mut area = self.extended_area()?;
        // SAFETY: the length stays as it is.
        extended::write(state, &mut unsafe { area.as_mut_fam_struct() }.xsave);
        // SAFETY: the area is as long as KVM says (`xsave_beyond`).
        unsafe { self.fd.set_xsave2(&area) }.map_err(error)
    }

    /// The extended state as KVM has it, in full length.
    fn extended_area(&self) -> io::Result<Xsave> {
        let mut area = Xsave::new(self.xsave_beyond.unwrap_or(0)).map_err(io::Error::other)?;
        match self.xsave_beyond {
            // SAFETY: the area is as long as KVM says.
            Some(_) => unsafe { self.fd.get_xsave2(&mut area) }.map_err(error)?,
            // SAFETY: the length stays as it is: none beyond.
            None => unsafe { area.as_mut_fam_struct() }.xsave = self.fd.get_xsave().map_err(error)?,
        }
        Ok(area)
    }

    fn read_msrs(&self, kept: &KeptMsrs) -> io::Result<Vec<(u32, u64)>> {
        let mut all: Vec<_> = self.msrs.iter().copied().zip(self.msr_values()?).collect();
        all.retain(|(_, value)| *value != 0);
        all.extend(kept.iter());
        all.sort_unstable();
        Ok(all)
    }

    /// Values of KVM's MSRs, in the order of the list.
    fn msr_values(&self) -> io::Result<Vec<u64>> {
        let entry = |index: &u32| kvm_msr_entry { index: *index, ..kvm_msr_entry::default() };
        let mut list = list(&self.msrs.iter().map(entry).collect::<Vec<_>>())?;
        match self.fd.get_msrs(&mut list).map_err(error)? {
            got if got == self.msrs.len() => Ok(list.as_slice().iter().map(|e| e.data).collect()),
            got => Err(io::Error::other(format!("MSR {:#x} cannot be read", self.msrs[got]))),
        }
    }

    fn write_msrs(&self, state: &VcpuState, old: Option<&VcpuState>, kept: &mut KeptMsrs) -> io::Result<()> {
        fn find(state: &VcpuState, number: u32) -> u64 {
            state.msrs.iter().find(|(n, _)| *n == number).map_or(0, |(_, value)| *value)
        }
        kept.clear();
        for (number, value) in state.msrs.iter().filter(|(number, _)| !self.msrs.contains(number)) {
            kept.keep(*number, *value);
        }
        let here = match old {
            Some(old) => self.msrs.iter().map(|number| find(old, *number)).collect(),
            None => self.msr_values()?,
        };
        // One that has its value is left alone: some KVMs complain about writes to MSRs that can only be 0.
        let differs = |(number, here): (&u32, u64)| {
            let data = find(state, *number);
            (data != here).then_some(kvm_msr_entry { index: *number, data, ..kvm_msr_entry::default() })
        };
        let entries: Vec<_> = self.msrs.iter().zip(here).filter_map(differs).collect();
        let mut rest = entries.as_slice();
        while !rest.is_empty() {
            let done = self.fd.set_msrs(&list(rest)?).map_err(error)?;
            match rest.get(done) {
                Some(refused) if refused.data != 0 => {
                    let (number, value) = (refused.index, refused.data);
                    return Err(io::Error::other(format!("MSR {number:#x} does not take {value:#x}")));
                }
                Some(_) => rest = &rest[done + 1..],
                None => break,
            }
        }
        Ok(())
    }
}

/// MSRs of the state that this KVM has: found by asking a new vCPU.
pub fn msrs_of(fd: &VcpuFd) -> io::Result<Vec<u32>> {
    let mut here = Vec::new();
    for number in msr::plain() {
        let entry = kvm_msr_entry { index: number, ..kvm_msr_entry::default() };
        let mut one = list(&[entry])?;
        if !KeptMsrs::is_ours(number) && fd.get_msrs(&mut one).map_err(error)? == 1 {
            here.push(number);
        }
    }
    Ok(here)
}

fn list(entries: &[kvm_msr_entry]) -> io::Result<Msrs> {
    Msrs::from_entries(entries).map_err(|e| io::Error::other(format!("{e:?}")))
}
