//! The monitor on the serial line: what people type, as typed requests, and the line editor under it.
//!
//! Called by: `ground`, which does what is asked. Nothing here touches a VM or the port.

use alloc::string::{String, ToString};
use alloc::vec::Vec;

/// Something that the monitor is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// All VMs, with what they do.
    List,
    /// Typing goes to this VM.
    Console(usize),
    /// It stands still.
    Pause(usize),
    /// It goes on.
    Resume(usize),
    /// It starts again.
    Reset(usize),
    /// It ends.
    Stop(usize),
    /// Its exits and its time.
    Statistics(usize),
    /// Memory of the machine.
    Memory,
    /// These commands.
    Help,
}

/// For `help`.
pub const HELP: &str = "\
list            all VMs
console N       type to VM N (Ctrl-A 0 comes back here)
pause N         let VM N stand still
resume N        let it go on
reset N         start it again
stop N          end it
stats N         its exits and its time
memory          memory of this machine
help            this";

/// The request in a line, `None` in an empty one. VMs are counted from 1 by people.
pub fn parse(line: &str, vms: usize) -> Result<Option<Command>, String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let vm = |make: fn(usize) -> Command| match words.get(1).map(|word| word.parse::<usize>()) {
        Some(Ok(number)) if (1..=vms).contains(&number) && words.len() == 2 => Ok(Some(make(number - 1))),
        _ => Err(alloc::format!("say which VM, 1 to {vms}")),
    };
    let alone = |command: Command| {
        if words.len() == 1 { Ok(Some(command)) } else { Err("this takes no more words".to_string()) }
    };
    match words.first().copied() {
        None => Ok(None),
        Some("list" | "ls") => alone(Command::List),
        Some("console") => vm(Command::Console),
        Some("pause") => vm(Command::Pause),
        Some("resume") => vm(Command::Resume),
        Some("reset") => vm(Command::Reset),
        Some("stop") => vm(Command::Stop),
        Some("stats") => vm(Command::Statistics),
        Some("memory") => alone(Command::Memory),
        Some("help" | "?") => alone(Command::Help),
        Some(other) => Err(alloc::format!("there is no command `{other}`; try help")),
    }
}

const MAX_LINE: usize = 128;

/// A line that is being typed.
#[derive(Debug, Default)]
pub struct LineEditor {
    line: String,
}

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

impl LineEditor {
    /// A key was typed.
    pub fn key(&mut self, byte: u8) -> Key {
        match byte {
            b'\r' | b'\n' => Key::Line(core::mem::take(&mut self.line)),
            // Backspace and Delete.
            8 | 127 if self.line.pop().is_some() => Key::Echo(b"\x08 \x08".to_vec()),
            // Ctrl-C and Ctrl-U: all of it.
            3 | 21 => {
                let erased = b"\x08 \x08".repeat(self.line.len());
                self.line.clear();
                Key::Echo(erased)
            }
            b' '..=b'~' if self.line.len() < MAX_LINE => {
                self.line.push(char::from(byte));
                Key::Echo(alloc::vec![byte])
            }
            _ => Key::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_requests() {
        assert_eq!(parse("", 2), Ok(None));
        assert_eq!(parse("  list ", 2), Ok(Some(Command::List)));
        assert_eq!(parse("console 2", 2), Ok(Some(Command::Console(1))));
        for wrong in ["console", "console 0", "console 3", "stop x", "stop 1 2", "list 1", "jump"] {
            assert!(parse(wrong, 2).is_err(), "{wrong}");
        }
        for line in HELP.lines() {
            let words: Vec<&str> = line.split("  ").next().unwrap().split(' ').collect();
            let typed = if words.len() > 1 { alloc::format!("{} 1", words[0]) } else { words[0].to_string() };
            assert!(parse(&typed, 1).is_ok(), "{typed}");
        }
    }

    #[test]
    fn lines_are_edited() {
        let mut editor = LineEditor::default();
        let typed =
            |editor: &mut LineEditor, bytes: &[u8]| bytes.iter().map(|b| editor.key(*b)).last().unwrap();
        assert_eq!(typed(&mut editor, b"lisst\x7F\x08t\r"), Key::Line("list".into()));
        assert_eq!(typed(&mut editor, b"abc\x15"), Key::Echo(b"\x08 \x08".repeat(3)));
        assert_eq!(typed(&mut editor, b"help\n"), Key::Line("help".into()));
        assert_eq!(editor.key(8), Key::Nothing);
        assert_eq!(editor.key(0xC3), Key::Nothing);
        (0..1000).for_each(|_| drop(editor.key(b'x')));
        assert_eq!(editor.key(b'\r'), Key::Line("x".repeat(MAX_LINE)));
    }
}
