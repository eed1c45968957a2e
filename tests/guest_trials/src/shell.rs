//! Runs commands in a guest's shell and reads their output and exit status back.
//!
//! A command's end is marked by a text that the shell assembles, so that the terminal's echo of the command line
//! is never taken for it.

use std::time::Duration;

use crate::console::Console;
use crate::stage::Failure;

/// A shell at its prompt on a console.
#[derive(Debug)]
pub struct Shell<'a> {
    console: &'a mut Console,
    patience: Duration,
    count: u32,
}

impl<'a> Shell<'a> {
    /// Takes over a console on which a shell waits; `patience` is for each command.
    ///
    /// # Errors
    /// The shell does not answer.
    pub fn at(console: &'a mut Console, patience: Duration) -> Result<Self, Failure> {
        let mut shell = Self { console, patience, count: 0 };
        // An empty line first: a shell that was just started may drop what came before its prompt.
        shell.console.send("\n")?;
        shell.run("PS1=; stty -echo 2>/dev/null; true")?;
        Ok(shell)
    }

    /// Runs a command that must succeed and gives its output.
    ///
    /// # Errors
    /// Exit status other than zero, or no answer.
    pub fn run(&mut self, command: &str) -> Result<String, Failure> {
        let (status, output) = self.status(command)?;
        if status == 0 {
            return Ok(output);
        }
        Err(Failure::new(format!("`{command}` ended with {status} in the guest; it said:\n{output}")))
    }

    /// Runs a command and gives its exit status and output.
    ///
    /// # Errors
    /// No answer.
    pub fn status(&mut self, command: &str) -> Result<(i32, String), Failure> {
        self.count += 1;
        let count = self.count;
        self.console.send(&format!("{command}; echo \"BEDPLATE-\"\"END-{count}-$?-\"\n"))?;
        let before = self.console.expect(&format!("BEDPLATE-END-{count}-"), self.patience)?;
        let status = self.console.expect("-", self.patience)?;
        let status = status.parse().map_err(|_| Failure::new(format!("no exit status in {status:?}")))?;
        Ok((status, tidy(&before)))
    }

    /// Types a line and does not wait (the guest may go away).
    ///
    /// # Errors
    /// The console is closed.
    pub fn leave(self, command: &str) -> Result<(), Failure> {
        self.console.send(&format!("{command}\n"))?;
        Ok(())
    }
}

/// Drops carriage returns, terminal control sequences and the echoed command line (if the terminal still echoes).
fn tidy(output: &str) -> String {
    let plain = without_controls(output);
    let lines = plain.lines().filter(|line| !line.contains("BEDPLATE-\"\"END-"));
    lines.collect::<Vec<_>>().join("\n").trim().to_string()
}

fn without_controls(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\r' => {}
            '\u{1b}' => {
                // ESC [ parameters letter
                if rest.next() == Some('[') {
                    rest.find(|c| c.is_ascii_alphabetic());
                }
            }
            _ => plain.push(c),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn control_sequences_are_dropped() {
        assert_eq!(tidy("\u{1b}[?2004ha\u{1b}[6n b\r\nx; echo \"BEDPLATE-\"\"END-1\nc\n"), "a b\nc");
    }

    #[test]
    fn output_and_status_come_back() {
        let mut child = Command::new("sh").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut console = Console::new(child.stdout.take().unwrap(), child.stdin.take().unwrap());
        let mut shell = Shell::at(&mut console, Duration::from_secs(30)).unwrap();
        assert_eq!(shell.run("echo one; echo two").unwrap(), "one\ntwo");
        assert_eq!(shell.status("(exit 7)").unwrap().0, 7);
        assert!(shell.run("false").unwrap_err().to_string().contains("`false` ended with 1"));
        shell.leave("exit").unwrap();
        console.expect_end(Duration::from_secs(30)).unwrap();
        child.wait().unwrap();
    }
}
