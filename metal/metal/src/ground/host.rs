//! What a machine needs of its ground, without an operating system ([`machine::HostServices`]).
//!
//! Wakers and timers are noted here and served by the scheduler's loop, with no lock held. Invariant: a VM's RAM comes
//! from free memory, whole, and is the guest's alone; nothing else of memory ever reaches a guest.

use super::console::Port;
use super::processor::Processor;
use crate::arch::{clock, clock::MachineTime};
use crate::memory::FreeMemory;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::format;
use alloc::string::{String, ToString};
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use chipset::SerialOut;
use core::arch::x86_64::__cpuid_count;
use core::ops::Range;
use core::ptr::NonNull;
use core::sync::atomic::{AtomicBool, Ordering::SeqCst};
use device::Waker;
use guest_memory::HostSpan;
use guest_time::{GuestClock, GuestNs, Timer};
use hypervisor::Wake;
use machine::{DeviceSlot, HostError, HostServices, SerialInput};
use machine_spec::{HostKey, RamSpec};
use sync::Mutex;
use virtio_devices::{BlockBackend, ConsoleBackend, EntropySource, NetBackend};

/// Guest RAM starts at a multiple of this, so that nested tables are small.
const LARGE_PAGE: u64 = 2 << 20;

/// Free memory, shared by all VMs.
pub struct Memory(Mutex<FreeMemory>);

impl Memory {
    /// All that is free.
    pub fn new(free: FreeMemory) -> Self {
        Self(Mutex::new(free))
    }
    /// Bytes left.
    pub fn free_bytes(&self) -> u64 {
        self.0.lock().bytes()
    }
}

/// A timer's deadline in guest time, and whose it is.
type Deadline = (Weak<Mutex<Option<GuestNs>>>, DeviceSlot);

#[derive(Default)]
struct Events {
    /// Devices that asked to be polled, with the mark that they did.
    pending: Mutex<VecDeque<(Arc<AtomicBool>, DeviceSlot)>>,
    timers: Mutex<Vec<Deadline>>,
    /// By vCPU: it was woken.
    woken: Mutex<BTreeMap<u32, Arc<AtomicBool>>>,
}

/// See the module's header.
pub struct VmHost {
    clock: GuestClock,
    events: Arc<Events>,
    memory: Arc<Memory>,
    files: BTreeMap<String, &'static [u8]>,
    port: Arc<Port>,
    /// Start and length of the RAM.
    ram: Mutex<Option<(u64, u64)>>,
}

impl VmHost {
    /// For one VM; `files` are what it may read.
    pub fn new(memory: &Arc<Memory>, files: BTreeMap<String, &'static [u8]>, port: Arc<Port>) -> Self {
        Self {
            clock: GuestClock::new(Box::new(MachineTime)),
            events: Arc::default(),
            memory: memory.clone(),
            files,
            port,
            ram: Mutex::new(None),
        }
    }

    /// Polls the devices that asked for it and those whose timers are due.
    pub fn serve(&self) {
        let now = self.clock.now();
        let pending = core::mem::take(&mut *self.events.pending.lock());
        let mut due = Vec::new();
        for (asked, slot) in pending {
            // From here on another wake is another poll.
            asked.store(false, SeqCst);
            due.push(slot);
        }
        self.events.timers.lock().retain(|(deadline, slot)| {
            let Some(deadline) = deadline.upgrade() else { return false };
            let mut deadline = deadline.lock();
            if self.clock.is_running() && deadline.is_some_and(|at| at <= now) {
                *deadline = None;
                due.push(slot.clone());
            }
            true
        });
        due.iter().for_each(DeviceSlot::poll);
    }

    /// When the next of its timers is due, in our time; `None`: none is.
    pub fn next_timer(&self) -> Option<u64> {
        let timers = self.events.timers.lock();
        let next = timers.iter().filter_map(|(deadline, _)| *deadline.upgrade()?.lock()).min()?;
        Some(clock::now_ns().saturating_add(self.clock.host_ns_until(next)?))
    }

    /// Whether vCPU `id` was woken since the last call.
    pub fn take_woken(&self, id: u32) -> bool {
        self.events.woken.lock().get(&id).is_some_and(|woken| woken.swap(false, SeqCst))
    }
}

struct VcpuWake(Arc<AtomicBool>);

impl Wake for VcpuWake {
    fn wake(&self) {
        self.0.store(true, SeqCst);
        Processor::want_scheduler();
    }
}

struct DeviceTimer(Arc<Mutex<Option<GuestNs>>>);

impl Timer for DeviceTimer {
    fn arm(&self, at: GuestNs) {
        *self.0.lock() = Some(at);
        // The turn of whoever runs may end earlier now.
        Processor::want_scheduler();
    }
    fn cancel(&self) {
        *self.0.lock() = None;
    }
}

fn not_there(what: &str) -> HostError {
    HostError(format!("{what} on bare metal are not there yet"))
}

impl HostServices for VmHost {
    fn clock(&self) -> &GuestClock {
        &self.clock
    }

    fn waker(&self, slot: &DeviceSlot) -> Waker {
        let (events, slot) = (self.events.clone(), slot.clone());
        let asked = Arc::new(AtomicBool::new(false));
        Waker::new(move || {
            if !asked.swap(true, SeqCst) {
                events.pending.lock().push_back((asked.clone(), slot.clone()));
            }
            Processor::want_scheduler();
        })
    }

    fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer> {
        let deadline = Arc::new(Mutex::new(None));
        self.events.timers.lock().push((Arc::downgrade(&deadline), slot.clone()));
        Box::new(DeviceTimer(deadline))
    }

    fn vcpu_wake(&self, id: u32) -> Arc<dyn Wake> {
        Arc::new(VcpuWake(self.events.woken.lock().entry(id).or_default().clone()))
    }

    fn allocate_ram(&self, spec: &RamSpec) -> Result<HostSpan, HostError> {
        let free = self.memory.free_bytes();
        let taken = self.memory.0.lock().take(spec.bytes, LARGE_PAGE, u64::MAX);
        let at = taken.ok_or_else(|| {
            HostError(format!(
                "{} MiB are wanted in one piece, {} MiB are free",
                spec.bytes >> 20,
                free >> 20
            ))
        })?;
        *self.ram.lock() = Some((at, spec.bytes));
        self.clear_ram()?;
        let base = core::ptr::with_exposed_provenance_mut::<u8>(at as usize);
        let base = NonNull::new(base).ok_or_else(|| HostError("memory at address 0".into()))?;
        // SAFETY: the range is RAM, mapped one to one, taken from free memory for good; nobody has references to it.
        Ok(unsafe { HostSpan::new(base, spec.bytes as usize, Box::new(())) })
    }

    fn clear_ram(&self) -> Result<(), HostError> {
        if let Some((at, bytes)) = *self.ram.lock() {
            // SAFETY: the guest's RAM, whole words of it; nobody has references to it, and the guest does not run.
            unsafe { zero(at, bytes / 8) };
        }
        Ok(())
    }

    fn populated_ram(&self) -> Result<Vec<Range<u64>>, HostError> {
        Ok(self.ram.lock().iter().map(|(_, bytes)| 0..*bytes).collect())
    }

    fn read_file(&self, file: &HostKey) -> Result<Vec<u8>, HostError> {
        let found = self.files.get(&file.0);
        found
            .map(|bytes| bytes.to_vec())
            .ok_or_else(|| HostError(format!("the bundle has no file `{}`", file.0)))
    }

    fn open_serial(
        &self,
        stream: Option<&HostKey>,
        input: SerialInput,
        _: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError> {
        Ok(Port::open(&self.port, stream.is_some(), input))
    }

    fn open_console(&self, _: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError> {
        Err(not_there("virtio consoles"))
    }
    fn open_disk(&self, _: &HostKey) -> Result<Box<dyn BlockBackend>, HostError> {
        Err(not_there("disks"))
    }
    fn open_net(&self, _: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError> {
        Err(not_there("networks"))
    }

    fn entropy(&self) -> Result<Box<dyn EntropySource>, HostError> {
        const RDRAND: u32 = 1 << 30;
        if __cpuid_count(1, 0).ecx & RDRAND == 0 {
            return Err(HostError("this processor has no RDRAND".to_string()));
        }
        Ok(Box::new(ProcessorRandom))
    }
}

/// # Safety
/// `words` words at `at` are RAM that nobody refers to.
unsafe fn zero(at: u64, words: u64) {
    // SAFETY: the caller vouches for the range; DF is clear in Rust code.
    unsafe {
        core::arch::asm!("rep stosq", inout("rdi") at => _, inout("rcx") words => _, in("rax") 0,
            options(nostack, preserves_flags));
    }
}

/// The processor's generator.
struct ProcessorRandom;

impl EntropySource for ProcessorRandom {
    fn fill(&mut self, buf: &mut [u8]) {
        for piece in buf.chunks_mut(8) {
            let (mut word, mut valid): (u64, u8);
            loop {
                // SAFETY: `entropy` has looked for the instruction.
                unsafe {
                    core::arch::asm!("rdrand {w}", "setc {v}", w = out(reg) word, v = out(reg_byte) valid,
                        options(nomem, nostack));
                }
                if valid != 0 {
                    break;
                }
                core::hint::spin_loop();
            }
            piece.copy_from_slice(&word.to_le_bytes()[..piece.len()]);
        }
    }
}
