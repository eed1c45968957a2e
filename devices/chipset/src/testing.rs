//! What the chips' tests share: lines that remember, a golden-bytes check, register access by width.

use crate::{MsiMessage, PlatformRequests};
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{Device, IoError, IrqLine, LineSink};
use saved_state::StateBlob;
use sync::Mutex;

/// Records what lines did: (line, level), changes only.
#[derive(Clone, Default)]
pub struct LineLog(pub Arc<Mutex<Vec<(u32, bool)>>>);

impl LineSink for LineLog {
    fn set_level(&self, line: u32, level: bool) {
        self.0.lock().push((line, level));
    }
    fn restore_level(&self, _: u32, _: bool) {}
}

impl LineLog {
    pub fn line(&self, number: u32) -> IrqLine {
        IrqLine::new(Arc::new(self.clone()), number)
    }
    /// Rising edges of `line` since the last call, which forgets all.
    pub fn take_edges(&self, line: u32) -> usize {
        self.0.lock().drain(..).filter(|e| *e == (line, true)).count()
    }
    pub fn level(&self, line: u32) -> bool {
        self.0.lock().iter().rev().find(|e| e.0 == line).is_some_and(|e| e.1)
    }
}

/// Counts requests: (power off, reset).
#[derive(Default)]
pub struct RequestLog(pub Mutex<(u32, u32)>);

impl PlatformRequests for RequestLog {
    fn power_off(&self) {
        self.0.lock().0 += 1;
    }
    fn reset(&self) {
        self.0.lock().1 += 1;
    }
}

/// Messages that were sent.
#[derive(Clone, Default)]
pub struct MessageLog(pub Arc<Mutex<Vec<MsiMessage>>>);

impl crate::MessageSink for MessageLog {
    fn send(&self, message: MsiMessage) {
        self.0.lock().push(message);
    }
}

impl MessageLog {
    pub fn take(&self) -> Vec<MsiMessage> {
        core::mem::take(&mut *self.0.lock())
    }
}

/// Reads and writes of a register.
pub trait Access {
    fn get(&mut self, region: usize, offset: u64, bytes: usize) -> u64;
    fn put(&mut self, region: usize, offset: u64, bytes: usize, value: u64) -> Result<(), IoError>;
    fn inb(&mut self, region: usize, offset: u64) -> u8 {
        self.get(region, offset, 1) as u8
    }
    fn outb(&mut self, region: usize, offset: u64, value: u8) {
        self.put(region, offset, 1, value.into()).unwrap();
    }
}

impl<D: Device> Access for D {
    fn get(&mut self, region: usize, offset: u64, bytes: usize) -> u64 {
        let mut data = [0xFF; 8];
        let _ = self.as_io().unwrap().io_read(region, offset, &mut data[..bytes]);
        device::read_le(&data[..bytes])
    }
    fn put(&mut self, region: usize, offset: u64, bytes: usize, value: u64) -> Result<(), IoError> {
        self.as_io().unwrap().io_write(region, offset, &value.to_le_bytes()[..bytes])
    }
}

/// The bytes of version 1 of a saved state must stay what they are.
pub fn golden(blob: &StateBlob, expected: &str) {
    let hex: String = blob.data.iter().map(|b| alloc::format!("{b:02x}")).collect();
    assert_eq!(hex, expected.split_whitespace().collect::<String>(), "saved state of {}", blob.kind);
}
