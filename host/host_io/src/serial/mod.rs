//! Console ends: where a guest's serial port or virtio-console meets the person, the test script or the log file.
//!
//! Called by: `vmm`, one `ConsolePort` for each guest console.

mod console;
mod ends;
pub mod escape;
mod raw_terminal;

pub use console::{ConsolePort, ConsoleSink};
pub use ends::{ConsoleError, ConsoleSpec};
pub use escape::EscapeCommand;
pub use raw_terminal::RawTerminal;
