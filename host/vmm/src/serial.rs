//! A guest's serial port on a console end of the host.
//!
//! Called by: [`crate::host`] when a machine is built; the UART for output; the console's thread for input.

use crate::input_gate::InputGate;
use chipset::SerialOut;
use host_io::serial::{ConsoleError, ConsolePort, ConsoleSink, ConsoleSpec, EscapeCommand};
use machine::{PanicWatch, Request, RequestQueue, SerialInput, Verdict};
use std::sync::Arc;

/// Hears of the last words of a kernel that panicked.
pub type OnPanic = Arc<dyn Fn() + Send + Sync>;

/// Opens the end that `spec` names.
pub fn open(
    spec: &ConsoleSpec,
    input: SerialInput,
    room: device::Waker,
    requests: Arc<RequestQueue>,
    gate: Arc<InputGate>,
    watch: Arc<PanicWatch>,
    on_panic: OnPanic,
) -> Result<Box<dyn SerialOut>, ConsoleError> {
    let port = Arc::new(ConsolePort::open(spec, Sink { input, room, requests, gate: gate.clone() })?);
    gate.add(&port);
    Ok(Box::new(Output { port, watch, on_panic }))
}

/// From the outside to the guest.
struct Sink {
    input: SerialInput,
    room: device::Waker,
    requests: Arc<RequestQueue>,
    gate: Arc<InputGate>,
}

impl ConsoleSink for Sink {
    fn input(&mut self, bytes: &[u8]) -> usize {
        if self.gate.is_open() { self.input.receive(bytes) } else { 0 }
    }
    fn command(&mut self, command: EscapeCommand) {
        stop_on_escape(&self.requests, command);
    }
    fn output_room(&mut self) {
        self.room.wake();
    }
}

/// What a typed escape command does to the VM.
pub fn stop_on_escape(requests: &RequestQueue, command: EscapeCommand) {
    if command == EscapeCommand::Stop {
        // Refused only when it has ended already.
        let _ = requests.ask(Request::Stop(Verdict::Killed));
    }
}

/// From the guest to the outside.
struct Output {
    port: Arc<ConsolePort>,
    watch: Arc<PanicWatch>,
    on_panic: OnPanic,
}

impl SerialOut for Output {
    fn write(&mut self, bytes: &[u8]) -> usize {
        let taken = self.port.write(bytes).min(bytes.len());
        if self.watch.output(&bytes[..taken]) {
            (self.on_panic)();
        }
        taken
    }
    fn input_room(&mut self) {
        self.port.resume_input();
    }
}
