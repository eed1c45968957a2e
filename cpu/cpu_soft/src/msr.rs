//! MSRs that are the engine's: TSC, local APIC, kvmclock; and CPUID with its dynamic bits.

use crate::core::SoftCore;
use crate::lockstep::what;
use guest_memory::Gpa;
use x86_defs::cpuid::Feature;
use x86_defs::msr;
use x86_emulate::{Core, Fault};

/// Their state beyond the APIC's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineMsrs {
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// MSR_KVM_SYSTEM_TIME_NEW.
    pub kvm_system_time: u64,
    /// MSR_KVM_WALL_CLOCK_NEW.
    pub kvm_wall_clock: u64,
}

/// Bit 0 of pvclock's flags: all vCPUs see one time.
const PVCLOCK_TSC_STABLE: u8 = 1 << 0;
/// Bit 1: the guest was paused; its watchdogs should know.
const PVCLOCK_GUEST_STOPPED: u8 = 1 << 1;

impl SoftCore {
    /// Moves the TSC of this vCPU by `delta`.
    fn move_tsc(&mut self, delta: u64) {
        let offset = self.apic.clock().tsc_offset.wrapping_add(delta);
        self.apic.set_tsc_offset(offset);
        self.publish_kvmclock(false);
    }

    /// Reads one; `None` if it is not one of ours.
    pub(crate) fn read_engine_msr(&mut self, number: u32) -> Option<Result<u64, Fault>> {
        let mut got = None;
        let kind = self.taped(what(9, number.into(), 0), |core| {
            got = core.engine_msr(number);
            kind_of(got.as_ref().map(|r| r.as_ref().map(|_| ())))
        });
        let value = self.taped(what(10, number.into(), 0), |_| match got {
            Some(Ok(value)) => value,
            _ => 0,
        });
        self.as_taped(kind).map(|result| result.map(|()| value))
    }

    /// What was found to be of kind `kind`.
    fn as_taped(&mut self, kind: u64) -> Option<Result<(), Fault>> {
        match kind {
            0 => None,
            1 => Some(Ok(())),
            _ => Some(Err(self.gp(0))),
        }
    }

    fn engine_msr(&mut self, number: u32) -> Option<Result<u64, Fault>> {
        let value = match number {
            msr::TSC => self.apic.clock().tsc(),
            msr::TSC_ADJUST if self.has_feature(Feature::TscAdjust) => self.msr.tsc_adjust,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => self.msr.kvm_system_time,
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => self.msr.kvm_wall_clock,
            msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                return Some(self.apic.msr_read(number).map_err(|_| self.gp(0)));
            }
            _ => return None,
        };
        Some(Ok(value))
    }

    /// Writes one; `None` if it is not one of ours.
    pub(crate) fn write_engine_msr(&mut self, number: u32, value: u64) -> Option<Result<(), Fault>> {
        let kind = self.taped(what(11, number.into(), value), |core| {
            kind_of(core.set_engine_msr(number, value).as_ref().map(|r| r.as_ref().copied()))
        });
        self.as_taped(kind)
    }

    fn set_engine_msr(&mut self, number: u32, value: u64) -> Option<Result<(), Fault>> {
        match number {
            msr::TSC => {
                let delta = value.wrapping_sub(self.apic.clock().tsc());
                self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(delta);
                self.move_tsc(delta);
            }
            msr::TSC_ADJUST if self.has_feature(Feature::TscAdjust) => {
                let delta = value.wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = value;
                self.move_tsc(delta);
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.msr.kvm_system_time = value;
                self.publish_kvmclock(false);
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.msr.kvm_wall_clock = value;
                self.publish_wall_clock(value);
            }
            msr::APIC_BASE | msr::TSC_DEADLINE | msr::X2APIC_FIRST..=msr::X2APIC_LAST => {
                return Some(match self.apic.msr_write(number, value) {
                    Ok(action) => {
                        self.apic_action(action);
                        Ok(())
                    }
                    Err(_) => Err(self.gp(0)),
                });
            }
            _ => return None,
        }
        Some(Ok(()))
    }

    /// Writes pvclock_vcpu_time_info (Linux, Documentation/virt/kvm/x86/msr.rst). Our TSC is an exact linear
    /// function of guest time, so once per change is enough.
    pub(crate) fn publish_kvmclock(&mut self, stopped: bool) {
        let register = self.msr.kvm_system_time;
        if register & 1 == 0 {
            return;
        }
        let Some(at) = self.ram.offset(register & !1, 32) else { return };
        self.make_unsure();
        let now = self.shared.clock.now();
        let tsc = self.apic.clock().tsc_at(now);
        let (shift, multiplier) = tsc_scale(self.shared.tsc_khz);
        let version = self.ram.load::<u32>(at) | 1;
        self.ram.store(at, version);
        self.ram.store(at + 8, tsc);
        self.ram.store(at + 16, now);
        self.ram.store(at + 24, multiplier);
        self.ram.store(at + 28, shift as u8);
        let flags = PVCLOCK_TSC_STABLE | if stopped { PVCLOCK_GUEST_STOPPED } else { 0 };
        self.ram.store(at + 29, flags);
        self.ram.store(at, version.wrapping_add(1));
        self.code_page_written(at >> 12);
    }

    /// Writes pvclock_wall_clock: the wall clock at guest time 0.
    fn publish_wall_clock(&mut self, gpa: u64) {
        let Some(at) = self.ram.offset(Gpa(gpa).0, 12) else { return };
        self.make_unsure();
        let boot = self.shared.clock.wall_ns().saturating_sub(self.shared.clock.now());
        let version = self.ram.load::<u32>(at) | 1;
        self.ram.store(at, version);
        self.ram.store(at + 4, (boot / 1_000_000_000) as u32);
        self.ram.store(at + 8, (boot % 1_000_000_000) as u32);
        self.ram.store(at, version.wrapping_add(1));
        self.code_page_written(at >> 12);
    }
}

/// Of whom an MSR is, as a tape has it: 0 not ours, 1 ours, 2 ours with #GP.
fn kind_of(found: Option<Result<(), &Fault>>) -> u64 {
    match found {
        None => 0,
        Some(Ok(())) => 1,
        Some(Err(_)) => 2,
    }
}

/// Shift and multiplier with ns = ((tsc << shift) · multiplier) >> 32, the multiplier's top bit set.
fn tsc_scale(tsc_khz: u32) -> (i8, u32) {
    let khz = u64::from(tsc_khz.max(1));
    let mut shift = 0i8;
    // Ticks of 10⁹ Hz are nanoseconds themselves; bring the rate into (10⁹ / 2 … 10⁹] · 2.
    let mut scaled = u128::from(khz * 1000);
    while scaled > 2_000_000_000 {
        scaled >>= 1;
        shift -= 1;
    }
    while scaled <= 1_000_000_000 {
        scaled <<= 1;
        shift += 1;
    }
    let rate = if shift < 0 {
        // (tsc >> n): the exact rate is khz·1000 / 2^n.
        (u128::from(1_000_000_000u64) << 32 << (-shift) as u32) / u128::from(khz * 1000)
    } else {
        (u128::from(1_000_000_000u64) << 32 >> shift as u32) / u128::from(khz * 1000)
    };
    (shift, rate.min(u128::from(u32::MAX)) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scale_is_close_for_any_frequency() {
        for khz in [100_000u32, 999_999, 1_000_000, 2_000_000, 2_593_906, 4_300_000] {
            let (shift, multiplier) = tsc_scale(khz);
            let ticks = u128::from(khz) * 1000 * 60; // a minute
            let shifted = if shift < 0 { ticks >> -shift } else { ticks << shift };
            let ns = (shifted * u128::from(multiplier)) >> 32;
            let error = ns.abs_diff(60_000_000_000);
            assert!(error < 60_000, "{khz} kHz is off by {error} ns in a minute");
        }
    }
}
