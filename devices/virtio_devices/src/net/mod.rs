//! virtio-net: a network card (VIRTIO 1.2, section 5.1).
//!
//! One pair of queues. [`Net`] is the device; frames move in `runner.rs`, and what the driver leaves to the card
//! (checksums, cutting long TCP segments) is done in `offload.rs`. The device has no state of its own.

mod offload;
mod runner;

use crate::backend::NetBackend;
use crate::config_bytes::{put, read};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{RestoreError, StateBlob};
use saved_state::{FieldWriter, Fields, SavedState};
use sync::Mutex;
use virtio::{Activation, DeviceType, Runner, Signals, VirtioDevice};

/// Feature bits.
pub mod feature {
    /// The card completes checksums.
    pub const CSUM: u64 = 1 << 0;
    /// `mtu` is there.
    pub const MTU: u64 = 1 << 3;
    /// `mac` is there.
    pub const MAC: u64 = 1 << 5;
    /// The card cuts TCP segments over IPv4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// The card cuts TCP segments over IPv6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// A frame may be spread over several receive buffers.
    pub const MERGEABLE: u64 = 1 << 15;
    /// `status` is there.
    pub const STATUS: u64 = 1 << 16;
}

const QUEUE_SIZE: u16 = 256;
const RX: u16 = 0;
const TX: u16 = 1;
const CONFIG_BYTES: usize = 12;
/// Status: the cable is plugged.
const LINK_UP: u16 = 1;

/// What a card is besides its backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetConfig {
    /// Its address.
    pub mac: [u8; 6],
    /// The largest packet that its network carries, if the guest is to know.
    pub mtu: Option<u16>,
}

type Backend = Arc<Mutex<Box<dyn NetBackend>>>;

/// See the module's header.
pub struct Net {
    backend: Backend,
    config: NetConfig,
    link_up: bool,
}

impl Net {
    /// A card on the network behind `backend`.
    pub fn new(backend: Box<dyn NetBackend>, config: NetConfig) -> Self {
        let link_up = backend.link_up();
        Self { backend: Arc::new(Mutex::new(backend)), config, link_up }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::NET
    }
    fn features(&self) -> u64 {
        let mtu = if self.config.mtu.is_some() { feature::MTU } else { 0 };
        let offloads = feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6;
        feature::MAC | feature::STATUS | feature::MERGEABLE | offloads | mtu
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE; 2]
    }
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mut c = [0; CONFIG_BYTES];
        put(&mut c, 0, self.config.mac);
        put(&mut c, 6, (if self.link_up { LINK_UP } else { 0 }).to_le_bytes());
        put(&mut c, 8, 1u16.to_le_bytes());
        put(&mut c, 10, self.config.mtu.unwrap_or(0).to_le_bytes());
        read(&c, offset, data);
    }
    fn config_write(&mut self, _: usize, _: &[u8]) {}
    fn start(&mut self, activation: Activation) -> Vec<Runner> {
        self.backend.lock().set_waker(activation.waker.clone());
        let run = runner::NetRunner::new(self.backend.clone(), activation);
        alloc::vec![Runner { queues: alloc::vec![RX, TX], run: Box::new(run) }]
    }
    fn poll(&mut self, signals: &dyn Signals) {
        let link_up = self.backend.lock().link_up();
        if core::mem::replace(&mut self.link_up, link_up) != link_up {
            signals.config_changed();
        }
    }
    fn reset(&mut self) {}
    fn save(&self) -> StateBlob {
        saved_state::to_blob(&Nothing)
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        saved_state::from_blob::<Nothing>(blob).map(|_| ())
    }
}

/// Frames under way may be lost, as in any network; there is no other state.
struct Nothing;

impl SavedState for Nothing {
    const KIND: &'static str = "virtio-net";
    const VERSION: u32 = 1;
    fn encode(&self, _: &mut FieldWriter) {}
    fn decode(_: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self)
    }
}
