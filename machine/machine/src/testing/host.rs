//! A ground for tests: time moves when told, and the host's ends are those of [`super::ends`].

use super::ends::{Console, Ends, Entropy, MemoryDisk, Network, SerialLog};
use super::kernel;
use crate::host::{DeviceSlot, HostError, HostServices, SerialInput};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::SerialOut;
use core::ops::Range;
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use device::{Register, Waker};
use guest_memory::{GuestRam, HostSpan};
use guest_time::manual::ManualTime;
use guest_time::{GuestClock, GuestNs, HostTime, Timer};
use hypervisor::{Bell, Kicker, Wake};
use machine_spec::{HostKey, RamSpec};
use sync::{Mutex, Once};
use virtio_devices::{BlockBackend, ConsoleBackend, EntropySource, NetBackend};

/// Polls after which nobody believes any more that a device comes to rest.
const MANY_POLLS: usize = 10_000;
/// As many as are waited for when restless devices are allowed.
const SOME_POLLS: usize = 100;

/// When a timer fires; shared with its handle.
type Deadline = Arc<Mutex<Option<GuestNs>>>;

#[derive(Default)]
struct Shared {
    pending: Mutex<VecDeque<DeviceSlot>>,
    timers: Mutex<Vec<(Deadline, DeviceSlot)>>,
    bells: Mutex<Vec<(DeviceSlot, Register)>>,
    ends: Ends,
    ram: Once<GuestRam>,
    kernel: Mutex<Vec<u8>>,
    missing: Mutex<Option<String>>,
    restless: AtomicBool,
}

/// A clock that moves when told, and kicks a vCPU when it was looked at often enough.
#[derive(Clone, Default)]
struct Time {
    manual: ManualTime,
    looks: Arc<AtomicU64>,
    kicker: Arc<Mutex<Option<Kicker>>>,
}

impl HostTime for Time {
    fn now_ns(&self) -> u64 {
        let last = self.looks.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)) == Ok(1);
        if let Some(kicker) = self.kicker.lock().as_ref().filter(|_| last) {
            kicker.kick();
        }
        self.manual.now_ns()
    }
    fn wall_ns(&self) -> u64 {
        self.manual.wall_ns()
    }
}

/// See the module's header. Clones are the same ground.
#[derive(Clone)]
pub struct TestHost {
    time: Time,
    clock: GuestClock,
    shared: Arc<Shared>,
}

impl Default for TestHost {
    fn default() -> Self {
        Self::new(Time::default(), Ends::default())
    }
}

impl TestHost {
    fn new(time: Time, ends: Ends) -> Self {
        let clock = GuestClock::new(Box::new(time.clone()));
        let kernel = Mutex::new(kernel::pvh(&kernel::IDLE));
        Self { time, clock, shared: Arc::new(Shared { ends, kernel, ..Shared::default() }) }
    }
    /// The same host, for a machine that is brought back: its time, disks and moods.
    pub fn again(&self) -> Self {
        let host = Self::new(self.time.clone(), self.shared.ends.again());
        host.shared.restless.store(self.shared.restless.load(SeqCst), SeqCst);
        host
    }
    pub(super) fn set_ram(&self, ram: GuestRam) {
        self.shared.ram.call_once(|| ram);
    }
    /// Lets time run.
    pub fn start(&self) {
        self.clock.resume();
    }
    /// Lets time pass outside of the machine.
    pub fn sleep(&self, ns: u64) {
        self.time.manual.advance(ns);
    }
    /// Kicks a vCPU when its engine has looked at the clock `looks` times: the end of a run, without a watch.
    pub fn kick_after(&self, looks: u64, kicker: Kicker) {
        *self.time.kicker.lock() = Some(kicker);
        self.time.looks.store(looks, SeqCst);
    }
    /// The host's ends of the devices.
    pub fn ends(&self) -> &Ends {
        &self.shared.ends
    }
    /// A guest may keep a device busy for ever (rings that lie on each other): [`TestHost::settle`] gives up quietly.
    pub fn allow_restless(&self) {
        self.shared.restless.store(true, SeqCst);
    }
    /// The host has no resource of this key.
    pub fn lack(&self, key: &str) {
        *self.shared.missing.lock() = Some(key.into());
    }
    /// Rings the bell of this number.
    pub fn ring(&self, descriptor: i32) {
        let bell = self.shared.bells.lock().get(descriptor as usize).cloned();
        if let Some((slot, register)) = bell {
            slot.ring(register);
        }
    }
    /// What the guest wrote to its serial ports.
    pub fn serial_output(&self) -> Vec<u8> {
        self.shared.ends.serial_output()
    }
    /// Types at the first serial port.
    pub fn type_text(&self, text: &[u8]) -> usize {
        self.shared.ends.type_text(text)
    }
    /// Polls whoever asked for it, until nobody does (or too many: a device that always asks again is broken).
    pub fn settle(&self) {
        let restless = self.shared.restless.load(SeqCst);
        for _ in 0..if restless { SOME_POLLS } else { MANY_POLLS } {
            let Some(slot) = self.shared.pending.lock().pop_front() else { return };
            slot.poll();
        }
        assert!(restless, "a device asks for polls without end");
    }
    /// Lets `ns` pass: timers fire, devices are polled.
    pub fn advance(&self, ns: u64) {
        let end = self.clock.now() + ns;
        for _ in 0..MANY_POLLS {
            self.settle();
            let next = self.shared.timers.lock().iter().filter_map(|(at, _)| *at.lock()).min();
            let Some(at) = next.filter(|at| *at <= end) else { break };
            self.time.manual.advance(at.saturating_sub(self.clock.now()));
            let due: Vec<DeviceSlot> =
                self.shared.timers.lock().iter().filter_map(|t| take_due(t, at)).collect();
            due.iter().for_each(DeviceSlot::poll);
        }
        self.time.manual.advance(end.saturating_sub(self.clock.now()));
        self.settle();
    }

    fn check(&self, key: Option<&HostKey>) -> Result<(), HostError> {
        match (&*self.shared.missing.lock(), key) {
            (Some(missing), Some(key)) if *missing == key.0 => Err(HostError("not there".into())),
            _ => Ok(()),
        }
    }
}

fn take_due((at, slot): &(Deadline, DeviceSlot), now: GuestNs) -> Option<DeviceSlot> {
    let mut at = at.lock();
    let due = at.is_some_and(|at| at <= now);
    if due {
        *at = None;
    }
    due.then(|| slot.clone())
}

struct TestBell(i32);

impl Bell for TestBell {
    fn descriptor(&self) -> i32 {
        self.0
    }
}

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl HostServices for TestHost {
    fn clock(&self) -> &GuestClock {
        &self.clock
    }
    fn waker(&self, slot: &DeviceSlot) -> Waker {
        // Weak: the host's ends keep wakers, and belong to the host.
        let (shared, slot) = (Arc::downgrade(&self.shared), slot.clone());
        Waker::new(move || {
            if let Some(shared) = shared.upgrade() {
                shared.pending.lock().push_back(slot.clone());
            }
        })
    }
    fn bell(&self, slot: &DeviceSlot, register: Register) -> Option<Arc<dyn Bell>> {
        let mut bells = self.shared.bells.lock();
        bells.push((slot.clone(), register));
        Some(Arc::new(TestBell(bells.len() as i32 - 1)))
    }
    fn timer(&self, slot: &DeviceSlot) -> Box<dyn Timer> {
        let at = Arc::new(Mutex::new(None));
        self.shared.timers.lock().push((at.clone(), slot.clone()));
        Box::new(TestTimer(at))
    }
    fn vcpu_wake(&self, _: u32) -> Arc<dyn Wake> {
        Arc::new(NoWake)
    }
    fn allocate_ram(&self, spec: &RamSpec) -> Result<HostSpan, HostError> {
        Ok(HostSpan::allocate(spec.bytes as usize))
    }
    fn clear_ram(&self) -> Result<(), HostError> {
        if let Some(ram) = self.shared.ram.get() {
            ram.fill_bytes(0, 0, ram.span_bytes());
        }
        Ok(())
    }
    fn populated_ram(&self) -> Result<Vec<Range<u64>>, HostError> {
        let everything = self.shared.ram.get().map(|ram| 0..ram.span_bytes());
        Ok(everything.into_iter().collect())
    }
    fn read_file(&self, file: &HostKey) -> Result<Vec<u8>, HostError> {
        self.check(Some(file))?;
        Ok(self.shared.kernel.lock().clone())
    }
    fn open_serial(
        &self,
        stream: Option<&HostKey>,
        input: SerialInput,
        waker: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError> {
        self.check(stream)?;
        Ok(Box::new(SerialLog::open(&self.shared.ends, stream.map(|key| &*key.0), input, waker)))
    }
    fn open_console(&self, stream: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError> {
        self.check(stream)?;
        Ok(Box::new(Console {
            name: stream.map_or("console", |key| &key.0).into(),
            ends: self.shared.ends.clone(),
        }))
    }
    fn open_disk(&self, disk: &HostKey) -> Result<Box<dyn BlockBackend>, HostError> {
        self.check(Some(disk))?;
        Ok(Box::new(MemoryDisk::new(disk.0.clone(), self.shared.ends.clone())))
    }
    fn open_net(&self, net: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError> {
        self.check(Some(net))?;
        Ok((Box::new(Network { name: net.0.clone(), ends: self.shared.ends.clone() }), 1500))
    }
    fn entropy(&self) -> Result<Box<dyn EntropySource>, HostError> {
        Ok(Box::new(Entropy))
    }
}

struct TestTimer(Deadline);

impl Timer for TestTimer {
    fn arm(&self, at: GuestNs) {
        *self.0.lock() = Some(at);
    }
    fn cancel(&self) {
        *self.0.lock() = None;
    }
}
