//! A short probe of this host's KVM: a VM of a few instructions shows whether it can run real guests.
//!
//! Called by: `KvmHypervisor::verdict`. It takes some milliseconds, and nothing of it is timed: whether KVM emulates the
//! guest's instructions is read from its own count.
//!
//! Invariant: a probe that does not end is ended, and counts against this KVM.

use crate::ioctls::statistics_file;
use crate::partition::KvmPartition;
use crate::vcpu::KvmVcpu;
use crate::watch::{Count, EMULATED};
use guest_memory::{Gpa, GuestRam};
use guest_time::{GuestClock, HostTime};
use hypervisor::{CpuModel, Kicker, PartitionLayout, Vcpu, VcpuExit, VcpuIo};
use kvm_ioctls::Kvm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;
use sync::Mutex;

/// How long the probe may take; far more than it needs.
const PATIENCE: Duration = Duration::from_millis(500);
const RAM_BYTES: u64 = 0x10000;
const CODE: u64 = 0x1000;
const RESULTS: u64 = 0x2000;
/// Instructions in the probe's loop.
const LOOP: u64 = 20_000;

/// What a probe found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Probe {
    /// CPUID shows the processor of the CPU model: the guest can move to another engine.
    pub cpuid_is_the_models: bool,
    /// What speaks against this KVM, for people.
    pub problems: Vec<String>,
}

/// Real mode: CPUID leaves 7 and 1 into memory, a loop of [`LOOP`] instructions, OUT to port 0x80.
const PROGRAM: &[u8] = &[
    0x66, 0xB8, 7, 0, 0, 0, 0x66, 0x31, 0xC9, 0x0F, 0xA2, // mov eax,7; xor ecx,ecx; cpuid
    0x66, 0x89, 0x1E, 0x00, 0x20, 0x66, 0x89, 0x0E, 0x04, 0x20, 0x66, 0x89, 0x16, 0x08,
    0x20, // ebx, ecx, edx
    0x66, 0xB8, 1, 0, 0, 0, 0x66, 0x31, 0xC9, 0x0F, 0xA2, // mov eax,1; xor ecx,ecx; cpuid
    0x66, 0x89, 0x0E, 0x0C, 0x20, 0x66, 0x89, 0x16, 0x10, 0x20, // ecx, edx
    0xB9, 0x10, 0x27, 0x49, 0x75, 0xFD, 0xE6, 0x80, 0xF4, // mov cx,10000; dec cx; jnz; out; hlt
];

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
    let failed = |what: &'static str| move |error: String| format!("{what}: {error}");
    let ram = GuestRam::for_test(RAM_BYTES);
    ram.store_bytes(CODE, PROGRAM);
    let clock = GuestClock::new(Box::new(Still));
    let layout = PartitionLayout { ram: ram.clone(), vcpus: 1, cpu_model: model.clone(), tsc_khz, clock };
    let partition =
        KvmPartition::new(kvm, &layout, None).map_err(|e| failed("a VM cannot be made")(e.to_string()))?;
    let made = |e: &dyn std::fmt::Display| failed("a vCPU cannot be made")(e.to_string());
    let mut vcpu = KvmVcpu::create(partition.shared(), 0).map_err(|e| made(&e))?;
    let mut state = vcpu.save().map_err(|e| made(&e))?;
    for segment in &mut state.segments {
        (segment.selector, segment.base) = (0, 0);
    }
    state.rip = CODE;
    vcpu.restore(&state).map_err(|e| made(&e))?;
    let ends = Arc::new(Ends { kicker: Mutex::new(Some(vcpu.kicker())), reached: AtomicBool::new(false) });
    let exit = run(&mut vcpu, &ends);
    if exit != VcpuExit::Kicked || !ends.reached.load(Ordering::SeqCst) {
        return Err(format!("a loop in real mode does not end ({exit:?})"));
    }
    let mut problems = Vec::new();
    let fd = partition.shared().vcpus[0].fd.get();
    let emulated = fd.and_then(|fd| Count::find(statistics_file(fd).ok()?, EMULATED).ok()?.read().ok());
    if emulated.is_some_and(|count| count > LOOP / 2) {
        problems.push("the guest's kernel is emulated, there is no virtualization in the processor".into());
    }
    let context = hypervisor::CpuidContext {
        apic_id: 0,
        cpus: 1,
        osxsave: false,
        apic_enabled: true,
        xcr0: 1,
        xss: 0,
        tsc_khz,
    };
    let [_, ebx7, ecx7, edx7] = model.cpuid(7, 0, &context);
    let [_, _, ecx1, edx1] = model.cpuid(1, 0, &context);
    let seen: [u32; 5] = std::array::from_fn(|n| ram.load(RESULTS + 4 * n as u64));
    let cpuid_is_the_models = seen == [ebx7, ecx7, edx7, ecx1, edx1];
    if !cpuid_is_the_models {
        problems.push("CPUID shows the host's processor, not the CPU model".into());
    }
    Ok(Probe { cpuid_is_the_models, problems })
}

fn run(vcpu: &mut KvmVcpu, ends: &Arc<Ends>) -> VcpuExit {
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
