//! virtio-console's backend on a console end of the host.
//!
//! Called by: [`crate::host`] when a machine is built; the device for output and waiting input; the console's thread.

use crate::input_gate::InputGate;
use crate::serial::stop_on_escape;
use crate::services::lock;
use device::Waker;
use host_io::serial::{ConsoleError, ConsolePort, ConsoleSink, ConsoleSpec, EscapeCommand};
use machine::RequestQueue;
use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use virtio_devices::ConsoleBackend;

/// Input that waits for the guest.
const INPUT_BYTES: usize = 4096;

#[derive(Default)]
struct Shared {
    input: VecDeque<u8>,
    /// Input was refused: the console waits to hear of room.
    refused: bool,
    waker: Option<Waker>,
}

/// Opens the end that `spec` names.
pub fn open(
    spec: &ConsoleSpec,
    requests: Arc<RequestQueue>,
    gate: Arc<InputGate>,
) -> Result<Box<dyn ConsoleBackend>, ConsoleError> {
    let shared: Arc<Mutex<Shared>> = Arc::default();
    let sink = Sink { shared: shared.clone(), requests, gate: gate.clone() };
    let port = Arc::new(ConsolePort::open(spec, sink)?);
    gate.add(&port);
    Ok(Box::new(Backend { port, shared }))
}

struct Sink {
    shared: Arc<Mutex<Shared>>,
    requests: Arc<RequestQueue>,
    gate: Arc<InputGate>,
}

impl Sink {
    fn wake(&self) {
        let waker = lock(&self.shared).waker.clone();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl ConsoleSink for Sink {
    fn input(&mut self, bytes: &[u8]) -> usize {
        if !self.gate.is_open() {
            return 0;
        }
        let taken = {
            let mut shared = lock(&self.shared);
            let taken = bytes.len().min(INPUT_BYTES.saturating_sub(shared.input.len()));
            shared.input.extend(&bytes[..taken]);
            shared.refused |= taken < bytes.len();
            taken
        };
        if taken > 0 {
            self.wake();
        }
        taken
    }
    fn command(&mut self, command: EscapeCommand) {
        stop_on_escape(&self.requests, command);
    }
    fn output_room(&mut self) {
        self.wake();
    }
}

struct Backend {
    port: Arc<ConsolePort>,
    shared: Arc<Mutex<Shared>>,
}

impl ConsoleBackend for Backend {
    fn set_waker(&mut self, waker: Waker) {
        lock(&self.shared).waker = Some(waker);
    }
    fn write(&mut self, data: &[u8]) -> usize {
        self.port.write(data)
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let mut shared = lock(&self.shared);
        let count = buf.len().min(shared.input.len());
        for (to, from) in buf.iter_mut().zip(shared.input.drain(..count)) {
            *to = from;
        }
        let room = count > 0 && std::mem::take(&mut shared.refused);
        drop(shared);
        if room {
            self.port.resume_input();
        }
        count
    }
}
