//! What a machine needs of its ground, without an operating system ([`machine::HostServices`]).
//!
//! Wakers and timers are noted here and served by the scheduler's loop, with no lock held. Invariant: a VM's RAM comes
//! from free memory, whole, and is the guest's alone; nothing else of memory ever reaches a guest.

use super::console::Port;
use super::devices::{Devices, MachineDisk};
use super::processor::Processor;
use crate::arch::pci::VirtioFunction;
use crate::arch::{clock, clock::MachineTime, processors};
use crate::disk::{Disk, RamDisk, SharedStore, Store};
use crate::memory::FreeMemory;
use crate::switch::{MTU, Switch, SwitchPort};
use crate::vm_spec::DiskSource;
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
use core::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use device::Waker;
use guest_memory::HostSpan;
use guest_time::{GuestClock, GuestNs, Timer};
use hypervisor::Wake;
use machine::{DeviceSlot, HostError, HostServices, SerialInput};
use machine_spec::{HostKey, RamSpec};
use sync::Mutex;
use virtio_devices::backend::SECTOR_BYTES;
use virtio_devices::{BlockBackend, ConsoleBackend, EntropySource, NetBackend};

const PAGE: u64 = 4096;
/// Guest RAM starts at a multiple of this, so that nested tables are small.
const LARGE_PAGE: u64 = 2 << 20;

/// What all VMs get their share of.
pub struct Resources {
    free: Mutex<FreeMemory>,
    switch: Arc<Mutex<Switch>>,
    /// Disks and network card of the machine.
    pub devices: Devices,
}

impl Resources {
    /// All that is free, and all devices that are known.
    pub fn new(free: FreeMemory, functions: &[VirtioFunction]) -> Self {
        let switch: Arc<Mutex<Switch>> = Arc::default();
        let devices = Devices::start(functions, || SwitchPort::plug(&switch));
        Self { free: Mutex::new(free), switch, devices }
    }

    /// Bytes left.
    pub fn free_bytes(&self) -> u64 {
        self.free.lock().bytes()
    }

    /// Takes memory at a multiple of `align` for good, and makes it zero.
    fn take(&self, bytes: u64, align: u64) -> Result<NonNull<u8>, HostError> {
        let taken = self.free.lock().take(bytes, align, u64::MAX);
        let at = taken.ok_or_else(|| {
            let free = self.free_bytes() >> 20;
            HostError(format!("{} MiB are wanted in one piece, {free} MiB are free", bytes >> 20))
        })?;
        // SAFETY: whole pages of RAM, mapped one to one, taken from free memory: nobody has references to them.
        unsafe { zero(at, bytes.div_ceil(8)) };
        NonNull::new(core::ptr::with_exposed_provenance_mut(at as usize))
            .ok_or_else(|| HostError("memory at address 0".into()))
    }

    /// Disk `number` of the machine, for one VM.
    pub fn machine_disk(&self, number: usize) -> Result<MachineDisk, HostError> {
        let disk = self.devices.take_disk(number);
        disk.ok_or_else(|| HostError(format!("the machine has no disk {number}, or it is another VM's")))
    }

    /// A disk in memory that starts as a copy of `content`.
    fn ram_disk(&self, content: &[u8]) -> Result<RamDisk, HostError> {
        let bytes = content.len().next_multiple_of(SECTOR_BYTES as usize);
        let at = self.take(bytes as u64, PAGE)?;
        // SAFETY: the memory was just taken for good, and is nobody else's.
        let memory = unsafe { core::slice::from_raw_parts_mut(at.as_ptr(), bytes) };
        memory[..content.len()].copy_from_slice(content);
        Ok(RamDisk::new(memory))
    }
}

/// What a VM has for good, whatever machine is built on it: RAM, disks.
#[derive(Default)]
pub struct Holdings {
    /// Start and length of the RAM.
    ram: Mutex<Option<(u64, u64)>>,
    /// By the name in the machine's spec.
    disks: Mutex<BTreeMap<String, SharedStore>>,
}

/// A timer's deadline in guest time, and whose it is.
type Deadline = (Weak<Mutex<Option<GuestNs>>>, DeviceSlot);

#[derive(Default)]
struct Events {
    /// Devices that asked to be polled, with the mark that they did.
    pending: Mutex<VecDeque<(Arc<AtomicBool>, DeviceSlot)>>,
    timers: Mutex<Vec<Deadline>>,
    /// Of each vCPU.
    places: Mutex<BTreeMap<u32, Arc<Place>>>,
}

/// Where a vCPU is.
#[derive(Default)]
pub struct Place {
    woken: AtomicBool,
    /// Number of the processor that it has, plus one; 0: none.
    processor: AtomicUsize,
}

impl Place {
    /// Takes it for this processor; `false`: another one has it.
    pub fn take(&self) -> bool {
        let mine = processors::number() + 1;
        self.processor.compare_exchange(0, mine, SeqCst, SeqCst).is_ok()
    }

    /// It has no processor any more.
    pub fn leave(&self) {
        self.processor.store(0, SeqCst);
    }

    /// Number of the processor that it has.
    pub fn processor(&self) -> Option<usize> {
        self.processor.load(SeqCst).checked_sub(1)
    }

    /// Whether it was woken since the last call.
    pub fn take_woken(&self) -> bool {
        self.woken.swap(false, SeqCst)
    }
}

/// See the module's header.
pub struct VmHost {
    clock: GuestClock,
    events: Arc<Events>,
    resources: Arc<Resources>,
    files: BTreeMap<String, &'static [u8]>,
    /// By the name in the machine's spec.
    disks: BTreeMap<String, DiskSource>,
    port: Arc<Port>,
    holdings: Arc<Holdings>,
}

impl VmHost {
    /// For one VM; `files` are what it may read, `disks` what it may have, `holdings` what it has already.
    pub fn new(
        resources: &Arc<Resources>,
        files: BTreeMap<String, &'static [u8]>,
        disks: BTreeMap<String, DiskSource>,
        port: Arc<Port>,
        holdings: Arc<Holdings>,
    ) -> Self {
        Self {
            clock: GuestClock::new(Box::new(MachineTime)),
            events: Arc::default(),
            resources: resources.clone(),
            files,
            disks,
            port,
            holdings,
        }
    }

    /// What holds disk `name`: the same as ever, or taken now.
    pub fn store(&self, name: &str) -> Result<SharedStore, HostError> {
        self.held(name, self.disks.get(name))
    }

    /// What holds disk `number` of the machine, which is no disk of the guest.
    pub fn machine_store(&self, number: usize) -> Result<SharedStore, HostError> {
        self.held(&format!("machine:{number}"), Some(&DiskSource::Machine(number)))
    }

    fn held(&self, name: &str, source: Option<&DiskSource>) -> Result<SharedStore, HostError> {
        let mut disks = self.holdings.disks.lock();
        if let Some(store) = disks.get(name) {
            return Ok(store.clone());
        }
        let store: Box<dyn Store> = match source {
            Some(DiskSource::Ram(file)) => {
                let content = self.files.get(&super::vm::image_key(file));
                let content = content.ok_or_else(|| HostError(format!("the bundle has no file `{file}`")))?;
                Box::new(self.resources.ram_disk(content)?)
            }
            Some(DiskSource::Machine(number)) => Box::new(self.resources.machine_disk(*number)?),
            None => return Err(HostError(format!("there is no disk `{name}`"))),
        };
        let store: SharedStore = Arc::new(Mutex::new(store));
        disks.insert(name.into(), store.clone());
        Ok(store)
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

    /// Where vCPU `id` is.
    pub fn place(&self, id: u32) -> Arc<Place> {
        self.events.places.lock().entry(id).or_default().clone()
    }
}

impl Wake for Place {
    fn wake(&self) {
        self.woken.store(true, SeqCst);
        Processor::want_turn();
    }
    fn interrupt(&self) {
        if let Some(processor) = self.processor() {
            Processor::interrupt(processor);
        }
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
        self.place(id)
    }

    fn allocate_ram(&self, spec: &RamSpec) -> Result<HostSpan, HostError> {
        let mut held = self.holdings.ram.lock();
        let base = match *held {
            Some((at, bytes)) if bytes == spec.bytes => {
                // SAFETY: whole words of RAM that were taken for this VM, whose last machine has ended (`Vm::start_again`).
                unsafe { zero(at, bytes / 8) };
                NonNull::new(core::ptr::with_exposed_provenance_mut(at as usize))
                    .ok_or_else(|| HostError("memory at address 0".into()))?
            }
            Some(_) => return Err(HostError("the VM's RAM has another size than before".into())),
            None => self.resources.take(spec.bytes, LARGE_PAGE)?,
        };
        *held = Some((base.expose_provenance().get() as u64, spec.bytes));
        // SAFETY: the range is RAM, mapped one to one, taken from free memory for good; nobody has references to it.
        Ok(unsafe { HostSpan::new(base, spec.bytes as usize, Box::new(())) })
    }

    fn clear_ram(&self) -> Result<(), HostError> {
        if let Some((at, bytes)) = *self.holdings.ram.lock() {
            // SAFETY: the guest's RAM, whole words of it; nobody has references to it, and the guest does not run.
            unsafe { zero(at, bytes / 8) };
        }
        Ok(())
    }

    fn populated_ram(&self) -> Result<Vec<Range<u64>>, HostError> {
        Ok(self.holdings.ram.lock().iter().map(|(_, bytes)| 0..*bytes).collect())
    }

    fn read_file(&self, file: &HostKey) -> Result<Vec<u8>, HostError> {
        let found = self.files.get(&file.0);
        let found = found.ok_or_else(|| HostError(format!("the bundle has no file `{}`", file.0)))?;
        let mut bytes = Vec::new();
        let room = bytes.try_reserve_exact(found.len());
        room.map_err(|_| HostError(format!("`{}` does not fit into the heap", file.0)))?;
        bytes.extend_from_slice(found);
        Ok(bytes)
    }

    fn open_serial(
        &self,
        stream: Option<&HostKey>,
        input: SerialInput,
        _: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError> {
        Ok(Port::open(&self.port, stream.is_some(), input))
    }

    fn open_console(&self, stream: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError> {
        Ok(Port::open_console(&self.port, stream.is_some()))
    }

    fn open_disk(&self, disk: &HostKey) -> Result<Box<dyn BlockBackend>, HostError> {
        Ok(Box::new(Disk::new(Box::new(self.store(&disk.0)?))))
    }

    fn open_net(&self, _: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError> {
        Ok((Box::new(SwitchPort::plug(&self.resources.switch)), MTU))
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
