//! The common configuration structure (VIRTIO 1.2, 4.1.4.3) and the status machine (2.1, 3.1).

use super::VirtioPci;
use super::signals::{DRIVER_OK, NEEDS_RESET};
use crate::device::Signals;
use crate::feature;
use crate::queue::QueueLayout;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use device::{IoError, read_le, write_le};

pub const FEATURES_OK: u8 = 8;
/// Bits that a driver may set: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, FAILED.
const DRIVER_BITS: u8 = 0x8F;

mod offset {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0C;
    pub const CONFIG_VECTOR: u64 = 0x10;
    pub const NUM_QUEUES: u64 = 0x12;
    pub const STATUS: u64 = 0x14;
    pub const GENERATION: u64 = 0x15;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_VECTOR: u64 = 0x1A;
    pub const QUEUE_ENABLE: u64 = 0x1C;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 0x1E;
    pub const QUEUE_DESCRIPTORS: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const END: u64 = 0x38;
}

/// One queue as the driver configures it.
#[derive(Clone, Copy, Debug)]
pub struct QueueRegisters {
    pub max_size: u16,
    pub layout: QueueLayout,
    pub enabled: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, layout: QueueLayout { size: max_size, ..QueueLayout::default() }, enabled: false }
    }
    /// Whether it could be enabled as it stands.
    pub fn is_valid(&self) -> bool {
        self.layout.is_valid() && self.layout.size <= self.max_size
    }
}

/// The registers.
pub struct CommonConfig {
    pub device_feature_select: u32,
    pub driver_feature_select: u32,
    pub driver_features: u64,
    pub queue_select: u16,
    pub queues: Vec<QueueRegisters>,
}

impl CommonConfig {
    pub fn new(sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: sizes.iter().map(|size| QueueRegisters::new(*size)).collect(),
        }
    }

    pub fn reset(&mut self) {
        let Self { device_feature_select, driver_feature_select, driver_features, queue_select, queues } =
            self;
        (*device_feature_select, *driver_feature_select) = (0, 0);
        (*driver_features, *queue_select) = (0, 0);
        queues.iter_mut().for_each(|q| *q = QueueRegisters::new(q.max_size));
    }

    fn queue(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }
}

/// The register at an offset: where it starts, and its width.
fn register(at: u64) -> Option<(u64, u64)> {
    use offset::*;
    Some(match at {
        ..CONFIG_VECTOR => (at & !3, 4),
        CONFIG_VECTOR..STATUS => (at & !1, 2),
        STATUS | GENERATION => (at, 1),
        QUEUE_SELECT..QUEUE_DESCRIPTORS => (at & !1, 2),
        QUEUE_DESCRIPTORS..END => (at & !7, 8),
        _ => return None,
    })
}

/// Registers take their own width; those of 64 bits also take their halves.
fn check(at: u64, bytes: usize) -> Result<u64, IoError> {
    let (start, width) = register(at).ok_or(IoError::Offset)?;
    let half = width == 8 && bytes == 4 && at.is_multiple_of(4);
    if (at == start && bytes as u64 == width) || half { Ok(start) } else { Err(IoError::Width) }
}

impl VirtioPci {
    pub(super) fn common_read(&mut self, at: u64, data: &mut [u8]) -> Result<(), IoError> {
        let start = check(at, data.len())?;
        let value = self.common_value(start);
        write_le(data, value >> (8 * (at - start)));
        Ok(())
    }

    fn common_value(&mut self, start: u64) -> u64 {
        let half = |features: u64, select: u32| match select {
            0 => features & 0xFFFF_FFFF,
            1 => features >> 32,
            _ => 0,
        };
        let (c, queue) = (&self.common, self.common.queue().copied());
        let layout = queue.map(|q| q.layout).unwrap_or_default();
        match start {
            offset::DEVICE_FEATURE_SELECT => c.device_feature_select.into(),
            offset::DEVICE_FEATURE => half(self.offered(), c.device_feature_select),
            offset::DRIVER_FEATURE_SELECT => c.driver_feature_select.into(),
            offset::DRIVER_FEATURE => half(c.driver_features, c.driver_feature_select),
            offset::CONFIG_VECTOR => self.signals.config_vector.load(Ordering::SeqCst).into(),
            offset::NUM_QUEUES => c.queues.len() as u64,
            offset::STATUS => {
                // The driver polls here for the end of a reset.
                self.continue_reset();
                self.signals.status().into()
            }
            offset::GENERATION => self.signals.generation.load(Ordering::SeqCst).into(),
            offset::QUEUE_SELECT => c.queue_select.into(),
            offset::QUEUE_SIZE => layout.size.into(),
            offset::QUEUE_VECTOR => {
                let vector = self.signals.queue_vectors.get(usize::from(c.queue_select));
                vector.map_or(0xFFFF, |v| v.load(Ordering::SeqCst)).into()
            }
            offset::QUEUE_ENABLE => queue.is_some_and(|q| q.enabled).into(),
            offset::QUEUE_NOTIFY_OFFSET if queue.is_some() => c.queue_select.into(),
            offset::QUEUE_DESCRIPTORS => layout.descriptors,
            offset::QUEUE_DRIVER => layout.available,
            offset::QUEUE_DEVICE => layout.used,
            _ => 0,
        }
    }

    pub(super) fn common_write(&mut self, at: u64, data: &[u8]) -> Result<(), IoError> {
        let start = check(at, data.len())?;
        if self.resetting {
            // Nothing counts until the reset is through.
            return Ok(());
        }
        let value = read_le(data);
        match start {
            offset::DEVICE_FEATURE_SELECT => self.common.device_feature_select = value as u32,
            offset::DRIVER_FEATURE_SELECT => self.common.driver_feature_select = value as u32,
            offset::DRIVER_FEATURE => self.set_driver_features(value as u32),
            offset::CONFIG_VECTOR => {
                let vector = self.signals.checked_vector(value as u16);
                self.signals.config_vector.store(vector, Ordering::SeqCst);
            }
            offset::STATUS => self.set_status(value as u8),
            offset::QUEUE_SELECT => self.common.queue_select = value as u16,
            offset::QUEUE_VECTOR => {
                let checked = self.signals.checked_vector(value as u16);
                if let Some(vector) = self.signals.queue_vectors.get(usize::from(self.common.queue_select)) {
                    vector.store(checked, Ordering::SeqCst);
                }
            }
            offset::QUEUE_ENABLE => self.enable_queue(value as u16),
            _ => self.set_queue_register(start, at, data.len(), value),
        }
        Ok(())
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.signals.status() & FEATURES_OK != 0 {
            return;
        }
        let features = &mut self.common.driver_features;
        match self.common.driver_feature_select {
            0 => *features = *features >> 32 << 32 | u64::from(value),
            1 => *features = *features & 0xFFFF_FFFF | u64::from(value) << 32,
            _ => {}
        }
    }

    fn set_queue_register(&mut self, start: u64, at: u64, bytes: usize, value: u64) {
        let index = usize::from(self.common.queue_select);
        let Some(queue) = self.common.queues.get_mut(index).filter(|q| !q.enabled) else { return };
        let set = |address: &mut u64| {
            *address = match (bytes, at - start) {
                (8, _) => value,
                (_, 0) => *address >> 32 << 32 | value,
                _ => *address & 0xFFFF_FFFF | value << 32,
            }
        };
        match start {
            offset::QUEUE_SIZE => queue.layout.size = value as u16,
            offset::QUEUE_DESCRIPTORS => set(&mut queue.layout.descriptors),
            offset::QUEUE_DRIVER => set(&mut queue.layout.available),
            offset::QUEUE_DEVICE => set(&mut queue.layout.used),
            _ => {}
        }
    }

    fn enable_queue(&mut self, value: u16) {
        let status = self.signals.status();
        let configuring = status & FEATURES_OK != 0 && status & (DRIVER_OK | NEEDS_RESET) == 0;
        let index = usize::from(self.common.queue_select);
        let Some(queue) = self.common.queues.get_mut(index) else { return };
        if value != 1 || queue.enabled || !configuring {
            return;
        }
        if queue.is_valid() {
            queue.enabled = true;
        } else {
            self.signals.needs_reset();
        }
    }

    fn set_status(&mut self, value: u8) {
        if value == 0 {
            self.begin_reset();
            return;
        }
        let old = self.signals.status();
        // Bits only come; they go by a reset.
        let mut new = old | value & DRIVER_BITS;
        if new & !old & FEATURES_OK != 0 && !self.features_acceptable() {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 || new & NEEDS_RESET != 0 {
            new &= !DRIVER_OK | old;
        }
        self.signals.status.fetch_or(new, Ordering::SeqCst);
        if new & !old & DRIVER_OK != 0 {
            self.start(Vec::new());
            // Buffers may have been made available before the driver was ready.
            self.kick_all();
        }
    }

    pub(super) fn features_acceptable(&self) -> bool {
        let features = self.common.driver_features;
        features & !self.offered() == 0 && features & feature::VERSION_1 != 0
    }
}
