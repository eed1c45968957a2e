//! Saved state: plain structs of numbered, length-prefixed fields.
//!
//! A state is a sequence of fields: tag (u16, little endian), length (u32), bytes. Tags ascend. Rules:
//! - An absent field has its default. A field at its default may be left out.
//! - Bit 15 of a tag says *critical*: a reader that does not know it refuses; other unknown tags are skipped.
//! - Everything read is hostile: each length is checked against the blob and against the reader's cap.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;

/// Set in tags that a reader must know.
pub const CRITICAL: u16 = 1 << 15;
/// Longest state of one device or vCPU in bytes.
pub const MAX_BLOB_BYTES: usize = 64 << 20;
/// Most fields in one state.
pub const MAX_FIELDS: usize = 65_536;

/// A saved state that cannot be taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The blob ends in the middle of a field.
    #[error("saved state is cut off at byte {at}")]
    Truncated {
        /// Offset of the field that does not fit.
        at: usize,
    },
    /// Tags do not ascend.
    #[error("saved state has tag {tag:#x} out of order")]
    Disorder {
        /// The tag.
        tag: u16,
    },
    /// A field has the wrong length.
    #[error("field {tag:#x} has {got} bytes where {expected} belong")]
    Length {
        /// The tag.
        tag: u16,
        /// Bytes that the field has.
        got: usize,
        /// Bytes that it should have (or at most).
        expected: usize,
    },
    /// A value that the device could never hold.
    #[error("field {tag:#x}: {reason}")]
    Value {
        /// The tag.
        tag: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A field that this version does not know and must not ignore.
    #[error("saved by a newer version: critical field {tag:#x} is not known")]
    UnknownCritical {
        /// The tag.
        tag: u16,
    },
    /// The blob is of another kind of device.
    #[error("saved state of `{got}` where `{expected}` belongs")]
    Kind {
        /// Kind in the blob.
        got: String,
        /// Kind of the device.
        expected: String,
    },
    /// A version that cannot be read.
    #[error("saved state of `{kind}` has version {got}; this version reads up to {supported}")]
    Version {
        /// Kind of state.
        kind: String,
        /// Version in the blob.
        got: u32,
        /// Newest version that can be read.
        supported: u32,
    },
    /// Too much of something.
    #[error("saved state is too large: {0}")]
    TooLarge(&'static str),
    /// A part that must be there is not.
    #[error("saved state lacks {0}")]
    Missing(&'static str),
}

/// Why something cannot be saved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot be saved: {0}")]
pub struct Unsavable(pub String);

/// The saved state of one device, vCPU or controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateBlob {
    /// What it is the state of (stable name, e.g. `uart16550`).
    pub kind: String,
    /// Version of its fields.
    pub version: u32,
    /// The fields.
    pub data: Vec<u8>,
}

/// A plain struct that can be saved. Implementations destructure exhaustively in `encode`, so that a new
/// field fails to compile until it is saved.
pub trait SavedState: Sized {
    /// Stable name of the kind.
    const KIND: &'static str;
    /// Newest version, the one written.
    const VERSION: u32;
    /// Writes the fields in ascending order of tags.
    fn encode(&self, w: &mut FieldWriter);
    /// Reads the fields. Unknown ones are dealt with by the caller ([`from_blob`]).
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError>;
}

/// `state` as a blob.
pub fn to_blob<S: SavedState>(state: &S) -> StateBlob {
    let mut w = FieldWriter::default();
    state.encode(&mut w);
    StateBlob { kind: S::KIND.into(), version: S::VERSION, data: w.finish() }
}

/// The state in `blob`; checks kind, version and unknown critical fields.
pub fn from_blob<S: SavedState>(blob: &StateBlob) -> Result<S, RestoreError> {
    if blob.kind != S::KIND {
        return Err(RestoreError::Kind { got: blob.kind.clone(), expected: S::KIND.into() });
    }
    if blob.version > S::VERSION {
        return Err(RestoreError::Version {
            kind: blob.kind.clone(),
            got: blob.version,
            supported: S::VERSION,
        });
    }
    decode_all(&blob.data)
}

fn decode_all<S: SavedState>(data: &[u8]) -> Result<S, RestoreError> {
    let mut fields = Fields::parse(data)?;
    let state = S::decode(&mut fields)?;
    fields.refuse_unknown_critical()?;
    Ok(state)
}

/// Writes fields.
#[derive(Default)]
pub struct FieldWriter {
    data: Vec<u8>,
    last: Option<u16>,
}

/// Order of tags: the number without the critical bit.
fn number(tag: u16) -> u16 {
    tag & !CRITICAL
}

impl FieldWriter {
    /// A field of raw bytes. Tags must ascend (a bug of the caller otherwise: caught in debug builds).
    pub fn bytes(&mut self, tag: u16, bytes: &[u8]) -> &mut Self {
        debug_assert!(self.last.is_none_or(|l| number(l) < number(tag)), "tags must ascend");
        self.last = Some(tag);
        self.data.extend_from_slice(&tag.to_le_bytes());
        self.data.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
        self.data.extend_from_slice(bytes);
        self
    }
    /// An unsigned number; leading zero bytes are not stored, zero is left out altogether.
    pub fn uint(&mut self, tag: u16, value: impl Into<u64>) -> &mut Self {
        let value: u64 = value.into();
        if value == 0 {
            return self;
        }
        let len = 8 - value.leading_zeros() as usize / 8;
        self.bytes(tag, &value.to_le_bytes()[..len])
    }
    /// A truth value; `false` is left out.
    pub fn flag(&mut self, tag: u16, value: bool) -> &mut Self {
        self.uint(tag, u8::from(value))
    }
    /// A list of numbers, eight bytes each; an empty one is left out.
    pub fn uints(&mut self, tag: u16, values: impl IntoIterator<Item = u64>) -> &mut Self {
        let mut out = Vec::new();
        for v in values {
            out.extend_from_slice(&v.to_le_bytes());
        }
        if out.is_empty() { self } else { self.bytes(tag, &out) }
    }
    /// A text; an empty one is left out.
    pub fn text(&mut self, tag: u16, value: &str) -> &mut Self {
        if value.is_empty() { self } else { self.bytes(tag, value.as_bytes()) }
    }
    /// A state inside this one.
    pub fn nested<S: SavedState>(&mut self, tag: u16, state: &S) -> &mut Self {
        let mut w = FieldWriter::default();
        state.encode(&mut w);
        self.bytes(tag, &w.finish())
    }
    /// A list of states inside this one; an empty one is left out.
    pub fn list<'s, S: SavedState + 's>(
        &mut self,
        tag: u16,
        states: impl IntoIterator<Item = &'s S>,
    ) -> &mut Self {
        let mut out = Vec::new();
        for state in states {
            let mut w = FieldWriter::default();
            state.encode(&mut w);
            let data = w.finish();
            out.extend_from_slice(&(data.len() as u32).to_le_bytes());
            out.extend_from_slice(&data);
        }
        if out.is_empty() { self } else { self.bytes(tag, &out) }
    }
    /// The finished fields.
    pub fn finish(self) -> Vec<u8> {
        self.data
    }
}

/// Fields of a state being read. Each is taken out by its tag; what is left is unknown.
pub struct Fields<'a> {
    fields: Vec<(u16, &'a [u8], bool)>,
}

impl<'a> Fields<'a> {
    /// Splits `data`.
    pub fn parse(data: &'a [u8]) -> Result<Self, RestoreError> {
        if data.len() > MAX_BLOB_BYTES {
            return Err(RestoreError::TooLarge("one state is over 64 MiB"));
        }
        let mut fields: Vec<(u16, &'a [u8], bool)> = Vec::new();
        let mut at = 0;
        while at < data.len() {
            let cut = RestoreError::Truncated { at };
            let head = data.get(at..at + 6).ok_or(cut.clone())?;
            let tag = u16::from_le_bytes([head[0], head[1]]);
            let len = u32::from_le_bytes([head[2], head[3], head[4], head[5]]) as usize;
            let bytes = data.get(at + 6..).and_then(|rest| rest.get(..len)).ok_or(cut)?;
            if fields.last().is_some_and(|(last, ..)| number(*last) >= number(tag)) {
                return Err(RestoreError::Disorder { tag });
            }
            if fields.len() == MAX_FIELDS {
                return Err(RestoreError::TooLarge("too many fields"));
            }
            fields.push((tag, bytes, false));
            at += 6 + len;
        }
        Ok(Self { fields })
    }

    fn refuse_unknown_critical(&self) -> Result<(), RestoreError> {
        match self.fields.iter().find(|(tag, _, taken)| !taken && tag & CRITICAL != 0) {
            Some((tag, ..)) => Err(RestoreError::UnknownCritical { tag: *tag }),
            None => Ok(()),
        }
    }

    /// The bytes of a field, at most `cap`; empty if absent.
    pub fn bytes(&mut self, tag: u16, cap: usize) -> Result<&'a [u8], RestoreError> {
        Ok(self.optional_bytes(tag, cap)?.unwrap_or(&[]))
    }
    /// As [`Fields::bytes`]; `None` if absent.
    pub fn optional_bytes(&mut self, tag: u16, cap: usize) -> Result<Option<&'a [u8]>, RestoreError> {
        let Some(field) = self.fields.iter_mut().find(|(t, ..)| *t == tag) else { return Ok(None) };
        field.2 = true;
        if field.1.len() > cap {
            return Err(RestoreError::Length { tag, got: field.1.len(), expected: cap });
        }
        Ok(Some(field.1))
    }
    /// A field of exactly `N` bytes; zeroes if absent.
    pub fn array<const N: usize>(&mut self, tag: u16) -> Result<[u8; N], RestoreError> {
        match self.optional_bytes(tag, N)? {
            None => Ok([0; N]),
            Some(b) => b.try_into().map_err(|_| RestoreError::Length { tag, got: b.len(), expected: N }),
        }
    }
    /// A number; 0 if absent; refused if it does not fit `T`.
    pub fn uint<T: TryFrom<u64>>(&mut self, tag: u16) -> Result<T, RestoreError> {
        let bytes = self.bytes(tag, 8)?;
        let mut raw = [0; 8];
        raw[..bytes.len()].copy_from_slice(bytes);
        T::try_from(u64::from_le_bytes(raw))
            .map_err(|_| RestoreError::Value { tag, reason: "number out of range" })
    }
    /// A truth value; `false` if absent.
    pub fn flag(&mut self, tag: u16) -> Result<bool, RestoreError> {
        match self.uint::<u8>(tag)? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(RestoreError::Value { tag, reason: "neither true nor false" }),
        }
    }
    /// A list of at most `cap` numbers.
    pub fn uints(&mut self, tag: u16, cap: usize) -> Result<Vec<u64>, RestoreError> {
        let bytes = self.bytes(tag, cap.saturating_mul(8))?;
        if !bytes.len().is_multiple_of(8) {
            return Err(RestoreError::Length { tag, got: bytes.len(), expected: bytes.len() / 8 * 8 });
        }
        Ok(bytes.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default())).collect())
    }
    /// A text of at most `cap` bytes.
    pub fn text(&mut self, tag: u16, cap: usize) -> Result<String, RestoreError> {
        let bytes = self.bytes(tag, cap)?;
        core::str::from_utf8(bytes)
            .map(Into::into)
            .map_err(|_| RestoreError::Value { tag, reason: "not UTF-8" })
    }
    /// A state inside this one; `None` if absent.
    pub fn nested<S: SavedState>(&mut self, tag: u16) -> Result<Option<S>, RestoreError> {
        self.optional_bytes(tag, MAX_BLOB_BYTES)?.map(decode_all).transpose()
    }
    /// A list of at most `cap` states.
    pub fn list<S: SavedState>(&mut self, tag: u16, cap: usize) -> Result<Vec<S>, RestoreError> {
        let mut rest = self.bytes(tag, MAX_BLOB_BYTES)?;
        let mut out = Vec::new();
        while !rest.is_empty() {
            let cut = RestoreError::Value { tag, reason: "list is cut off" };
            if out.len() == cap {
                return Err(RestoreError::Value { tag, reason: "list is too long" });
            }
            let (head, tail) = rest.split_at_checked(4).ok_or(cut.clone())?;
            let len = u32::from_le_bytes(head.try_into().unwrap_or_default()) as usize;
            let (data, tail) = tail.split_at_checked(len).ok_or(cut)?;
            out.push(decode_all(data)?);
            rest = tail;
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests;
