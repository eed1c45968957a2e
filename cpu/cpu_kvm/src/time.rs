//! Guest time is the machine's (`GuestClock`); KVM's own clocks (TSC, kvmclock, APIC timers) follow it.
//!
//! They cannot be stopped. So what they mean is read when a vCPU leaves `run` ([`freeze`]), in neutral form, and given
//! to them anew when one enters it and guest time stood still or jumped meanwhile ([`Shared::thaw`]). In between
//! the neutral values are the truth; a save takes those.
//!
//! Invariants:
//! - A thaw is done for all vCPUs before one of them runs, and interrupt messages wait for it: an APIC's registers are
//!   read and written back.
//! - All vCPUs get their TSC from one pair of readings, so that it is the same on all of them.
//! - Guest time is moved on to what kvmclock has shown: the two run on different clocks of the host.

use crate::ioctls::{error, get_tsc_offset, host_tsc, set_tsc_offset};
use crate::partition::{Shared, VcpuCell};
use crate::state::ApicPage;
use apic::ApicClock;
use guest_time::GuestNs;
use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use std::io;
use x86_defs::msr;

/// How this KVM lets the guest's TSC be set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscControl {
    /// By its offset from the host's.
    Offset,
    /// By its value.
    Value,
    /// Not at all: the guest sees the host's.
    Fixed,
}

/// What a vCPU's clocks mean.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Frozen {
    /// As in `VcpuState`.
    pub tsc_offset: u64,
    /// When the APIC timer's count is over.
    pub expires: Option<GuestNs>,
    /// IA32_TSC_DEADLINE.
    pub tsc_deadline: u64,
    /// Tell the guest that it stood still.
    pub stopped: bool,
}

/// Guest time and host TSC of one moment.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    guest_ns: GuestNs,
    host_tsc: u64,
}

/// Of a partition.
#[derive(Default)]
pub struct Time {
    /// Epoch of the clock that KVM's clocks follow, and the moment at which they were set.
    applied: Option<(u64, Moment)>,
    /// When they were last looked at.
    seen: Moment,
}

/// Readings of a moment are shared by vCPUs that stop within this time.
const SAME_STOP_NS: u64 = 100_000_000;
/// A TSC this far off was not set: a tenth of a second of any host's.
const NOT_SET: u64 = 100_000_000;

impl Shared {
    /// The guest's TSC at `ns` by the machine's clock.
    fn tsc_at(&self, ns: GuestNs) -> u64 {
        let clock = self.layout.clock.clone();
        ApicClock { clock, tsc_khz: self.layout.tsc_khz, tsc_offset: 0 }.tsc_at(ns)
    }

    /// Guest time and host TSC, read as close together as can be had.
    fn moment(&self) -> Moment {
        let mut best = Moment::default();
        let mut shortest = u64::MAX;
        for _ in 0..5 {
            let before = host_tsc();
            let guest_ns = self.layout.clock.now();
            let took = host_tsc().wrapping_sub(before);
            if took < shortest {
                shortest = took;
                best = Moment { guest_ns, host_tsc: before.wrapping_add(took / 2) };
            }
        }
        best
    }

    /// Sets KVM's clocks if guest time stood still since.
    pub fn thaw(&self) -> io::Result<()> {
        let mut time = self.time.lock();
        let epoch = self.layout.clock.epoch();
        if time.applied.is_some_and(|(applied, _)| applied == epoch) {
            return Ok(());
        }
        let _no_messages = self.messages.write();
        let _no_bells = self.routing.silence(&self.vm)?;
        let now = self.moment();
        let clock = kvm_clock_data { clock: now.guest_ns, ..kvm_clock_data::default() };
        self.vm.set_clock(&clock).map_err(error)?;
        for cell in &self.vcpus {
            let mut times = cell.times.lock();
            if let Some(fd) = cell.fd.get() {
                self.thaw_vcpu(fd, &times, now)?;
                times.stopped = false;
            }
        }
        time.applied = Some((epoch, now));
        time.seen = now;
        Ok(())
    }

    fn thaw_vcpu(&self, fd: &VcpuFd, times: &Frozen, now: Moment) -> io::Result<()> {
        let tsc = self.tsc_at(now.guest_ns).wrapping_add(times.tsc_offset);
        match self.tsc_control() {
            TscControl::Offset => set_tsc_offset(fd, tsc.wrapping_sub(now.host_tsc))?,
            TscControl::Value => set_msr(fd, msr::TSC, tsc)?,
            TscControl::Fixed => {}
        }
        let mut page = ApicPage(fd.get_lapic().map_err(error)?);
        if page.counts() {
            page.set_ns_left(times.expires.map(|at| at.saturating_sub(now.guest_ns)));
            fd.set_lapic(&page.0).map_err(error)?;
        } else {
            set_msr(fd, msr::TSC_DEADLINE, times.tsc_deadline)?;
        }
        if times.stopped {
            // Refused if the guest does not use kvmclock.
            let _ = fd.kvmclock_ctrl();
        }
        Ok(())
    }

    /// Reads what the clocks of the vCPU in `cell` mean. Not while it runs.
    pub fn freeze(&self, cell: &VcpuCell) -> io::Result<()> {
        let Some(fd) = cell.fd.get() else { return Ok(()) };
        let mut time = self.time.lock();
        let now = self.layout.clock.now();
        if now.saturating_sub(time.seen.guest_ns) >= SAME_STOP_NS {
            self.layout.clock.advance_to(self.vm.get_clock().map_err(error)?.clock);
            time.seen = self.moment();
        }
        let page = ApicPage(fd.get_lapic().map_err(error)?);
        let expires = page.ns_left().map(|ns| self.layout.clock.now().saturating_add(ns));
        let tsc_offset = self.tsc_offset(fd, &time)?;
        let tsc_deadline = if page.counts() { 0 } else { get_msr(fd, msr::TSC_DEADLINE)? };
        *cell.times.lock() = Frozen { tsc_offset, expires, tsc_deadline, stopped: true };
        Ok(())
    }

    /// The TSC's offset from what the machine's clock gives.
    fn tsc_offset(&self, fd: &VcpuFd, time: &Time) -> io::Result<u64> {
        if self.tsc_control() == TscControl::Offset && time.applied.is_some() {
            // Exact, and alike on all vCPUs: the offset in KVM, seen from the last common moment.
            let offset = get_tsc_offset(fd)?;
            let Moment { guest_ns, host_tsc } = time.seen;
            return Ok(host_tsc.wrapping_add(offset).wrapping_sub(self.tsc_at(guest_ns)));
        }
        Ok(get_msr(fd, msr::TSC)?.wrapping_sub(self.tsc_at(self.layout.clock.now())))
    }

    /// Finds out, with the first vCPU, how the TSC can be set, and where it stands.
    pub fn start_time(&self, cell: &VcpuCell) -> io::Result<()> {
        let Some(fd) = cell.fd.get() else { return Ok(()) };
        self.tsc_control.call_once(|| probe(fd).unwrap_or(TscControl::Fixed));
        let tsc_offset = match self.tsc_control() {
            TscControl::Fixed => get_msr(fd, msr::TSC)?.wrapping_sub(self.tsc_at(self.layout.clock.now())),
            _ => 0,
        };
        *cell.times.lock() = Frozen { tsc_offset, ..Frozen::default() };
        Ok(())
    }

    /// As found by the first vCPU.
    pub fn tsc_control(&self) -> TscControl {
        self.tsc_control.get().copied().unwrap_or(TscControl::Fixed)
    }

    /// Sets the clocks anew at the next `run`: a vCPU got another state.
    pub fn forget_time(&self) {
        self.time.lock().applied = None;
    }

    /// Whether a TSC at `offset` can be had.
    pub fn takes_tsc(&self, cell: &VcpuCell, offset: u64) -> bool {
        let here = cell.times.lock().tsc_offset;
        let apart = here.wrapping_sub(offset).min(offset.wrapping_sub(here));
        self.tsc_control() != TscControl::Fixed || apart < NOT_SET
    }
}

fn probe(fd: &VcpuFd) -> io::Result<TscControl> {
    let is_small = |fd| get_msr(fd, msr::TSC).map(|tsc| tsc < NOT_SET);
    let same_rate = get_tsc_offset(fd).is_ok();
    if same_rate && set_tsc_offset(fd, 0u64.wrapping_sub(host_tsc())).is_ok() && is_small(fd)? {
        return Ok(TscControl::Offset);
    }
    set_msr(fd, msr::TSC, 0)?;
    Ok(if is_small(fd)? { TscControl::Value } else { TscControl::Fixed })
}

/// One MSR of a vCPU.
pub fn get_msr(fd: &VcpuFd, index: u32) -> io::Result<u64> {
    let mut list = one(index, 0)?;
    match fd.get_msrs(&mut list).map_err(error)? {
        1 => Ok(list.as_slice()[0].data),
        _ => Err(io::Error::other(format!("MSR {index:#x} cannot be read"))),
    }
}

/// Sets one MSR of a vCPU.
pub fn set_msr(fd: &VcpuFd, index: u32, value: u64) -> io::Result<()> {
    match fd.set_msrs(&one(index, value)?).map_err(error)? {
        1 => Ok(()),
        _ => Err(io::Error::other(format!("MSR {index:#x} does not take {value:#x}"))),
    }
}

fn one(index: u32, data: u64) -> io::Result<Msrs> {
    let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    Msrs::from_entries(&[entry]).map_err(|e| io::Error::other(format!("{e:?}")))
}
