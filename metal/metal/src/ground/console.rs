//! The serial line of the machine that we run on, shared by the guests' first serial ports.
//!
//! One VM: its bytes pass as they are. Several: whole lines, each with its VM's name in front. What is typed goes to one
//! of them, or to the monitor: Ctrl-A and a digit choose, 0 is the monitor.

use super::processor::Processor;
use crate::arch::serial;
use crate::line_editor::{Key, LineEditor};
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::SerialOut;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use device::Waker;
use machine::{PanicWatch, SerialInput};
use sync::Mutex;
use virtio_devices::ConsoleBackend;

/// Ctrl-A.
const SWITCH_KEY: u8 = 1;
/// A line longer than this is shown in pieces.
const MAX_LINE: usize = 512;
/// Most bytes that wait for a guest to read them.
const MAX_TYPED: usize = 4096;

/// Whether names stand in front of lines.
static NAMED: AtomicBool = AtomicBool::new(false);

/// Several VMs write from now on.
pub fn name_lines() {
    NAMED.store(true, Relaxed);
}

/// Lines of a VM that are kept.
const MAX_KEPT: usize = 64;

/// A VM's end of the line.
pub struct Port {
    name: String,
    lines: Mutex<Lines>,
    input: Mutex<Input>,
    /// Of the serial port, and of the virtio console.
    watches: [PanicWatch; 2],
}

/// What the VM said.
#[derive(Default)]
struct Lines {
    /// The line that is not finished.
    open: Vec<u8>,
    kept: VecDeque<String>,
}

/// What was typed, and where it goes: to the virtio console if there is one.
#[derive(Default)]
struct Input {
    typed: VecDeque<u8>,
    serial: Option<SerialInput>,
    console: Option<Waker>,
}

impl Port {
    /// Of the VM called `name`.
    pub fn new(name: &str) -> Self {
        let watches = [PanicWatch::default(), PanicWatch::default()];
        Self { name: name.into(), lines: Mutex::default(), input: Mutex::default(), watches }
    }

    /// What the guest's kernel said last, if it panicked and said its last words.
    pub fn panic_ended(&self) -> Option<String> {
        self.watches.iter().find_map(PanicWatch::ended)
    }

    /// The same, whether or not they were said.
    pub fn panicked(&self) -> Option<String> {
        self.watches.iter().find_map(PanicWatch::panicked)
    }

    /// The machine starts again.
    pub fn forget_panic(&self) {
        self.watches.iter().for_each(PanicWatch::forget);
    }

    /// Its last lines.
    pub fn last_lines(&self) -> Vec<String> {
        self.lines.lock().kept.iter().cloned().collect()
    }

    /// Connects the guest's serial port; one that is not `shown` goes nowhere.
    pub fn open(this: &Arc<Self>, shown: bool, input: SerialInput) -> Box<dyn SerialOut> {
        if shown {
            this.input.lock().serial = Some(input);
        }
        Box::new(PortOut(shown.then(|| this.clone())))
    }

    /// Connects the guest's virtio console.
    pub fn open_console(this: &Arc<Self>, shown: bool) -> Box<dyn ConsoleBackend> {
        Box::new(ConsoleEnd(shown.then(|| this.clone())))
    }

    /// The guest wrote this to its serial port (0) or its virtio console (1).
    fn write(&self, stream: usize, bytes: &[u8]) {
        if self.watches[stream].output(bytes) {
            Processor::want_scheduler();
        }
        let named = NAMED.load(Relaxed);
        if !named {
            crate::log::raw(bytes);
        }
        let mut lines = self.lines.lock();
        for byte in bytes {
            match byte {
                b'\n' => self.end_line(&mut lines, named),
                b'\r' => {}
                _ => lines.open.push(*byte),
            }
            if lines.open.len() >= MAX_LINE {
                self.end_line(&mut lines, named);
            }
        }
    }

    fn end_line(&self, lines: &mut Lines, named: bool) {
        let line = String::from_utf8_lossy(&core::mem::take(&mut lines.open)).into_owned();
        if named {
            crate::log::passing(format_args!("[{}] {line}", self.name));
        }
        if lines.kept.len() == MAX_KEPT {
            lines.kept.pop_front();
        }
        lines.kept.push_back(line);
    }

    /// Something was typed for it.
    pub fn typed(&self, byte: u8) {
        let mut input = self.input.lock();
        if input.typed.len() < MAX_TYPED {
            input.typed.push_back(byte);
        }
        if let Some(waker) = &input.console {
            waker.wake();
        }
    }

    /// Gives the guest's serial port what it has room for.
    pub fn give(&self) {
        let Input { typed, serial: Some(serial), console: None } = &mut *self.input.lock() else { return };
        if !typed.is_empty() {
            let taken = serial.receive(typed.make_contiguous());
            typed.drain(..taken.min(typed.len()));
        }
    }
}

/// A virtio console's end; `None`: it is connected to nothing.
struct ConsoleEnd(Option<Arc<Port>>);

impl ConsoleBackend for ConsoleEnd {
    fn set_waker(&mut self, waker: Waker) {
        if let Some(port) = &self.0 {
            port.input.lock().console = Some(waker);
        }
    }
    fn write(&mut self, data: &[u8]) -> usize {
        if let Some(port) = &self.0 {
            port.write(1, data);
        }
        data.len()
    }
    fn read(&mut self, buf: &mut [u8]) -> usize {
        let Some(port) = &self.0 else { return 0 };
        let typed = &mut port.input.lock().typed;
        let bytes = typed.len().min(buf.len());
        buf.iter_mut().zip(typed.drain(..bytes)).for_each(|(to, byte)| *to = byte);
        bytes
    }
}

struct PortOut(Option<Arc<Port>>);

impl SerialOut for PortOut {
    fn write(&mut self, bytes: &[u8]) -> usize {
        if let Some(port) = &self.0 {
            port.write(0, bytes);
        }
        bytes.len()
    }
    fn input_room(&mut self) {
        // The scheduler offers what is left at every turn.
    }
}

const PROMPT: &[u8] = b"bedplate> ";

/// What is typed, and to whom it goes.
#[derive(Debug, Default)]
pub struct Keyboard {
    /// The VM; `None`: the monitor.
    focus: Option<usize>,
    switching: bool,
    editor: LineEditor,
}

impl Keyboard {
    /// Typing goes to the first VM at first.
    pub fn new() -> Self {
        Self { focus: Some(0), ..Self::default() }
    }

    /// Typing goes to VM `number`.
    pub fn type_to(&mut self, number: usize) {
        self.focus = Some(number);
    }

    /// The monitor is ready for the next line, if typing goes there.
    pub fn prompt(&self) {
        if self.focus.is_none() {
            crate::log::raw(PROMPT);
        }
    }

    /// Takes what arrived; a line for the monitor.
    pub fn poll(&mut self, ports: &[&Arc<Port>]) -> Option<String> {
        while let Some(byte) = serial::receive() {
            if core::mem::take(&mut self.switching) {
                match byte {
                    b'0' => {
                        self.focus = None;
                        crate::log!("");
                        self.prompt();
                        continue;
                    }
                    b'1'..=b'9' if usize::from(byte - b'1') < ports.len() => {
                        self.focus = Some(usize::from(byte - b'1'));
                        continue;
                    }
                    SWITCH_KEY => {}
                    _ => continue,
                }
            } else if byte == SWITCH_KEY {
                self.switching = true;
                continue;
            }
            if let Some(focus) = self.focus {
                if let Some(port) = ports.get(focus) {
                    port.typed(byte);
                }
                continue;
            }
            match self.editor.key(byte) {
                Key::Echo(bytes) => crate::log::raw(&bytes),
                Key::Line(line) => {
                    crate::log!("");
                    return Some(line);
                }
                Key::Nothing => {}
            }
        }
        None
    }
}
