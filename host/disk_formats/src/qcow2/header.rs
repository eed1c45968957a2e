//! The qcow2 header, read and judged by us before imago sees the image (QEMU, docs/interop/qcow2.txt).
//!
//! Called by: `qcow2::open`.
//!
//! Invariants: whatever is in the file, parsing reads at most the first cluster (2 MiB), allocates no more than that, and
//! ends in a header whose tables lie inside the file and are small enough to be loaded, or in an error that names the
//! field. Features that imago or we do not do are refused, never ignored.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{DiskError, Format};

const MAGIC: [u8; 4] = *b"QFI\xfb";
const V2_BYTES: usize = 72;
const V3_BYTES: usize = 104;
/// QEMU's bounds, which keep table sizes sane: 512 B to 2 MiB clusters, 32 MiB of L1, 8 MiB of refcount table.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
const MAX_L1_BYTES: u64 = 32 << 20;
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;
const MAX_BACKING_NAME: usize = 1023;
const MAX_REFCOUNT_ORDER: u32 = 6;
const V2_REFCOUNT_ORDER: u32 = 4;

const EXTENSION_END: u32 = 0;
const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;

/// What we need to know of an image.
#[derive(Debug)]
pub(super) struct Header {
    /// The size the guest sees.
    pub(super) size_bytes: u64,
    /// The backing file's name as it stands in the image.
    pub(super) backing_name: Option<String>,
    /// The backing file's format, if the image says it.
    pub(super) backing_format: Option<Format>,
}

impl Header {
    /// Reads and checks the header of an image of `file_bytes`, to be opened for writing or not.
    pub(super) fn read(
        file: &File,
        file_bytes: u64,
        path: &Path,
        read_only: bool,
    ) -> Result<Header, DiskError> {
        let mut fixed = [0; V3_BYTES];
        let got = (file_bytes as usize).min(V3_BYTES);
        let read = |buf: &mut [u8], at| {
            file.read_exact_at(buf, at).map_err(|source| DiskError::Io {
                path: path.into(),
                what: "read its header",
                source,
            })
        };
        read(&mut fixed[..got], 0)?;
        let check = Check { path, fixed: &fixed, file_bytes };
        if got < V2_BYTES || fixed[..4] != MAGIC {
            return Err(check.bad("magic", "is not that of a qcow2 image; is it raw? then say format=raw"));
        }
        let version = check.u32(4);
        if !matches!(version, 2 | 3) || (version == 3 && got < V3_BYTES) {
            return Err(check.bad("version", format!("{version} is neither 2 nor 3")));
        }
        let cluster_bits = check.u32(20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(check.bad("cluster_bits", format!("{cluster_bits} is not from 9 to 21")));
        }
        check.features(version, read_only)?;
        check.tables(1 << cluster_bits)?;
        if !read_only {
            let order = if version == 2 { V2_REFCOUNT_ORDER } else { check.u32(96) };
            check.counts_header(order, 1 << cluster_bits, read)?;
        }

        let header_bytes = if version == 2 { V2_BYTES } else { check.header_length(1 << cluster_bits)? };
        let mut cluster = vec![0; file_bytes.min(1 << cluster_bits) as usize];
        read(&mut cluster, 0)?;
        let backing_name = check.backing_name(&cluster)?;
        let backing_format =
            if version == 2 { None } else { check.backing_format(&cluster, header_bytes)? };
        Ok(Header { size_bytes: check.u64(24), backing_name, backing_format })
    }
}

/// The fixed part of a header under examination.
struct Check<'a> {
    path: &'a Path,
    fixed: &'a [u8; V3_BYTES],
    file_bytes: u64,
}

impl Check<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32::from_be_bytes([self.fixed[at], self.fixed[at + 1], self.fixed[at + 2], self.fixed[at + 3]])
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from(self.u32(at)) << 32 | u64::from(self.u32(at + 4))
    }

    fn bad(&self, field: &'static str, problem: impl Into<String>) -> DiskError {
        DiskError::Malformed { path: self.path.into(), field, problem: problem.into() }
    }

    fn unsupported(&self, what: impl Into<String>, way_out: &str) -> DiskError {
        DiskError::Unsupported { path: self.path.into(), what: what.into(), way_out: way_out.into() }
    }

    fn features(&self, version: u32, read_only: bool) -> Result<(), DiskError> {
        let convert = "convert it with `qemu-img convert -O qcow2 OLD NEW`";
        if self.u32(32) != 0 {
            return Err(self.unsupported("encryption", convert));
        }
        if self.u32(60) != 0 && !read_only {
            let way_out = "open it with `,ro`, or delete them with `qemu-img snapshot -d`";
            return Err(self.unsupported("writing beside internal snapshots", way_out));
        }
        if version == 2 {
            return Ok(());
        }
        let incompatible = self.u64(72);
        let repair = "was not closed properly; repair it with `qemu-img check -r all`";
        for (bit, refusal) in [
            (0, self.bad("dirty bit", repair)),
            (1, self.bad("corrupt bit", repair)),
            (2, self.unsupported("an external data file", convert)),
            (3, self.unsupported("zstd compression", convert)),
            (4, self.unsupported("extended L2 entries (subclusters)", convert)),
        ] {
            if incompatible >> bit & 1 != 0 {
                return Err(refusal);
            }
        }
        if incompatible != 0 {
            return Err(self.unsupported(format!("incompatible features {incompatible:#x}"), convert));
        }
        if self.u32(96) > MAX_REFCOUNT_ORDER {
            return Err(self.bad("refcount_order", format!("{} is above 6", self.u32(96))));
        }
        Ok(())
    }

    /// Size, L1 table and refcount table fit each other and the file.
    fn tables(&self, cluster: u64) -> Result<(), DiskError> {
        let size = self.u64(24);
        if !size.is_multiple_of(512) || size > i64::MAX as u64 {
            return Err(self.bad("size", format!("{size} is not a multiple of 512 that a file can have")));
        }
        let inside = |start: u64, len: u64| {
            start >= cluster
                && start.is_multiple_of(cluster)
                && start.checked_add(len).is_some_and(|end| end <= self.file_bytes)
        };
        let l1_bytes = u64::from(self.u32(36)) * 8;
        let covers = (cluster / 8 * cluster).saturating_mul(u64::from(self.u32(36)));
        if l1_bytes > MAX_L1_BYTES || covers < size {
            return Err(
                self.bad("l1_size", format!("{} entries do not suit a disk of {size} bytes", self.u32(36)))
            );
        }
        if l1_bytes > 0 && !inside(self.u64(40), l1_bytes) {
            return Err(self.bad("l1_table_offset", format!("{:#x} leads outside of the file", self.u64(40))));
        }
        let refcount_bytes = u64::from(self.u32(56)) * cluster;
        if refcount_bytes == 0 || refcount_bytes > MAX_REFCOUNT_TABLE_BYTES.max(cluster) {
            return Err(
                self.bad("refcount_table_clusters", format!("{} is too few or too many", self.u32(56)))
            );
        }
        if !inside(self.u64(48), refcount_bytes) {
            return Err(
                self.bad("refcount_table_offset", format!("{:#x} leads outside of the file", self.u64(48)))
            );
        }
        Ok(())
    }

    /// The header's own cluster is in use, as the refcounts say. Where they do not, the next allocation would be put on
    /// it; and a refcount block that stands at offset 0 counts as absent, which imago's search for a place never survives.
    fn counts_header(
        &self,
        order: u32,
        cluster: u64,
        read: impl Fn(&mut [u8], u64) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let mut entry = [0; 8];
        read(&mut entry, self.u64(48))?;
        let block = u64::from_be_bytes(entry);
        let inside = block.checked_add(cluster).is_some_and(|end| end <= self.file_bytes);
        if block == 0 || !block.is_multiple_of(cluster) || !inside {
            return Err(self.bad("refcount_table", format!("its first entry {block:#x} leads to no block")));
        }
        let mut count = [0; 8];
        let bytes = (1usize << order).div_ceil(8);
        read(&mut count[..bytes], block)?;
        // Counts of less than a byte start with its low bits.
        let mask = if order < 3 { (1u16 << (1 << order)) as u8 - 1 } else { 0xFF };
        if count.iter().all(|byte| byte & mask == 0) {
            return Err(self.bad(
                "refcounts",
                "the header's cluster counts as free; repair it with `qemu-img check -r all`",
            ));
        }
        Ok(())
    }

    fn header_length(&self, cluster: usize) -> Result<usize, DiskError> {
        let length = self.u32(100) as usize;
        if length < V3_BYTES || length > cluster || !length.is_multiple_of(8) {
            return Err(
                self.bad("header_length", format!("{length} is not a multiple of 8 from 104 to a cluster"))
            );
        }
        Ok(length)
    }

    fn backing_name(&self, cluster: &[u8]) -> Result<Option<String>, DiskError> {
        let (at, len) = (self.u64(8), self.u32(16) as usize);
        if at == 0 {
            return Ok(None);
        }
        let name = usize::try_from(at).ok().filter(|_| (1..=MAX_BACKING_NAME).contains(&len));
        let name = name.and_then(|at| cluster.get(at..at.checked_add(len)?));
        let name =
            name.ok_or_else(|| self.bad("backing_file_offset", "leads outside of the first cluster"))?;
        match std::str::from_utf8(name) {
            Ok(name) if !name.contains('\0') => Ok(Some(name.into())),
            _ => Err(self.bad("backing file name", "is not UTF-8 text")),
        }
    }

    fn backing_format(&self, cluster: &[u8], mut at: usize) -> Result<Option<Format>, DiskError> {
        loop {
            let outside = || self.bad("header extensions", "lead outside of the first cluster");
            let head = cluster.get(at..at + 8).ok_or_else(outside)?;
            let kind = u32::from_be_bytes([head[0], head[1], head[2], head[3]]);
            let len = u32::from_be_bytes([head[4], head[5], head[6], head[7]]) as usize;
            at += 8;
            let end = at.checked_add(len).ok_or_else(outside)?;
            let data = cluster.get(at..end).ok_or_else(outside)?;
            match kind {
                EXTENSION_END => return Ok(None),
                EXTENSION_BACKING_FORMAT => {
                    let name = String::from_utf8_lossy(&data[..data.len().min(32)]);
                    let way_out = "convert the backing file to raw or qcow2";
                    return match name.parse() {
                        Ok(format) => Ok(Some(format)),
                        Err(_) => {
                            Err(self
                                .unsupported(format!("backing format `{}`", name.escape_debug()), way_out))
                        }
                    };
                }
                _ => at = end.next_multiple_of(8),
            }
        }
    }
}
