//! The host processor's side: one persistent child process runs batches of cases natively.
//!
//! Batches pass through shared memory, a byte through a pipe starts one and ends one. The child has the arena
//! and the code at their fixed addresses; it may read, write its pipes and return from signals (seccomp's
//! strict mode), nothing else. A signal is an exception: the handler notes it and leaves the instruction. If
//! the child dies or hangs, the case it was at is reported and a new child goes on behind it.

mod child;
mod enter;

use crate::layout::*;
use crate::state::{Case, Outcome};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};

/// How long a batch may take.
const TIMEOUT_MS: i32 = 20_000;

/// Whether the host's processor is one of AMD's: where the manuals differ, so do processors.
pub fn is_amd() -> bool {
    let leaf = core::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx] == [*b"Auth", *b"enti", *b"cAMD"].map(u32::from_le_bytes)
}

/// Shared between the processes.
#[repr(C)]
struct Shared {
    count: u64,
    /// The case under way.
    current: AtomicU64,
    cases: [Case; BATCH],
    outcomes: [Outcome; BATCH],
}

/// The child and what it shares with us.
#[derive(Debug)]
pub struct Native {
    shared: *mut Shared,
    arena: Mapping,
    code: Mapping,
    child: Option<Child>,
}

#[derive(Debug)]
struct Child {
    pid: libc::pid_t,
    start: OwnedFd,
    done: OwnedFd,
}

/// A file in memory and a writable view of it.
#[derive(Debug)]
struct Mapping {
    fd: OwnedFd,
    view: *mut u8,
    bytes: usize,
}

impl Mapping {
    fn new(name: &std::ffi::CStr, bytes: usize) -> io::Result<Self> {
        // SAFETY: plain system calls; the descriptor is ours alone, the view's address is the kernel's choice.
        unsafe {
            let fd = check(libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC))?;
            let fd = OwnedFd::from_raw_fd(fd);
            check(libc::ftruncate(fd.as_raw_fd(), bytes as libc::off_t))?;
            let view = libc::mmap(
                ptr::null_mut(),
                bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                0,
            );
            if view == libc::MAP_FAILED {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { fd, view: view.cast(), bytes })
        }
    }

    /// Writes `data` at `at`; what does not fit is left out.
    fn write(&self, at: usize, data: &[u8]) {
        let len = data.len().min(self.bytes.saturating_sub(at));
        // SAFETY: the range lies in the view; the child reads it only between the pipe's bytes.
        unsafe { ptr::copy_nonoverlapping(data.as_ptr(), self.view.add(at), len) };
    }
}

fn check(result: i32) -> io::Result<i32> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Native {
    /// Makes the shared memory and the first child.
    pub fn new() -> io::Result<Self> {
        let arena = Mapping::new(c"arena", ARENA_BYTES as usize)?;
        let code = Mapping::new(c"code", CODE_BYTES as usize)?;
        let flags = libc::MAP_SHARED | libc::MAP_ANONYMOUS;
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new anonymous mapping; zero is a valid `Shared`.
        let shared = unsafe { libc::mmap(ptr::null_mut(), size_of::<Shared>(), protection, flags, -1, 0) };
        if shared == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mut native = Self { shared: shared.cast(), arena, code, child: None };
        for (i, exit) in enter::exits().into_iter().enumerate() {
            native.code.write((EXITS - CODE) as usize + 16 * i, &exit_stub(exit));
        }
        native.start()?;
        Ok(native)
    }

    fn start(&mut self) -> io::Result<()> {
        let (mut start, mut done) = ([0; 2], [0; 2]);
        // SAFETY: plain system calls; the child runs `child::main`, which never returns.
        unsafe {
            check(libc::pipe2(start.as_mut_ptr(), libc::O_CLOEXEC))?;
            check(libc::pipe2(done.as_mut_ptr(), libc::O_CLOEXEC))?;
            let pid = check(libc::fork())?;
            if pid == 0 {
                child::main(self, start[0], done[1]);
            }
            libc::close(start[0]);
            libc::close(done[1]);
            let (start, done) = (OwnedFd::from_raw_fd(start[1]), OwnedFd::from_raw_fd(done[0]));
            let child = self.child.insert(Child { pid, start, done });
            // It says when it is ready.
            let mut byte = [0u8];
            if libc::read(child.done.as_raw_fd(), byte.as_mut_ptr().cast(), 1) == 1 {
                return Ok(());
            }
        }
        self.stop();
        Err(io::Error::other("no sandbox: it needs seccomp, and FSGSBASE (Linux 5.9)"))
    }

    /// Runs `cases` (at most [`BATCH`], each in a slot of its own). `None`: the case killed the child.
    pub fn run(&mut self, cases: &[Case]) -> io::Result<Vec<Option<Outcome>>> {
        assert!(cases.len() <= BATCH);
        for case in cases {
            self.code.write((case.code.slot as usize % BATCH) * SLOT as usize, &slot_bytes(case));
        }
        let mut outcomes = Vec::with_capacity(cases.len());
        while outcomes.len() < cases.len() {
            let rest = &cases[outcomes.len()..];
            if self.child.is_none() {
                self.start()?;
            }
            let finished = self.run_batch(rest)?;
            // SAFETY: the child is idle or dead; the first `finished` outcomes are written.
            let shared = unsafe { &*self.shared };
            outcomes.extend(shared.outcomes[..finished].iter().map(|o| Some(*o)));
            if finished < rest.len() {
                outcomes.push(None);
            }
        }
        Ok(outcomes)
    }

    /// Runs as many cases as it can; the child is gone if that is not all of them.
    fn run_batch(&mut self, cases: &[Case]) -> io::Result<usize> {
        let Some(child) = &self.child else { return Ok(0) };
        // SAFETY: the child is idle: it waits for the pipe.
        let shared = unsafe { &mut *self.shared };
        shared.cases[..cases.len()].copy_from_slice(cases);
        shared.count = cases.len() as u64;
        shared.current.store(0, Ordering::SeqCst);
        let mut byte = [0u8];
        // SAFETY: plain system calls on our own descriptors.
        let answered = unsafe {
            let sent = libc::write(child.start.as_raw_fd(), byte.as_ptr().cast(), 1) == 1;
            let mut poll = libc::pollfd { fd: child.done.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            sent && libc::poll(&mut poll, 1, TIMEOUT_MS) == 1
                && libc::read(child.done.as_raw_fd(), byte.as_mut_ptr().cast(), 1) == 1
        };
        if answered {
            return Ok(cases.len());
        }
        self.stop();
        Ok((shared.current.load(Ordering::SeqCst) as usize).min(cases.len()))
    }

    fn stop(&mut self) {
        if let Some(child) = self.child.take() {
            // SAFETY: `pid` is our child and not yet waited for.
            unsafe {
                libc::kill(child.pid, libc::SIGKILL);
                libc::waitpid(child.pid, ptr::null_mut(), 0);
            }
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.stop();
        // SAFETY: our own mappings, used by nobody any more.
        unsafe {
            libc::munmap(self.shared.cast(), size_of::<Shared>());
            libc::munmap(self.arena.view.cast(), self.arena.bytes);
            libc::munmap(self.code.view.cast(), self.code.bytes);
        }
    }
}

/// An exit stub: JMP [RIP+2], padding, the target. The target is aligned, for alignment checks may be on.
fn exit_stub(target: u64) -> [u8; 16] {
    let mut bytes = [0xCC; 16];
    bytes[..6].copy_from_slice(&[0xFF, 0x25, 2, 0, 0, 0]);
    bytes[8..].copy_from_slice(&target.to_le_bytes());
    bytes
}

/// A jump at `at` to exit stub `i`: JMP rel32, or JMP FAR from 32-bit code.
fn jump_to_exit(at: u64, i: usize, is_32: bool) -> [u8; 7] {
    let stub = EXITS + 16 * i as u64;
    let mut bytes = [0xCC; 7];
    if is_32 {
        bytes[0] = 0xEA;
        bytes[1..5].copy_from_slice(&(stub as u32).to_le_bytes());
        bytes[5..7].copy_from_slice(&CS64.to_le_bytes());
    } else {
        bytes[0] = 0xE9;
        bytes[1..5].copy_from_slice(&(stub.wrapping_sub(at + 5) as u32).to_le_bytes());
    }
    bytes
}

/// The instruction and the ways out behind it and at the branch target.
fn slot_bytes(case: &Case) -> [u8; SLOT as usize] {
    let mut bytes = [0xCC; SLOT as usize];
    let len = case.code.len as usize;
    bytes[INSTRUCTION as usize..][..len].copy_from_slice(&case.code.bytes[..len]);
    let slot = CODE + SLOT * u64::from(case.code.slot);
    for (i, at) in [INSTRUCTION as usize + len, TAKEN as usize].into_iter().enumerate() {
        bytes[at..at + 7].copy_from_slice(&jump_to_exit(slot + at as u64, i, case.code.is_32));
    }
    bytes
}
