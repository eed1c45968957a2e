//! Holds back what people type while the machine stands still: before it runs for the first time (a UART that is
//! about to be restored would forget it), while it is paused or saved (what is taken then is not in the file).
//!
//! Called by: console sinks (`is_open`), the driver (`open`, `close`).

use crate::services::lock;
use host_io::serial::ConsolePort;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

/// See the module's header. Closed at first.
#[derive(Debug, Default)]
pub struct InputGate {
    open: AtomicBool,
    ports: Mutex<Vec<Weak<ConsolePort>>>,
}

impl InputGate {
    /// Whether input may go to the machine. Who is told no keeps it, until its port is resumed.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Acquire)
    }

    /// A port that waits at this gate.
    pub fn add(&self, port: &Arc<ConsolePort>) {
        lock(&self.ports).push(Arc::downgrade(port));
    }

    /// The machine runs: what waited goes in.
    pub fn open(&self) {
        self.open.store(true, Ordering::Release);
        let ports: Vec<_> = lock(&self.ports).iter().filter_map(Weak::upgrade).collect();
        ports.iter().for_each(|port| port.resume_input());
    }

    /// The machine stands still.
    pub fn close(&self) {
        self.open.store(false, Ordering::Release);
    }
}
