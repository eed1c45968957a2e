//! The log: lines on COM1 of the machine that we run on.
//!
//! Called by: everybody, through [`log!`](crate::log!). One line at a time; a panic breaks the lock.

use crate::arch::serial;
use core::fmt::{Arguments, Write};
use spin::Mutex;

struct Port;

impl Write for Port {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                serial::send(b'\r');
            }
            serial::send(byte);
        }
        Ok(())
    }
}

static PORT: Mutex<()> = Mutex::new(());

/// Writes a line.
pub fn line(text: Arguments<'_>) {
    let _alone = PORT.lock();
    // The port never refuses.
    let _ = writeln!(Port, "{text}");
}

/// Writes bytes as they are.
pub fn raw(bytes: &[u8]) {
    let _alone = PORT.lock();
    bytes.iter().for_each(|byte| serial::send(*byte));
}

/// Writes a line whoever holds the lock: it will not come back.
pub fn last_words(text: Arguments<'_>) {
    // As above.
    let _ = writeln!(Port, "{text}");
}

/// Writes a line to the log.
#[macro_export]
macro_rules! log {
    ($($text:tt)*) => { $crate::log::line(format_args!($($text)*)) };
}
