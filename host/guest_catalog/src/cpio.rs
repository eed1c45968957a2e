//! Writes cpio archives in the "newc" format, which is what Linux unpacks as an initrd
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Used by [`crate::initrd`].
//!
//! Invariants: every entry is owned by root with time 0, so that equal content gives equal bytes; each header,
//! name and body is padded to four bytes; the trailer is written by `finish` only.

use std::io::{self, Write};

const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_SYMLINK: u32 = 0o120_000;
const TYPE_CHAR_DEVICE: u32 = 0o020_000;
const HEADER_BYTES: usize = 110;

/// An archive under construction.
#[derive(Debug)]
pub struct CpioWriter<W: Write> {
    out: W,
    next_inode: u32,
}

impl<W: Write> CpioWriter<W> {
    /// Starts an empty archive.
    pub fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    /// Adds a folder. Parents must have been added before.
    ///
    /// # Errors
    /// Those of the underlying writer, here and in every other method.
    pub fn directory(&mut self, path: &str) -> io::Result<()> {
        self.entry(path, TYPE_DIRECTORY | 0o755, &[], (0, 0))
    }

    /// Adds a file that may be executed.
    ///
    /// # Errors
    /// As [`Self::directory`]; also if the file is over 4 GiB, which the format cannot express.
    pub fn executable(&mut self, path: &str, data: &[u8]) -> io::Result<()> {
        self.entry(path, TYPE_FILE | 0o755, data, (0, 0))
    }

    /// Adds a plain file.
    ///
    /// # Errors
    /// As [`Self::executable`].
    pub fn file(&mut self, path: &str, data: &[u8]) -> io::Result<()> {
        self.entry(path, TYPE_FILE | 0o644, data, (0, 0))
    }

    /// Adds a symbolic link.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.entry(path, TYPE_SYMLINK | 0o777, target.as_bytes(), (0, 0))
    }

    /// Adds a character device node.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) -> io::Result<()> {
        self.entry(path, TYPE_CHAR_DEVICE | 0o600, &[], (major, minor))
    }

    /// Writes the trailer and gives the writer back.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn finish(mut self) -> io::Result<W> {
        self.next_inode = 0;
        self.entry("TRAILER!!!", 0, &[], (0, 0))?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn entry(&mut self, path: &str, mode: u32, data: &[u8], device: (u32, u32)) -> io::Result<()> {
        let length =
            u32::try_from(data.len()).map_err(|_| io::Error::other("file over 4 GiB in a cpio archive"))?;
        let name_bytes = path.len() + 1;
        let links = if mode & TYPE_DIRECTORY == TYPE_DIRECTORY { 2 } else { 1 };
        let fields =
            [self.next_inode, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, name_bytes as u32, 0];
        self.next_inode = self.next_inode.wrapping_add(1);

        let mut head = String::with_capacity(HEADER_BYTES);
        head.push_str("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        self.out.write_all(head.as_bytes())?;
        self.out.write_all(path.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(HEADER_BYTES + name_bytes)?;
        self.out.write_all(data)?;
        self.pad(data.len())
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        let missing = written.wrapping_neg() & 3;
        self.out.write_all(&[0; 3][..missing])
    }
}

/// One entry, as [`entries`] reads it.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// Path inside the archive.
    pub path: &'a str,
    /// Type and permission bits.
    pub mode: u32,
    /// The file's content or the link's target.
    pub data: &'a [u8],
}

/// Reads an archive back, to verify one in the cache. `None` as soon as it is malformed or lacks its trailer.
pub fn entries(archive: &[u8]) -> Option<Vec<Entry<'_>>> {
    let mut found = Vec::new();
    let mut at = 0usize;
    loop {
        let head = archive.get(at..at.checked_add(HEADER_BYTES)?)?;
        if head.get(..6)? != b"070701" {
            return None;
        }
        let field = |index: usize| -> Option<usize> {
            let text = std::str::from_utf8(head.get(6 + index * 8..14 + index * 8)?).ok()?;
            usize::from_str_radix(text, 16).ok()
        };
        let (mode, size, name_bytes) = (field(1)?, field(6)?, field(11)?);
        let name_at = at + HEADER_BYTES;
        let name = archive.get(name_at..name_at.checked_add(name_bytes)?)?;
        let path = std::str::from_utf8(name.strip_suffix(&[0])?).ok()?;
        let data_at = name_at.checked_add(name_bytes)?.checked_next_multiple_of(4)?;
        let data = archive.get(data_at..data_at.checked_add(size)?)?;
        if path == "TRAILER!!!" {
            return Some(found);
        }
        found.push(Entry { path, mode: mode as u32, data });
        at = data_at.checked_add(size)?.checked_next_multiple_of(4)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn golden_bytes_of_a_small_archive() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.file("a", b"hello").unwrap();
        let bytes = cpio.finish().unwrap();
        let expected = concat!(
            "070701",
            "00000001",
            "000081a4",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000005",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000002",
            "00000000",
            "a\0",
            "hello\0\0\0",
            "070701",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000001",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "00000000",
            "0000000b",
            "00000000",
            "TRAILER!!!\0",
            "\0\0\0",
        );
        assert_eq!(String::from_utf8(bytes).unwrap(), expected);
    }

    #[test]
    fn types_and_modes_survive() {
        let mut cpio = CpioWriter::new(Vec::new());
        cpio.directory("dev").unwrap();
        cpio.char_device("dev/console", 5, 1).unwrap();
        cpio.executable("init", b"#!/bin/sh\n").unwrap();
        cpio.symlink("linuxrc", "init").unwrap();
        let bytes = cpio.finish().unwrap();
        let modes: Vec<_> = entries(&bytes).unwrap().iter().map(|e| (e.path.to_string(), e.mode)).collect();
        let expected =
            [("dev", 0o040_755), ("dev/console", 0o020_600), ("init", 0o100_755), ("linuxrc", 0o120_777)];
        assert_eq!(modes, expected.map(|(path, mode)| (path.to_string(), mode)));
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_back(files in prop::collection::vec(("[a-z/]{1,20}", prop::collection::vec(any::<u8>(), 0..300)), 0..8)) {
            let mut cpio = CpioWriter::new(Vec::new());
            for (path, data) in &files {
                cpio.file(path, data).unwrap();
            }
            let bytes = cpio.finish().unwrap();
            let read: Vec<_> = entries(&bytes).unwrap().iter().map(|e| (e.path.to_string(), e.data.to_vec())).collect();
            prop_assert_eq!(read, files);
        }

        #[test]
        fn cut_and_flipped_archives_never_panic(cut in 0usize..600, flip in 0usize..600) {
            let mut cpio = CpioWriter::new(Vec::new());
            cpio.file("one", &[7; 100]).unwrap();
            cpio.file("two", &[8; 33]).unwrap();
            let mut bytes = cpio.finish().unwrap();
            let at = flip % bytes.len();
            bytes[at] ^= 0x55;
            bytes.truncate(cut.min(bytes.len()));
            let _ = entries(&bytes);
        }
    }
}
