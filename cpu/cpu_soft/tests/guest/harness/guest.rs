//! [`Guest`]: one vCPU in a mode of the test's choice.

use super::assemble;
use super::images::*;
use super::io::Recorder;
use super::layout::*;
use super::watchdog::Watchdog;
use cpu_soft::SoftHypervisor;
use guest_memory::{GuestRam, HostSpan, Region};
use guest_time::GuestClock;
use guest_time::manual::ManualTime;
use hypervisor::state::RunState;
use hypervisor::{CpuModel, Hypervisor, Partition, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState, Wake};
use iced_x86::code_asm::CodeAssembler;
use std::sync::Arc;
use x86_defs::control::*;
use x86_defs::paging::*;
use x86_defs::{DescriptorTable, SegmentIndex, flags};

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// HLT with nothing to do; guest time of the next timer.
    Halted(Option<u64>),
    /// The guest wrote to the port that ends the test, or somebody kicked.
    Kicked,
    TripleFault,
}

/// An exception or interrupt that went to its stub.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    pub vector: u8,
    pub error: Option<u32>,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    /// Pushed stack pointer and segment, if the frame has them.
    pub stack: Option<(u64, u16)>,
}

/// Does nothing: the test's own thread runs the vCPU.
pub struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

/// RAM of all tests, with the structures that do not depend on the mode.
pub fn ram() -> GuestRam {
    let span = HostSpan::allocate((RAM_BYTES + ROM_BYTES) as usize);
    let regions = vec![
        Region { gpa: 0, bytes: RAM_BYTES, offset: 0 },
        Region { gpa: ROM, bytes: ROM_BYTES, offset: RAM_BYTES },
    ];
    let ram = GuestRam::new(span, regions).unwrap();
    let flat = u32::MAX;
    for (selector, d) in [
        (KCODE32, descriptor(0, flat, CODE32)),
        (KCODE64, descriptor(0, flat, CODE64)),
        (KDATA, descriptor(0, flat, DATA32)),
        (UCODE32, descriptor(0, flat, CODE32 | DPL3)),
        (UDATA, descriptor(0, flat, DATA32 | DPL3)),
        (UCODE64, descriptor(0, flat, CODE64 | DPL3)),
        (KCODE16, descriptor(0, 0xFFFF, CODE16)),
        (KDATA16, descriptor(0, 0xFFFF, DATA16)),
        (TSS_SELECTOR, descriptor(TSS, TSS_LIMIT, TSS64_BUSY)),
        (TSS_SELECTOR + 8, 0),
    ] {
        ram.store(GDT + u64::from(selector), d);
    }
    for vector in 0..256u64 {
        // hlt; jmp to it
        ram.store_bytes(STUBS + vector * 8, &[0xF4, 0xEB, 0xFD]);
    }
    // No port is allowed; the map ends with a byte of ones.
    ram.store::<u16>(TSS + 0x66, 0x68);
    ram.fill_bytes(TSS + 0x68, 0xFF, 0x81);
    ram
}
/// I/O permission map for 0x400 ports.
pub const TSS_LIMIT: u32 = 0x68 + 0x80;

/// See the module's header.
pub struct Guest {
    pub ram: GuestRam,
    pub time: ManualTime,
    pub clock: GuestClock,
    pub io: Arc<Recorder>,
    pub partition: Box<dyn Partition>,
    pub vcpu: Box<dyn Vcpu>,
}

impl Guest {
    /// After power-up, with empty ROM.
    pub fn at_reset() -> Self {
        Self::with_model("max")
    }

    pub fn with_model(model: &str) -> Self {
        Self::with_engine(model, &super::engine())
    }

    pub fn with_engine(model: &str, engine: &SoftHypervisor) -> Self {
        let (time, clock) = ManualTime::clock();
        Self::with_clock(model, engine, time, clock)
    }

    /// `time` moves nothing if it is not the clock's.
    pub fn with_clock(model: &str, engine: &SoftHypervisor, time: ManualTime, clock: GuestClock) -> Self {
        let ram = ram();
        let layout = PartitionLayout {
            ram: ram.clone(),
            vcpus: 1,
            cpu_model: CpuModel::parse(model).unwrap(),
            tsc_khz: TSC_KHZ,
            clock: clock.clone(),
        };
        let partition = engine.create_partition(&layout).unwrap();
        let vcpu = partition.create_vcpu(0, Arc::new(NoWake)).unwrap();
        let io = Arc::new(Recorder::default());
        io.add_kicker(vcpu.kicker());
        Self { ram, time, clock, io, partition, vcpu }
    }

    /// 64-bit mode at CPL 0, the first 4 MiB mapped onto themselves as supervisor pages.
    pub fn long() -> Self {
        let mut g = Self::at_reset();
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, PTE_P | PTE_W);
        g.long_with(&tables);
        g
    }

    /// 64-bit mode at CPL 0 in `tables`.
    pub fn long_with(&mut self, tables: &Tables) {
        self.idt64();
        let state = long_state(tables.root);
        self.vcpu.restore(&state).unwrap();
    }

    /// As [`Guest::long`] at CPL 3 with user pages.
    pub fn user64() -> Self {
        Self::at_reset().into_user64()
    }
    /// From power-up to [`Guest::user64`].
    pub fn into_user64(self) -> Self {
        let mut g = self;
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
        g.long_with(&tables);
        g.edit(to_user64);
        g
    }

    /// 32-bit protected mode at CPL 0 without paging.
    pub fn protected() -> Self {
        let mut g = Self::at_reset();
        g.idt32();
        g.vcpu.restore(&protected_state()).unwrap();
        g
    }

    /// Real mode with all segments at 0.
    pub fn real() -> Self {
        let mut g = Self::at_reset();
        for vector in 0..256u64 {
            g.ram.store::<u32>(vector * 4, (STUBS + vector * 8) as u32);
        }
        g.edit(|s| {
            for segment in &mut s.segments {
                (segment.selector, segment.base) = (0, 0);
            }
            s.idtr = DescriptorTable { base: 0, limit: 0x3FF };
            s.rip = CODE_16;
            s.gpr[4] = STACK_16;
        });
        g
    }

    /// Interrupt gates of 64-bit mode to the stubs, usable from CPL 3.
    pub fn idt64(&mut self) {
        for vector in 0..256u64 {
            let [low, high] = gate64(KCODE64, STUBS + vector * 8, 0xEE, 0);
            self.ram.store(IDT + vector * 16, low);
            self.ram.store(IDT + vector * 16 + 8, high);
        }
        self.ram.store(TSS + 4, KERNEL_STACK);
    }
    /// Gates of 32-bit mode.
    pub fn idt32(&mut self) {
        for vector in 0..256u64 {
            self.ram.store(IDT + vector * 8, gate(KCODE32, STUBS + vector * 8, 0xEE));
        }
        self.ram.store(TSS + 4, KERNEL_STACK as u32);
        self.ram.store(TSS + 8, u32::from(KDATA));
    }
    /// A handler of the test's for `vector`, assembled at `at` (64-bit mode).
    pub fn handler64(&mut self, vector: u8, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        let [low, high] = gate64(KCODE64, at, 0xEE, 0);
        self.ram.store(IDT + u64::from(vector) * 16, low);
        self.ram.store(IDT + u64::from(vector) * 16 + 8, high);
        self.put(at, &assemble(64, at, f));
    }

    pub fn state(&mut self) -> VcpuState {
        self.vcpu.save().unwrap()
    }
    pub fn edit(&mut self, f: impl FnOnce(&mut VcpuState)) {
        let mut state = self.state();
        f(&mut state);
        self.vcpu.restore(&state).unwrap();
    }
    pub fn put(&self, gpa: u64, bytes: &[u8]) {
        let at = self.ram.offset(gpa, bytes.len() as u64).unwrap();
        self.ram.store_bytes(at, bytes);
        self.ram.note_write(at, bytes.len() as u64);
    }
    pub fn get(&self, gpa: u64) -> u64 {
        self.ram.load(self.ram.offset(gpa, 8).unwrap())
    }
    pub fn get32(&self, gpa: u64) -> u32 {
        self.get(gpa) as u32
    }
    /// Assembles at the place where RIP is (CS base 0).
    pub fn code(&mut self, f: impl FnOnce(&mut CodeAssembler)) {
        let s = self.state();
        let bits = if s.efer & EFER_LMA != 0 && s.segments[1].attributes.long() {
            64
        } else if s.segments[1].attributes.big() {
            32
        } else {
            16
        };
        self.put(s.rip, &assemble(bits, s.rip, f));
    }
    pub fn code_at(&self, bits: u32, at: u64, f: impl FnOnce(&mut CodeAssembler)) {
        self.put(at, &assemble(bits, at, f));
    }

    pub fn run(&mut self) -> Stop {
        match self.exit() {
            VcpuExit::Halted { wake_at } => Stop::Halted(wake_at),
            VcpuExit::Kicked => Stop::Kicked,
            VcpuExit::TripleFault => Stop::TripleFault,
            other => panic!("{other:?}"),
        }
    }
    /// As `run`, however it ends.
    pub fn exit(&mut self) -> VcpuExit {
        let watchdog = Watchdog::start(vec![self.vcpu.kicker()]);
        let io: Arc<dyn VcpuIo> = self.io.clone();
        let exit = self.vcpu.run(&io);
        if watchdog.barked() {
            panic!("the guest hangs: {:x?}", self.state());
        }
        exit
    }
    /// Runs what does not end by itself and kicks it, a little later each time, until its state shows that it `ran`:
    /// on a busy machine a kick may come before the first instruction.
    pub fn run_until_kicked(&mut self, ran: impl Fn(&VcpuState) -> bool) -> VcpuState {
        for pause in 5.. {
            let kicker = self.vcpu.kicker();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    std::thread::sleep(std::time::Duration::from_millis(1 << pause));
                    kicker.kick();
                });
                assert_eq!(self.run(), Stop::Kicked);
            });
            if ran(&self.state()) {
                break;
            }
        }
        self.state()
    }
    /// Runs to a HLT and gives the state there.
    pub fn run_to_halt(&mut self) -> VcpuState {
        let stop = self.run();
        let state = self.state();
        assert!(matches!(stop, Stop::Halted(_)), "{stop:?} at {:#x}", state.rip);
        assert_eq!(state.run_state, RunState::Halted);
        if let Some(frame) = self.frame_of(&state) {
            panic!("unexpected {frame:x?}, cr2 {:#x}", state.cr2);
        }
        state
    }
    /// Runs into a stub: which one, and what was pushed.
    pub fn run_to_stub(&mut self) -> Frame {
        let stop = self.run();
        let state = self.state();
        let frame = self.frame_of(&state);
        frame.unwrap_or_else(|| panic!("no exception: {stop:?} at {:#x}: {:x?}", state.rip, state))
    }

    /// The exception whose stub `s` is in.
    pub fn frame_of(&self, s: &VcpuState) -> Option<Frame> {
        let inside = s.rip.checked_sub(STUBS).filter(|n| *n < 256 * 8)?;
        let vector = (inside / 8) as u8;
        let real = s.cr0 & CR0_PE == 0;
        let bytes: u64 = if real {
            2
        } else if s.efer & EFER_LMA != 0 {
            8
        } else {
            4
        };
        let mut at = s.segments[SegmentIndex::Ss as usize].base + s.gpr[4];
        let mut pop = || {
            let value = self.get(at) & if bytes == 8 { u64::MAX } else { (1 << (bytes * 8)) - 1 };
            at += bytes;
            value
        };
        let has_error = !real && x86_defs::Exception::from_vector(vector).is_some_and(|e| e.has_error_code());
        let error = has_error.then(|| pop() as u32);
        let (rip, cs, rflags) = (pop(), pop() as u16, pop());
        let outer = bytes == 8 || bytes == 4 && (cs & 3 != 0 || rflags & flags::VM != 0);
        let stack = outer.then(|| (pop(), pop() as u16));
        Some(Frame { vector, error, rip, cs, rflags, stack })
    }
}

/// Code and stack of tests in real mode.
pub const CODE_16: u64 = 0x8000;
pub const STACK_16: u64 = 0x7000;

/// CPL 0 in 64-bit mode, interrupts off.
pub fn long_state(root: u64) -> VcpuState {
    let mut s = protected_state();
    s.segments[SegmentIndex::Cs as usize] = segment(KCODE64, 0, u32::MAX, CODE64);
    s.cr0 |= CR0_PG | CR0_WP;
    s.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT | CR4_OSXSAVE;
    s.xcr0 = XCR0_X87 | XCR0_SSE | XCR0_AVX;
    s.cr3 = root;
    s.efer = EFER_LME | EFER_LMA | EFER_NXE | EFER_SCE;
    s
}

/// CPL 0 in 32-bit protected mode, flat, interrupts off, no paging.
pub fn protected_state() -> VcpuState {
    let data = segment(KDATA, 0, u32::MAX, DATA32);
    let code = segment(KCODE32, 0, u32::MAX, CODE32);
    let mut s = VcpuState { segments: [data, code, data, data, data, data], ..VcpuState::default() };
    s.tr = segment(TSS_SELECTOR, TSS, TSS_LIMIT, TSS64_BUSY);
    s.gdtr = DescriptorTable { base: GDT, limit: GDT_LIMIT };
    s.idtr = DescriptorTable { base: IDT, limit: 0xFFF };
    s.cr0 = CR0_PE | CR0_ET | CR0_NE | CR0_MP;
    s.rip = CODE;
    s.gpr[4] = STACK;
    s.x87.control = 0x37F;
    s
}

/// Makes `s` run at CPL 3 in 64-bit mode.
pub fn to_user64(s: &mut VcpuState) {
    let data = segment(UDATA | 3, 0, u32::MAX, DATA32 | DPL3);
    let code = segment(UCODE64 | 3, 0, u32::MAX, CODE64 | DPL3);
    s.segments = [data, code, data, data, data, data];
}
/// Makes `s` run at CPL 3 in 32-bit code.
pub fn to_user32(s: &mut VcpuState) {
    let data = segment(UDATA | 3, 0, u32::MAX, DATA32 | DPL3);
    let code = segment(UCODE32 | 3, 0, u32::MAX, CODE32 | DPL3);
    s.segments = [data, code, data, data, data, data];
}
