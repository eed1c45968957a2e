//! Saved state of the transport: everything but what the device calls its own, which is nested.

use super::VirtioPci;
use super::layout::MAX_QUEUES;
use super::signals::{DRIVER_OK, NO_VECTOR};
use crate::queue::{MAX_QUEUE_SIZE, QueueLayout, QueueState};
use alloc::string::String;
use alloc::vec::Vec;
use core::sync::atomic::Ordering;
use device::StateBlob;
use pci::SavedFunction;
use saved_state::{CRITICAL, FieldWriter, Fields, RestoreError, SavedState};

mod tag {
    use super::CRITICAL;
    pub const FUNCTION: u16 = 1 | CRITICAL;
    pub const DEVICE_ID: u16 = 2 | CRITICAL;
    pub const STATUS: u16 = 3 | CRITICAL;
    pub const ISR: u16 = 4;
    pub const GENERATION: u16 = 5;
    pub const CONFIG_VECTOR: u16 = 6;
    pub const FEATURES: u16 = 7 | CRITICAL;
    pub const DEVICE_SELECT: u16 = 8;
    pub const DRIVER_SELECT: u16 = 9;
    pub const QUEUE_SELECT: u16 = 10;
    pub const QUEUES: u16 = 11 | CRITICAL;
    pub const DEVICE: u16 = 12 | CRITICAL;
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedTransport {
    function: SavedFunction,
    device_id: u16,
    status: u8,
    isr: u8,
    generation: u8,
    /// Stored plus one: no vector is 0.
    config_vector: u16,
    features: u64,
    device_select: u32,
    driver_select: u32,
    queue_select: u16,
    queues: Vec<SavedQueue>,
    device: SavedBlob,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SavedQueue {
    layout: QueueLayout,
    enabled: bool,
    /// Stored plus one.
    vector: u16,
    state: QueueState,
}

/// The device's own state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct SavedBlob {
    kind: String,
    version: u32,
    data: Vec<u8>,
}

const MAX_KIND_BYTES: usize = 64;
const MAX_DEVICE_BYTES: usize = 16 << 20;

impl SavedState for SavedBlob {
    const KIND: &'static str = "virtio-device";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { kind, version, data } = self;
        w.text(1, kind).uint(2, *version);
        if !data.is_empty() {
            w.bytes(3, data);
        }
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let (kind, version) = (r.text(1, MAX_KIND_BYTES)?, r.uint(2)?);
        Ok(Self { kind, version, data: r.bytes(3, MAX_DEVICE_BYTES)?.to_vec() })
    }
}

impl SavedState for SavedQueue {
    const KIND: &'static str = "virtqueue";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { layout, enabled, vector, state } = self;
        let QueueLayout { size, descriptors, available, used } = layout;
        let QueueState { next_available, next_used, in_flight } = state;
        w.uint(1, *size).uint(2, *descriptors).uint(3, *available).uint(4, *used);
        w.flag(5, *enabled).uint(6, *vector).uint(7, *next_available).uint(8, *next_used);
        w.uints(9, in_flight.iter().map(|head| u64::from(*head)));
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let layout = QueueLayout {
            size: r.uint(1)?,
            descriptors: r.uint(2)?,
            available: r.uint(3)?,
            used: r.uint(4)?,
        };
        let (enabled, vector) = (r.flag(5)?, r.uint(6)?);
        let (next_available, next_used) = (r.uint(7)?, r.uint(8)?);
        let heads = r.uints(9, usize::from(MAX_QUEUE_SIZE))?;
        let in_flight = heads.into_iter().map(u16::try_from).collect::<Result<Vec<u16>, _>>();
        let in_flight =
            in_flight.map_err(|_| RestoreError::Value { tag: 9, reason: "no such descriptor" })?;
        if in_flight.len() > usize::from(layout.size) {
            return Err(RestoreError::Value { tag: 9, reason: "more in flight than the queue holds" });
        }
        Ok(Self { layout, enabled, vector, state: QueueState { next_available, next_used, in_flight } })
    }
}

impl SavedState for SavedTransport {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self {
            function,
            device_id,
            status,
            isr,
            generation,
            config_vector,
            features,
            device_select,
            driver_select,
            queue_select,
            queues,
            device,
        } = self;
        w.nested(tag::FUNCTION, function).uint(tag::DEVICE_ID, *device_id).uint(tag::STATUS, *status);
        w.uint(tag::ISR, *isr).uint(tag::GENERATION, *generation).uint(tag::CONFIG_VECTOR, *config_vector);
        w.uint(tag::FEATURES, *features).uint(tag::DEVICE_SELECT, *device_select);
        w.uint(tag::DRIVER_SELECT, *driver_select).uint(tag::QUEUE_SELECT, *queue_select);
        w.list(tag::QUEUES, queues).nested(tag::DEVICE, device);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self {
            function: r.nested(tag::FUNCTION)?.unwrap_or_default(),
            device_id: r.uint(tag::DEVICE_ID)?,
            status: r.uint(tag::STATUS)?,
            isr: r.uint(tag::ISR)?,
            generation: r.uint(tag::GENERATION)?,
            config_vector: r.uint(tag::CONFIG_VECTOR)?,
            features: r.uint(tag::FEATURES)?,
            device_select: r.uint(tag::DEVICE_SELECT)?,
            driver_select: r.uint(tag::DRIVER_SELECT)?,
            queue_select: r.uint(tag::QUEUE_SELECT)?,
            queues: r.list(tag::QUEUES, MAX_QUEUES)?,
            device: r.nested(tag::DEVICE)?.unwrap_or_default(),
        })
    }
}

fn refuse<T>(tag: u16, reason: &'static str) -> Result<T, RestoreError> {
    Err(RestoreError::Value { tag, reason })
}

impl VirtioPci {
    pub(super) fn to_saved(&self) -> SavedTransport {
        let mut states: Vec<QueueState> = Vec::new();
        states.resize(self.common.queues.len(), QueueState::default());
        for (index, state) in self.runners.iter().flat_map(|r| r.run.queue_states()) {
            if let Some(slot) = states.get_mut(usize::from(index)) {
                *slot = state;
            }
        }
        let vectors = self.signals.queue_vectors.iter().map(|v| v.load(Ordering::SeqCst).wrapping_add(1));
        let queues = self
            .common
            .queues
            .iter()
            .zip(states)
            .zip(vectors)
            .map(|((q, state), vector)| SavedQueue { layout: q.layout, enabled: q.enabled, vector, state });
        let StateBlob { kind, version, data } = self.device.save();
        SavedTransport {
            function: self.core.save(),
            device_id: self.device.device_type().id,
            status: self.signals.status(),
            isr: self.signals.isr(),
            generation: self.signals.generation.load(Ordering::SeqCst),
            config_vector: self.signals.config_vector.load(Ordering::SeqCst).wrapping_add(1),
            features: self.common.driver_features,
            device_select: self.common.device_feature_select,
            driver_select: self.common.driver_feature_select,
            queue_select: self.common.queue_select,
            queues: queues.collect(),
            device: SavedBlob { kind, version, data },
        }
    }

    /// Takes over `saved`; called after a reset, and followed by one on an error.
    pub(super) fn take_saved(&mut self, saved: SavedTransport) -> Result<(), RestoreError> {
        let SavedTransport { function, device_id, status, isr, generation, config_vector, features, .. } =
            saved;
        if device_id != self.device.device_type().id {
            return refuse(tag::DEVICE_ID, "another type of device");
        }
        if saved.queues.len() != self.common.queues.len() {
            return refuse(tag::QUEUES, "another number of queues");
        }
        self.common.driver_features = features;
        if status & super::common_config::FEATURES_OK != 0 && !self.features_acceptable() {
            return refuse(tag::FEATURES, "features that this device does not offer");
        }
        if status & DRIVER_OK != 0 && status & super::common_config::FEATURES_OK == 0 {
            return refuse(tag::STATUS, "ready without features");
        }
        (self.common.device_feature_select, self.common.driver_feature_select) =
            (saved.device_select, saved.driver_select);
        self.common.queue_select = saved.queue_select;
        let mut states = Vec::new();
        for (i, queue) in saved.queues.into_iter().enumerate() {
            let Some(registers) = self.common.queues.get_mut(i) else { break };
            (registers.layout, registers.enabled) = (queue.layout, queue.enabled);
            if queue.enabled && !registers.is_valid() {
                return refuse(tag::QUEUES, "a queue that cannot be enabled");
            }
            self.restore_vector(Some(i), queue.vector)?;
            states.push(queue.state);
        }
        self.restore_vector(None, config_vector)?;
        self.core.restore(&function)?;
        self.signals.restore_isr(isr & 3);
        self.signals.generation.store(generation, Ordering::SeqCst);
        let SavedBlob { kind, version, data } = saved.device;
        self.device.restore(&StateBlob { kind, version, data })?;
        self.signals.status.store(status, Ordering::SeqCst);
        if status & DRIVER_OK != 0 {
            self.start(states);
        }
        Ok(())
    }

    fn restore_vector(&self, queue: Option<usize>, stored: u16) -> Result<(), RestoreError> {
        let vector = stored.wrapping_sub(1);
        if vector != NO_VECTOR && self.signals.checked_vector(vector) != vector {
            return refuse(tag::CONFIG_VECTOR, "no such MSI-X vector");
        }
        let slot = match queue {
            None => Some(&self.signals.config_vector),
            Some(i) => self.signals.queue_vectors.get(i),
        };
        if let Some(slot) = slot {
            slot.store(vector, Ordering::SeqCst);
        }
        Ok(())
    }
}
