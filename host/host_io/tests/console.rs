//! A console port against real sockets and files.
#![allow(missing_docs)]

use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};

use host_io::serial::{ConsoleError, ConsolePort, ConsoleSink, ConsoleSpec, EscapeCommand};

#[derive(Debug, PartialEq)]
enum Event {
    Input(Vec<u8>),
    Room,
}

/// Reports what arrives; takes at most `appetite` bytes until told otherwise.
struct Probe {
    events: Sender<Event>,
    appetite: Receiver<usize>,
    left: usize,
}

impl ConsoleSink for Probe {
    fn input(&mut self, bytes: &[u8]) -> usize {
        self.left = self.appetite.try_iter().last().unwrap_or(self.left);
        let taken = bytes.len().min(self.left);
        self.left -= taken;
        if taken > 0 {
            self.events.send(Event::Input(bytes[..taken].to_vec())).unwrap();
        }
        taken
    }
    fn command(&mut self, _: EscapeCommand) {}
    fn output_room(&mut self) {
        let _ = self.events.send(Event::Room);
    }
}

fn open(
    spec: ConsoleSpec,
    left: usize,
) -> Result<(ConsolePort, Receiver<Event>, Sender<usize>), ConsoleError> {
    let (events, seen) = channel();
    let (feed, appetite) = channel();
    let port = ConsolePort::open(&spec, Probe { events, appetite, left })?;
    Ok((port, seen, feed))
}

fn take_input(seen: &Receiver<Event>, bytes: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < bytes {
        if let Event::Input(part) = seen.recv().unwrap() {
            all.extend(part);
        }
    }
    all
}

#[test]
fn a_socket_client_reads_the_scrollback_and_talks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (port, seen, _) = open(ConsoleSpec::Unix(path.clone()), usize::MAX).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(port.write(b"booted before you came\n"), 23);

    let mut client = UnixStream::connect(&path).unwrap();
    let mut text = [0u8; 23];
    client.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"booted before you came\n");
    client.write_all(b"root\r").unwrap();
    assert_eq!(take_input(&seen, 5), b"root\r");

    let mut second = UnixStream::connect(&path).unwrap();
    let mut refusal = String::new();
    second.read_to_string(&mut refusal).unwrap();
    assert!(refusal.contains("Another client"), "{refusal}");

    // A second port on the same path is refused while the first lives; the file goes with the port.
    assert!(matches!(open(ConsoleSpec::Unix(path.clone()), 0), Err(ConsoleError::SocketInUse { .. })));
    drop(port);
    assert!(!path.exists());
}

#[test]
fn a_stale_socket_is_replaced_and_a_foreign_file_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    assert!(path.exists());
    drop(open(ConsoleSpec::Unix(path.clone()), 0).unwrap());
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(open(ConsoleSpec::Unix(path.clone()), 0), Err(ConsoleError::NotASocket { .. })));
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

#[test]
fn output_is_bounded_and_nothing_is_lost_on_a_slow_client() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (port, seen, _) = open(ConsoleSpec::Unix(path.clone()), usize::MAX).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"x").unwrap();
    take_input(&seen, 1); // The port knows its client now.

    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i % 251) as u8).collect();
    let mut sent = 0;
    loop {
        let taken = port.write(&data[sent..]);
        sent += taken;
        if taken == 0 {
            break;
        }
    }
    assert!(sent < data.len(), "a client that does not read must fill the port");
    assert!(port.pending_output() <= 256 << 10);
    let mut got = vec![0u8; data.len()];
    let reader = std::thread::spawn(move || client.read_exact(&mut got).map(|()| got));
    while sent < data.len() {
        sent += port.write(&data[sent..]);
        if sent < data.len() {
            assert_eq!(seen.recv().unwrap(), Event::Room);
        }
    }
    assert_eq!(reader.join().unwrap().unwrap(), data);
}

#[test]
fn input_waits_until_the_guest_takes_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console");
    let (port, seen, feed) = open(ConsoleSpec::Unix(path.clone()), 3).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let data: Vec<u8> = (0..50_000u32).map(|i| (i % 241) as u8).collect();
    let copy = data.clone();
    let writer = std::thread::spawn(move || client.write_all(&copy).map(|()| client));
    assert_eq!(take_input(&seen, 3), &data[..3]);
    let mut all = data[..3].to_vec();
    while all.len() < data.len() {
        let step = (data.len() - all.len()).min(7_001);
        feed.send(step).unwrap();
        port.resume_input();
        all.extend(take_input(&seen, step));
    }
    assert_eq!(all, data);
    writer.join().unwrap().unwrap();
}

#[test]
fn a_file_has_everything_once_the_port_is_closed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    for round in 1..=2 {
        let (port, _, _) = open(ConsoleSpec::File(path.clone()), 0).unwrap();
        assert_eq!(port.write(&vec![b'a'; 100_000]), 100_000);
        drop(port);
        assert_eq!(std::fs::metadata(&path).unwrap().len(), round * 100_000);
    }
    let error = open(ConsoleSpec::File(dir.path().join("no/log")), 0).unwrap_err().to_string();
    assert!(error.contains("no/log"), "{error}");
}

#[test]
fn nothing_takes_everything() {
    let (port, _, _) = open(ConsoleSpec::Null, 0).unwrap();
    assert_eq!(port.write(&vec![0; 10 << 20]), 10 << 20);
    assert_eq!(port.pending_output(), 0);
}
