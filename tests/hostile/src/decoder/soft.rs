//! Bytes as a guest of the `soft` engine, interpreted and translated, with interrupts on the way and a save in the middle.
//!
//! The guest runs until it halts, triple-faults, or its engine has looked at the clock often enough: a clock that kicks
//! makes the end of an endless loop a matter of what the guest did, not of the host's speed.

use super::modes::CODE;
use super::{Random, Script};
use cpu_soft::SoftHypervisor;
use guest_memory::GuestRam;
use guest_time::{GuestClock, HostTime};
use hypervisor::{
    CpuModel, Gpa, Hypervisor, Kicker, Msi, Partition, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState,
    Wake,
};
use saved_state::{from_blob, to_blob};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

const RAM: u64 = 2 << 20;
/// Looks at the clock that a run may take: each at most 16384 instructions.
const LOOKS: u64 = 8;
/// Runs of a script.
const RUNS: u32 = 3;

/// Time moves with every look.
#[derive(Clone, Default)]
struct Looks(Arc<(AtomicU64, OnceLock<Kicker>)>);

impl HostTime for Looks {
    fn now_ns(&self) -> u64 {
        let looks = self.0.0.fetch_add(1, SeqCst);
        if let Some(kicker) = self.0.1.get().filter(|_| looks % LOOKS == LOOKS - 1) {
            kicker.kick();
        }
        looks * 50_000
    }
    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000
    }
}

struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

/// Answers everything; every access has a size that devices expect.
struct Nobody;

impl VcpuIo for Nobody {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
        data.fill(port as u8);
    }
    fn pio_write(&self, _: u16, data: &[u8]) {
        assert!(matches!(data.len(), 1 | 2 | 4));
    }
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        assert!((1..=8).contains(&data.len()) && at.0 >= RAM, "{at:x?}");
        data.fill(at.0 as u8);
    }
    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        assert!((1..=8).contains(&data.len()) && at.0 >= RAM, "{at:x?}");
    }
    fn pic_ack(&self) -> Option<u8> {
        Some(0x21)
    }
    fn eoi(&self, _: u8) {}
}

pub fn run(script: &Script<'_>) {
    run_on(script, &SoftHypervisor::interpreter());
    // Everything is translated the first time it runs.
    run_on(script, &SoftHypervisor::translating(Arc::new(cpu_translate::Factory { threshold: 0 })));
}

fn run_on(script: &Script<'_>, engine: &SoftHypervisor) {
    let time = Looks::default();
    let clock = GuestClock::new(Box::new(time.clone()));
    clock.resume();
    let ram = GuestRam::for_test(RAM);
    ram.store_bytes(0, &script.mode.memory());
    let code = &script.code[..script.code.len().min(0x8000)];
    ram.store_bytes(CODE, code);
    let model = if script.without & 2 == 0 { CpuModel::max() } else { small_model() };
    let layout = PartitionLayout { ram: ram.clone(), vcpus: 1, cpu_model: model, tsc_khz: 1_000_000, clock };
    let Ok(partition) = engine.create_partition(&layout) else { return };
    let Ok(mut vcpu) = partition.create_vcpu(0, Arc::new(NoWake)) else { return };
    let _ = time.0.1.set(vcpu.kicker());
    let mut state = script.mode.state();
    let mut random = Random(script.seed | 1);
    for register in [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] {
        state.gpr[register] = random.value();
    }
    vcpu.restore(&state).unwrap_or_else(|error| panic!("{:?} is impossible: {error}", script.mode));
    play(&mut *vcpu, &*partition, &mut random);
}

fn small_model() -> CpuModel {
    CpuModel::parse("x86-64-v2").unwrap_or_else(|_| CpuModel::max())
}

fn play(vcpu: &mut dyn Vcpu, partition: &dyn Partition, random: &mut Random) {
    let io: Arc<dyn VcpuIo> = Arc::new(Nobody);
    for _ in 0..RUNS {
        let exit = vcpu.run(&io);
        assert!(!matches!(exit, VcpuExit::Fatal(_) | VcpuExit::DebugStop), "{exit:?}");
        // What it came to can be saved and taken back, and says the same again.
        let state = vcpu.save().expect("a software vCPU can be saved");
        let blob = to_blob(&state);
        let copy = from_blob::<VcpuState>(&blob)
            .unwrap_or_else(|error| panic!("its own state is refused: {error}: {state:x?}"));
        vcpu.restore(&copy).unwrap_or_else(|error| panic!("its own state is refused: {error}: {state:x?}"));
        assert_eq!(vcpu.save().expect("as before"), copy, "restored as another");
        if exit == VcpuExit::TripleFault {
            return;
        }
        let data = [0x41, 0x4041, 4 << 8, 5 << 8, 6 << 8 | 0x10, 7 << 8][(random.next() % 6) as usize];
        partition.irq_sink().deliver(Msi { address: 0xFEE0_0000, data });
    }
}
