//! Interrupt lines: handles that hide their number; lines shared by several devices.

use alloc::sync::Arc;
use alloc::vec::Vec;
use sync::Mutex;

/// Whoever takes levels of numbered lines: an interrupt controller, or the machine in front of several.
pub trait LineSink: Send + Sync {
    /// Line `line` is at `level` now. Called with every change, and again for unchanged levels.
    fn set_level(&self, line: u32, level: bool);
    /// As `set_level` after a restore: the level is established without counting as an edge.
    fn restore_level(&self, line: u32, level: bool);
}

/// One device's handle on a line. Dropped: lowered.
pub struct IrqLine {
    sink: Arc<dyn LineSink>,
    line: u32,
    level: bool,
}

impl IrqLine {
    /// The handle of `line` at `sink`, low.
    pub fn new(sink: Arc<dyn LineSink>, line: u32) -> Self {
        Self { sink, line, level: false }
    }
    /// A line that leads nowhere.
    pub fn unconnected() -> Self {
        struct Nowhere;
        impl LineSink for Nowhere {
            fn set_level(&self, _: u32, _: bool) {}
            fn restore_level(&self, _: u32, _: bool) {}
        }
        Self::new(Arc::new(Nowhere), 0)
    }
    /// Drives the line.
    pub fn set(&mut self, level: bool) {
        if self.level != level {
            self.level = level;
            self.sink.set_level(self.line, level);
        }
    }
    /// An edge: up and down.
    pub fn pulse(&mut self) {
        self.set(false);
        self.set(true);
        self.set(false);
    }
    /// Re-establishes a level after a restore, without an edge.
    pub fn restore(&mut self, level: bool) {
        self.level = level;
        self.sink.restore_level(self.line, level);
    }
    /// The level that was last driven.
    pub fn level(&self) -> bool {
        self.level
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// A line with several drivers: high while any of them drives it. Each driver gets a number of its own
/// from [`SharedLine::add_driver`], which is the `line` of its [`IrqLine`].
pub struct SharedLine {
    output: Arc<dyn LineSink>,
    line: u32,
    levels: Mutex<Vec<bool>>,
}

impl SharedLine {
    /// In front of `line` of `output`.
    pub fn new(output: Arc<dyn LineSink>, line: u32) -> Arc<Self> {
        Arc::new(Self { output, line, levels: Mutex::new(Vec::new()) })
    }
    /// A new driver's handle.
    pub fn add_driver(self: &Arc<Self>) -> IrqLine {
        let mut levels = self.levels.lock();
        levels.push(false);
        IrqLine::new(self.clone(), (levels.len() - 1) as u32)
    }
    fn change(&self, driver: u32, level: bool, restore: bool) {
        let mut levels = self.levels.lock();
        if let Some(slot) = levels.get_mut(driver as usize) {
            *slot = level;
        }
        let any = levels.iter().any(|l| *l);
        // Told under the lock: two drivers cannot report out of order.
        if restore {
            self.output.restore_level(self.line, any);
        } else {
            self.output.set_level(self.line, any);
        }
    }
}

impl LineSink for SharedLine {
    fn set_level(&self, driver: u32, level: bool) {
        self.change(driver, level, false);
    }
    fn restore_level(&self, driver: u32, level: bool) {
        self.change(driver, level, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u32, bool)>>);
    impl LineSink for Log {
        fn set_level(&self, line: u32, level: bool) {
            self.0.lock().push((line, level));
        }
        fn restore_level(&self, _: u32, _: bool) {}
    }

    #[test]
    fn shared_lines_are_high_while_anyone_drives() {
        let log = Arc::new(Log::default());
        let shared = SharedLine::new(log.clone(), 9);
        let (mut a, mut b) = (shared.add_driver(), shared.add_driver());
        a.set(true);
        b.set(true);
        a.set(false);
        drop(b);
        assert_eq!(*log.0.lock(), [(9, true), (9, true), (9, true), (9, false)]);
    }
}
