//! The modern PCI transport (VIRTIO 1.2, section 4.1): a PCI function around a [`VirtioDevice`].
//!
//! Called by the machine as a [`Device`] and a [`PciFunction`], always under the function's lock.
//!
//! ```text
//! status 0 ─ACKNOWLEDGE|DRIVER─► features ─FEATURES_OK─► queues ─DRIVER_OK─► running
//!    ▲                                                                         │ status := 0
//!    └───────── runners dropped, device reset ◄──── [resetting: quiesce] ◄─────┘
//! ```
//!
//! A reset by the driver takes as long as the backend has requests that write to guest memory: until then the
//! status register keeps its value, which the driver polls. [`Device::reset`] and [`Device::restore`] come
//! from the machine after a quiesce and do not wait.

mod common_config;
mod layout;
mod saved;
mod signals;
#[cfg(test)]
mod tests;

use crate::device::{Activation, Runner, Signals, VirtioDevice};
use crate::feature;
use crate::queue::{Queue, QueueState};
use alloc::boxed::Box;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use common_config::CommonConfig;
use core::task::Poll;
use device::{Device, IoError, IoHandler, IrqLine, Register, RestoreError, StateBlob, Unsavable, Waker};
use guest_memory::DmaSpace;
use hypervisor::{EngineError, MsiSink};
use layout::window;
use pci::{FunctionCore, Interrupts, PciFunction, express};
use signals::{DRIVER_OK, PciSignals};

/// What a device needs around it.
pub struct VirtioPciConfig {
    /// Unique name in the machine.
    pub name: String,
    /// Guest memory behind this function's bus-master bit.
    pub dma: DmaSpace,
    /// Its INTx.
    pub line: IrqLine,
    /// Asks the machine for [`Device::poll`] of this device.
    pub waker: Waker,
    /// Whether it hangs on bus 0 (else below a root port).
    pub on_root_bus: bool,
}

/// See the module's header.
pub struct VirtioPci {
    name: String,
    core: FunctionCore,
    /// Offset of the configuration access capability.
    window: u16,
    device: Box<dyn VirtioDevice>,
    dma: DmaSpace,
    waker: Waker,
    signals: Arc<PciSignals>,
    common: CommonConfig,
    runners: Vec<Runner>,
    /// The driver asked for a reset that waits for the backend.
    resetting: bool,
    quiesced: bool,
}

impl VirtioPci {
    /// The PCI function of `device`.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        config: VirtioPciConfig,
        msi: &dyn MsiSink,
    ) -> Result<Self, EngineError> {
        let VirtioPciConfig { name, dma, line, waker, on_root_bus } = config;
        let mut sizes = device.queue_sizes();
        sizes.truncate(layout::MAX_QUEUES);
        let vectors = sizes.len() as u16 + 1;
        let interrupts = Arc::new(Interrupts::new(line).with_msix(msi, vectors)?);
        let (mut space, window) = layout::config_space(device.device_type());
        let kind =
            if on_root_bus { express::PortKind::RootComplexEndpoint } else { express::PortKind::Endpoint };
        express::add(&mut space, kind);
        let mut core = FunctionCore::new(space, interrupts.clone(), Some(dma.clone()));
        core.add_msix(layout::MSIX_BAR);
        core.add_intx();
        let signals = Arc::new(PciSignals::new(interrupts, sizes.len()));
        let common = CommonConfig::new(&sizes);
        let (runners, resetting, quiesced) = (Vec::new(), false, false);
        Ok(Self { name, core, window, device, dma, waker, signals, common, runners, resetting, quiesced })
    }

    /// The notification register of each queue, by number. What is written there does not matter: they may have doorbells.
    pub fn notification_registers(&self) -> impl Iterator<Item = Register> + use<> {
        let offset = |queue: u64| layout::NOTIFY + queue * u64::from(layout::NOTIFY_MULTIPLIER);
        let region = usize::from(layout::STRUCTURES_BAR);
        (0..self.common.queues.len() as u64).map(move |queue| Register { region, offset: offset(queue) })
    }

    /// Everything that may be negotiated.
    fn offered(&self) -> u64 {
        self.device.features() | feature::TRANSPORT
    }

    /// Makes runners of the queues as configured, standing at `states`.
    fn start(&mut self, mut states: Vec<QueueState>) {
        let features = self.common.driver_features;
        states.resize(self.common.queues.len(), QueueState::default());
        let signals: Arc<dyn Signals> = self.signals.clone();
        let queues = self.common.queues.iter().zip(states).enumerate().map(|(i, (q, state))| {
            let layout = q.enabled.then_some(q.layout);
            Queue::new(i as u16, layout, features, self.dma.clone(), signals.clone(), state)
        });
        let queues = queues.collect();
        let (dma, waker) = (self.dma.clone(), self.waker.clone());
        self.runners =
            self.device.start(Activation { features, dma, queues, signals: signals.clone(), waker });
    }

    /// Whether queues run: the driver is ready and no reset is under way.
    fn is_running(&self) -> bool {
        self.signals.status() & DRIVER_OK != 0 && !self.resetting && !self.quiesced
    }

    fn kick(&mut self, queue: u16) {
        if !self.is_running() {
            return;
        }
        if let Some(runner) = self.runners.iter_mut().find(|r| r.queues.contains(&queue)) {
            runner.run.kick(queue);
        }
    }

    fn kick_all(&mut self) {
        for queue in 0..self.common.queues.len() as u16 {
            self.kick(queue);
        }
    }

    fn quiesce_runners(&mut self) -> bool {
        let mut ready = true;
        for runner in &mut self.runners {
            // All of them, without stopping at the first that is busy.
            ready &= runner.run.quiesce().is_ready();
        }
        ready
    }

    /// The driver wrote 0 to the status register.
    fn begin_reset(&mut self) {
        self.resetting = true;
        self.continue_reset();
    }

    fn continue_reset(&mut self) {
        if self.resetting && self.quiesce_runners() {
            self.reset_device();
        }
    }

    fn reset_device(&mut self) {
        self.resetting = false;
        self.runners.clear();
        self.common.reset();
        self.signals.reset();
        self.device.reset();
    }

    fn bar_access(&mut self, write: bool) {
        let config = self.core.config();
        let (bar, offset) =
            (config.get(self.window + window::BAR, 1), config.get(self.window + window::OFFSET, 4));
        let length = config.get(self.window + window::LENGTH, 4);
        if !matches!(length, 1 | 2 | 4) || !offset.is_multiple_of(length) {
            return;
        }
        let data_at = self.window + window::DATA;
        let mut data = (config.get(data_at, 4) as u32).to_le_bytes();
        let part = &mut data[..length as usize];
        if write {
            // Refusals are the guest's problem, as on the bus.
            let _ = self.io_write(bar as usize, offset, part);
        } else {
            part.fill(0xFF);
            let _ = self.io_read(bar as usize, offset, part);
            self.core.config_mut().set(data_at, 4, u64::from(u32::from_le_bytes(data)));
        }
    }

    fn touches_window(&self, offset: u16, bytes: usize) -> bool {
        let (first, end) = (self.window + window::DATA, self.window + window::END);
        offset < end && usize::from(offset) + bytes > usize::from(first)
    }
}

impl PciFunction for VirtioPci {
    fn core(&self) -> &FunctionCore {
        &self.core
    }
    fn core_mut(&mut self) -> &mut FunctionCore {
        &mut self.core
    }
    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.touches_window(offset, data.len()) {
            self.bar_access(false);
        }
        self.core.read(offset, data);
    }
    fn config_write(&mut self, offset: u16, data: &[u8]) {
        if self.core.write(offset, data).bus_master_on {
            self.kick_all();
        }
        if self.touches_window(offset, data.len()) {
            self.bar_access(true);
        }
    }
}

impl IoHandler for VirtioPci {
    fn io_read(&mut self, region: usize, offset: u64, data: &mut [u8]) -> Result<(), IoError> {
        if region == usize::from(layout::MSIX_BAR) {
            return self.core.interrupts().msix_read(offset, data);
        }
        if region != usize::from(layout::STRUCTURES_BAR) {
            return Err(IoError::Offset);
        }
        let inside = offset % layout::PART_BYTES;
        match offset - inside {
            layout::COMMON => self.common_read(inside, data),
            layout::ISR if inside == 0 => {
                data.fill(0);
                data[0] = self.signals.take_isr();
                Ok(())
            }
            layout::DEVICE => {
                data.fill(0);
                self.device.config_read(inside as usize, data);
                Ok(())
            }
            layout::NOTIFY => {
                data.fill(0);
                Ok(())
            }
            _ => Err(IoError::Offset),
        }
    }

    fn io_write(&mut self, region: usize, offset: u64, data: &[u8]) -> Result<(), IoError> {
        if region == usize::from(layout::MSIX_BAR) {
            return self.core.interrupts().msix_write(offset, data);
        }
        if region != usize::from(layout::STRUCTURES_BAR) {
            return Err(IoError::Offset);
        }
        let inside = offset % layout::PART_BYTES;
        match offset - inside {
            layout::COMMON => self.common_write(inside, data),
            layout::DEVICE => {
                if !self.resetting {
                    self.device.config_write(inside as usize, data);
                }
                Ok(())
            }
            layout::NOTIFY => {
                self.kick((inside / u64::from(layout::NOTIFY_MULTIPLIER)) as u16);
                Ok(())
            }
            _ => Err(IoError::Offset),
        }
    }
}

impl Device for VirtioPci {
    fn name(&self) -> &str {
        &self.name
    }
    fn as_io(&mut self) -> Option<&mut dyn IoHandler> {
        Some(self)
    }
    fn poll(&mut self) {
        self.continue_reset();
        self.device.poll(&*self.signals);
        for runner in &mut self.runners {
            runner.run.poll();
        }
        // A poll may have completed what the reset waited for.
        self.continue_reset();
    }
    fn quiesce(&mut self) -> Poll<()> {
        self.quiesced = true;
        if !self.quiesce_runners() {
            return Poll::Pending;
        }
        self.continue_reset();
        Poll::Ready(())
    }
    fn resume(&mut self) {
        self.quiesced = false;
        if !self.resetting {
            self.runners.iter_mut().for_each(|r| r.run.resume());
        }
    }
    fn reset(&mut self) {
        self.quiesced = false;
        self.reset_device();
        self.signals.generation.store(0, core::sync::atomic::Ordering::SeqCst);
        self.core.reset();
    }
    fn save(&self) -> Result<StateBlob, Unsavable> {
        Ok(saved_state::to_blob(&self.to_saved()))
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        self.reset();
        let result = saved_state::from_blob(blob).and_then(|saved| self.take_saved(saved));
        if result.is_err() {
            self.reset();
        }
        result
    }
}
