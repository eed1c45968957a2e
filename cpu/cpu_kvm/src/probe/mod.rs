//! A short probe of this host's KVM: a VM of a few instructions shows whether it can run real guests.
//!
//! Called by: `KvmHypervisor::probe`. It takes some milliseconds, and nothing of it is timed: whether KVM emulates the
//! guest's instructions is read from its own count.
//!
//! Invariant: a probe that does not end is ended, and counts against this KVM.

mod parts;

use crate::partition::{KvmPartition, Options};
use crate::vcpu::KvmVcpu;
use guest_memory::{Gpa, GuestRam};
use guest_time::{GuestClock, HostTime};
use hypervisor::{CpuModel, Kicker, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState};
use kvm_ioctls::Kvm;
use parts::Part;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use sync::Mutex;

/// How long a part may take; far more than it needs.
const PATIENCE: Duration = Duration::from_millis(500);

/// What a probe found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// CPUID shows the processor of the CPU model: the guest can move to another engine.
    pub cpuid_is_the_models: bool,
    /// What speaks against this KVM, for people.
    pub problems: Vec<String>,
}

struct Still;
impl HostTime for Still {
    fn now_ns(&self) -> u64 {
        0
    }
    fn wall_ns(&self) -> u64 {
        0
    }
}

/// Ends the probe at its OUT.
struct Ends {
    kicker: Mutex<Option<Kicker>>,
    reached: AtomicBool,
}

impl VcpuIo for Ends {
    fn pio_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {
        self.reached.store(true, Ordering::SeqCst);
        if let Some(kicker) = &*self.kicker.lock() {
            kicker.kick();
        }
    }
    fn mmio_read(&self, _: Gpa, data: &mut [u8]) {
        data.fill(0xFF);
    }
    fn mmio_write(&self, _: Gpa, _: &[u8]) {}
    fn pic_ack(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// Probes `kvm` with `model`, which it claims to give.
pub fn probe(kvm: &Kvm, model: CpuModel, tsc_khz: u32) -> Probe {
    match try_probe(kvm, model, tsc_khz) {
        Ok(probe) => probe,
        Err(problem) => Probe { cpuid_is_the_models: false, problems: vec![problem] },
    }
}

fn try_probe(kvm: &Kvm, model: CpuModel, tsc_khz: u32) -> Result<Probe, String> {
    let ram = GuestRam::for_test(parts::RAM_BYTES);
    let clock = GuestClock::new(Box::new(Still));
    let layout = PartitionLayout { ram: ram.clone(), vcpus: 1, cpu_model: model.clone(), tsc_khz, clock };
    let options = Options { log: Arc::new(|_| ()), dirty_ring: None };
    let partition =
        KvmPartition::new(kvm, &layout, None, options).map_err(|e| format!("a VM cannot be made: {e}"))?;
    let shared = partition.shared();
    let made = |e: &dyn std::fmt::Display| format!("a vCPU cannot be made: {e}");
    let mut vcpu = KvmVcpu::create(shared, 0).map_err(|e| made(&e))?;
    let power_up = vcpu.save().map_err(|e| made(&e))?;
    let mut probe = Probe::default();
    run_part(&parts::FIRST, &mut vcpu, &power_up, &ram)?;
    let emulated = shared.vcpus[0].emulated.get().and_then(|count| count.as_ref()?.read().ok());
    if emulated.is_some_and(|count| count > parts::LOOP / 2) {
        let problem = "the guest's kernel is emulated, there is no virtualization in the processor";
        probe.problems.push(problem.into());
    }
    probe.cpuid_is_the_models = shows_the_model(&ram, &model, tsc_khz);
    if !probe.cpuid_is_the_models {
        probe.problems.push("CPUID shows the host's processor, not the CPU model".into());
    }
    for part in parts::PARTS {
        let before = shared.counters.completed.load(Ordering::Relaxed);
        if let Err(problem) = run_part(part, &mut vcpu, &power_up, &ram) {
            // What KVM said, if it was asked for something that it does not do.
            let why = shared.counters.take_failure().map(|why| format!(" ({why})")).unwrap_or_default();
            probe.problems.push(problem + &why);
        } else if shared.counters.completed.load(Ordering::Relaxed) != before {
            probe.problems.push(format!("KVM does not execute {}", part.name));
        }
    }
    Ok(probe)
}

/// Runs `part` to its end; what is wrong with what came out.
fn run_part(part: &Part, vcpu: &mut dyn Vcpu, power_up: &VcpuState, ram: &GuestRam) -> Result<(), String> {
    parts::load(part, ram);
    // A TSC that cannot be set goes on: it stands where it stands.
    let here = vcpu.save().map_err(|e| format!("the state before {} cannot be read: {e}", part.name))?;
    let mut state = VcpuState { tsc_offset: here.tsc_offset, ..power_up.clone() };
    parts::enter(part.mode, &mut state);
    vcpu.restore(&state).map_err(|e| format!("the state before {} is refused: {e}", part.name))?;
    let ends = Arc::new(Ends { kicker: Mutex::new(Some(vcpu.kicker())), reached: AtomicBool::new(false) });
    let exit = run(vcpu, &ends);
    if exit != VcpuExit::Kicked || !ends.reached.load(Ordering::SeqCst) {
        return Err(format!("{} does not end ({exit:?})", part.name));
    }
    let wrong = |(offset, value): &&(u64, u32)| ram.load::<u32>(parts::RESULTS + offset) != *value;
    match part.results.iter().find(wrong) {
        None => Ok(()),
        Some((offset, value)) => {
            let got: u32 = ram.load(parts::RESULTS + offset);
            Err(format!("{} gives {got:#x} instead of {value:#x}", part.name))
        }
    }
}

/// Whether the first part's CPUID gave the model's answers.
fn shows_the_model(ram: &GuestRam, model: &CpuModel, tsc_khz: u32) -> bool {
    let context = hypervisor::CpuidContext::alone(tsc_khz);
    let [_, ebx7, ecx7, edx7] = model.cpuid(7, 0, &context);
    let [_, _, ecx1, edx1] = model.cpuid(1, 0, &context);
    let seen: [u32; 5] = std::array::from_fn(|n| ram.load(parts::RESULTS + 4 * n as u64));
    seen == [ebx7, ecx7, edx7, ecx1, edx1]
}

fn run(vcpu: &mut dyn Vcpu, ends: &Arc<Ends>) -> VcpuExit {
    let (stop, stopped) = channel::<()>();
    let kicker = vcpu.kicker();
    std::thread::scope(|threads| {
        threads.spawn(move || {
            if stopped.recv_timeout(PATIENCE) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                kicker.kick();
            }
        });
        let io: Arc<dyn VcpuIo> = ends.clone();
        let exit = vcpu.run(&io);
        drop(stop);
        exit
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpu_soft::SoftHypervisor;
    use hypervisor::{Hypervisor, Wake};

    struct NoWake;
    impl Wake for NoWake {
        fn wake(&self) {}
    }

    /// The interpreter executes every part as the part expects it of KVM, and a wrong result is told.
    #[test]
    fn the_parts_hold_on_the_interpreter() {
        let ram = GuestRam::for_test(parts::RAM_BYTES);
        let clock = GuestClock::new(Box::new(Still));
        let cpu_model = CpuModel::max();
        let layout = PartitionLayout { ram: ram.clone(), vcpus: 1, cpu_model, tsc_khz: 1_000_000, clock };
        let partition = SoftHypervisor::interpreter().create_partition(&layout).unwrap();
        let mut vcpu = partition.create_vcpu(0, Arc::new(NoWake)).unwrap();
        let power_up = vcpu.save().unwrap();
        run_part(&parts::FIRST, &mut *vcpu, &power_up, &ram).unwrap();
        assert!(shows_the_model(&ram, &layout.cpu_model, layout.tsc_khz));
        for part in parts::PARTS {
            assert_eq!(run_part(part, &mut *vcpu, &power_up, &ram), Ok(()), "{}", part.name);
            let wrong = Part { results: &[(0, 0xBAD)], ..*part };
            let problem = run_part(&wrong, &mut *vcpu, &power_up, &ram).unwrap_err();
            assert!(problem.contains(part.name) && problem.contains("0xbad"), "{problem}");
        }
    }
}
