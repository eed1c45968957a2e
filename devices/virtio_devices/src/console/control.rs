//! The control queues of a multiport console (VIRTIO 1.2, 5.3.6.2).
//!
//! ```text
//! driver: DEVICE_READY ─► we: DEVICE_ADD per port ─► driver: PORT_READY ─► we: PORT_NAME, CONSOLE_PORT, PORT_OPEN
//! driver: PORT_OPEN(1|0) when a program opens or closes the port
//! ```

use super::{Port, Shared};
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::task::Poll;
use device::Waker;
use sync::Mutex;
use virtio::{Queue, QueueRunner, QueueState};

const DEVICE_READY: u16 = 0;
const DEVICE_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

const HEADER_BYTES: usize = 8;
/// A header and a name.
pub(super) const MAX_MESSAGE_BYTES: usize = 256;
/// Most messages that wait for a driver that gives no buffers; further ones are dropped.
pub(super) const MAX_MESSAGES: usize = 256;

/// A message to the driver.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message(pub(super) Vec<u8>);

impl Message {
    fn new(port: usize, event: u16, value: u16) -> Self {
        let mut bytes = Vec::with_capacity(HEADER_BYTES);
        bytes.extend_from_slice(&(port as u32).to_le_bytes());
        bytes.extend_from_slice(&event.to_le_bytes());
        bytes.extend_from_slice(&value.to_le_bytes());
        Self(bytes)
    }
    fn with(mut self, more: &[u8]) -> Self {
        let room = MAX_MESSAGE_BYTES - HEADER_BYTES;
        self.0.extend_from_slice(&more[..more.len().min(room)]);
        self
    }
}

fn post(shared: &mut Shared, message: Message) {
    if shared.messages.len() < MAX_MESSAGES {
        shared.messages.push_back(message);
    }
}

/// Tells the driver the size of terminal `port`.
pub(super) fn announce_size(shared: &mut Shared, port: usize, size: Option<(u16, u16)>) {
    if let Some((columns, rows)) = size {
        let size = [columns.to_le_bytes(), rows.to_le_bytes()].concat();
        post(shared, Message::new(port, RESIZE, 0).with(&size));
    }
}

pub(super) struct ControlRunner {
    ports: Arc<[Port]>,
    shared: Arc<Mutex<Shared>>,
    to_driver: Queue,
    from_driver: Queue,
    waker: Waker,
    quiesced: bool,
}

impl ControlRunner {
    pub fn new(
        ports: Arc<[Port]>,
        shared: Arc<Mutex<Shared>>,
        to_driver: Queue,
        from_driver: Queue,
        waker: Waker,
    ) -> Self {
        Self { ports, shared, to_driver, from_driver, waker, quiesced: false }
    }

    fn run(&mut self) {
        if self.quiesced {
            return;
        }
        let mut budget = self.from_driver.size();
        loop {
            if budget == 0 {
                self.waker.wake();
                break;
            }
            budget -= 1;
            match self.from_driver.pop() {
                Some(chain) => {
                    let header = chain.reader(self.from_driver.dma()).read_array::<HEADER_BYTES>();
                    if let Some(header) = header {
                        self.take(header);
                    }
                    self.from_driver.push(chain.head(), 0);
                }
                None if self.from_driver.arm() => {}
                None => break,
            }
        }
        self.from_driver.signal();
        self.deliver();
    }

    /// A message of the driver.
    fn take(&mut self, header: [u8; HEADER_BYTES]) {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = header;
        let number = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        let (event, value) = (u16::from_le_bytes([e0, e1]), u16::from_le_bytes([v0, v1]));
        if event == DEVICE_READY {
            let mut shared = self.shared.lock();
            for port in (0..self.ports.len()).filter(|_| value == 1) {
                post(&mut shared, Message::new(port, DEVICE_ADD, 1));
            }
            return;
        }
        let Some(port) = self.ports.get(number) else { return };
        match event {
            PORT_READY if value == 1 => {
                let size = port.backend.lock().size().filter(|_| port.is_terminal);
                let mut shared = self.shared.lock();
                if let Some(name) = &port.name {
                    post(&mut shared, Message::new(number, PORT_NAME, 1).with(name.as_bytes()));
                }
                if port.is_terminal {
                    post(&mut shared, Message::new(number, CONSOLE_PORT, 1));
                    announce_size(&mut shared, number, size);
                }
                post(&mut shared, Message::new(number, PORT_OPEN, 1));
            }
            PORT_OPEN => {
                if let Some(state) = self.shared.lock().ports.get_mut(number) {
                    state.guest_open = value == 1;
                }
                // The port's runner may have input for it now.
                self.waker.wake();
            }
            _ => {}
        }
    }

    /// Gives messages to the driver as far as there are buffers.
    fn deliver(&mut self) {
        loop {
            let Some(message) = self.shared.lock().messages.front().cloned() else { break };
            match self.to_driver.pop() {
                Some(chain) => {
                    // A buffer that is too short gets what fits: the driver's loss.
                    let written = chain.writer(self.to_driver.dma()).write(&message.0) as u32;
                    self.to_driver.push(chain.head(), written);
                    self.shared.lock().messages.pop_front();
                }
                None if self.to_driver.arm() => {}
                None => break,
            }
        }
        self.to_driver.signal();
    }
}

impl QueueRunner for ControlRunner {
    fn kick(&mut self, _: u16) {
        self.run();
    }
    fn poll(&mut self) {
        self.run();
    }
    fn quiesce(&mut self) -> Poll<()> {
        self.quiesced = true;
        Poll::Ready(())
    }
    fn resume(&mut self) {
        self.quiesced = false;
        self.run();
    }
    fn queue_states(&self) -> Vec<(u16, QueueState)> {
        [&self.to_driver, &self.from_driver].map(|q| (q.index(), q.state([]))).into()
    }
}
