//! Bytes as code in every mode, translated and interpreted: both must come to the same registers and memory.
//!
//! Every gate leads to a HLT, and what no byte was given for is HLT, so that most programs end; one that does not is
//! stopped by a clock that kicks and says nothing. What the manual leaves undefined is not held against anybody: where
//! programs end differently the interpreter goes through it once more by single instructions, to see which flags are
//! undefined at its end, and whether it looked at any that were.

use crate::decoder::modes::CODE;
use crate::decoder::{Random, Script};
use cpu_soft::{Completer, SoftHypervisor};
use guest_memory::GuestRam;
use guest_time::{GuestClock, HostTime};
use hypervisor::state::RunState;
use hypervisor::{
    CpuModel, Gpa, Hypervisor, Kicker, PartitionLayout, Vcpu, VcpuExit, VcpuIo, VcpuState, Wake,
};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, OnceLock};
use x86_decode::{Mnemonic, flag_use};
use x86_defs::flags::STATUS;

const RAM: u64 = 2 << 20;
/// Looks at the clock that a run may take: each at most 16,384 instructions.
const LOOKS: u64 = 6;
/// Instructions that are looked at where programs end differently: more than a run can have.
const TRACED: u64 = LOOKS * 16_384;
/// Instructions that may leave a register undefined.
const REGISTER_UNDEFINED: [Mnemonic; 5] =
    [Mnemonic::Bsf, Mnemonic::Bsr, Mnemonic::Bswap, Mnemonic::Shld, Mnemonic::Shrd];
/// Where gates lead.
const HALT: u64 = 0x7F00;
/// Bytes of code that are taken.
const MAX_CODE: usize = 0x4000;
const HLT: u8 = 0xF4;

/// Time that stands still; it is looked at a number of times.
#[derive(Clone, Default)]
struct Still(Arc<(AtomicU64, OnceLock<Kicker>)>);

impl HostTime for Still {
    fn now_ns(&self) -> u64 {
        let looks = self.0.0.fetch_add(1, SeqCst);
        if let Some(kicker) = self.0.1.get().filter(|_| looks >= LOOKS) {
            kicker.kick();
        }
        1_000_000
    }
    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000
    }
}

struct NoWake;
impl Wake for NoWake {
    fn wake(&self) {}
}

/// Answers by the address alone.
struct Nobody;

impl VcpuIo for Nobody {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        data.fill(port as u8);
    }
    fn pio_write(&self, _: u16, _: &[u8]) {}
    fn mmio_read(&self, at: Gpa, data: &mut [u8]) {
        data.fill(at.0 as u8);
    }
    fn mmio_write(&self, _: Gpa, _: &[u8]) {}
    fn pic_ack(&self) -> Option<u8> {
        None
    }
    fn eoi(&self, _: u8) {}
}

/// What a program left.
struct End {
    exit: VcpuExit,
    state: VcpuState,
    memory: Vec<u8>,
    /// In memory, bytes that may hold flags of an exception's frame.
    frame: Option<usize>,
}

/// Runs bytes as code on both tiers.
pub fn run(data: &[u8]) {
    let Some(script) = crate::script::<Script<'_>>(data) else { return };
    let Some(want) = run_on(&script, &SoftHypervisor::interpreter()) else { return };
    let translating = SoftHypervisor::translating(Arc::new(cpu_translate::Factory { threshold: 0 }));
    let Some(got) = run_on(&script, &translating) else { return };
    if difference(&want, &got, 0).is_none() {
        return;
    }
    let Some(undefined) = undefined_flags(&script) else { return };
    if let Some(difference) = difference(&want, &got, undefined) {
        panic!("{:?}: {difference}", script.mode);
    }
}

fn memory(script: &Script<'_>) -> Vec<u8> {
    let mut memory = script.mode.memory_with_gates(|_| HALT);
    memory.resize(RAM as usize, HLT);
    memory[HALT as usize..HALT as usize + 0x10].fill(HLT);
    let code = &script.code[..script.code.len().min(MAX_CODE)];
    memory[CODE as usize..CODE as usize + code.len()].copy_from_slice(code);
    memory
}

fn start(script: &Script<'_>) -> VcpuState {
    let mut state = script.mode.state();
    let mut random = Random(script.seed | 1);
    for register in [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15] {
        state.gpr[register] = random.value();
    }
    state
}

/// RAM with the program, and a partition around it.
fn place(script: &Script<'_>, time: &Still) -> (GuestRam, PartitionLayout) {
    let clock = GuestClock::new(Box::new(time.clone()));
    clock.resume();
    let ram = GuestRam::for_test(RAM);
    ram.store_bytes(0, &memory(script));
    let cpu_model = CpuModel::max();
    (ram.clone(), PartitionLayout { ram, vcpus: 1, cpu_model, tsc_khz: 1_000_000, clock })
}

/// `None`: it did not end by itself.
fn run_on(script: &Script<'_>, engine: &SoftHypervisor) -> Option<End> {
    let time = Still::default();
    let (ram, layout) = place(script, &time);
    let partition = engine.create_partition(&layout).ok()?;
    let mut vcpu: Box<dyn Vcpu> = partition.create_vcpu(0, Arc::new(NoWake)).ok()?;
    let _ = time.0.1.set(vcpu.kicker());
    vcpu.restore(&start(script)).ok()?;
    let io: Arc<dyn VcpuIo> = Arc::new(Nobody);
    let exit = vcpu.run(&io);
    if !matches!(exit, VcpuExit::Halted { .. } | VcpuExit::TripleFault) {
        return None;
    }
    let state = vcpu.save().expect("a software vCPU can be saved");
    let mut memory = vec![0; RAM as usize];
    ram.load_bytes(0, &mut memory);
    let frame = (state.rip & !0xF == HALT).then_some((state.segments[2].base + state.gpr[4]) as usize);
    Some(End { exit, state, memory, frame })
}

/// What differs but for `undefined` flags.
fn difference(want: &End, got: &End, undefined: u64) -> Option<String> {
    if want.exit != got.exit {
        return Some(format!("interpreter {:x?}, translator {:x?}", want.exit, got.exit));
    }
    // A fault may show flags that nothing reads.
    let state = |end: &End| {
        let mut state = end.state.clone();
        state.rflags &=
            if end.frame.is_some() || end.exit == VcpuExit::TripleFault { !STATUS } else { !undefined };
        state
    };
    if state(want) != state(got) {
        return Some(format!("interpreter {:x?}\ntranslator {:x?}", want.state, got.state));
    }
    let flags = want.frame.map_or(0..0, |at| at..at + 40);
    let differs = |at: &usize| want.memory[*at] != got.memory[*at] && !flags.contains(at);
    let at = (0..RAM as usize).find(differs)?;
    let near = |end: &End| format!("{:02x?}", &end.memory[at..(at + 16).min(RAM as usize)]);
    Some(format!("memory at {at:#x}: interpreter {}, translator {}", near(want), near(got)))
}

/// Flags that are undefined where the program ends; `None`: it looked at undefined ones, or may have got an undefined
/// register.
fn undefined_flags(script: &Script<'_>) -> Option<u64> {
    let (_ram, layout) = place(script, &Still::default());
    let mut completer = Completer::new(&layout, 0);
    let io: Arc<dyn VcpuIo> = Arc::new(Nobody);
    let mut state = start(script);
    let mut undefined = 0;
    for _ in 0..TRACED {
        let Ok(done) = completer.complete(&state, &io) else { break };
        if let Some(insn) = done.instruction {
            let looked_at = if flag_use::shows_all(&insn) { STATUS } else { flag_use::read(&insn) };
            let halts = insn.mnemonic() == Mnemonic::Hlt;
            if undefined & looked_at != 0 && !halts || REGISTER_UNDEFINED.contains(&insn.mnemonic()) {
                return None;
            }
            undefined = undefined & !flag_use::overwritten(&insn) | flag_use::undefined(&insn);
        }
        if done.state.run_state != RunState::Running {
            break;
        }
        state = done.state;
    }
    Some(undefined)
}
