//! The registers and the status machine, around a device that only records.

use super::*;
use crate::device::{DeviceType, QueueRunner};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use guest_memory::GuestRam;
use hypervisor::{Msi, MsiRoute};
use pci::regs;
use proptest::prelude::*;
use saved_state::{FieldWriter, Fields, SavedState};

struct NoRoute;
impl MsiRoute for NoRoute {
    fn set(&self, _: Msi) {}
    fn fire(&self) {}
    fn mask(&self, _: bool) {}
}
struct NoMessages;
impl MsiSink for NoMessages {
    fn route(&self) -> Result<Box<dyn MsiRoute>, EngineError> {
        Ok(Box::new(NoRoute))
    }
}

#[derive(Default)]
struct Seen {
    started: AtomicU32,
    kicks: AtomicU32,
    resets: AtomicU32,
    busy: AtomicBool,
    value: AtomicU32,
}

struct Recorder(Arc<Seen>);

struct Quiet(Arc<Seen>);

impl QueueRunner for Quiet {
    fn kick(&mut self, _: u16) {
        self.0.kicks.fetch_add(1, Ordering::SeqCst);
    }
    fn poll(&mut self) {}
    fn quiesce(&mut self) -> Poll<()> {
        if self.0.busy.load(Ordering::SeqCst) { Poll::Pending } else { Poll::Ready(()) }
    }
    fn resume(&mut self) {
        self.kick(0);
    }
    fn queue_states(&self) -> Vec<(u16, QueueState)> {
        alloc::vec![(1, QueueState { next_available: 7, next_used: 5, in_flight: alloc::vec![3, 9] })]
    }
}

struct Own(u32);
impl SavedState for Own {
    const KIND: &'static str = "recorder";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self(value) = self;
        w.uint(1, *value);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self(r.uint(1)?))
    }
}

impl VirtioDevice for Recorder {
    fn device_type(&self) -> DeviceType {
        DeviceType::ENTROPY
    }
    fn features(&self) -> u64 {
        1 << 3
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![16, 32]
    }
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        if offset == 0 {
            device::write_le(data, self.0.value.load(Ordering::SeqCst).into());
        }
    }
    fn config_write(&mut self, offset: usize, data: &[u8]) {
        if offset == 0 {
            self.0.value.store(device::read_le(data) as u32, Ordering::SeqCst);
        }
    }
    fn start(&mut self, a: Activation) -> Vec<Runner> {
        self.0.started.fetch_add(1, Ordering::SeqCst);
        assert_eq!(a.queues.len(), 2);
        alloc::vec![Runner { queues: alloc::vec![0, 1], run: Box::new(Quiet(self.0.clone())) }]
    }
    fn poll(&mut self, _: &dyn Signals) {}
    fn reset(&mut self) {
        self.0.resets.fetch_add(1, Ordering::SeqCst);
        self.0.value.store(0, Ordering::SeqCst);
    }
    fn save(&self) -> StateBlob {
        saved_state::to_blob(&Own(self.0.value.load(Ordering::SeqCst)))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.0.value.store(saved_state::from_blob::<Own>(blob)?.0, Ordering::SeqCst);
        Ok(())
    }
}

fn fresh() -> (VirtioPci, Arc<Seen>) {
    let seen = Arc::new(Seen::default());
    let config = VirtioPciConfig {
        name: "test".into(),
        dma: DmaSpace::new(GuestRam::for_test(0x10_000)),
        line: IrqLine::unconnected(),
        waker: Waker::new(|| {}),
        on_root_bus: false,
    };
    (VirtioPci::new(Box::new(Recorder(seen.clone())), config, &NoMessages).unwrap(), seen)
}

fn get(f: &mut VirtioPci, at: u64, bytes: usize) -> u64 {
    let mut data = [0xFF; 8];
    f.io_read(0, at, &mut data[..bytes]).unwrap();
    device::read_le(&data[..bytes])
}
fn put(f: &mut VirtioPci, at: u64, bytes: usize, value: u64) {
    f.io_write(0, at, &value.to_le_bytes()[..bytes]).unwrap();
}

fn features(f: &mut VirtioPci, value: u64) -> u64 {
    put(f, 0x14, 1, 0);
    put(f, 0x14, 1, 3);
    for half in 0..2 {
        put(f, 8, 4, half);
        put(f, 12, 4, value >> (32 * half));
    }
    put(f, 0x14, 1, 0xB);
    get(f, 0x14, 1)
}

fn enable(f: &mut VirtioPci, queue: u64) {
    put(f, 0x16, 2, queue);
    for (at, address) in [(0x20, 0x1000u64), (0x28, 0x2000), (0x30, 0x3000)] {
        put(f, at, 8, address);
    }
    put(f, 0x1C, 2, 1);
}

/// Ready, with queue 1 enabled and a value of its own.
fn running() -> (VirtioPci, Arc<Seen>) {
    let (mut f, seen) = fresh();
    f.config_write(regs::COMMAND, &[6, 0]);
    assert_eq!(features(&mut f, 1 << 32 | 1 << 3), 0xB);
    enable(&mut f, 1);
    put(&mut f, 0x1A, 2, 2);
    put(&mut f, 0x10, 2, 0);
    put(&mut f, 0x2000, 4, 0xABCD);
    put(&mut f, 0x14, 1, 0xF);
    seen.resets.store(0, Ordering::SeqCst);
    (f, seen)
}

#[test]
fn features_are_negotiated() {
    let (mut f, _) = fresh();
    assert_eq!((get(&mut f, 4, 4), get(&mut f, 0x12, 2)), (1 << 28 | 1 << 29 | 1 << 3, 2));
    put(&mut f, 0, 4, 1);
    assert_eq!(get(&mut f, 4, 4), 1);
    put(&mut f, 0, 4, 2);
    assert_eq!(get(&mut f, 4, 4), 0);
    assert_eq!(features(&mut f, 1 << 3), 3, "without version 1");
    assert_eq!(features(&mut f, 1 << 32 | 1 << 5), 3, "not offered");
    assert_eq!(features(&mut f, 1 << 32), 0xB);
    put(&mut f, 12, 4, 0);
    assert_eq!(get(&mut f, 12, 4), 1, "settled");
}

#[test]
fn queues_are_enabled_once_and_only_when_valid() {
    let (mut f, _) = fresh();
    enable(&mut f, 0);
    assert_eq!(get(&mut f, 0x1C, 2), 0, "before the features");
    features(&mut f, 1 << 32);
    assert_eq!((get(&mut f, 0x18, 2), get(&mut f, 0x1E, 2)), (16, 0));
    enable(&mut f, 0);
    assert_eq!(get(&mut f, 0x1C, 2), 1);
    put(&mut f, 0x20, 8, 0x5000);
    put(&mut f, 0x1C, 2, 0);
    assert_eq!((get(&mut f, 0x20, 4), get(&mut f, 0x24, 4), get(&mut f, 0x1C, 2)), (0x1000, 0, 1));
    put(&mut f, 0x16, 2, 2);
    assert_eq!((get(&mut f, 0x18, 2), get(&mut f, 0x20, 8)), (0, 0));
    for (register, value) in [(0x18, 64), (0x18, 3), (0x18, 0)] {
        features(&mut f, 1 << 32);
        put(&mut f, 0x16, 2, 1);
        put(&mut f, register, 2, value);
        put(&mut f, 0x1C, 2, 1);
        assert_eq!(get(&mut f, 0x1C, 2), 0);
        assert_eq!(get(&mut f, 0x14, 1), 0x4B);
        put(&mut f, 0x14, 1, 0xF);
        assert_eq!(get(&mut f, 0x14, 1), 0x4B, "cannot get ready any more");
    }
}

#[test]
fn vectors_that_do_not_exist_are_none() {
    let (mut f, _) = fresh();
    for (value, expected) in [(2, 2), (3, 0xFFFF), (0, 0), (0xFFFF, 0xFFFF)] {
        put(&mut f, 0x10, 2, value);
        put(&mut f, 0x1A, 2, value);
        assert_eq!((get(&mut f, 0x10, 2), get(&mut f, 0x1A, 2)), (expected, expected));
    }
}

#[test]
fn wrong_widths_are_refused() {
    let (mut f, _) = fresh();
    for (at, bytes) in
        [(0, 1), (0, 2), (2, 2), (0x10, 4), (0x11, 1), (0x14, 2), (0x20, 2), (0x22, 4), (0x38, 2)]
    {
        let mut data = [0; 8];
        assert!(f.io_read(0, at, &mut data[..bytes]).is_err(), "{at:#x} {bytes}");
        assert!(f.io_write(0, at, &data[..bytes]).is_err(), "{at:#x} {bytes}");
    }
    assert!(f.io_read(0, 0x4000, &mut [0]).is_err() && f.io_read(3, 0, &mut [0]).is_err());
}

#[test]
fn kicks_reach_runners_only_while_ready() {
    let (mut f, seen) = fresh();
    put(&mut f, 0x3004, 2, 1);
    assert_eq!(seen.kicks.load(Ordering::SeqCst), 0);
    let (mut f, seen) = running();
    // Both queues when it got ready.
    assert_eq!((seen.started.load(Ordering::SeqCst), seen.kicks.swap(0, Ordering::SeqCst)), (1, 2));
    put(&mut f, 0x3004, 2, 1);
    put(&mut f, 0x3008, 2, 1);
    assert_eq!(seen.kicks.swap(0, Ordering::SeqCst), 1);
    assert!(f.quiesce().is_ready());
    put(&mut f, 0x3000, 2, 0);
    assert_eq!(seen.kicks.swap(0, Ordering::SeqCst), 0);
    f.resume();
    assert_eq!(seen.kicks.swap(0, Ordering::SeqCst), 1);
    // The bus-master bit comes back: everything is looked at again.
    f.config_write(regs::COMMAND, &[2, 0]);
    f.config_write(regs::COMMAND, &[6, 0]);
    assert_eq!(seen.kicks.swap(0, Ordering::SeqCst), 2);
}

#[test]
fn a_reset_waits_for_runners() {
    let (mut f, seen) = running();
    seen.busy.store(true, Ordering::SeqCst);
    put(&mut f, 0x14, 1, 0);
    assert_eq!(get(&mut f, 0x14, 1), 0xF);
    put(&mut f, 0x2000, 4, 1);
    seen.busy.store(false, Ordering::SeqCst);
    assert_eq!((get(&mut f, 0x14, 1), seen.resets.load(Ordering::SeqCst)), (0, 1));
    assert_eq!((get(&mut f, 0x1C, 2), get(&mut f, 0x2000, 4)), (0, 0));
    // One that nobody polls for ends with the device's own poll.
    let (mut f, seen) = running();
    seen.busy.store(true, Ordering::SeqCst);
    put(&mut f, 0x14, 1, 0);
    seen.busy.store(false, Ordering::SeqCst);
    f.poll();
    assert_eq!(seen.resets.load(Ordering::SeqCst), 1);
}

#[test]
fn restores_refuse_what_cannot_be() {
    let (f, _) = running();
    let saved = f.to_saved();
    let (mut copy, seen) = fresh();
    copy.restore(&f.save().unwrap()).unwrap();
    assert_eq!(copy.to_saved(), saved);
    assert_eq!((seen.started.load(Ordering::SeqCst), seen.value.load(Ordering::SeqCst)), (1, 0xABCD));
    assert_eq!(saved_state::to_blob(&saved).data, f.save().unwrap().data);
    let (mut other, _) = fresh();
    let other_kind = StateBlob { kind: "virtio-mmio".into(), ..f.save().unwrap() };
    assert!(other.restore(&other_kind).is_err());
}

/// The bytes of version 1. They stay as they are; a new version adds its own.
const GOLDEN_V1: &str = concat!(
    "018036000000010003000000040006040027000000000000000000000000000000010000000000000000000000000100",
    "000000000000000000000001028001000000040380010000000f06000100000001078005000000080000000109000100",
    "0000010a0001000000010b80600000000700000001000100000010510000000100010000002002000200000000100300",
    "020000000020040002000000003005000100000001060001000000030700010000000708000100000005090010000000",
    "030000000000000009000000000000000c80230000000100080000007265636f72646572020001000000010300080000",
    "00010002000000cdab",
);

#[test]
fn golden_bytes() {
    let (f, _) = running();
    let data = f.save().unwrap().data;
    let hex: String = data.iter().map(|b| alloc::format!("{b:02x}")).collect();
    assert_eq!(hex, GOLDEN_V1);
    let from_hex = |i: usize| u8::from_str_radix(&GOLDEN_V1[i..i + 2], 16).unwrap();
    let data = (0..GOLDEN_V1.len()).step_by(2).map(from_hex).collect();
    let (mut copy, _) = fresh();
    copy.restore(&StateBlob { kind: "virtio-pci".into(), version: 1, data }).unwrap();
    assert_eq!(copy.to_saved(), f.to_saved());
}

device::device_conformance!(transport_conforms, || fresh().0, &[0x4000, 0x1000], |f: &mut VirtioPci| {
    *f = running().0;
});

proptest! {
    /// Any registers in any order, then a driver that does it right.
    #[test]
    fn registers_in_any_order(ops in proptest::collection::vec((0u64..0x40, 0usize..4, any::<u64>()), 0..200)) {
        let (mut f, _) = fresh();
        for (at, width, value) in ops {
            let mut data = value.to_le_bytes();
            let _ = f.io_write(0, at, &data[..1 << width]);
            let _ = f.io_read(0, at, &mut data[..1 << width]);
        }
        let saved = f.save().unwrap();
        f.restore(&saved).unwrap();
        prop_assert_eq!(f.save().unwrap(), saved);
        prop_assert_eq!(features(&mut f, 1 << 32), 0xB);
        enable(&mut f, 1);
        prop_assert_eq!(get(&mut f, 0x1C, 2), 1);
    }
}
