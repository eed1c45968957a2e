//! Programs of `system.rs` and `system32.rs` on both tiers; once more with interrupts between any two blocks.

use super::harness::apic::{self, X2_DIVIDE, X2_INITIAL, X2_LVT_TIMER};
use super::harness::{Guest, RAM_BYTES, Random, Stop, Tables, translator};
use super::system::{self, COUNTED, System};
use super::system32::{self, Window};
use super::{Mode, paged_state, seeds};
use cpu_soft::SoftHypervisor;
use guest_time::manual::ManualTime;
use guest_time::{GuestClock, HostTime};
use hypervisor::VcpuState;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use x86_defs::flags::{IF, STATUS};
use x86_defs::paging::{PTE_P, PTE_U, PTE_W};

/// One look at the clock in so many finds that time has passed, which makes an interrupt: seldom enough for its handler to
/// end before the next one.
const LOOKS_OF_A_FIT: u64 = 8;

/// Time that passes by fits and starts, as it is looked at.
#[derive(Default)]
struct Fits {
    looks: AtomicU64,
    now: AtomicU64,
}

impl HostTime for Fits {
    fn now_ns(&self) -> u64 {
        // Hashed, so that its rhythm is never that of a program.
        let looks = self.looks.fetch_add(1, SeqCst);
        let starts = looks.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32 & (LOOKS_OF_A_FIT - 1) == 0;
        self.now.fetch_add(if starts { 1000 } else { 0 }, SeqCst)
    }
    fn wall_ns(&self) -> u64 {
        1_700_000_000_000_000_000
    }
}

/// An interrupt every half of a fit.
fn arm_timer(g: &mut Guest) {
    let before = g.state();
    g.code(|a| {
        apic::wrmsr(a, X2_DIVIDE, 0xB);
        apic::wrmsr(a, X2_LVT_TIMER, 1 << 17 | u64::from(system::IRQ));
        apic::wrmsr(a, X2_INITIAL, 500);
        a.hlt().unwrap();
    });
    g.run();
    g.edit(|s| {
        let apic = s.apic.take();
        *s = before;
        s.apic = apic;
    });
}

/// A guest for programs of the system's kind.
struct Machine {
    guest: Guest,
    fresh: VcpuState,
    window: Window,
    compared: [(u64, u64); 4],
    storm: bool,
}

impl Machine {
    /// `mode`: 64-bit code, or 32-bit code in one of two pagings.
    /// `storm`: interrupts come between any two blocks.
    fn new(engine: SoftHypervisor, mode: Mode, storm: bool) -> Self {
        let mut g = if storm {
            let clock = GuestClock::new(Box::new(Fits::default()));
            clock.resume();
            Guest::with_clock("max", &engine.with_slice(1), ManualTime::default(), clock)
        } else {
            Guest::with_engine("max", &engine)
        };
        let mut tables = Tables::long(&g.ram);
        tables.identity(RAM_BYTES, PTE_P | PTE_W | PTE_U);
        g.long_with(&tables);
        let mut guest = g.with_x2apic();
        if storm {
            arm_timer(&mut guest);
        }
        if mode == Mode::Long {
            let window = Window { table: system::prepare(&mut guest, &mut tables), entry: 8 };
            let mut fresh = guest.state();
            system::state(&mut fresh);
            return Self { guest, fresh, window, compared: system::COMPARED, storm };
        }
        let apic = guest.state().apic;
        let mut tables = if mode == Mode::Pae { Tables::pae(&guest.ram) } else { Tables::legacy(&guest.ram) };
        let mut fresh = paged_state(&guest, &mut tables, mode);
        let window =
            Window { table: tables.entry(system::WINDOW, 1), entry: if mode == Mode::Pae { 8 } else { 4 } };
        system32::prepare(&mut guest);
        fresh.apic = apic;
        guest.vcpu.restore(&fresh).unwrap();
        let mut fresh = guest.state();
        system32::state(&mut fresh);
        Self { guest, fresh, window, compared: system32::COMPARED_32, storm }
    }

    /// Runs it: how it ended, what it left in registers and in memory, and what it did.
    fn run(&mut self, p: &System) -> (Stop, VcpuState, Vec<u8>, [u32; 8]) {
        let g = &mut self.guest;
        p.load(g);
        let mut start = p.start(&self.fresh);
        start.rflags |= if self.storm { IF } else { 0 };
        g.vcpu.restore(&start).unwrap();
        let mut stop = g.run();
        let mut state = g.state();
        // Flags of a fault that nothing reads; what the exceptions' stack holds of them.
        state.rflags &= !STATUS;
        let counts = system::counters(g);
        if self.storm {
            // How often the clock was looked at is nobody's business, nor where the timer stands.
            g.put(system::COUNTERS + 4, &[0; 4]);
            state.apic = None;
            if let Stop::Halted(timer) = &mut stop {
                *timer = None;
            }
        }
        let mut memory = Vec::new();
        for (at, len) in self.compared {
            let from = memory.len();
            memory.resize(from + len as usize, 0);
            g.ram.load_bytes(at, &mut memory[from..]);
        }
        (stop, state, memory, counts)
    }
}

#[test]
fn random_systems_end_alike() {
    end_alike(translator(), Mode::Long, false, 1, 0);
}

/// Where translations are dropped, all at once, some times in each program.
fn crowded() -> SoftHypervisor {
    let factory = cpu_translate::Crowded(cpu_translate::Factory { threshold: 0 });
    SoftHypervisor::translating(std::sync::Arc::new(factory))
}

#[test]
fn random_systems_end_alike_in_little_room() {
    end_alike(crowded(), Mode::Long, false, 4, 0);
    // Slices end everywhere, so that there are hot blocks, too.
    end_alike(crowded(), Mode::Long, true, 8, 1);
    end_alike(crowded(), Mode::Legacy, true, 8, 2);
}

#[test]
fn random_32_bit_systems_end_alike() {
    end_alike(translator(), Mode::Pae, false, 2, 0);
    end_alike(translator(), Mode::Legacy, false, 2, 1);
}

#[test]
fn random_systems_end_alike_however_often_they_are_interrupted() {
    for (n, mode) in [Mode::Long, Mode::Pae, Mode::Legacy].into_iter().enumerate() {
        end_alike(translator(), mode, true, 3, n as u64);
    }
}

/// Every `of`-th program, from the `first` on.
fn end_alike(engine: SoftHypervisor, mode: Mode, storm: bool, of: u64, first: u64) {
    let seeds = seeds().filter(|seed| seed % of == first);
    let mut reference = Machine::new(SoftHypervisor::interpreter(), mode, storm);
    let mut translating = Machine::new(engine, mode, storm);
    assert_eq!(reference.window, translating.window);
    let (mut counts, mut programs) = ([0u64; 8], 0);
    for seed in seeds {
        let mut r = Random(seed.wrapping_mul(0xA24B_AED4_963E_E407));
        let p = match mode {
            Mode::Long => System::random(&mut r, reference.window.table),
            _ => System::random_32(&mut r, reference.window),
        };
        let want = reference.run(&p);
        let got = translating.run(&p);
        programs += 1;
        counts.iter_mut().zip(got.3).for_each(|(count, seen)| *count += u64::from(seen));
        if (&want.0, &want.1, &want.2) != (&got.0, &got.1, &got.2) {
            let both = want.2.iter().zip(&got.2).enumerate();
            let differ: Vec<_> = both.filter(|(_, (a, b))| a != b).take(32).collect();
            panic!(
                "SEED={seed} in {mode:?} {}\nmemory differs at {differ:x?} of {:x?}\ninterpreter {:x?} {:x?}\ntranslator  {:x?} {:x?}",
                p.listing(),
                reference.compared,
                want.0,
                want.1,
                got.0,
                got.1
            );
        }
    }
    let listed: Vec<_> = COUNTED.iter().zip(counts).map(|(what, n)| format!("{n} {what}")).collect();
    println!("{mode:?}, storm {storm}: {programs} systems; {}", listed.join(", "));
    assert!(programs < 100 || counts.iter().all(|n| *n > 0));
}
