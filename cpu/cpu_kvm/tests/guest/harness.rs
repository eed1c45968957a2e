//! A partition with RAM and vCPUs on `/dev/kvm`, a board that records, and a watchdog.

use cpu_kvm::KvmHypervisor;
use guest_memory::{Gpa, GuestRam};
use guest_time::{GuestClock, HostTime};
use hypervisor::{
    CpuModel, Hypervisor, Kicker, Partition, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState, Wake,
};
use iced_x86::code_asm::CodeAssembler;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use x86_defs::{DescriptorTable, Segment, SegmentAttributes};

pub const RAM_BYTES: u64 = 4 << 20;
pub const CODE: u64 = 0x10000;
pub const DATA: u64 = 0x20000;
pub const STACK: u64 = 0x30000;
pub const HANDLERS: u64 = 0x40000;
pub const GDT: u64 = 0x6000;
pub const TSS: u64 = 0x7000;
pub const IDT: u64 = 0x8000;
pub const PML4: u64 = 0x1000;
/// Outside RAM, mapped.
pub const MMIO: u64 = 0x1000_0000;
/// OUT here ends a test.
pub const DONE: u16 = 0xF4;
/// Far beyond what any test needs.
const LIMIT: Duration = Duration::from_secs(20);

struct Host(Instant);
impl HostTime for Host {
    fn now_ns(&self) -> u64 {
        self.0.elapsed().as_nanos() as u64
    }
    fn wall_ns(&self) -> u64 {
        SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Out(u16, u32),
    In(u16),
    Write(u64, u64),
    Read(u64),
    Ack,
    Eoi(u8),
}

type Hook = Box<dyn Fn(u16, u32) + Send + Sync>;

/// What guests do outside RAM.
#[derive(Default)]
pub struct Board {
    pub events: Mutex<Vec<Event>>,
    /// What reads give, in order; 0 afterwards.
    pub answers: Mutex<VecDeque<u64>>,
    /// Vector of the 8259, if it asks.
    pub pic: Mutex<Option<u8>>,
    done: Mutex<Option<Kicker>>,
    finished: AtomicBool,
    hook: Mutex<Option<Arc<Hook>>>,
    /// Kicked by the next read of memory-mapped I/O.
    pub kick_at_read: Mutex<Option<Kicker>>,
}

fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

impl Board {
    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
    fn answer(&self, data: &mut [u8]) {
        let value = self.answers.lock().unwrap().pop_front().unwrap_or(0);
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }
    pub fn outs(&self) -> Vec<(u16, u32)> {
        let outs = |event: &Event| match event {
            Event::Out(port, value) => Some((*port, *value)),
            _ => None,
        };
        self.events.lock().unwrap().iter().filter_map(outs).collect()
    }
}

impl VcpuIo for Board {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        self.note(Event::In(port));
        self.answer(data);
    }
    fn pio_write(&self, port: u16, data: &[u8]) {
        let hook = self.hook.lock().unwrap().clone();
        if let Some(hook) = hook {
            hook(port, number(data) as u32);
        }
        if port == DONE {
            self.finished.store(true, Ordering::SeqCst);
            if let Some(kicker) = &*self.done.lock().unwrap() {
                kicker.kick();
            }
        } else {
            self.note(Event::Out(port, number(data) as u32));
        }
    }
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        self.note(Event::Read(at.0));
        if let Some(kicker) = self.kick_at_read.lock().unwrap().take() {
            kicker.kick();
        }
        self.answer(data);
    }
    fn mmio_write(&self, at: Gpa, data: &[u8]) {
        self.note(Event::Write(at.0, number(data)));
    }
    fn pic_ack(&self) -> Option<u8> {
        self.note(Event::Ack);
        self.pic.lock().unwrap().take()
    }
    fn eoi(&self, vector: u8) {
        self.note(Event::Eoi(vector));
    }
}

struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

/// One guest.
pub struct Guest {
    pub ram: GuestRam,
    pub clock: GuestClock,
    pub partition: Box<dyn Partition>,
    pub vcpus: Vec<Box<dyn Vcpu>>,
    pub board: Arc<Board>,
    pub tsc_khz: u32,
}

/// Guest time that runs.
pub fn running_clock() -> GuestClock {
    let clock = GuestClock::new(Box::new(Host(Instant::now())));
    clock.resume();
    clock
}

pub fn model() -> Option<CpuModel> {
    let kvm = match KvmHypervisor::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            eprintln!("not run: {error}");
            return None;
        }
    };
    let here = kvm.capabilities().features;
    let mut model = CpuModel::max();
    for feature in here.missing_from(model.features).iter() {
        model.features.remove(feature);
    }
    Some(model)
}

impl Guest {
    /// With `vcpus`, which are as after power-up. `None` (and a line that says why) without KVM.
    pub fn new(vcpus: u32) -> Option<Self> {
        Self::in_time_of(running_clock(), vcpus)
    }

    /// As [`Guest::new`], in the time of another one.
    pub fn in_time_of(clock: GuestClock, vcpus: u32) -> Option<Self> {
        model()?;
        Some(Self::on(&KvmHypervisor::open().unwrap(), clock, vcpus))
    }

    /// On an engine of the test's choice, which is there.
    pub fn on(engine: &dyn Hypervisor, clock: GuestClock, vcpus: u32) -> Self {
        let cpu_model = model().unwrap();
        let ram = GuestRam::for_test(RAM_BYTES);
        let tsc_khz = engine.capabilities().tsc_khz.unwrap_or(1_000_000);
        let layout = PartitionLayout { ram: ram.clone(), vcpus, cpu_model, tsc_khz, clock: clock.clone() };
        let partition = engine.create_partition(&layout).unwrap();
        let vcpus: Vec<_> =
            (0..vcpus).map(|id| partition.create_vcpu(id, Arc::new(NoWake)).unwrap()).collect();
        let board = Arc::new(Board::default());
        *board.done.lock().unwrap() = Some(vcpus[0].kicker());
        Self { ram, clock, partition, vcpus, board, tsc_khz }
    }

    pub fn store(&self, at: u64, bytes: &[u8]) {
        self.ram.store_bytes(at, bytes);
    }
    pub fn load(&self, at: u64) -> u64 {
        self.ram.load(at)
    }

    pub fn assemble(&self, bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        code(&mut a);
        self.store(at, &a.assemble(at).unwrap());
    }

    pub fn on_out(&self, hook: impl Fn(u16, u32) + Send + Sync + 'static) {
        *self.board.hook.lock().unwrap() = Some(Arc::new(Box::new(hook)));
    }

    /// Runs vCPU 0 until OUT to [`DONE`], or something else; others meanwhile on threads of their own.
    pub fn run(&mut self) -> VcpuExit {
        let kickers: Vec<_> = self.vcpus.iter().map(|v| v.kicker()).collect();
        let barked = Arc::new(AtomicBool::new(false));
        let stop = watch(kickers.clone(), barked.clone());
        let io: Arc<dyn VcpuIo> = self.board.clone();
        let board = self.board.clone();
        board.finished.store(false, Ordering::SeqCst);
        let exit = std::thread::scope(|threads| {
            let (first, others) = self.vcpus.split_first_mut().unwrap();
            for vcpu in others {
                let (io, board, barked) = (io.clone(), board.clone(), barked.clone());
                threads.spawn(move || {
                    while !board.finished.load(Ordering::SeqCst) && !barked.load(Ordering::SeqCst) {
                        let exit = vcpu.run(&io);
                        assert_eq!(exit, VcpuExit::Kicked, "vCPU {}", vcpu.id());
                    }
                });
            }
            let exit = first.run(&io);
            board.finished.store(true, Ordering::SeqCst);
            kickers.iter().skip(1).for_each(Kicker::kick);
            exit
        });
        drop(stop);
        let states: Vec<_> = self.vcpus.iter_mut().map(|v| v.save().map(|s| (s.rip, s.rflags))).collect();
        let statistics = self.partition.statistics();
        assert!(
            !barked.load(Ordering::SeqCst),
            "does not end: {states:x?} {:?} {statistics:?}",
            self.board.events.lock().unwrap()
        );
        exit
    }

    pub fn run_to_done(&mut self) {
        let exit = self.run();
        let state = self.vcpus[0].save().unwrap();
        let (rip, events) = (state.rip, self.board.events.lock().unwrap());
        assert_eq!(exit, VcpuExit::Kicked, "rip {rip:x} {events:?} {:?}", self.partition.statistics());
        assert!(self.board.finished.load(Ordering::SeqCst));
    }

    pub fn set(&mut self, vcpu: usize, change: impl FnOnce(&mut VcpuState)) {
        let mut state = self.vcpus[vcpu].save().unwrap();
        change(&mut state);
        self.vcpus[vcpu].restore(&state).unwrap();
    }

    /// Long mode at ring 0, interrupts off, all vectors to handlers that say `OUT 0xF0, vector` and halt.
    pub fn long(&mut self) {
        self.long_tables();
        self.set(0, long_registers);
    }

    pub fn long_tables(&self) {
        let put = |at: u64, value: u64| self.ram.store(at, value);
        put(PML4, 0x2007);
        for giga in 0..4u64 {
            put(0x2000 + 8 * giga, 0x9007 + (giga << 12));
            for n in 0..512u64 {
                put(0x9000 + (giga << 12) + 8 * n, (giga << 30) | (n << 21) | 0x87);
            }
        }
        for (n, descriptor) in
            [0, 0x00cf_9b00_0000_ffff, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().enumerate()
        {
            put(GDT + 8 * n as u64, *descriptor);
        }
        for vector in 0..256u64 {
            let handler = HANDLERS + 32 * vector;
            self.gate(vector as u8, handler);
            self.assemble(64, handler, |a| {
                use iced_x86::code_asm::*;
                a.mov(eax, vector as u32).unwrap();
                a.out(0xF0, al).unwrap();
                a.out(i32::from(DONE), al).unwrap();
                a.hlt().unwrap();
            });
        }
    }

    pub fn gate(&self, vector: u8, handler: u64) {
        let at = IDT + 16 * u64::from(vector);
        let low = (handler & 0xFFFF) | 0x10 << 16 | 0x8E00 << 32 | (handler >> 16 & 0xFFFF) << 48;
        self.ram.store(at, low);
        self.ram.store(at + 8, handler >> 32);
    }
}

pub fn long_registers(s: &mut VcpuState) {
    use x86_defs::control::*;
    s.cr0 = CR0_PE | CR0_MP | CR0_ET | CR0_NE | CR0_WP | CR0_PG;
    s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT;
    (s.cr3, s.efer) = (PML4, EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE);
    let data = segment(0x18, 0xC93, u32::MAX);
    s.segments = [data, segment(0x10, 0xA9B, u32::MAX), data, data, data, data];
    s.ldtr = Segment { unusable: true, ..segment(0, 0x82, 0) };
    s.tr = Segment { base: TSS, ..segment(0x40, 0x8B, 0x67) };
    s.gdtr = DescriptorTable { base: GDT, limit: 0x4F };
    s.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
    (s.rip, s.rflags, s.gpr[4]) = (CODE, 2, STACK);
}

/// As [`long_registers`], at ring 3 with ports allowed: what KVM lets the processor execute, everywhere.
pub fn user_registers(s: &mut VcpuState) {
    long_registers(s);
    let data = segment(0x2B, 0xCF3, u32::MAX);
    s.segments = [data, segment(0x33, 0xAFB, u32::MAX), data, data, data, data];
    s.rflags |= 3 << 12;
}

pub fn segment(selector: u16, attributes: u16, limit: u32) -> Segment {
    Segment { selector, attributes: SegmentAttributes(attributes), limit, base: 0, unusable: false }
}

/// Kicks until it is dropped, once [`LIMIT`] has passed.
fn watch(kickers: Vec<Kicker>, barked: Arc<AtomicBool>) -> Sender<()> {
    let (stop, stopped) = channel::<()>();
    std::thread::spawn(move || {
        let mut patience = LIMIT;
        while stopped.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            barked.store(true, Ordering::SeqCst);
            kickers.iter().for_each(Kicker::kick);
            patience = Duration::from_millis(100);
        }
    });
    stop
}
