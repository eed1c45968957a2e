//! Copies between a chain's buffers and slices, and cuts buffers out for zero-copy transfers.

use super::Buffer;
use alloc::vec::Vec;
use guest_memory::GuestRam;

/// A position in a list of buffers.
#[derive(Clone)]
struct Cursor<'a> {
    buffers: &'a [Buffer],
    /// Bytes of the first buffer that are done.
    done: u32,
}

impl Cursor<'_> {
    /// The next piece of at most `max` bytes, passed over.
    fn next(&mut self, max: u64) -> Option<Buffer> {
        let first = self.buffers.first()?;
        let left = first.len - self.done;
        let len = u64::from(left).min(max) as u32;
        let piece = Buffer { offset: first.offset + u64::from(self.done), len };
        if len == left {
            self.buffers = &self.buffers[1..];
            self.done = 0;
        } else {
            self.done += len;
        }
        Some(piece)
    }

    fn remaining(&self) -> u64 {
        let all: u64 = self.buffers.iter().map(|b| u64::from(b.len)).sum();
        all - u64::from(self.done)
    }

    /// Passes over at most `bytes`, handing each piece to `visit`; returns how many there were.
    fn advance(&mut self, bytes: u64, mut visit: impl FnMut(Buffer, u64)) -> u64 {
        let mut at = 0;
        while at < bytes {
            let Some(piece) = self.next(bytes - at) else { break };
            visit(piece, at);
            at += u64::from(piece.len);
        }
        at
    }
}

/// Reads what the driver wrote.
#[derive(Clone)]
pub struct ChainReader<'a> {
    ram: &'a GuestRam,
    cursor: Cursor<'a>,
}

impl<'a> ChainReader<'a> {
    pub(super) fn new(ram: &'a GuestRam, buffers: &'a [Buffer]) -> Self {
        Self { ram, cursor: Cursor { buffers, done: 0 } }
    }
    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.cursor.remaining()
    }
    /// Fills `to` as far as there are bytes; returns how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let (ram, bytes) = (self.ram, to.len() as u64);
        let copy = |piece: Buffer, at: u64| {
            let at = at as usize;
            ram.load_bytes(piece.offset, &mut to[at..at + piece.len as usize]);
        };
        self.cursor.advance(bytes, copy) as usize
    }
    /// Exactly `N` bytes, if there are as many.
    pub fn read_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut out = [0; N];
        (self.read(&mut out) == N).then_some(out)
    }
    /// Cuts the next `bytes` out as buffers (fewer if there are fewer).
    pub fn take(&mut self, bytes: u64) -> Vec<Buffer> {
        let mut out = Vec::new();
        self.cursor.advance(bytes, |piece, _| out.push(piece));
        out
    }
}

/// Writes what the driver will read. Writes are told to whoever tracks the pages.
pub struct ChainWriter<'a> {
    ram: &'a GuestRam,
    cursor: Cursor<'a>,
    written: u32,
}

impl<'a> ChainWriter<'a> {
    pub(super) fn new(ram: &'a GuestRam, buffers: &'a [Buffer]) -> Self {
        Self { ram, cursor: Cursor { buffers, done: 0 }, written: 0 }
    }
    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.cursor.remaining()
    }
    /// Bytes written so far.
    pub fn written(&self) -> u32 {
        self.written
    }
    /// Writes as much of `from` as there is room for; returns how many bytes.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let ram = self.ram;
        let copy = |piece: Buffer, at: u64| {
            let at = at as usize;
            ram.store_bytes(piece.offset, &from[at..at + piece.len as usize]);
            ram.note_write(piece.offset, u64::from(piece.len));
        };
        let n = self.cursor.advance(from.len() as u64, copy);
        self.written += n as u32;
        n as usize
    }
    /// Cuts the next `bytes` out as buffers (fewer if there are fewer), for somebody else to write.
    pub fn take(&mut self, bytes: u64) -> Vec<Buffer> {
        let mut out = Vec::new();
        self.cursor.advance(bytes, |piece, _| out.push(piece));
        out
    }
}
