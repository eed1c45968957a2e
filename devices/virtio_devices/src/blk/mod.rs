//! virtio-blk: a disk (VIRTIO 1.2, section 5.2).
//!
//! One queue. [`Blk`] is the device: features and configuration, from what the backend says. The work is in
//! `runner.rs`, the requests' format in `request.rs`. The device has no state of its own.

mod request;
mod runner;

use crate::backend::{BlockBackend, BlockInfo, SECTOR_BYTES};
use crate::config_bytes::{put, read};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use device::{RestoreError, StateBlob};
use saved_state::{FieldWriter, Fields, SavedState};
use sync::Mutex;
use virtio::{Activation, DeviceType, Runner, Signals, VirtioDevice};

/// Feature bits.
pub mod feature {
    /// `seg_max` is there.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk cannot be written.
    pub const READ_ONLY: u64 = 1 << 5;
    /// `blk_size` is there.
    pub const BLOCK_SIZE: u64 = 1 << 6;
    /// Writes are cached until a flush.
    pub const FLUSH: u64 = 1 << 9;
    /// `topology` is there.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// Discard requests are taken.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes requests are taken.
    pub const WRITE_ZEROES: u64 = 1 << 14;
}

/// Entries of the queue.
const QUEUE_SIZE: u16 = 256;
/// Data segments of a request: the queue less header and status.
const SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;
/// Longest discard or write-zeroes request in sectors: 1 GiB.
const MAX_RANGE_SECTORS: u32 = 1 << 21;
const CONFIG_BYTES: usize = 60;

/// What a disk is besides its backend.
#[derive(Clone, Debug, Default)]
pub struct BlkConfig {
    /// What the guest reads as serial number: its first 20 bytes.
    pub serial: String,
    /// Most requests at the backend at one time; 0: as many as the queue has entries.
    pub max_in_flight: u16,
}

/// The backend, with what outlives a runner.
struct Shared {
    backend: Box<dyn BlockBackend>,
    /// Of the next request. Never starts again, so that completions of an earlier runner's requests are
    /// known as such.
    next_id: u64,
    /// What the backend said last.
    info: BlockInfo,
}

/// See the module's header.
pub struct Blk {
    shared: Arc<Mutex<Shared>>,
    config: BlkConfig,
}

impl Blk {
    /// The disk behind `backend`.
    pub fn new(backend: Box<dyn BlockBackend>, config: BlkConfig) -> Self {
        let info = checked(backend.info());
        Self { shared: Arc::new(Mutex::new(Shared { backend, next_id: 1, info })), config }
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let mut c = [0; CONFIG_BYTES];
        let info = self.shared.lock().info;
        put(&mut c, 0, (info.bytes / SECTOR_BYTES).to_le_bytes());
        put(&mut c, 12, SEGMENTS.to_le_bytes());
        put(&mut c, 20, info.block_bytes.to_le_bytes());
        c[24] = (info.physical_block_bytes / info.block_bytes).trailing_zeros() as u8;
        put(&mut c, 26, ((info.physical_block_bytes / info.block_bytes).min(0x8000) as u16).to_le_bytes());
        put(&mut c, 34, 1u16.to_le_bytes());
        if info.discard {
            put(&mut c, 36, MAX_RANGE_SECTORS.to_le_bytes());
            put(&mut c, 40, 1u32.to_le_bytes());
            put(&mut c, 44, (info.block_bytes / SECTOR_BYTES as u32).to_le_bytes());
        }
        if info.write_zeroes {
            put(&mut c, 48, MAX_RANGE_SECTORS.to_le_bytes());
            put(&mut c, 52, 1u32.to_le_bytes());
            c[56] = 1;
        }
        c
    }
}

/// What a backend says, made fit for the protocol.
fn checked(info: BlockInfo) -> BlockInfo {
    let power = |bytes: u32, least: u32| if bytes.is_power_of_two() { bytes.max(least) } else { least };
    let block_bytes = power(info.block_bytes, SECTOR_BYTES as u32);
    let physical_block_bytes = power(info.physical_block_bytes, block_bytes);
    let writable = !info.read_only;
    BlockInfo {
        block_bytes,
        physical_block_bytes,
        discard: info.discard && writable,
        write_zeroes: info.write_zeroes && writable,
        ..info
    }
}

impl VirtioDevice for Blk {
    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }
    fn features(&self) -> u64 {
        let info = self.shared.lock().info;
        let always = feature::SEG_MAX | feature::BLOCK_SIZE | feature::FLUSH | feature::TOPOLOGY;
        let when = |there: bool, bit: u64| if there { bit } else { 0 };
        always
            | when(info.read_only, feature::READ_ONLY)
            | when(info.discard, feature::DISCARD)
            | when(info.write_zeroes, feature::WRITE_ZEROES)
    }
    fn queue_sizes(&self) -> Vec<u16> {
        alloc::vec![QUEUE_SIZE]
    }
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        read(&self.config_space(), offset, data);
    }
    fn config_write(&mut self, _: usize, _: &[u8]) {}
    fn start(&mut self, activation: Activation) -> Vec<Runner> {
        self.shared.lock().backend.set_waker(activation.waker.clone());
        let run = runner::BlkRunner::new(self.shared.clone(), &self.config, activation);
        alloc::vec![Runner { queues: alloc::vec![0], run: Box::new(run) }]
    }
    fn poll(&mut self, signals: &dyn Signals) {
        let mut shared = self.shared.lock();
        let bytes = shared.backend.info().bytes;
        let resized = core::mem::replace(&mut shared.info.bytes, bytes) != bytes;
        drop(shared);
        if resized {
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

/// A disk has no state that the transport does not know.
struct Nothing;

impl SavedState for Nothing {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u32 = 1;
    fn encode(&self, _: &mut FieldWriter) {}
    fn decode(_: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self)
    }
}
