//! Lines over a socket, with open files beside them.
//!
//! Called by: [`super::server`], [`super::client`], [`super::save`].
//!
//! Invariant: neither a line nor the number of its files is longer than allowed, whatever the other side sends.

use super::MAX_LINE_BYTES;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

/// Most files beside a line: a save, and an overlay for every device that there can be.
pub const MAX_FILES: usize = 1 + crate::wire::MAX_DEVICES;
const READ_BYTES: usize = 4096;
const SPACE: usize = rustix::cmsg_space!(ScmRights(MAX_FILES));

/// A line that came.
#[derive(Debug, Default)]
pub struct Line {
    /// It; without its end if that never came.
    pub bytes: Vec<u8>,
    /// The files that came with it.
    pub files: Vec<File>,
}

impl Line {
    /// Its end came.
    pub fn is_whole(&self) -> bool {
        self.bytes.last() == Some(&b'\n')
    }
}

/// The lines that come over a socket.
pub struct Lines<'a> {
    stream: &'a UnixStream,
    /// What came and is not a line yet.
    next: Line,
}

impl<'a> Lines<'a> {
    /// Of `stream`.
    pub fn new(stream: &'a UnixStream) -> Self {
        Self { stream, next: Line::default() }
    }

    /// The next line, or as much of it as is allowed or came before the end; `None` at the end.
    pub fn next(&mut self) -> io::Result<Option<Line>> {
        let mut looked_at = 0;
        loop {
            let end = self.next.bytes[looked_at..].iter().position(|byte| *byte == b'\n');
            let end = end.map(|at| looked_at + at + 1).filter(|end| *end <= MAX_LINE_BYTES as usize);
            let end =
                end.or((self.next.bytes.len() >= MAX_LINE_BYTES as usize).then_some(MAX_LINE_BYTES as usize));
            if let Some(end) = end {
                let rest = self.next.bytes.split_off(end);
                return Ok(Some(std::mem::replace(&mut self.next, Line { bytes: rest, files: Vec::new() })));
            }
            looked_at = self.next.bytes.len();
            if !self.receive()? {
                let last = std::mem::take(&mut self.next);
                return Ok((!last.bytes.is_empty()).then_some(last));
            }
        }
    }

    /// Takes what came; false at the end.
    fn receive(&mut self) -> io::Result<bool> {
        let (mut bytes, mut space) = ([0; READ_BYTES], [MaybeUninit::uninit(); SPACE]);
        let mut beside = RecvAncillaryBuffer::new(&mut space);
        let got = loop {
            let mut to = [IoSliceMut::new(&mut bytes)];
            match rustix::net::recvmsg(self.stream, &mut to, &mut beside, RecvFlags::CMSG_CLOEXEC) {
                Err(rustix::io::Errno::INTR) => {}
                got => break got?.bytes,
            }
        };
        for message in beside.drain() {
            if let RecvAncillaryMessage::ScmRights(files) = message {
                self.next.files.extend(files.map(File::from));
            }
        }
        if self.next.files.len() > MAX_FILES {
            return Err(io::Error::other("too many files"));
        }
        self.next.bytes.extend(&bytes[..got]);
        Ok(got > 0)
    }
}

/// Sends a line, with files.
pub fn send(mut stream: &UnixStream, line: &[u8], files: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut sent = 0;
    if files.len() > MAX_FILES {
        return Err(io::Error::other("too many files"));
    }
    if !files.is_empty() {
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut beside = SendAncillaryBuffer::new(&mut space);
        if !beside.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other("too many files"));
        }
        sent = rustix::net::sendmsg(stream, &[IoSlice::new(line)], &mut beside, SendFlags::NOSIGNAL)?;
    }
    stream.write_all(&line[sent..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek};
    use std::os::fd::AsFd;

    #[test]
    fn files_come_with_their_line() {
        let (here, there) = UnixStream::pair().unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        file.rewind().unwrap();
        send(&here, b"one\n", &[file.as_fd(), file.as_fd()]).unwrap();
        send(&here, b"two\nthr", &[]).unwrap();
        send(&here, b"ee\nfo", &[]).unwrap();
        drop(here);
        let mut lines = Lines::new(&there);
        let mut one = lines.next().unwrap().unwrap();
        assert_eq!((&one.bytes[..], one.files.len()), (&b"one\n"[..], 2));
        let mut text = String::new();
        one.files[0].read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        for expected in ["two\n", "three\n", "fo"] {
            let line = lines.next().unwrap().unwrap();
            assert_eq!((line.bytes, line.files.len()), (expected.as_bytes().to_vec(), 0));
        }
        assert!(lines.next().unwrap().is_none());
    }

    #[test]
    fn too_many_files_end_the_connection() {
        let (here, there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        assert!(send(&here, b"x", &[file.as_fd(); MAX_FILES + 1]).is_err());
        send(&here, b"x", &[file.as_fd(); MAX_FILES]).unwrap();
        send(&here, b"x", &[file.as_fd()]).unwrap();
        assert!(Lines::new(&there).next().is_err());
    }
}
