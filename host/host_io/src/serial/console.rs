//! A console port: bounded output that never blocks the guest, and input that waits until the guest takes it.
//!
//! Called by: `vmm`; `write` from a device's poll, everything else from the port's own thread.
//!
//! State of the output: bytes wait in a bounded queue; the thread moves them to the peer when it is writable. Without a
//! peer (a socket nobody is connected to) the queue is a scrollback: the oldest bytes make room, and a client that
//! connects later reads them first.
//!
//! Invariants:
//! - `write` takes a lock that is never held over I/O, and returns what fitted; after a short write `output_room` follows.
//! - Typed commands work even when the guest takes no input; a socket's input is never dropped, it is simply not read.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use super::ends::{ConsoleError, ConsoleSpec, End};
use super::escape::{ESCAPE_HELP, EscapeCommand, EscapeEvent, EscapeParser};
use crate::wake::WakeFd;

/// Bytes of output that may wait.
const OUTPUT_BYTES: usize = 256 << 10;
/// Bytes of typed input that may wait for the guest.
const INPUT_BYTES: usize = 4096;
/// How long a closing port tries to get its last output out.
const CLOSE_TIME: Duration = Duration::from_secs(1);

/// Who receives what comes from the outside; called on the port's thread.
pub trait ConsoleSink: Send + 'static {
    /// Bytes for the guest. Returns how many it took; the rest waits for `ConsolePort::resume_input`.
    fn input(&mut self, bytes: &[u8]) -> usize;
    /// The user typed an escape command. Help has been printed already.
    fn command(&mut self, command: EscapeCommand);
    /// There is room again after a short `write`.
    fn output_room(&mut self);
}

/// The guest's side of a console.
#[derive(Debug)]
pub struct ConsolePort {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    output: Mutex<Output>,
    wake: WakeFd,
    resume_input: AtomicBool,
}

#[derive(Debug, Default)]
struct Output {
    bytes: VecDeque<u8>,
    /// Nobody reads: keep only the newest bytes.
    scrollback: bool,
    /// The other end is gone for good: drop everything.
    dead: bool,
    /// A write was cut short; the writer waits for `output_room`.
    starved: bool,
    closing: bool,
}

impl ConsolePort {
    /// Opens the end that `spec` names and starts its thread.
    pub fn open(spec: &ConsoleSpec, sink: impl ConsoleSink) -> Result<ConsolePort, ConsoleError> {
        let end = End::open(spec)?;
        let output = Output {
            scrollback: end.listener.is_some(),
            dead: end.listener.is_none() && end.peer.is_none(),
            ..Output::default()
        };
        let shared = Arc::new(Shared {
            output: Mutex::new(output),
            wake: WakeFd::new().map_err(ConsoleError::Start)?,
            resume_input: AtomicBool::new(false),
        });
        let worker = Worker {
            shared: shared.clone(),
            end,
            sink,
            escape: EscapeParser::default(),
            held: VecDeque::new(),
        };
        let thread = std::thread::Builder::new()
            .name("console".into())
            .spawn(move || {
                jail::enter(jail::Thread::Console, &worker.end.files());
                worker.run();
            })
            .map_err(ConsoleError::Start)?;
        Ok(ConsolePort { shared, thread: Some(thread) })
    }

    /// Takes as many bytes as fit right now and returns their number.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut output = self.shared.lock();
        if output.dead {
            return bytes.len();
        }
        let was_empty = output.bytes.is_empty();
        let taken = output.push(bytes);
        drop(output);
        if was_empty && taken > 0 {
            self.shared.wake.signal();
        }
        taken
    }

    /// The guest can take input again.
    pub fn resume_input(&self) {
        self.shared.resume_input.store(true, Ordering::Release);
        self.shared.wake.signal();
    }

    /// Bytes that have not reached the other end yet.
    pub fn pending_output(&self) -> usize {
        self.shared.lock().bytes.len()
    }
}

impl Drop for ConsolePort {
    fn drop(&mut self) {
        self.shared.lock().closing = true;
        self.shared.wake.signal();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Output> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    fn push(&mut self, bytes: &[u8]) -> usize {
        if self.scrollback {
            let newest = &bytes[bytes.len().saturating_sub(OUTPUT_BYTES)..];
            let excess = (self.bytes.len() + newest.len()).saturating_sub(OUTPUT_BYTES);
            self.bytes.drain(..excess);
            self.bytes.extend(newest);
            return bytes.len();
        }
        let fits = bytes.len().min(OUTPUT_BYTES.saturating_sub(self.bytes.len()));
        self.bytes.extend(&bytes[..fits]);
        self.starved |= fits < bytes.len();
        fits
    }
}

/// Adds a descriptor, if there is one, and says at which place.
fn add<'a>(fds: &mut Vec<PollFd<'a>>, fd: Option<BorrowedFd<'a>>, flags: PollFlags) -> Option<usize> {
    fds.push(PollFd::from_borrowed_fd(fd?, flags));
    Some(fds.len() - 1)
}

/// What a poll found.
#[derive(Default)]
struct Ready {
    input: bool,
    output: bool,
    client: bool,
}

struct Worker<S> {
    shared: Arc<Shared>,
    end: End,
    sink: S,
    escape: EscapeParser,
    /// Input that the guest has not taken yet.
    held: VecDeque<u8>,
}

impl<S: ConsoleSink> Worker<S> {
    fn run(mut self) {
        let mut close_by: Option<Instant> = None;
        loop {
            let (pending, closing) = {
                let output = self.shared.lock();
                (!output.bytes.is_empty() && !output.scrollback, output.closing)
            };
            if closing {
                let deadline = *close_by.get_or_insert_with(|| Instant::now() + CLOSE_TIME);
                if !pending || Instant::now() >= deadline {
                    return;
                }
            }
            let Ok(ready) = self.poll(pending, close_by) else { return };
            if self.shared.wake.clear() && self.shared.resume_input.swap(false, Ordering::AcqRel) {
                self.offer_held();
            }
            if ready.client {
                self.accept();
            }
            if ready.input {
                self.read_input();
            }
            if ready.output {
                self.write_output();
            }
        }
    }

    fn poll(&self, pending: bool, close_by: Option<Instant>) -> Result<Ready, Errno> {
        let mut fds = vec![PollFd::new(&self.shared.wake, PollFlags::IN)];
        let peer = self.end.peer.as_ref();
        // A terminal is always read, so that its escape key works; a socket waits until the guest took what it sent.
        let read = self.held.is_empty() || self.end.terminal.is_some();
        let input = add(
            &mut fds,
            peer.and_then(|p| p.input.as_ref()).filter(|_| read).map(|f| f.as_fd()),
            PollFlags::IN,
        );
        let output = add(
            &mut fds,
            peer.and_then(|p| p.output.as_ref()).filter(|_| pending).map(|f| f.as_fd()),
            PollFlags::OUT,
        );
        let client = add(&mut fds, self.end.listener.as_ref().map(|l| l.socket.as_fd()), PollFlags::IN);
        let timeout = close_by.map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        match rustix::event::poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        let is_ready = |slot: Option<usize>| slot.is_some_and(|i| !fds[i].revents().is_empty());
        Ok(Ready { input: is_ready(input), output: is_ready(output), client: is_ready(client) })
    }

    fn accept(&mut self) {
        let Some(listener) = &self.end.listener else { return };
        if let Some(peer) = listener.accept(self.end.peer.is_some()) {
            self.end.peer = Some(peer);
            self.shared.lock().scrollback = false;
        }
    }

    /// The other end is gone: a socket waits for the next client, everything else stays silent.
    fn hang_up(&mut self) {
        self.end.peer = None;
        let mut output = self.shared.lock();
        match self.end.listener {
            Some(_) => output.scrollback = true,
            None => {
                output.dead = true;
                output.bytes.clear();
            }
        }
        let starved = std::mem::take(&mut output.starved);
        drop(output);
        if starved {
            self.sink.output_room();
        }
    }

    fn read_input(&mut self) {
        let Some(peer) = &mut self.end.peer else { return };
        let mut buf = [0u8; INPUT_BYTES];
        let got = match peer.read(&mut buf) {
            Err(Errno::AGAIN | Errno::INTR) => return,
            Ok(0) | Err(_) if self.end.listener.is_some() => return self.hang_up(),
            Ok(0) | Err(_) => {
                peer.input = None; // The end of a redirected input; the output goes on.
                return;
            }
            Ok(got) => got,
        };
        if self.end.terminal.is_none() {
            self.held.extend(&buf[..got]);
            return self.offer_held();
        }
        let mut escape = std::mem::take(&mut self.escape);
        escape.feed(&buf[..got], |event| match event {
            EscapeEvent::Input(bytes) => {
                let room = INPUT_BYTES.saturating_sub(self.held.len());
                self.held.extend(&bytes[..bytes.len().min(room)]);
            }
            EscapeEvent::Command(command) => {
                if command == EscapeCommand::Help {
                    self.shared.lock().push(ESCAPE_HELP.as_bytes());
                }
                self.sink.command(command);
            }
        });
        self.escape = escape;
        self.offer_held();
    }

    fn offer_held(&mut self) {
        while !self.held.is_empty() {
            let (front, _) = self.held.as_slices();
            let taken = self.sink.input(front).min(front.len());
            let all = taken == front.len();
            self.held.drain(..taken);
            if !all {
                return;
            }
        }
    }

    fn write_output(&mut self) {
        // The bytes stay in the queue until they are written, but the lock is not held over the system call.
        let mut piece = [0u8; 4096];
        let len = {
            let output = self.shared.lock();
            let len = output.bytes.len().min(piece.len());
            for (to, from) in piece.iter_mut().zip(output.bytes.iter().take(len)) {
                *to = *from;
            }
            len
        };
        let Some(peer) = &self.end.peer else { return };
        match peer.write(&piece[..len]) {
            Ok(written) => {
                let mut output = self.shared.lock();
                let gone = written.min(output.bytes.len());
                output.bytes.drain(..gone);
                let room = output.starved && output.bytes.len() <= OUTPUT_BYTES / 2;
                output.starved &= !room;
                drop(output);
                if room {
                    self.sink.output_room();
                }
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.hang_up(),
        }
    }
}
