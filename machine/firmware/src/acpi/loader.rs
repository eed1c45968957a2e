//! Relocatable tables: blobs, and the fix-ups that make them valid at an address.
//!
//! Called by `acpi` (which makes them), by `machine` through [`AcpiTables::load`] for direct boot,
//! and later by fw_cfg, whose table loader has the same three commands: allocate a blob, add a
//! blob's address to a pointer, compute a checksum. Order matters: a checksum covers the pointers
//! that were patched before it.

use crate::Segment;
use alloc::borrow::Cow;
use alloc::vec::Vec;
use guest_memory::Gpa;
use machine_spec::layout::{RSDP_AREA, RamLayout, Span};

/// The files that tables are made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlobKind {
    /// The root pointer, which guests search below 1 MiB.
    Rsdp,
    /// All tables that are read once.
    Tables,
    /// The FACS, which lives on while the guest runs.
    Facs,
}

/// Bytes that are valid wherever they are put, once the fix-ups were done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// Which.
    pub kind: BlobKind,
    /// Pointers in it count from the beginning of the blob that they point to.
    pub bytes: Vec<u8>,
    /// Alignment of its address.
    pub align: u64,
}

/// A change to a blob that depends on where blobs were put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fixup {
    /// Adds the address of `target` to the little-endian integer of `size` bytes at `offset`.
    AddPointer {
        /// Blob to change.
        blob: BlobKind,
        /// Where in it.
        offset: usize,
        /// 4 or 8.
        size: usize,
        /// Blob whose address is added.
        target: BlobKind,
    },
    /// Makes the sum of `len` bytes from `start` zero by the byte at `offset`.
    AddChecksum {
        /// Blob to change.
        blob: BlobKind,
        /// Where the checksum stands.
        offset: usize,
        /// First byte that counts.
        start: usize,
        /// How many bytes count.
        len: usize,
    },
}

/// Blobs and their fix-ups, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AcpiTables {
    /// The files.
    pub blobs: Vec<Blob>,
    /// What to do once every blob has an address.
    pub fixups: Vec<Fixup>,
}

/// Tables at their addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoadedTables {
    /// What to write into RAM.
    pub segments: Vec<Segment<'static>>,
    /// Where the root pointer is.
    pub rsdp: Gpa,
}

/// Why tables could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LoadTablesError {
    /// More tables than room.
    #[error("ACPI: {kind:?} of {bytes} bytes do not fit the {room} bytes reserved for them")]
    NoRoom {
        /// Which blob.
        kind: BlobKind,
        /// Its length.
        bytes: usize,
        /// What is there.
        room: u64,
    },
    /// A fix-up names a place that is not in its blob.
    #[error("ACPI: a fix-up of {kind:?} at {offset:#x} lies outside")]
    Fixup {
        /// Which blob.
        kind: BlobKind,
        /// Where.
        offset: usize,
    },
}

impl AcpiTables {
    /// What firmware would do: gives every blob its reserved place and applies the fix-ups.
    pub fn load(&self, layout: &RamLayout) -> Result<LoadedTables, LoadTablesError> {
        let mut placed: Vec<(BlobKind, u64, Vec<u8>)> = Vec::with_capacity(self.blobs.len());
        for blob in &self.blobs {
            let room = match blob.kind {
                BlobKind::Rsdp => RSDP_AREA,
                BlobKind::Tables => layout.acpi_tables(),
                BlobKind::Facs => layout.acpi_nvs(),
            };
            let start = room.start.0.next_multiple_of(blob.align.max(1));
            let fits = room.contains(&Span::new(start, blob.bytes.len() as u64));
            if !fits || placed.iter().any(|(kind, ..)| *kind == blob.kind) {
                return Err(LoadTablesError::NoRoom {
                    kind: blob.kind,
                    bytes: blob.bytes.len(),
                    room: room.size,
                });
            }
            placed.push((blob.kind, start, blob.bytes.clone()));
        }
        for fixup in &self.fixups {
            apply(fixup, &mut placed)?;
        }
        let rsdp = placed.iter().find(|(kind, ..)| *kind == BlobKind::Rsdp).map_or(0, |(_, start, _)| *start);
        let segments = placed
            .into_iter()
            .map(|(_, start, bytes)| Segment { gpa: Gpa(start), bytes: Cow::Owned(bytes), zeros_after: 0 })
            .collect();
        Ok(LoadedTables { segments, rsdp: Gpa(rsdp) })
    }
}

fn apply(fixup: &Fixup, placed: &mut [(BlobKind, u64, Vec<u8>)]) -> Result<(), LoadTablesError> {
    match *fixup {
        Fixup::AddPointer { blob, offset, size, target } => {
            let outside = LoadTablesError::Fixup { kind: blob, offset };
            let address = placed.iter().find(|(kind, ..)| *kind == target).map(|(_, start, _)| *start);
            let address = address.ok_or(outside)?;
            let bytes = bytes_of(placed, blob).and_then(|bytes| bytes.get_mut(offset..)?.get_mut(..size));
            let field = bytes.filter(|field| field.len() <= 8).ok_or(outside)?;
            let mut value = [0; 8];
            value[..size].copy_from_slice(field);
            let sum = u64::from_le_bytes(value).wrapping_add(address);
            field.copy_from_slice(&sum.to_le_bytes()[..size]);
        }
        Fixup::AddChecksum { blob, offset, start, len } => {
            let outside = LoadTablesError::Fixup { kind: blob, offset };
            let bytes = bytes_of(placed, blob).ok_or(outside)?;
            *bytes.get_mut(offset).ok_or(outside)? = 0;
            let covered = bytes.get(start..).and_then(|bytes| bytes.get(..len)).ok_or(outside)?;
            let sum = covered.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
            bytes[offset] = sum.wrapping_neg();
        }
    }
    Ok(())
}

fn bytes_of(placed: &mut [(BlobKind, u64, Vec<u8>)], wanted: BlobKind) -> Option<&mut Vec<u8>> {
    placed.iter_mut().find(|(kind, ..)| *kind == wanted).map(|(.., bytes)| bytes)
}
