//! The serial line of the machine that we run on, shared by the guests' first serial ports.
//!
//! One VM: its bytes pass as they are. Several: whole lines, each with its VM's name in front. What is typed goes to one
//! of them; Ctrl-A and a digit choose which.

use crate::arch::serial;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::sync::Arc;
use alloc::vec::Vec;
use chipset::SerialOut;
use core::sync::atomic::{AtomicBool, Ordering::Relaxed};
use machine::SerialInput;
use sync::Mutex;

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

/// A VM's end of the line.
pub struct Port {
    name: String,
    line: Mutex<Vec<u8>>,
    input: Mutex<(Option<SerialInput>, VecDeque<u8>)>,
}

impl Port {
    /// Of the VM called `name`.
    pub fn new(name: &str) -> Self {
        Self { name: name.into(), line: Mutex::default(), input: Mutex::default() }
    }

    /// Connects the guest's serial port; one that is not `shown` goes nowhere.
    pub fn open(this: &Arc<Self>, shown: bool, input: SerialInput) -> Box<dyn SerialOut> {
        if shown {
            this.input.lock().0 = Some(input);
        }
        Box::new(PortOut(shown.then(|| this.clone())))
    }

    fn write(&self, bytes: &[u8]) {
        if !NAMED.load(Relaxed) {
            return crate::log::raw(bytes);
        }
        let mut line = self.line.lock();
        for byte in bytes {
            match byte {
                b'\n' => {
                    crate::log!("[{}] {}", self.name, String::from_utf8_lossy(&line));
                    line.clear();
                }
                b'\r' => {}
                _ => line.push(*byte),
            }
            if line.len() >= MAX_LINE {
                crate::log!("[{}] {}", self.name, String::from_utf8_lossy(&line));
                line.clear();
            }
        }
    }

    /// Something was typed for it.
    pub fn typed(&self, byte: u8) {
        let mut input = self.input.lock();
        if input.1.len() < MAX_TYPED {
            input.1.push_back(byte);
        }
    }

    /// Gives the guest what it has room for.
    pub fn give(&self) {
        let mut guard = self.input.lock();
        let (Some(input), typed) = &mut *guard else { return };
        if !typed.is_empty() {
            let taken = input.receive(typed.make_contiguous());
            typed.drain(..taken.min(typed.len()));
        }
    }
}

struct PortOut(Option<Arc<Port>>);

impl SerialOut for PortOut {
    fn write(&mut self, bytes: &[u8]) -> usize {
        if let Some(port) = &self.0 {
            port.write(bytes);
        }
        bytes.len()
    }
    fn input_room(&mut self) {
        // The scheduler offers what is left at every turn.
    }
}

/// What is typed, and to whom it goes.
#[derive(Debug, Default)]
pub struct Keyboard {
    focus: usize,
    switching: bool,
}

impl Keyboard {
    /// Takes what arrived and hands it to one of `ports`.
    pub fn poll(&mut self, ports: &[&Arc<Port>]) {
        while let Some(byte) = serial::receive() {
            if core::mem::take(&mut self.switching) {
                match byte {
                    b'1'..=b'9' if usize::from(byte - b'1') < ports.len() => {
                        self.focus = usize::from(byte - b'1');
                        crate::log!("typing goes to `{}`", ports[self.focus].name);
                        continue;
                    }
                    SWITCH_KEY => {}
                    _ => continue,
                }
            } else if byte == SWITCH_KEY {
                self.switching = true;
                continue;
            }
            if let Some(port) = ports.get(self.focus) {
                port.typed(byte);
            }
        }
    }
}
