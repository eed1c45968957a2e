//! Listens to a serial console for the words of a Linux kernel that panicked.
//!
//! A guest without a paravirtual panic device has no other way to say it, and it would stand still for ever or reset in
//! circles. Text that a program prints is told from the kernel's: after a panic nothing but the kernel speaks.
//!
//! Called by: the serial port's output (any thread); whoever drives the machine, at a reset and a while after the last
//! words.
//!
//! ```text
//!  quiet ── "Kernel panic - not syncing: …" at a line's start ──► panicked ── "---[ end Kernel panic" ──► ended
//!    ▲                                                               │                                     │
//!    └───────────── a line that is not the kernel's, or a reset ─────┴─────────────────────────────────────┘
//! ```

use alloc::string::{String, ToString};
use alloc::vec::Vec;
use sync::Mutex;

const PANIC: &str = "Kernel panic - not syncing";
const END: &str = "---[ end Kernel panic";
/// Longest piece of a line that is looked at.
const LINE_BYTES: usize = 256;

#[derive(Debug, Default)]
struct State {
    line: Vec<u8>,
    panicked: Option<Panic>,
}

#[derive(Debug)]
struct Panic {
    detail: String,
    /// Its line had a time in front: then all of the kernel's lines have.
    stamped: bool,
    ended: bool,
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct PanicWatch(Mutex<State>);

impl PanicWatch {
    /// The guest wrote this. True: it has just said the last words of a panic.
    pub fn output(&self, bytes: &[u8]) -> bool {
        let mut state = self.0.lock();
        let mut ended = false;
        for &byte in bytes {
            if byte != b'\n' && byte != b'\r' {
                if state.line.len() < LINE_BYTES {
                    state.line.push(byte);
                }
                continue;
            }
            let line = core::mem::take(&mut state.line);
            ended |= state.line(&String::from_utf8_lossy(&line));
        }
        ended
    }

    /// The panic's words, if the kernel panicked and nobody else has spoken since.
    pub fn panicked(&self) -> Option<String> {
        self.0.lock().panicked.as_ref().map(|p| p.detail.clone())
    }

    /// As `panicked`, once the last words were said.
    pub fn ended(&self) -> Option<String> {
        self.0.lock().panicked.as_ref().filter(|p| p.ended).map(|p| p.detail.clone())
    }

    /// The machine was reset.
    pub fn forget(&self) {
        *self.0.lock() = State::default();
    }
}

/// A line without the time that the kernel puts in front, and whether there was one.
fn unstamped(line: &str) -> (&str, bool) {
    let stamp = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    match stamp {
        Some((time, text)) if time.bytes().all(|b| b.is_ascii_digit() || b == b' ' || b == b'.') => {
            (text, true)
        }
        _ => (line, false),
    }
}

impl State {
    fn line(&mut self, line: &str) -> bool {
        if line.trim().is_empty() {
            return false;
        }
        let (text, stamped) = unstamped(line);
        if let Some(detail) = text.strip_prefix(PANIC) {
            let detail = detail.trim_start_matches(':').trim().to_string();
            self.panicked = Some(Panic { detail, stamped, ended: false });
            return false;
        }
        let Some(panic) = &mut self.panicked else { return false };
        if panic.stamped && !stamped {
            self.panicked = None;
            return false;
        }
        let ends = text.starts_with(END);
        panic.ended |= ends;
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OOPS: &str =
        "[    1.5] Kernel panic - not syncing: VFS: Unable to mount\r\n[    1.6] CPU: 0 PID: 1\r\n";
    const LAST: &str = "[    1.7] ---[ end Kernel panic - not syncing: VFS: Unable to mount ]---\r\n";

    #[test]
    fn hears_a_panic_in_any_pieces() {
        let watch = PanicWatch::default();
        assert!(!watch.output(OOPS.as_bytes()));
        assert_eq!(watch.panicked().as_deref(), Some("VFS: Unable to mount"));
        assert_eq!(watch.ended(), None);
        let mut ended = false;
        for byte in LAST.bytes() {
            ended |= watch.output(&[byte]);
        }
        assert!(ended);
        assert!(watch.ended().is_some());
        watch.forget();
        assert!(watch.panicked().is_none());
    }

    #[test]
    fn programs_that_print_the_words_are_not_the_kernel() {
        let watch = PanicWatch::default();
        watch.output(b"# echo Kernel panic - not syncing: ha\r\n");
        assert!(watch.panicked().is_none());
        watch.output(OOPS.as_bytes());
        watch.output(b"root@guest:~# \r\n");
        assert!(watch.panicked().is_none(), "a shell still speaks");
    }

    #[test]
    fn kernels_without_times() {
        let watch = PanicWatch::default();
        watch.output(b"Kernel panic - not syncing: Attempted to kill init!\r\nCPU: 0\r\n---[ end Kernel panic - x ]---\r\n");
        assert_eq!(watch.ended().as_deref(), Some("Attempted to kill init!"));
    }

    #[test]
    fn long_lines_cost_nothing() {
        let watch = PanicWatch::default();
        watch.output(&alloc::vec![b'x'; 1 << 20]);
        assert!(watch.0.lock().line.len() <= LINE_BYTES);
    }
}
