//! Processors as guests' engine sees them: time slices, the timer that ends them, and what asks for a processor back.

use crate::acpi::MAX_PROCESSORS;
use crate::arch::{self, clock, interrupts, lapic, processors};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use cpu_hardware::Ground;

/// Memory is mapped one to one.
pub fn physical(address: usize) -> u64 {
    address as u64
}

/// One of them.
struct Own {
    /// Its local APIC's.
    id: AtomicU32,
    /// When whoever runs there has had its time, in our time.
    turn_ends: AtomicU64,
    /// An interrupt came, or the scheduler is wanted: to be seen before a guest is entered.
    interrupted: AtomicU32,
    /// It has nothing to do.
    idle: AtomicBool,
    /// How long it had nothing to do.
    idle_ns: AtomicU64,
}

static ALL: [Own; MAX_PROCESSORS] = [const {
    Own {
        id: AtomicU32::new(0),
        turn_ends: AtomicU64::new(0),
        interrupted: AtomicU32::new(0),
        idle: AtomicBool::new(false),
        idle_ns: AtomicU64::new(0),
    }
}; MAX_PROCESSORS];
/// A device wants to be polled, or something was asked.
static WORK: AtomicBool = AtomicBool::new(false);
/// Some processor looks at it, and looks again when it has done.
static LOOKING: AtomicBool = AtomicBool::new(false);

/// There is work that nobody is at.
fn is_work_left() -> bool {
    WORK.load(SeqCst) && !LOOKING.load(SeqCst)
}

fn own() -> &'static Own {
    &ALL[processors::number()]
}

/// See the module's header: the one that runs this.
pub struct Processor;

impl Processor {
    /// Interrupts are noticed from now on. On each.
    pub fn initialize() {
        interrupts::on_timer(|| own().interrupted.store(1, SeqCst));
        interrupts::on_device(Self::want_scheduler);
        own().id.store(lapic::id(), SeqCst);
    }

    /// Whoever runs next has it until `at`, in our time.
    pub fn grant_until(at: u64) {
        own().turn_ends.store(at, SeqCst);
    }

    /// Some processor is to look at its work soon.
    pub fn want_scheduler() {
        WORK.store(true, SeqCst);
        own().interrupted.store(1, SeqCst);
    }

    /// The scheduler looks now: others need not.
    pub fn scheduler_looks() {
        LOOKING.store(true, SeqCst);
        WORK.store(false, SeqCst);
    }

    /// It has looked; whether it is to look again.
    pub fn scheduler_has_looked() -> bool {
        LOOKING.store(false, SeqCst);
        WORK.load(SeqCst)
    }

    /// A vCPU has something to do: whoever is idle comes, otherwise the one that runs this.
    pub fn want_turn() {
        if !Self::wake_idle(1) {
            Self::want_scheduler();
        }
    }

    /// Has up to `count` idle processors look for something to do; whether there was one.
    pub fn wake_idle(count: usize) -> bool {
        let idle = ALL.iter().take(processors::running());
        let idle = idle.filter(|other| !core::ptr::eq(*other, own()) && other.idle.swap(false, SeqCst));
        idle.take(count).map(|other| lapic::send_wake(other.id.load(SeqCst))).count() > 0
    }

    /// Has processor `number` leave guest code.
    pub fn interrupt(number: usize) {
        if number != processors::number()
            && let Some(other) = ALL.get(number)
        {
            lapic::send_wake(other.id.load(SeqCst));
        }
    }

    /// From now on [`Processor::wake_idle`] reaches it; what came before is to be looked for.
    pub fn offer() {
        own().interrupted.store(0, SeqCst);
        own().idle.store(true, SeqCst);
    }

    /// It has found something.
    pub fn withdraw() {
        own().idle.store(false, SeqCst);
    }

    /// Waits until `at` in our time, or an interrupt since [`Processor::offer`].
    pub fn idle_until(at: u64) {
        arch::disable_interrupts();
        let now = clock::now_ns();
        if at > now && !is_work_left() && own().interrupted.load(SeqCst) == 0 {
            lapic::interrupt_in(at - now);
            arch::wait_for_interrupt();
        }
        arch::enable_interrupts();
        Self::withdraw();
        own().idle_ns.fetch_add(clock::now_ns().saturating_sub(now), Relaxed);
    }

    /// How long each has had nothing to do, in nanoseconds.
    pub fn idle_times() -> impl Iterator<Item = u64> {
        ALL.iter().take(processors::running()).map(|one| one.idle_ns.load(Relaxed))
    }
}

impl Ground for Processor {
    fn physical(&self) -> fn(usize) -> u64 {
        physical
    }

    fn tsc_khz(&self) -> u32 {
        clock::tsc_khz()
    }

    fn before_entry(&self, due_in: Option<u64>) -> bool {
        let own = own();
        own.interrupted.store(0, SeqCst);
        let left = own.turn_ends.load(SeqCst).saturating_sub(clock::now_ns());
        if left == 0 || is_work_left() {
            return false;
        }
        lapic::interrupt_in(left.min(due_in.unwrap_or(u64::MAX)));
        true
    }

    fn interrupted(&self) -> &AtomicU32 {
        &own().interrupted
    }
}
