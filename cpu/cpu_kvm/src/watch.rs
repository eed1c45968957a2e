//! Whether KVM serves this guest well: a thread that looks once a second at how many instructions are executed in
//! software, by the interpreter (`complete.rs`) or by KVM's own emulator.
//!
//! A processor with virtualization runs all but a few instructions of a guest itself. Where it does not, KVM emulates the
//! guest's kernel, a microsecond an instruction, and fails sooner or later: the software engine is faster, and whole.
//!
//! Invariants: it tells each partition at most once, through the first vCPU's `run`; it asks KVM for nothing that waits for
//! a vCPU to leave KVM_RUN.

use crate::partition::{Shared, VcpuCell};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use sync::Mutex;

/// Between two looks.
const STEP: Duration = Duration::from_secs(1);
/// Nanoseconds a second for completing instructions that are too many. Time, not a number: on a host that is busy with
/// something else everything takes longer alike.
const COMPLETING_A_SECOND: u64 = 100_000_000;
/// Instructions a second in KVM's emulator that are too many: a booting guest on real hardware needs some hundreds for
/// its devices.
const EMULATED_A_SECOND: u64 = 100_000;
/// Instructions in KVM's emulator before which nothing is said: a guest begins in ways that it does not go on.
const EMULATED_AT_LEAST: u64 = 1_000_000;
/// KVM's name of the count.
pub const EMULATED: &[u8] = b"insn_emulation";

/// What was found.
#[derive(Default)]
pub struct Verdict {
    reason: Mutex<Option<String>>,
    /// Readable without the lock.
    there: AtomicBool,
}

impl Verdict {
    /// Takes it, once.
    pub fn take(&self) -> Option<String> {
        if self.there.swap(false, Ordering::SeqCst) { self.reason.lock().take() } else { None }
    }

    fn give(&self, reason: String) {
        *self.reason.lock() = Some(reason);
        self.there.store(true, Ordering::SeqCst);
    }
}

static THREAD_START: OnceLock<fn()> = OnceLock::new();

/// Has every thread that the engine starts from now on call `f` first; the first one counts.
pub fn on_thread_start(f: fn()) {
    let _ = THREAD_START.set(f);
}

/// The thread; dropping it ends it.
pub struct Watch {
    ending: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `shared`.
    pub fn start(shared: &Arc<Shared>) -> io::Result<Self> {
        let (ending, shared) = (Arc::new(AtomicBool::new(false)), Arc::downgrade(shared));
        let end = ending.clone();
        let run = move || {
            if let Some(first) = THREAD_START.get() {
                first();
            }
            watch(&shared, &end);
        };
        let thread = std::thread::Builder::new().name("kvm-watch".into()).spawn(run)?;
        Ok(Self { ending, thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // It does nothing that could fail.
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Weak<Shared>, ending: &AtomicBool) {
    let (mut completed, mut completing, mut emulated) = (0, 0, 0);
    let mut since = Instant::now();
    while !ending.load(Ordering::SeqCst) {
        std::thread::park_timeout(STEP);
        let took = since.elapsed();
        let Some(shared) = shared.upgrade() else { return };
        if took < STEP {
            continue;
        }
        since = Instant::now();
        let now_completed = shared.counters.completed.load(Ordering::Relaxed);
        let now_completing = shared.counters.completing_ns.load(Ordering::Relaxed);
        let count = |cell: &VcpuCell| cell.emulated.get()?.as_ref()?.read().ok();
        let now_emulated: u64 = shared.vcpus.iter().filter_map(count).sum();
        shared.counters.emulated.store(now_emulated, Ordering::Relaxed);
        let a_second = |n: u64| (n as f64 / took.as_secs_f64()) as u64;
        let found = Found {
            completed: a_second(now_completed - completed),
            completing_ns: a_second(now_completing - completing),
            emulated: a_second(now_emulated.saturating_sub(emulated)),
            emulated_in_all: now_emulated,
        };
        (completed, completing, emulated) = (now_completed, now_completing, now_emulated);
        if let Some(reason) = found.objection() {
            shared.unsuited.give(reason);
            if let Some(cell) = shared.vcpus.first() {
                cell.kick.nudge();
            }
            return;
        }
    }
}

/// What was executed in software, a second, and in KVM since the beginning.
#[derive(Clone, Copy, Default)]
struct Found {
    completed: u64,
    completing_ns: u64,
    emulated: u64,
    emulated_in_all: u64,
}

impl Found {
    /// What speaks against this KVM.
    fn objection(&self) -> Option<String> {
        let Self { completed, completing_ns, emulated, emulated_in_all } = *self;
        let too_many = emulated >= EMULATED_A_SECOND && emulated_in_all >= EMULATED_AT_LEAST;
        (completing_ns >= COMPLETING_A_SECOND || too_many).then(|| {
            format!(
                "this host's KVM executes the guest in software ({emulated} instructions a second in KVM, {completed} here)"
            )
        })
    }
}

/// One of a vCPU's binary statistics (api.rst, KVM_GET_STATS_FD).
pub struct Count {
    file: File,
    at: u64,
}

impl Count {
    /// The one called `name` in `file`.
    pub fn find(file: File, name: &[u8]) -> io::Result<Self> {
        let mut header = [0; 24];
        file.read_exact_at(&mut header, 0)?;
        let field = |bytes: &[u8], at: usize| -> u32 {
            u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
        };
        let name_size = (field(&header, 4) as usize).min(256);
        let descriptors = field(&header, 8).min(1024);
        let (first, data) = (u64::from(field(&header, 16)), u64::from(field(&header, 20)));
        let size = 16 + name_size;
        for n in 0..u64::from(descriptors) {
            let mut descriptor = vec![0; size];
            file.read_exact_at(&mut descriptor, first + n * size as u64)?;
            let end = descriptor[16..].iter().position(|b| *b == 0).unwrap_or(name_size);
            if &descriptor[16..16 + end] == name {
                return Ok(Self { file, at: data + u64::from(field(&descriptor, 8)) });
            }
        }
        Err(io::ErrorKind::NotFound.into())
    }

    /// Its value now.
    pub fn read(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.at)?;
        Ok(u64::from_le_bytes(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds() {
        let little = Found {
            completed: 1_000_000,
            completing_ns: COMPLETING_A_SECOND - 1,
            emulated: EMULATED_A_SECOND - 1,
            emulated_in_all: u64::MAX,
        };
        assert_eq!(little.objection(), None);
        let beginning =
            Found { emulated: u64::MAX, emulated_in_all: EMULATED_AT_LEAST - 1, ..Found::default() };
        assert_eq!(beginning.objection(), None, "it only begins");
        let completes = Found { completed: 2_000, completing_ns: COMPLETING_A_SECOND, ..Found::default() };
        assert!(completes.objection().unwrap().contains("2000 here"));
        let emulates =
            Found { emulated: EMULATED_A_SECOND, emulated_in_all: EMULATED_AT_LEAST, ..Found::default() };
        assert!(emulates.objection().unwrap().contains("100000 instructions"));
    }
}
