//! virtio-console: terminals and named byte streams (VIRTIO 1.2, section 5.3).
//!
//! [`Console`] is the device. A single unnamed port makes a plain console of two queues; anything else is a
//! multiport device, whose ports the driver and we announce to each other over a pair of control queues
//! (`control.rs`). Each port has a runner of its own (`port.rs`). What ports and control have to know of each
//! other, and what must be saved, is in [`Shared`] under one short lock (never held over a backend's call).

mod control;
mod port;
mod saved;

use crate::backend::ConsoleBackend;
use crate::config_bytes::{put, read};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use control::Message;
use device::{RestoreError, StateBlob};
use sync::Mutex;
use virtio::{Activation, DeviceType, Queue, Runner, Signals, VirtioDevice};

/// Feature bits.
pub mod feature {
    /// `cols` and `rows` are there.
    pub const SIZE: u64 = 1 << 0;
    /// More than one port, with control queues.
    pub const MULTIPORT: u64 = 1 << 1;
}

/// Most ports of a device.
pub const MAX_PORTS: usize = 32;
const QUEUE_SIZE: u16 = 64;
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
const CONFIG_BYTES: usize = 12;

/// A port.
pub struct ConsolePort {
    /// How the guest finds it (`/dev/virtio-ports/NAME`).
    pub name: Option<String>,
    /// Whether the guest makes a terminal of it.
    pub is_terminal: bool,
    /// Its other end.
    pub backend: Box<dyn ConsoleBackend>,
}

type Backend = Arc<Mutex<Box<dyn ConsoleBackend>>>;

struct Port {
    name: Option<String>,
    is_terminal: bool,
    backend: Backend,
}

/// What the guest did to a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct PortState {
    /// A program has it open.
    guest_open: bool,
    /// Bytes of the chain at the head of the transmit queue that the backend has taken.
    sent: u32,
}

/// See the module's header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Shared {
    ports: Vec<PortState>,
    /// Control messages that wait for buffers.
    messages: VecDeque<Message>,
}

impl Shared {
    fn fresh(ports: usize) -> Self {
        Self { ports: alloc::vec![PortState::default(); ports], messages: VecDeque::new() }
    }
}

/// See the module's header.
pub struct Console {
    ports: Arc<[Port]>,
    is_multiport: bool,
    /// The driver took the multiport feature.
    controlled: bool,
    size: Option<(u16, u16)>,
    shared: Arc<Mutex<Shared>>,
}

/// Receive queue of a port; its transmit queue is the next.
fn queue_of(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 + 2 * port as u16 }
}

impl Console {
    /// A plain console.
    pub fn terminal(backend: Box<dyn ConsoleBackend>) -> Self {
        Self::with_ports(alloc::vec![ConsolePort { name: None, is_terminal: true, backend }])
    }

    /// A device of `ports`: at least one, at most [`MAX_PORTS`] (further ones are left out).
    pub fn with_ports(ports: Vec<ConsolePort>) -> Self {
        let is_multiport = !matches!(&ports[..], [ConsolePort { name: None, is_terminal: true, .. }]);
        let ports: Arc<[Port]> = ports
            .into_iter()
            .take(MAX_PORTS)
            .map(|ConsolePort { name, is_terminal, backend }| Port {
                name,
                is_terminal,
                backend: Arc::new(Mutex::new(backend)),
            })
            .collect();
        let shared = Arc::new(Mutex::new(Shared::fresh(ports.len())));
        let mut console = Self { ports, is_multiport, controlled: false, size: None, shared };
        console.size = console.terminal_size();
        console
    }

    fn terminal_size(&self) -> Option<(u16, u16)> {
        let terminal = self.ports.iter().find(|p| p.is_terminal)?;
        terminal.backend.lock().size()
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::CONSOLE
    }
    fn features(&self) -> u64 {
        feature::SIZE | if self.is_multiport { feature::MULTIPORT } else { 0 }
    }
    fn queue_sizes(&self) -> Vec<u16> {
        let pairs = if self.is_multiport { self.ports.len() + 1 } else { 1 };
        alloc::vec![QUEUE_SIZE; 2 * pairs]
    }
    fn config_read(&self, offset: usize, data: &mut [u8]) {
        let mut c = [0; CONFIG_BYTES];
        let (columns, rows) = self.size.unwrap_or((0, 0));
        put(&mut c, 0, columns.to_le_bytes());
        put(&mut c, 2, rows.to_le_bytes());
        put(&mut c, 4, (self.ports.len() as u32).to_le_bytes());
        read(&c, offset, data);
    }
    fn config_write(&mut self, _: usize, _: &[u8]) {}

    fn start(&mut self, activation: Activation) -> Vec<Runner> {
        let Activation { features, queues, waker, .. } = activation;
        self.controlled = features & feature::MULTIPORT != 0;
        let mut queues: Vec<Option<Queue>> = queues.into_iter().map(Some).collect();
        let mut pair = |first: u16| {
            let mut take = |i: u16| queues.get_mut(usize::from(i)).and_then(Option::take);
            Some((take(first)?, take(first + 1)?))
        };
        let mut runners = Vec::new();
        for (number, port) in self.ports.iter().enumerate() {
            if number != 0 && !self.controlled {
                break;
            }
            let Some((rx, tx)) = pair(queue_of(number)) else { continue };
            port.backend.lock().set_waker(waker.clone());
            let numbers = alloc::vec![rx.index(), tx.index()];
            let run = port::PortRunner::new(port::Wiring {
                number,
                backend: port.backend.clone(),
                shared: self.shared.clone(),
                controlled: self.controlled,
                rx,
                tx,
                waker: waker.clone(),
            });
            runners.push(Runner { queues: numbers, run: Box::new(run) });
        }
        if let Some((to_driver, from_driver)) = pair(CONTROL_RX).filter(|_| self.controlled) {
            let (ports, shared) = (self.ports.clone(), self.shared.clone());
            let run = control::ControlRunner::new(ports, shared, to_driver, from_driver, waker);
            runners.push(Runner { queues: alloc::vec![CONTROL_RX, CONTROL_TX], run: Box::new(run) });
        }
        runners
    }

    fn poll(&mut self, signals: &dyn Signals) {
        let size = self.terminal_size();
        if core::mem::replace(&mut self.size, size) == size {
            return;
        }
        let terminal = self.ports.iter().position(|p| p.is_terminal);
        if let Some(terminal) = terminal.filter(|_| self.controlled) {
            control::announce_size(&mut self.shared.lock(), terminal, size);
        }
        signals.config_changed();
    }

    fn reset(&mut self) {
        self.controlled = false;
        *self.shared.lock() = Shared::fresh(self.ports.len());
    }
    fn save(&self) -> StateBlob {
        saved_state::to_blob(&*self.shared.lock())
    }
    fn restore(&mut self, blob: &StateBlob) -> Result<(), RestoreError> {
        let saved: Shared = saved_state::from_blob(blob)?;
        if saved.ports.len() != self.ports.len() {
            return Err(RestoreError::Value { tag: saved::PORTS, reason: "another number of ports" });
        }
        *self.shared.lock() = saved;
        Ok(())
    }
}
