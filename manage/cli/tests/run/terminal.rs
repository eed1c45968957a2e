//! The console on a real terminal: the escape key, and the terminal's settings afterwards.

use crate::bench::{Bench, counter, run_args};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::{Read, Write};
use std::process::Stdio;

#[test]
fn the_escape_key_ends_the_vm_and_the_terminal_is_as_before() {
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal = File::options().read(true).write(true).open(name).unwrap();
    let before = tcgetattr(&terminal).unwrap();
    let mut master = File::from(master);

    let bench = Bench::new();
    let kernel = bench.kernel(&counter());
    let mut command = bench.command(&run_args(&kernel, &[]));
    let ends = [terminal.try_clone().unwrap(), terminal.try_clone().unwrap()];
    let [input, output] = ends.map(Stdio::from);
    let mut child = command.stdin(input).stdout(output).spawn().unwrap();
    drop(command);
    let mut wait_for = |wanted: &str| {
        let mut seen = String::new();
        while !seen.contains(wanted) {
            let mut byte = [0];
            master.read_exact(&mut byte).unwrap();
            seen.push(char::from(byte[0]));
        }
    };
    wait_for(">");
    assert!(!tcgetattr(&terminal).unwrap().local_modes.contains(LocalModes::ICANON), "the terminal is raw");
    master.write_all(b"x").unwrap();
    let mut byte = [0];
    master.read_exact(&mut byte).unwrap();
    assert_eq!(byte[0], b'1');
    master.write_all(b"\x01x").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(20));
    let after = tcgetattr(&terminal).unwrap();
    assert_eq!((before.local_modes, before.input_modes), (after.local_modes, after.input_modes));
}
