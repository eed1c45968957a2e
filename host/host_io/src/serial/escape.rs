//! The console's escape key as a pure state machine: Ctrl-A x stops the VM, Ctrl-A h shows help, Ctrl-A Ctrl-A types a Ctrl-A.
//!
//! Called by: `serial::console` on bytes typed at a terminal.
//!
//! Invariants: every input byte is either passed on exactly once, in order, or is part of an escape sequence; the state
//! survives between calls, so that a sequence may be cut anywhere.

/// The key that opens a sequence: Ctrl-A.
pub const ESCAPE_KEY: u8 = 0x01;

/// What `Ctrl-A h` prints; the vmm may show its first line at start as well.
pub const ESCAPE_HELP: &str =
    "Ctrl-A x  stop the VM\r\nCtrl-A h  show this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// What the user asked the VMM, not the guest, to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EscapeCommand {
    /// Ctrl-A x: stop the VM.
    Stop,
    /// Ctrl-A h, or Ctrl-A and a key that means nothing: show the keys.
    Help,
}

/// One step of the parsed input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EscapeEvent<'a> {
    /// Bytes for the guest.
    Input(&'a [u8]),
    /// A command for the VMM.
    Command(EscapeCommand),
}

/// Remembers whether an escape key is waiting for its second half.
#[derive(Debug, Default)]
pub struct EscapeParser {
    escaped: bool,
}

impl EscapeParser {
    /// Splits typed bytes into guest input and commands, in order.
    pub fn feed<'a>(&mut self, mut bytes: &'a [u8], mut emit: impl FnMut(EscapeEvent<'a>)) {
        while let Some((&first, rest)) = bytes.split_first() {
            if self.escaped {
                self.escaped = false;
                match first {
                    ESCAPE_KEY => emit(EscapeEvent::Input(&bytes[..1])),
                    b'x' | b'X' => emit(EscapeEvent::Command(EscapeCommand::Stop)),
                    _ => emit(EscapeEvent::Command(EscapeCommand::Help)),
                }
                bytes = rest;
                continue;
            }
            let plain = bytes.iter().position(|&b| b == ESCAPE_KEY).unwrap_or(bytes.len());
            if plain > 0 {
                emit(EscapeEvent::Input(&bytes[..plain]));
            }
            self.escaped = plain < bytes.len();
            bytes = bytes.get(plain + 1..).unwrap_or_default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(parts: &[&[u8]]) -> (Vec<u8>, Vec<EscapeCommand>) {
        let mut parser = EscapeParser::default();
        let (mut input, mut commands) = (Vec::new(), Vec::new());
        for part in parts {
            parser.feed(part, |event| match event {
                EscapeEvent::Input(bytes) => input.extend_from_slice(bytes),
                EscapeEvent::Command(command) => commands.push(command),
            });
        }
        (input, commands)
    }

    #[test]
    fn sequences_mean_what_the_help_says() {
        assert_eq!(run(&[b"ls\r"]), (b"ls\r".to_vec(), vec![]));
        assert_eq!(run(&[b"a\x01xb"]), (b"ab".to_vec(), vec![EscapeCommand::Stop]));
        assert_eq!(run(&[b"\x01h"]), (vec![], vec![EscapeCommand::Help]));
        assert_eq!(run(&[b"\x01?q"]), (b"q".to_vec(), vec![EscapeCommand::Help]));
        assert_eq!(run(&[b"\x01\x01x"]), (b"\x01x".to_vec(), vec![]));
        assert_eq!(run(&[b"\x01", b"", b"x"]), (vec![], vec![EscapeCommand::Stop]));
    }

    proptest! {
        #[test]
        fn cutting_the_input_changes_nothing(keys in proptest::collection::vec(prop_oneof![Just(1u8), Just(b'x'), any::<u8>()], 0..64), cut in 0usize..64) {
            let cut = cut.min(keys.len());
            prop_assert_eq!(run(&[&keys]), run(&[&keys[..cut], &keys[cut..]]));
        }

        #[test]
        fn doubling_every_escape_key_is_transparent(keys in proptest::collection::vec(any::<u8>(), 0..64)) {
            let typed: Vec<u8> = keys.iter().flat_map(|&b| if b == ESCAPE_KEY { vec![b, b] } else { vec![b] }).collect();
            prop_assert_eq!(run(&[&typed]), (keys, vec![]));
        }
    }
}
