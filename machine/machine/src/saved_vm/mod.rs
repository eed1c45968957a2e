//! The saved VM: a stream of checked records, in a file or on a wire.
//!
//! ```text
//! magic "BEDPLATE", version u32, records …, record "END "
//! record: kind [u8; 4], flags u16, version of its fields u16, body length u32, CRC-32C of header and body u32, body
//! ```
//! Called by: [`crate::Machine`] (records of its parts), `vmm` (its own records, the file).
//!
//! Invariants: every record is capped and checked before anybody sees its body; a record of unknown kind is
//! skipped, unless its flag [`CRITICAL`] is set: then the whole is refused; what ends without `END ` is refused.

mod crc;
mod ram;
mod records;

pub(crate) use ram::KIND_PAGES;
pub use ram::{MAX_PAGES, PAGE_BYTES, RamSaver, restore_pages};
pub use records::{SavedBlob, SavedClock, SavedDisk, SavedRam};

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use saved_state::{RestoreError, SavedState, Unsavable};

/// First bytes of every saved VM.
pub const MAGIC: [u8; 8] = *b"BEDPLATE";
/// Version of the stream's shape; what records hold has versions of its own.
pub const VERSION: u32 = 1;
/// Longest body of a record.
pub const MAX_BODY_BYTES: usize = 64 << 20;
/// Flag: a reader that does not know this kind of record must refuse.
pub const CRITICAL: u16 = 1;

/// What a record is.
pub type Kind = [u8; 4];
/// The VM as people wrote it, for a host (TOML, `vmm::wire`), with its disks as they are now. Before the machine's own.
pub const KIND_HOST: Kind = *b"HOST";
/// A [`SavedDisk`]. Before the machine's own records.
pub const KIND_DISK: Kind = *b"DISK";
/// The last record.
pub const KIND_END: Kind = *b"END ";

const HEADER_BYTES: usize = 16;

/// Takes bytes in order.
pub trait ByteSink {
    /// Writes all of `bytes`.
    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError>;
}

/// Gives bytes in order.
pub trait ByteSource {
    /// Fills all of `bytes`; the end of the stream is an error.
    fn get(&mut self, bytes: &mut [u8]) -> Result<(), StreamError>;
}

/// What is below the stream failed: the host's words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct StreamError(pub String);

/// Why a VM cannot be saved.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// A part that has no state that could be saved.
    #[error("{part} {source}")]
    Unsavable {
        /// Which.
        part: String,
        /// Why.
        source: Unsavable,
    },
    /// The engine's part.
    #[error("the engine's state cannot be saved: {0}")]
    Engine(#[from] hypervisor::EngineError),
    /// It cannot be written.
    #[error("cannot write the saved VM: {0}")]
    Stream(#[from] StreamError),
}

/// Why a saved VM cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// It cannot be read, or ends too early.
    #[error("cannot read the saved VM: {0}")]
    Stream(#[from] StreamError),
    /// Something else.
    #[error("this is no saved VM: it does not begin with BEDPLATE")]
    Magic,
    /// Saved by a later version.
    #[error("saved in format {got}; this version reads format {VERSION}")]
    Version {
        /// Of the file.
        got: u32,
    },
    /// Bits changed since it was written.
    #[error("damaged: the checksum of record {record} (`{kind}`) is wrong")]
    Checksum {
        /// Number of the record, from 0.
        record: u64,
        /// What it claims to be.
        kind: String,
    },
    /// A body that is longer than any may be.
    #[error("record {record} (`{kind}`) claims {bytes} bytes")]
    TooLong {
        /// Number of the record.
        record: u64,
        /// What it claims to be.
        kind: String,
        /// Its length.
        bytes: u64,
    },
    /// A record that must not be skipped.
    #[error("saved by a newer version: record `{0}` is not known and must not be ignored")]
    UnknownRecord(String),
    /// A part's state is refused.
    #[error("state of {part}: {source}")]
    State {
        /// Which.
        part: String,
        /// Why.
        source: RestoreError,
    },
    /// The records do not belong together, or not to this machine.
    #[error("the saved VM does not fit this machine: {0}")]
    Mismatch(String),
}

impl LoadError {
    /// A refused state of `part`.
    pub fn state(part: impl Into<String>) -> impl FnOnce(RestoreError) -> Self {
        let part = part.into();
        move |source| Self::State { part, source }
    }
}

/// Writes records.
pub struct Writer<'s> {
    sink: &'s mut dyn ByteSink,
    records: u64,
}

impl<'s> Writer<'s> {
    /// Begins a saved VM.
    pub fn begin(sink: &'s mut dyn ByteSink) -> Result<Self, StreamError> {
        sink.put(&MAGIC)?;
        sink.put(&VERSION.to_le_bytes())?;
        Ok(Self { sink, records: 0 })
    }

    /// A record of raw bytes, which have no version.
    pub fn record(&mut self, kind: Kind, flags: u16, body: &[u8]) -> Result<(), StreamError> {
        self.versioned(kind, flags, 0, body)
    }

    /// A record of raw bytes whose fields have a version.
    pub fn versioned(
        &mut self,
        kind: Kind,
        flags: u16,
        version: u16,
        body: &[u8],
    ) -> Result<(), StreamError> {
        let length = u32::try_from(body.len()).ok().filter(|l| *l as usize <= MAX_BODY_BYTES);
        let length =
            length.ok_or_else(|| StreamError(format!("record of {} bytes is too long", body.len())))?;
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind);
        header[4..6].copy_from_slice(&flags.to_le_bytes());
        header[6..8].copy_from_slice(&version.to_le_bytes());
        header[8..12].copy_from_slice(&length.to_le_bytes());
        let check = checksum(&header, body);
        header[12..].copy_from_slice(&check.to_le_bytes());
        self.records += 1;
        self.sink.put(&header)?;
        self.sink.put(body)
    }

    /// A record of fields.
    pub fn state<S: SavedState>(&mut self, kind: Kind, flags: u16, state: &S) -> Result<(), StreamError> {
        const { assert!(S::VERSION <= u16::MAX as u32, "a record's version has 16 bits") }
        self.versioned(kind, flags, S::VERSION as u16, &saved_state::to_blob(state).data)
    }

    /// The last record, which says how many there were.
    pub fn finish(mut self) -> Result<(), StreamError> {
        let count = self.records;
        self.record(KIND_END, CRITICAL, &count.to_le_bytes())
    }
}

/// A record that was read and checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it is.
    pub kind: Kind,
    /// Its flags.
    pub flags: u16,
    /// Version of the fields in its body; 0 for raw bytes.
    pub version: u16,
    /// Its body.
    pub body: Vec<u8>,
}

impl Record {
    /// Its body as fields.
    pub fn state<S: SavedState>(&self) -> Result<S, LoadError> {
        let (kind, version) = (S::KIND.into(), self.version.into());
        let blob = saved_state::StateBlob { kind, version, data: self.body.clone() };
        saved_state::from_blob(&blob).map_err(LoadError::state(S::KIND))
    }

    /// For a kind that nobody took: an error if it must not be skipped.
    pub fn skip(&self) -> Result<(), LoadError> {
        if self.flags & CRITICAL == 0 { Ok(()) } else { Err(LoadError::UnknownRecord(kind_name(self.kind))) }
    }
}

fn kind_name(kind: Kind) -> String {
    kind.iter().map(|b| if b.is_ascii_graphic() || *b == b' ' { char::from(*b) } else { '?' }).collect()
}

fn checksum(header: &[u8; HEADER_BYTES], body: &[u8]) -> u32 {
    crc::crc32c(crc::crc32c(0, &header[..12]), body)
}

/// Reads records.
pub struct Reader<'s> {
    source: &'s mut dyn ByteSource,
    records: u64,
    ended: bool,
    longest: usize,
}

impl<'s> Reader<'s> {
    /// Reads the beginning.
    pub fn begin(source: &'s mut dyn ByteSource) -> Result<Self, LoadError> {
        let mut magic = [0; 8];
        source.get(&mut magic)?;
        if magic != MAGIC {
            return Err(LoadError::Magic);
        }
        let mut version = [0; 4];
        source.get(&mut version)?;
        match u32::from_le_bytes(version) {
            VERSION => Ok(Self { source, records: 0, ended: false, longest: MAX_BODY_BYTES }),
            got => Err(LoadError::Version { got }),
        }
    }

    /// Goes on where another reader of the same source stopped, after `records` records.
    pub fn resume(source: &'s mut dyn ByteSource, records: u64) -> Self {
        Self { source, records, ended: false, longest: MAX_BODY_BYTES }
    }

    /// Takes no record that is longer than this, either: for grounds with little memory.
    #[must_use]
    pub fn with_longest(mut self, bytes: usize) -> Self {
        self.longest = bytes.min(MAX_BODY_BYTES);
        self
    }

    /// How many records were read.
    pub fn records(&self) -> u64 {
        self.records
    }

    /// The next record; `None` after the last one, which was there and right.
    pub fn next_record(&mut self) -> Result<Option<Record>, LoadError> {
        if self.ended {
            return Ok(None);
        }
        let mut header = [0; HEADER_BYTES];
        self.source.get(&mut header)?;
        let [k0, k1, k2, k3, f0, f1, v0, v1, l0, l1, l2, l3, c0, c1, c2, c3] = header;
        let kind = [k0, k1, k2, k3];
        let length = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let record = self.records;
        if length > self.longest {
            return Err(LoadError::TooLong { record, kind: kind_name(kind), bytes: length as u64 });
        }
        let body = self.body(length)?;
        if checksum(&header, &body) != u32::from_le_bytes([c0, c1, c2, c3]) {
            return Err(LoadError::Checksum { record, kind: kind_name(kind) });
        }
        if kind == KIND_END {
            if body != record.to_le_bytes() {
                return Err(LoadError::Mismatch("records are missing".into()));
            }
            self.ended = true;
            return Ok(None);
        }
        self.records += 1;
        let (flags, version) = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([v0, v1]));
        Ok(Some(Record { kind, flags, version, body }))
    }

    /// Reads in pieces: a lie about the length costs no more memory than what is really there.
    fn body(&mut self, length: usize) -> Result<Vec<u8>, LoadError> {
        const PIECE: usize = 1 << 20;
        let mut body = Vec::new();
        while body.len() < length {
            let at = body.len();
            body.resize(length.min(at + PIECE), 0);
            self.source.get(&mut body[at..])?;
        }
        Ok(body)
    }
}

impl ByteSink for Vec<u8> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.extend_from_slice(bytes);
        Ok(())
    }
}

impl ByteSource for &[u8] {
    fn get(&mut self, bytes: &mut [u8]) -> Result<(), StreamError> {
        let (head, tail) =
            self.split_at_checked(bytes.len()).ok_or_else(|| StreamError("the file is cut off".into()))?;
        bytes.copy_from_slice(head);
        *self = tail;
        Ok(())
    }
}

/// Room for `bytes` zero bytes.
pub(crate) fn zeroes(bytes: usize) -> Vec<u8> {
    vec![0; bytes]
}

#[cfg(test)]
mod tests;
