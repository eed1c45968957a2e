//! Bodies of records that the machine itself writes.

use super::{LoadError, StreamError, Writer};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;
use guest_memory::Region;
use saved_state::{FieldWriter, Fields, MAX_BLOB_BYTES, RestoreError, SavedState, StateBlob};

/// Most RAM regions of a machine.
const MAX_REGIONS: usize = 64;
/// Longest name of a device or kind.
const MAX_NAME_BYTES: usize = 256;

/// Identity of a disk, as whoever holds it tells it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedDisk {
    /// Its key in the machine's spec.
    pub key: String,
    /// Which disk; zero: not known.
    pub uuid: [u8; 16],
    /// The size that the guest sees.
    pub size_bytes: u64,
    /// Which state of its content; [`SavedDisk::NO_GENERATION`]: not known.
    pub generation: u64,
}

impl SavedDisk {
    /// Of grounds that keep no account of when a disk was written.
    pub const NO_GENERATION: u64 = 0;
}

impl SavedState for SavedDisk {
    const KIND: &'static str = "disk";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { key, uuid, size_bytes, generation } = self;
        w.text(1, key).bytes(2, uuid).uint(3, *size_bytes).uint(4, *generation);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let key = r.text(1, 64)?;
        Ok(Self { key, uuid: r.array(2)?, size_bytes: r.uint(3)?, generation: r.uint(4)? })
    }
}

/// State of one named part: a device, a vCPU, a piece of the partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedBlob {
    /// Name in its machine.
    pub name: String,
    /// Its state.
    pub blob: StateBlob,
}

impl SavedState for SavedBlob {
    const KIND: &'static str = "named-state";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { name, blob: StateBlob { kind, version, data } } = self;
        w.text(1, name).text(2, kind).uint(3, *version).bytes(4, data);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let name = r.text(1, MAX_NAME_BYTES)?;
        let kind = r.text(2, MAX_NAME_BYTES)?;
        let version = r.uint(3)?;
        let data = r.bytes(4, MAX_BLOB_BYTES)?.to_vec();
        Ok(Self { name, blob: StateBlob { kind, version, data } })
    }
}

/// Guest time at the moment of the save.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SavedClock {
    /// Guest nanoseconds.
    pub guest_ns: u64,
    /// The host's wall clock then, for people.
    pub wall_ns: u64,
}

impl SavedState for SavedClock {
    const KIND: &'static str = "clock";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { guest_ns, wall_ns } = self;
        w.uint(1, *guest_ns).uint(2, *wall_ns);
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        Ok(Self { guest_ns: r.uint(1)?, wall_ns: r.uint(2)? })
    }
}

/// The shape of guest RAM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SavedRam {
    /// Length of the memory behind all regions.
    pub span_bytes: u64,
    /// Where the guest sees it: address, length, offset in the span.
    pub regions: Vec<Region>,
}

impl SavedState for SavedRam {
    const KIND: &'static str = "ram";
    const VERSION: u32 = 1;
    fn encode(&self, w: &mut FieldWriter) {
        let Self { span_bytes, regions } = self;
        w.uint(1, *span_bytes);
        w.uints(2, regions.iter().flat_map(|Region { gpa, bytes, offset }| [*gpa, *bytes, *offset]));
    }
    fn decode(r: &mut Fields<'_>) -> Result<Self, RestoreError> {
        let span_bytes = r.uint(1)?;
        let numbers = r.uints(2, MAX_REGIONS * 3)?;
        let regions =
            numbers.chunks_exact(3).map(|c| Region { gpa: c[0], bytes: c[1], offset: c[2] }).collect();
        Ok(Self { span_bytes, regions })
    }
}

impl SavedRam {
    /// Refuses RAM of another shape.
    pub fn must_be(&self, other: &SavedRam) -> Result<(), LoadError> {
        if self == other {
            return Ok(());
        }
        let reason = format!(
            "its RAM has {} bytes in {} regions, here are {} bytes in {} regions",
            self.span_bytes,
            self.regions.len(),
            other.span_bytes,
            other.regions.len()
        );
        Err(LoadError::Mismatch(reason))
    }
}

impl Writer<'_> {
    /// A record of one named state. All of them are critical: a machine with a part less is another machine.
    pub fn named(&mut self, kind: super::Kind, name: &str, blob: StateBlob) -> Result<(), StreamError> {
        self.state(kind, super::CRITICAL, &SavedBlob { name: name.into(), blob })
    }
}
