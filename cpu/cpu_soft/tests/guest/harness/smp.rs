//! Several vCPUs, each in a thread of its own that sleeps while its vCPU is halted. Nothing but a wake ends
//! the sleep, so that a lost wake hangs, and the watchdog says so.

use super::apic::enable_x2apic;
use super::guest::{long_state, ram};
use super::layout::*;
use super::watchdog::Watchdog;
use super::{Recorder, Tables, assemble};
use guest_memory::GuestRam;
use guest_time::manual::ManualTime;
use hypervisor::{
    CpuModel, Hypervisor, IrqSink, Kicker, Partition, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState,
    Wake,
};
use iced_x86::code_asm::*;
use std::sync::{Arc, Condvar, Mutex};
use x86_defs::SegmentIndex;
use x86_defs::paging::*;

/// Wakes a thread; a wake before the wait counts.
#[derive(Default)]
pub struct Bell(Mutex<bool>, Condvar);

impl Bell {
    pub fn wait(&self) {
        let mut rung = self.1.wait_while(self.0.lock().unwrap(), |rung| !*rung).unwrap();
        *rung = false;
    }
}
impl Wake for Bell {
    fn wake(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
}

/// See the module's header.
pub struct Smp {
    pub ram: GuestRam,
    pub io: Arc<Recorder>,
    pub partition: Box<dyn Partition>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub bells: Vec<Arc<Bell>>,
    pub tables: Tables,
}

/// Stack of vCPU `n`.
pub const fn stack_of(n: u64) -> u64 {
    0x30_0000 + (n + 1) * 0x1_0000
}
/// Where programs count: one line each 64 bytes.
pub const SHARED: u64 = 0x4_0000;
/// vCPUs count themselves here when they are through.
const FINISHED: u64 = SHARED + 0xF000;

impl Smp {
    /// vCPUs after power-up.
    pub fn at_reset(vcpus: u32) -> Self {
        let ram = ram();
        let (_, clock) = ManualTime::clock();
        let layout = PartitionLayout {
            ram: ram.clone(),
            vcpus,
            cpu_model: CpuModel::parse("max").unwrap(),
            tsc_khz: TSC_KHZ,
            clock,
        };
        let partition = super::engine().create_partition(&layout).unwrap();
        let bells: Vec<Arc<Bell>> = (0..vcpus).map(|_| Arc::default()).collect();
        let vcpus: Vec<_> =
            bells.iter().zip(0..).map(|(bell, n)| partition.create_vcpu(n, bell.clone()).unwrap()).collect();
        let io = Arc::new(Recorder::default());
        vcpus.iter().for_each(|v| io.add_kicker(v.kicker()));
        let tables = Tables::long(&ram);
        Self { ram, io, partition, vcpus, bells, tables }
    }

    /// All vCPUs in 64-bit mode, with their number in RDI, at `CODE`, where they enable their x2APIC, wait for
    /// each other and run `f`. When all have run it, the test ends.
    pub fn long(vcpus: u32, f: impl FnOnce(&mut CodeAssembler)) -> Self {
        let mut smp = Self::at_reset(vcpus);
        smp.tables.identity(RAM_BYTES, PTE_P | PTE_W);
        smp.idt();
        for n in 0..u64::from(vcpus) {
            smp.set(n as usize, |s| {
                s.rip = CODE;
                s.gpr[4] = stack_of(n);
                s.gpr[7] = n;
            });
        }
        smp.code(CODE, |a| {
            enable_x2apic(a);
            barrier(a, FINISHED + 64, vcpus);
            f(a);
            let mut idle = a.create_label();
            a.mov(eax, 1).unwrap();
            lock(a);
            a.xadd(dword_ptr(FINISHED), eax).unwrap();
            a.cmp(eax, vcpus as i32 - 1).unwrap();
            a.jne(idle).unwrap();
            a.mov(edx, i32::from(PORT_DONE)).unwrap();
            a.out(dx, al).unwrap();
            a.set_label(&mut idle).unwrap();
            a.hlt().unwrap();
            a.jmp(idle).unwrap();
        });
        smp
    }

    /// Gates to the stubs, and a TSS.
    pub fn idt(&self) {
        for vector in 0..256u64 {
            let [low, high] = super::gate64(KCODE64, STUBS + vector * 8, 0xEE, 0);
            self.ram.store(IDT + vector * 16, low);
            self.ram.store(IDT + vector * 16 + 8, high);
        }
    }

    /// Changes the state that `long_state` gives and loads it.
    pub fn set(&mut self, n: usize, f: impl FnOnce(&mut VcpuState)) {
        let mut s = long_state(self.tables.root);
        s.apic = self.vcpus[n].save().unwrap().apic;
        f(&mut s);
        self.vcpus[n].restore(&s).unwrap();
    }

    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        let at = self.ram.offset(gpa, bytes.len() as u64).unwrap();
        self.ram.store_bytes(at, bytes);
        self.ram.note_write(at, bytes.len() as u64);
    }
    pub fn get(&self, gpa: u64) -> u64 {
        self.ram.load(self.ram.offset(gpa, 8).unwrap())
    }
    pub fn code(&self, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        self.put(at, &assemble(64, at, f));
    }
    pub fn handler(&self, vector: u8, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        let [low, high] = super::gate64(KCODE64, at, 0xEE, 0);
        self.ram.store(IDT + u64::from(vector) * 16, low);
        self.ram.store(IDT + u64::from(vector) * 16 + 8, high);
        self.code(at, f);
    }
    pub fn sink(&self) -> Arc<dyn IrqSink> {
        self.partition.irq_sink()
    }
    pub fn kickers(&self) -> Vec<Kicker> {
        self.vcpus.iter().map(|v| v.kicker()).collect()
    }

    /// Runs all until the guest says that it is done.
    pub fn run(&mut self) {
        self.run_beside(|| {});
    }

    /// As [`Smp::run`], with `beside` in the test's own thread meanwhile.
    pub fn run_beside(&mut self, beside: impl FnOnce()) {
        let watchdog = Watchdog::start(self.kickers());
        let io = &self.io;
        std::thread::scope(|scope| {
            for (vcpu, bell) in self.vcpus.iter_mut().zip(&self.bells) {
                let watchdog = &watchdog;
                scope.spawn(move || run_vcpu(vcpu, bell, io, watchdog));
            }
            beside();
        });
        if watchdog.barked() {
            let places: Vec<_> = self.vcpus.iter_mut().map(|v| v.save().unwrap()).collect();
            let brief: Vec<_> = places.iter().map(|s| (s.rip, s.rflags, s.run_state, s.gpr)).collect();
            panic!("the guest hangs: {brief:x?}");
        }
        for vcpu in &mut self.vcpus {
            let s = vcpu.save().unwrap();
            let stub = s
                .rip
                .checked_sub(STUBS)
                .filter(|n| *n < 0x800 && s.segments[SegmentIndex::Cs as usize].base == 0);
            assert!(stub.is_none(), "vCPU {} took vector {}: {s:x?}", vcpu.id(), stub.unwrap_or(0) / 8);
        }
    }
}

fn run_vcpu(vcpu: &mut Box<dyn Vcpu>, bell: &Bell, io: &Arc<Recorder>, watchdog: &Watchdog) {
    let as_io: Arc<dyn VcpuIo> = io.clone();
    loop {
        match vcpu.run(&as_io) {
            VcpuExit::Kicked if io.done() || watchdog.barked() => return,
            VcpuExit::Kicked => {}
            VcpuExit::Halted { .. } => bell.wait(),
            other => {
                io.finish();
                panic!("vCPU {}: {other:?} {:x?}", vcpu.id(), vcpu.save());
            }
        }
    }
}

/// The LOCK prefix for the instruction that follows.
pub fn lock(a: &mut CodeAssembler) {
    a.db(&[0xF0]).unwrap();
}

/// Spins until `vcpus` vCPUs came here (RAX is lost). `at` is used once.
pub fn barrier(a: &mut CodeAssembler, at: u64, vcpus: u32) {
    let mut wait = a.create_label();
    lock(a);
    a.inc(dword_ptr(at)).unwrap();
    a.set_label(&mut wait).unwrap();
    a.pause().unwrap();
    a.cmp(dword_ptr(at), vcpus as i32).unwrap();
    a.jb(wait).unwrap();
}
