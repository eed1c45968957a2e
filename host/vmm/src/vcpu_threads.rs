//! One thread for each vCPU, and the gate that parks them all.
//!
//! Called by: the driver. The threads call [`RunVcpu::run`] (the machine) until it says to wait or the gate closes.
//!
//! Invariants:
//! - After [`VcpuThreads::park`] has returned, no vCPU runs until [`VcpuThreads::release`].
//! - A wake that comes before the wait is not lost; a halted vCPU's thread sleeps in the kernel.
//! - A thread that dies (a panic, which its hook has reported) is told of, and nobody waits for it.

use crate::services::lock;
use guest_time::{GuestClock, GuestNs};
use hypervisor::Wake;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long vCPUs may take to end; after a park that did not succeed, that is known to be in vain.
const END_TIME: Duration = Duration::from_secs(5);
const END_STEP: Duration = Duration::from_millis(1);

/// What a vCPU's thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Run again.
    Run,
    /// Wait for a wake, or for this moment in guest time.
    Wait(Option<GuestNs>),
}

/// What the threads run: the machine.
pub trait RunVcpu: Send + Sync + 'static {
    /// Runs vCPU `id` for a while.
    fn run(&self, id: u32) -> Next;
    /// Makes `run` of vCPU `id` return soon.
    fn kick(&self, id: u32);
    /// The thread of vCPU `id` died.
    fn died(&self, id: u32);
}

/// Which vCPUs are in their engine, and in which turn.
pub struct Turns(Vec<AtomicU64>);

impl Turns {
    /// For `count` vCPUs, none of which runs.
    pub fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU64::new(0)).collect())
    }
    /// How many vCPUs there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }
    /// vCPU `id` goes into its engine.
    pub fn enter(&self, id: u32) {
        self.0[id as usize].fetch_add(1, Ordering::Relaxed);
    }
    /// It comes out.
    pub fn leave(&self, id: u32) {
        self.0[id as usize].fetch_add(1, Ordering::Relaxed);
    }
    /// The number of the turn that vCPU `id` is in, if it is in one.
    pub fn running(&self, id: u32) -> Option<u64> {
        // It is counted when it goes in and when it comes out.
        Some(self.0[id as usize].load(Ordering::Relaxed)).filter(|number| number % 2 == 1)
    }
}

/// Where a halted vCPU's thread sleeps.
pub struct Bed {
    woken: Mutex<bool>,
    changed: Condvar,
}

impl Bed {
    /// One that nobody sleeps in.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { woken: Mutex::new(false), changed: Condvar::new() })
    }

    /// Sleeps until woken or until `wake_at`, and uses up the wake.
    fn sleep(&self, clock: &GuestClock, wake_at: Option<GuestNs>) {
        let mut woken = lock(&self.woken);
        while !*woken {
            // While guest time stands still the gate is closed, or closing: its wake ends the sleep.
            woken = match wake_at.and_then(|at| clock.host_ns_until(at)) {
                Some(0) => return,
                Some(ns) => {
                    let wait = self.changed.wait_timeout(woken, Duration::from_nanos(ns));
                    wait.unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(woken).unwrap_or_else(PoisonError::into_inner),
            };
        }
        *woken = false;
    }
}

impl Wake for Bed {
    fn wake(&self) {
        *lock(&self.woken) = true;
        self.changed.notify_one();
    }
}

#[derive(Default)]
struct GateState {
    closed: bool,
    ending: bool,
    parked: usize,
    /// Threads that will never park.
    dead: usize,
}

struct Gate {
    /// `closed || ending`, readable without the lock.
    shut: AtomicBool,
    state: Mutex<GateState>,
    changed: Condvar,
}

impl Gate {
    /// Waits while the gate is closed. False: the thread is to end.
    fn pass(&self) -> bool {
        if !self.shut.load(Ordering::Acquire) {
            return true;
        }
        let mut state = lock(&self.state);
        state.parked += 1;
        self.changed.notify_all();
        while state.closed && !state.ending {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
        !state.ending
    }

    fn set(&self, change: impl FnOnce(&mut GateState)) {
        let mut state = lock(&self.state);
        change(&mut state);
        self.shut.store(state.closed || state.ending, Ordering::Release);
        self.changed.notify_all();
    }
}

/// A thread's, to its end.
struct Life<'a> {
    target: &'a dyn RunVcpu,
    gate: &'a Gate,
    id: u32,
}

impl Drop for Life<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.gate.set(|state| state.dead += 1);
            self.target.died(self.id);
        }
    }
}

/// See the module's header. Dropping it ends the threads.
pub struct VcpuThreads {
    target: Arc<dyn RunVcpu>,
    beds: Vec<Arc<Bed>>,
    gate: Arc<Gate>,
    turns: Arc<Turns>,
    threads: Vec<JoinHandle<()>>,
}

impl VcpuThreads {
    /// Starts a parked thread for each of `beds` (vCPU 0, 1, …).
    pub fn start(target: Arc<dyn RunVcpu>, beds: Vec<Arc<Bed>>, clock: &GuestClock) -> io::Result<Self> {
        let gate = Arc::new(Gate {
            shut: AtomicBool::new(true),
            state: Mutex::new(GateState { closed: true, ..GateState::default() }),
            changed: Condvar::new(),
        });
        let turns = Arc::new(Turns::new(beds.len()));
        let mut all = Self { target, beds, gate, turns, threads: Vec::new() };
        for (id, bed) in all.beds.iter().enumerate() {
            let (target, bed, gate, clock) =
                (all.target.clone(), bed.clone(), all.gate.clone(), clock.clone());
            let turns = all.turns.clone();
            let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(move || {
                jail::enter(jail::Thread::Vcpu, &[]);
                let life = Life { target: &*target, gate: &gate, id: id as u32 };
                while life.gate.pass() {
                    turns.enter(life.id);
                    let next = life.target.run(life.id);
                    turns.leave(life.id);
                    if let Next::Wait(wake_at) = next {
                        bed.sleep(&clock, wake_at);
                    }
                }
            })?;
            all.threads.push(thread);
        }
        Ok(all)
    }

    /// Who is in the engine.
    pub fn turns(&self) -> Arc<Turns> {
        self.turns.clone()
    }

    /// Parks all vCPUs; returns when none runs any more, or with how many still do after `patience`: an engine that
    /// hangs.
    pub fn park(&self, patience: Duration) -> Result<(), usize> {
        self.gate.set(|state| state.closed = true);
        self.disturb();
        let deadline = Instant::now() + patience;
        let mut state = lock(&self.gate.state);
        while state.parked + state.dead < self.threads.len() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(self.threads.len() - state.parked - state.dead);
            }
            state = self.gate.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Lets them run again.
    pub fn release(&self) {
        self.gate.set(|state| state.closed = false);
    }

    fn disturb(&self) {
        for (id, bed) in self.beds.iter().enumerate() {
            self.target.kick(id as u32);
            bed.wake();
        }
    }
}

impl Drop for VcpuThreads {
    fn drop(&mut self) {
        self.gate.set(|state| state.ending = true);
        self.disturb();
        let deadline = Instant::now() + END_TIME;
        for thread in self.threads.drain(..) {
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(END_STEP);
            }
            // A panic of a vCPU thread was reported by the panic hook; one that hangs ends with the process.
            if thread.is_finished() {
                let _ = thread.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use host_io::clock::HostClock;
    use std::sync::atomic::AtomicU64;

    const LONG: Duration = Duration::from_secs(60);

    /// Counts runs; vCPU 1 always waits for ever.
    #[derive(Default)]
    struct Counter {
        runs: [AtomicU64; 2],
        kicks: AtomicU64,
    }
    impl RunVcpu for Counter {
        fn run(&self, id: u32) -> Next {
            self.runs[id as usize].fetch_add(1, Ordering::SeqCst);
            if id == 1 { Next::Wait(None) } else { Next::Run }
        }
        fn kick(&self, _: u32) {
            self.kicks.fetch_add(1, Ordering::SeqCst);
        }
        fn died(&self, _: u32) {}
    }

    #[test]
    fn parked_means_nobody_runs() {
        let clock = GuestClock::new(Box::new(HostClock));
        clock.resume();
        let counter = Arc::new(Counter::default());
        let beds = vec![Bed::new(), Bed::new()];
        let threads = VcpuThreads::start(counter.clone(), beds.clone(), &clock).unwrap();
        threads.park(LONG).unwrap();
        assert_eq!(counter.runs[0].load(Ordering::SeqCst), 0, "threads start parked");
        for round in 1..20 {
            threads.release();
            while counter.runs[0].load(Ordering::SeqCst) < round * 10
                || counter.runs[1].load(Ordering::SeqCst) < round
            {
                beds[1].wake();
                std::thread::yield_now();
            }
            threads.park(LONG).unwrap();
            let runs = counter.runs[0].load(Ordering::SeqCst);
            std::thread::yield_now();
            assert_eq!(counter.runs[0].load(Ordering::SeqCst), runs);
        }
        threads.release();
        drop(threads);
        assert!(counter.kicks.load(Ordering::SeqCst) >= 40);
    }

    #[test]
    fn a_vcpu_that_hangs_is_told_of_and_does_not_hang_the_end() {
        struct Hangs(std::sync::mpsc::SyncSender<()>);
        impl RunVcpu for Hangs {
            fn run(&self, _: u32) -> Next {
                let _ = self.0.send(());
                std::thread::park();
                Next::Run
            }
            fn kick(&self, _: u32) {}
            fn died(&self, _: u32) {}
        }
        let clock = GuestClock::new(Box::new(HostClock));
        let (runs, ran) = std::sync::mpsc::sync_channel(1);
        let threads = VcpuThreads::start(Arc::new(Hangs(runs)), vec![Bed::new()], &clock).unwrap();
        threads.park(LONG).unwrap();
        threads.release();
        ran.recv().unwrap();
        assert_eq!(threads.park(Duration::from_millis(1)), Err(1));
    }

    #[test]
    fn a_thread_that_dies_is_told_of_and_not_waited_for() {
        struct Dies(std::sync::mpsc::SyncSender<u32>);
        impl RunVcpu for Dies {
            fn run(&self, id: u32) -> Next {
                assert_ne!(id, 1, "this panic is the test's");
                Next::Wait(None)
            }
            fn kick(&self, _: u32) {}
            fn died(&self, id: u32) {
                let _ = self.0.send(id);
            }
        }
        let clock = GuestClock::new(Box::new(HostClock));
        let (dies, died) = std::sync::mpsc::sync_channel(1);
        let beds = vec![Bed::new(), Bed::new()];
        let threads = VcpuThreads::start(Arc::new(Dies(dies)), beds, &clock).unwrap();
        threads.release();
        assert_eq!(died.recv().unwrap(), 1);
        threads.park(LONG).unwrap();
    }

    #[test]
    fn sleep_ends_at_the_moment_or_by_an_earlier_wake() {
        let clock = GuestClock::new(Box::new(HostClock));
        clock.resume();
        let bed = Bed::new();
        let at = clock.now() + 2_000_000;
        bed.sleep(&clock, Some(at));
        assert!(clock.now() >= at);
        bed.wake();
        bed.sleep(&clock, None);
    }
}
