//! From interrupt lines to the controller that they end at.

use alloc::sync::Arc;
use device::LineSink;
use sync::Mutex;

/// A controller with numbered inputs.
pub trait InterruptInputs: Send {
    /// Input `line` is at `level` now.
    fn set_level(&mut self, line: u32, level: bool);
    /// As `set_level`, after a restore: no edge.
    fn restore_level(&mut self, line: u32, level: bool);
}

/// The inputs of a controller, as the lines see them. Takes the controller's lock.
pub struct InputPins<C>(pub Arc<Mutex<C>>);

impl<C: InterruptInputs> LineSink for InputPins<C> {
    fn set_level(&self, line: u32, level: bool) {
        self.0.lock().set_level(line, level);
    }
    fn restore_level(&self, line: u32, level: bool) {
        self.0.lock().restore_level(line, level);
    }
}
