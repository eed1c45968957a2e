//! A line that is typed on a terminal: cursor, history, and what the terminal is to show.
//!
//! Called by: `ground`'s keyboard, for the monitor. Keys are bytes as a VT100 sends them.

use alloc::collections::VecDeque;
use alloc::string::String;
use alloc::vec::Vec;

const MAX_LINE: usize = 128;
/// Lines that are remembered.
const MAX_LINES: usize = 32;
const BACKSPACE: u8 = 8;
const ESCAPE: u8 = 0x1B;

/// What a key did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Key {
    /// These bytes go to the screen.
    Echo(Vec<u8>),
    /// The line is finished.
    Line(String),
    /// Nothing.
    Nothing,
}

/// How much of an escape sequence has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Sequence {
    #[default]
    None,
    /// ESC.
    Escape,
    /// ESC [ and perhaps digits: the first of them.
    Control(u8),
}

/// See the module's header.
#[derive(Debug, Default)]
pub struct LineEditor {
    /// Printable ASCII only.
    line: Vec<u8>,
    cursor: usize,
    sequence: Sequence,
    past: VecDeque<Vec<u8>>,
    /// The line of the past that is shown, counted from the last; 0: none.
    back: usize,
}

impl LineEditor {
    /// A key was typed, or a part of one.
    pub fn key(&mut self, byte: u8) -> Key {
        let shown = match (core::mem::take(&mut self.sequence), byte) {
            (Sequence::Escape, b'[' | b'O') => {
                self.sequence = Sequence::Control(0);
                return Key::Nothing;
            }
            (Sequence::Control(first), b'0'..=b'9' | b';') => {
                self.sequence = Sequence::Control(if first == 0 { byte } else { first });
                return Key::Nothing;
            }
            (Sequence::Control(first), _) => self.control(first, byte),
            (_, ESCAPE) => {
                self.sequence = Sequence::Escape;
                return Key::Nothing;
            }
            (_, b'\r' | b'\n') => return Key::Line(self.take()),
            (_, BACKSPACE | 127) if self.cursor > 0 => self.remove(self.cursor - 1),
            // Ctrl-C and Ctrl-U: all of it.
            (_, 3 | 21) => self.replace(Vec::new()),
            (_, b' '..=b'~') if self.line.len() < MAX_LINE => self.insert(byte),
            _ => return Key::Nothing,
        };
        if shown.is_empty() { Key::Nothing } else { Key::Echo(shown) }
    }

    /// The end of a control sequence (ECMA-48) whose first digit is `first`.
    fn control(&mut self, first: u8, last: u8) -> Vec<u8> {
        match (last, first) {
            (b'A', _) => self.remember(self.back + 1),
            (b'B', _) => self.remember(self.back.saturating_sub(1)),
            (b'C', _) => self.move_to((self.cursor + 1).min(self.line.len())),
            (b'D', _) => self.move_to(self.cursor.saturating_sub(1)),
            (b'H', _) | (b'~', b'1' | b'7') => self.move_to(0),
            (b'F', _) | (b'~', b'4' | b'8') => self.move_to(self.line.len()),
            (b'~', b'3') if self.cursor < self.line.len() => self.remove(self.cursor),
            _ => Vec::new(),
        }
    }

    fn take(&mut self) -> String {
        let line = core::mem::take(&mut self.line);
        (self.cursor, self.back) = (0, 0);
        if !line.is_empty() && self.past.front() != Some(&line) {
            self.past.truncate(MAX_LINES - 1);
            self.past.push_front(line.clone());
        }
        line.into_iter().map(char::from).collect()
    }

    fn move_to(&mut self, cursor: usize) -> Vec<u8> {
        let shown = if cursor > self.cursor {
            self.line[self.cursor..cursor].to_vec()
        } else {
            alloc::vec![BACKSPACE; self.cursor - cursor]
        };
        self.cursor = cursor;
        shown
    }

    fn insert(&mut self, byte: u8) -> Vec<u8> {
        self.line.insert(self.cursor, byte);
        let mut shown = self.line[self.cursor..].to_vec();
        self.cursor += 1;
        shown.extend(alloc::vec![BACKSPACE; self.line.len() - self.cursor]);
        shown
    }

    /// Removes the character at `at`, where the cursor is or right before it.
    fn remove(&mut self, at: usize) -> Vec<u8> {
        let mut shown = self.move_to(at);
        self.line.remove(at);
        shown.extend_from_slice(&self.line[at..]);
        shown.push(b' ');
        shown.extend(alloc::vec![BACKSPACE; self.line.len() + 1 - at]);
        shown
    }

    fn replace(&mut self, line: Vec<u8>) -> Vec<u8> {
        let mut shown = self.move_to(0);
        let behind = self.line.len().saturating_sub(line.len());
        shown.extend_from_slice(&line);
        shown.extend(alloc::vec![b' '; behind]);
        shown.extend(alloc::vec![BACKSPACE; behind]);
        (self.cursor, self.line) = (line.len(), line);
        shown
    }

    /// Shows the line that was typed `back` lines ago.
    fn remember(&mut self, back: usize) -> Vec<u8> {
        let line = match back.checked_sub(1) {
            None => Vec::new(),
            Some(number) => match self.past.get(number) {
                Some(line) => line.clone(),
                None => return Vec::new(),
            },
        };
        self.back = back;
        self.replace(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What stands on a terminal's line after `shown`.
    fn terminal(shown: &[u8]) -> String {
        let (mut line, mut cursor) = (Vec::new(), 0);
        for byte in shown {
            if *byte == BACKSPACE {
                cursor -= 1;
                continue;
            }
            if cursor == line.len() {
                line.push(*byte);
            } else {
                line[cursor] = *byte;
            }
            cursor += 1;
        }
        String::from_utf8(line).unwrap().trim_end().into()
    }

    /// Types; the last line that was finished, and what a terminal shows since.
    fn typed(editor: &mut LineEditor, bytes: &[u8]) -> (Option<String>, String) {
        let (mut last, mut shown) = (None, Vec::new());
        for byte in bytes {
            match editor.key(*byte) {
                Key::Echo(bytes) => shown.extend(bytes),
                Key::Line(line) => {
                    last = Some(line);
                    shown.clear();
                }
                Key::Nothing => {}
            }
        }
        (last, terminal(&shown))
    }

    #[test]
    fn what_is_shown_is_what_is_meant() {
        for (keys, line) in [
            (&b"lisst\x7F\x08t"[..], "list"),
            (b"abc\x15", ""),
            (b"lt\x1B[Dis", "list"),
            (b"ist\x1B[Hl\x1B[F 1", "list 1"),
            (b"xhelp\x1B[1~\x1B[3~", "help"),
            (b"\x1B[3~\x1B[C\x1B[D\x1B[A\x1B[Bok\xC3", "ok"),
            (b"\x1BOHq\x1B[99z", "q"),
        ] {
            let mut editor = LineEditor::default();
            assert_eq!(typed(&mut editor, keys).1, line, "{keys:?}");
            assert_eq!(editor.key(b'\r'), Key::Line(line.into()), "{keys:?}");
        }
    }

    #[test]
    fn lines_come_back() {
        let mut editor = LineEditor::default();
        assert_eq!(typed(&mut editor, b"stop 1\rlist\rlist\r").0.as_deref(), Some("list"));
        assert_eq!(typed(&mut editor, b"abcdefgh\x1B[A").1, "list");
        assert_eq!(typed(&mut editor, b"\x1B[A\x1B[A\r").0.as_deref(), Some("stop 1"));
        assert_eq!(typed(&mut editor, b"\x1B[A\x1B[A\x1B[B\x1B[B\r").0.as_deref(), Some(""));
    }

    #[test]
    fn lines_have_an_end() {
        let mut editor = LineEditor::default();
        (0..1000).for_each(|_| drop(editor.key(b'x')));
        assert_eq!(editor.key(b'\r'), Key::Line("x".repeat(MAX_LINE)));
        (0..1000).for_each(|n| drop(typed(&mut editor, alloc::format!("{n}\r").as_bytes())));
        assert_eq!(editor.past.len(), MAX_LINES);
    }
}
