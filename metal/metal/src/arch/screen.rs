//! The text screen of a PC, for last words: 80 × 25 characters at 0xB8000. On a machine without one the writes go
//! nowhere.

use core::fmt::{Arguments, Write};

const BASE: usize = 0xB_8000;
const COLUMNS: usize = 80;
const ROWS: usize = 25;
/// White on red.
const ATTRIBUTE: u16 = 0x4F00;

struct Screen {
    at: usize,
}

impl Screen {
    fn put(&mut self, byte: u8) {
        if self.at < COLUMNS * ROWS {
            let cell = (BASE as *mut u16).wrapping_add(self.at);
            // SAFETY: the legacy video window is mapped and no RAM of ours.
            unsafe { cell.write_volatile(ATTRIBUTE | u16::from(byte)) };
            self.at += 1;
        }
    }
}

impl Write for Screen {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            if byte == b'\n' {
                self.at = self.at.next_multiple_of(COLUMNS);
            } else {
                self.put(if byte.is_ascii_graphic() { byte } else { b' ' });
            }
        }
        Ok(())
    }
}

/// Clears the screen and shows `text`.
pub fn show(text: Arguments<'_>) {
    let mut screen = Screen { at: 0 };
    (0..COLUMNS * ROWS).for_each(|_| screen.put(b' '));
    screen.at = 0;
    // The screen never refuses.
    let _ = screen.write_fmt(text);
}
