//! The log: lines on COM1 of the machine that we run on.
//!
//! Called by: everybody, through [`log!`](crate::log!). One line at a time; a panic breaks the lock.

use crate::arch::serial;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt::{Arguments, Write};
use spin::Mutex;

/// What is kept of the log, in bytes.
const KEPT: usize = 8 << 10;

/// The end of the log.
struct Kept {
    bytes: [u8; KEPT],
    /// Written so far, in all.
    written: usize,
}

impl Write for Kept {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            self.bytes[self.written % KEPT] = byte;
            self.written += 1;
        }
        Ok(())
    }
}

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

static PORT: Mutex<Kept> = Mutex::new(Kept { bytes: [0; KEPT], written: 0 });

/// Writes a line, and keeps it.
pub fn line(text: Arguments<'_>) {
    let mut kept = PORT.lock();
    // Neither refuses.
    let _ = writeln!(kept, "{text}");
    let _ = writeln!(Port, "{text}");
}

/// Writes a line that is not the log's own, such as a guest's.
pub fn passing(text: Arguments<'_>) {
    let _alone = PORT.lock();
    // As above.
    let _ = writeln!(Port, "{text}");
}

/// The last lines of the log, the oldest first.
pub fn last_lines() -> String {
    let kept = PORT.lock();
    let from = kept.written.saturating_sub(KEPT);
    let bytes: Vec<u8> = (from..kept.written).map(|at| kept.bytes[at % KEPT]).collect();
    drop(kept);
    let text = String::from_utf8_lossy(&bytes);
    // The first may have lost its beginning.
    let whole = if from > 0 { text.split_once('\n').map_or("", |(_, rest)| rest) } else { &text };
    whole.into()
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_log_is_kept() {
        let mut kept = PORT.lock();
        (0..KEPT).for_each(|n| _ = writeln!(kept, "line {n}"));
        drop(kept);
        let lines = last_lines();
        assert!(lines.len() <= KEPT && lines.starts_with("line "));
        assert!(lines.ends_with(&alloc::format!("line {}\n", KEPT - 1)));
    }
}
