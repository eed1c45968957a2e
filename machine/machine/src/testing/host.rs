//! A ground for tests: time moves when told, disks are memory, networks echo nothing.

use super::kernel;
use crate::host::{DeviceSlot, HostError, HostServices, SerialInput};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec;
use alloc::vec::Vec;
use chipset::SerialOut;
use core::ops::Range;
use device::Waker;
use guest_memory::{DmaSpace, GuestRam, HostSpan};
use guest_time::manual::ManualTime;
use guest_time::{GuestClock, GuestNs, Timer};
use hypervisor::Wake;
use machine_spec::{HostKey, RamSpec};
use sync::{Mutex, Once};
use virtio_devices::{
    BlockBackend, BlockInfo, BlockOp, BlockRequest, Busy, Completion, ConsoleBackend, EntropySource,
    NetBackend,
};

/// Bytes of the test disk.
pub const DISK_BYTES: usize = 1 << 20;

/// When a timer fires; shared with its handle.
type Deadline = Arc<Mutex<Option<GuestNs>>>;

#[derive(Default)]
struct Shared {
    pending: Mutex<VecDeque<DeviceSlot>>,
    timers: Mutex<Vec<(Deadline, DeviceSlot)>>,
    serial: Mutex<Vec<u8>>,
    input: Mutex<Option<SerialInput>>,
    disk: Mutex<Vec<u8>>,
    ram: Once<GuestRam>,
    kernel: Mutex<Vec<u8>>,
    missing: Mutex<Option<String>>,
}

/// See the module's header. Clones are the same ground.
#[derive(Clone)]
pub struct TestHost {
    time: ManualTime,
    clock: GuestClock,
    shared: Arc<Shared>,
}

impl Default for TestHost {
    fn default() -> Self {
        let time = ManualTime::default();
        let clock = GuestClock::new(Box::new(time.clone()));
        let shared = Shared {
            disk: Mutex::new(vec![0; DISK_BYTES]),
            kernel: Mutex::new(kernel::pvh(&kernel::IDLE)),
            ..Shared::default()
        };
        Self { time, clock, shared: Arc::new(shared) }
    }
}

impl TestHost {
    pub(super) fn set_ram(&self, ram: GuestRam) {
        self.shared.ram.call_once(|| ram);
    }
    /// Lets time run.
    pub fn start(&self) {
        self.clock.resume();
    }
    /// Lets time pass outside of the machine.
    pub fn sleep(&self, ns: u64) {
        self.time.advance(ns);
    }
    /// The host has no resource of this key.
    pub fn lack(&self, key: &str) {
        *self.shared.missing.lock() = Some(key.into());
    }
    /// What the guest wrote to its serial ports.
    pub fn serial_output(&self) -> Vec<u8> {
        self.shared.serial.lock().clone()
    }
    /// Types at the first serial port.
    pub fn type_text(&self, text: &[u8]) -> usize {
        let input = self.shared.input.lock().clone();
        input.map_or(0, |input| input.receive(text))
    }
    /// Polls whoever asked for it, until nobody does (or too many: a device that always asks again is broken).
    pub fn settle(&self) {
        for _ in 0..10_000 {
            let Some(slot) = self.shared.pending.lock().pop_front() else { return };
            slot.poll();
        }
        panic!("a device asks for polls without end");
    }
    /// Lets `ns` pass: timers fire, devices are polled.
    pub fn advance(&self, ns: u64) {
        let end = self.clock.now() + ns;
        for _ in 0..10_000 {
            self.settle();
            let next = self.shared.timers.lock().iter().filter_map(|(at, _)| *at.lock()).min();
            let Some(at) = next.filter(|at| *at <= end) else { break };
            self.time.advance(at.saturating_sub(self.clock.now()));
            let due: Vec<DeviceSlot> =
                self.shared.timers.lock().iter().filter_map(|t| take_due(t, at)).collect();
            due.iter().for_each(DeviceSlot::poll);
        }
        self.time.advance(end.saturating_sub(self.clock.now()));
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

struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

impl HostServices for TestHost {
    fn clock(&self) -> &GuestClock {
        &self.clock
    }
    fn waker(&self, slot: &DeviceSlot) -> Waker {
        let (shared, slot) = (self.shared.clone(), slot.clone());
        Waker::new(move || shared.pending.lock().push_back(slot.clone()))
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
        _: Waker,
    ) -> Result<Box<dyn SerialOut>, HostError> {
        self.check(stream)?;
        if stream.is_some() {
            *self.shared.input.lock() = Some(input);
        }
        Ok(Box::new(SerialLog(self.shared.clone())))
    }
    fn open_console(&self, stream: Option<&HostKey>) -> Result<Box<dyn ConsoleBackend>, HostError> {
        self.check(stream)?;
        Ok(Box::new(Silence))
    }
    fn open_disk(&self, disk: &HostKey) -> Result<Box<dyn BlockBackend>, HostError> {
        self.check(Some(disk))?;
        Ok(Box::new(MemoryDisk { shared: self.shared.clone(), waker: None, done: VecDeque::new() }))
    }
    fn open_net(&self, net: &HostKey) -> Result<(Box<dyn NetBackend>, u16), HostError> {
        self.check(Some(net))?;
        Ok((Box::new(Silence), 1500))
    }
    fn entropy(&self) -> Result<Box<dyn EntropySource>, HostError> {
        Ok(Box::new(Silence))
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

struct SerialLog(Arc<Shared>);

impl SerialOut for SerialLog {
    fn write(&mut self, bytes: &[u8]) -> usize {
        self.0.serial.lock().extend_from_slice(bytes);
        bytes.len()
    }
    fn input_room(&mut self) {}
}

/// Takes everything, gives nothing.
struct Silence;

impl ConsoleBackend for Silence {
    fn set_waker(&mut self, _: Waker) {}
    fn write(&mut self, data: &[u8]) -> usize {
        data.len()
    }
    fn read(&mut self, _: &mut [u8]) -> usize {
        0
    }
}

impl NetBackend for Silence {
    fn set_waker(&mut self, _: Waker) {}
    fn send(&mut self, _: &[u8]) -> Result<(), Busy> {
        Ok(())
    }
    fn receive(&mut self, _: &mut [u8]) -> Option<usize> {
        None
    }
}

impl EntropySource for Silence {
    fn fill(&mut self, buf: &mut [u8]) {
        buf.fill(0x5A);
    }
}

struct MemoryDisk {
    shared: Arc<Shared>,
    waker: Option<Waker>,
    done: VecDeque<Completion>,
}

impl BlockBackend for MemoryDisk {
    fn info(&self) -> BlockInfo {
        BlockInfo {
            bytes: DISK_BYTES as u64,
            read_only: false,
            block_bytes: 512,
            physical_block_bytes: 4096,
            discard: true,
            write_zeroes: true,
        }
    }
    fn set_waker(&mut self, waker: Waker) {
        self.waker = Some(waker);
    }
    fn submit(&mut self, request: BlockRequest, mem: &DmaSpace) -> Result<(), Busy> {
        let mut disk = self.shared.disk.lock();
        match request.op {
            BlockOp::Read { offset } | BlockOp::Write { offset } => {
                let mut at = offset as usize;
                for buffer in request.buffers.iter() {
                    let part = &mut disk[at..at + buffer.len as usize];
                    match request.op {
                        BlockOp::Read { .. } => mem.ram().store_bytes(buffer.offset, part),
                        _ => mem.ram().load_bytes(buffer.offset, part),
                    }
                    at += buffer.len as usize;
                }
            }
            BlockOp::WriteZeroes { offset, bytes, .. } | BlockOp::Discard { offset, bytes } => {
                disk[offset as usize..(offset + bytes) as usize].fill(0);
            }
            BlockOp::Flush => {}
        }
        drop(disk);
        self.done.push_back(Completion { id: request.id, result: Ok(()) });
        if let Some(waker) = &self.waker {
            waker.wake();
        }
        Ok(())
    }
    fn next_completion(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }
}
