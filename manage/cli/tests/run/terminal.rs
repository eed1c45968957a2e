//! The console on a real terminal: the escape key, and the terminal's settings afterwards.

use crate::bench::{Bench, counter, run_args};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};

/// A terminal that the command has for input and output.
pub struct Terminal {
    master: File,
    slave: File,
    before: Termios,
}

impl Terminal {
    pub fn new() -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
        let slave = File::options().read(true).write(true).open(name).unwrap();
        let before = tcgetattr(&slave).unwrap();
        Self { master: File::from(master), slave, before }
    }

    /// Starts the command here; its errors go to a pipe.
    pub fn start(&self, bench: &Bench, args: &[&str]) -> Child {
        let [input, output] = [(); 2].map(|()| Stdio::from(self.slave.try_clone().unwrap()));
        bench.command(args).stdin(input).stdout(output).spawn().unwrap()
    }

    pub fn send(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    pub fn expect(&mut self, wanted: &str) {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            let mut byte = [0];
            self.master.read_exact(&mut byte).unwrap();
            seen.push(char::from(byte[0]));
        }
    }

    pub fn is_raw(&self) -> bool {
        !tcgetattr(&self.slave).unwrap().local_modes.contains(LocalModes::ICANON)
    }

    pub fn is_as_before(&self) -> bool {
        let now = tcgetattr(&self.slave).unwrap();
        (self.before.local_modes, self.before.input_modes) == (now.local_modes, now.input_modes)
    }
}

#[test]
fn the_escape_key_ends_the_vm_and_the_terminal_is_as_before() {
    let (bench, mut terminal) = (Bench::new(), Terminal::new());
    let kernel = bench.kernel(&counter());
    let mut child = terminal.start(&bench, &run_args(&kernel, &[]));
    terminal.expect(">");
    assert!(terminal.is_raw());
    terminal.send("x");
    terminal.expect("1");
    terminal.send("\x01x");
    assert_eq!(child.wait().unwrap().code(), Some(20));
    assert!(terminal.is_as_before());
}
