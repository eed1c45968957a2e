//! What happened in a partition so far: exits, completed instructions by name.

use hypervisor::Statistics;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use sync::Mutex;

/// Counts of a partition.
#[derive(Default)]
pub struct Counters {
    /// KVM_RUN returned to do something.
    pub exits: AtomicU64,
    /// Processor time that vCPUs' threads spent in `run`, in nanoseconds.
    busy_ns: AtomicU64,
    /// Instructions completed by the interpreter.
    pub completed: AtomicU64,
    /// Time that passed for that, in nanoseconds, of all vCPUs.
    pub completing_ns: AtomicU64,
    /// Instructions that KVM emulated, as last seen by `watch.rs`.
    pub emulated: AtomicU64,
    by_mnemonic: Mutex<BTreeMap<String, u64>>,
    failure: Mutex<Option<String>>,
}

impl Counters {
    /// An instruction was completed, which was begun at `since`; whether it is the first of its name.
    pub fn complete(&self, mnemonic: &str, since: Instant) -> bool {
        self.completed.fetch_add(1, Ordering::Relaxed);
        self.completing_ns.fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
        let mut all = self.by_mnemonic.lock();
        match all.get_mut(mnemonic) {
            Some(count) => {
                *count += 1;
                false
            }
            None => all.insert(mnemonic.into(), 1).is_none(),
        }
    }

    /// Something failed where nobody could be told: the next `run` says so.
    pub fn fail(&self, reason: String) {
        self.failure.lock().get_or_insert(reason);
    }

    /// What failed.
    pub fn take_failure(&self) -> Option<String> {
        self.failure.lock().take()
    }

    /// Adds to what vCPUs have done.
    pub fn busy(&self, ns: u64) {
        self.busy_ns.fetch_add(ns, Ordering::Relaxed);
    }

    /// All of it.
    pub fn statistics(&self) -> Statistics {
        let mut counts = vec![
            ("exits".to_string(), self.exits.load(Ordering::Relaxed)),
            ("emulated".to_string(), self.emulated.load(Ordering::Relaxed)),
            ("completed".to_string(), self.completed.load(Ordering::Relaxed)),
        ];
        let named = self.by_mnemonic.lock();
        counts.extend(named.iter().map(|(name, count)| (format!("completed.{name}"), *count)));
        Statistics { instructions: None, busy_ns: self.busy_ns.load(Ordering::Relaxed), counts }
    }
}

/// Processor time of the calling thread, in nanoseconds.
pub fn thread_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}
