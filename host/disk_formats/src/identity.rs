//! Which disk an image is, and in which state, without writing anything beside or into it.
//!
//! Called by: every format's `Disk::identity`; compared by `restore`, which refuses a disk that moved on.
//!
//! Neither raw nor qcow2 has a place for a UUID or a change counter, so both come from the file system:
//! - `uuid` is a version-8 UUID hashed from inode number and birth time (device number where the file system keeps no
//!   birth time). It survives renames, remounts and reboots; a copy is another disk.
//! - `generation` is hashed from the time of the last change of the content (nanoseconds) of the image and of every
//!   backing file. Changing mode, owner or name does not change it.
//! - A block device's time says nothing. Its uuid is its device number, its generation the kernel's disk sequence number
//!   and count of sectors written, in this boot of the host: after a reboot such a disk counts as moved on.
//!
//! Invariants: the same file, unwritten, always gives the same identity. Kernel timestamps advance in ticks (4 ms), so
//! a change in the very tick of the save goes unseen; the image is locked for that time, so there is nobody to make it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, StatxFlags, statx};

/// Names a disk and its state; saved beside a VM's state and checked when that is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DiskIdentity {
    /// Which disk.
    pub uuid: [u8; 16],
    /// The size the guest sees.
    pub size_bytes: u64,
    /// Which state of its content.
    pub generation: u64,
}

impl std::fmt::Display for DiskIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let hex = |range: std::ops::Range<usize>| {
            self.uuid[range].iter().map(|byte| format!("{byte:02x}")).collect::<String>()
        };
        write!(f, "{}-{}-{}-{}-{}", hex(0..4), hex(4..6), hex(6..8), hex(8..10), hex(10..16))?;
        write!(f, ", {} bytes, generation {:016x}", self.size_bytes, self.generation)
    }
}

/// Identifies the open image `file`; `backing` are the generations of the files it is based on, nearest first.
pub(crate) fn identify(file: &File, size_bytes: u64, backing: &[u64]) -> io::Result<DiskIdentity> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let stat = statx(file, "", AtFlags::EMPTY_PATH, wanted)?;
    let (mut uuid, mut generation) = (Hash::new(0x75), Hash::new(0x67));
    if FileType::from_raw_mode(stat.stx_mode.into()) == FileType::BlockDevice {
        let device = (stat.stx_rdev_major, stat.stx_rdev_minor);
        uuid.add(u64::from(device.0)).add(u64::from(device.1));
        add_device_activity(&mut generation, device)?;
    } else {
        uuid.add(stat.stx_ino);
        if stat.stx_mask & StatxFlags::BTIME.bits() != 0 {
            uuid.add(stat.stx_btime.tv_sec as u64).add(stat.stx_btime.tv_nsec.into());
        } else {
            uuid.add(stat.stx_dev_major.into()).add(stat.stx_dev_minor.into());
        }
        generation.add(stat.stx_mtime.tv_sec as u64).add(stat.stx_mtime.tv_nsec.into());
    }
    for layer in backing {
        generation.add(*layer);
    }
    Ok(DiskIdentity { uuid: uuid.into_uuid(), size_bytes, generation: generation.0 as u64 })
}

/// What tells two moments of a block device apart within one boot.
fn add_device_activity(hash: &mut Hash, (major, minor): (u32, u32)) -> io::Result<()> {
    let folder = format!("/sys/dev/block/{major}:{minor}");
    for path in [format!("{folder}/diskseq"), "/proc/sys/kernel/random/boot_id".into()] {
        if let Ok(text) = read_small(Path::new(&path)) {
            text.bytes().for_each(|byte| _ = hash.add(byte.into()));
        }
    }
    // The seventh field is the count of sectors written (Linux, Documentation/block/stat.rst).
    let stat = read_small(Path::new(&format!("{folder}/stat")))?;
    let sectors_written = stat.split_whitespace().nth(6).and_then(|field| field.parse().ok());
    let missing =
        || io::Error::new(io::ErrorKind::InvalidData, "the kernel's statistics lack sectors written");
    hash.add(sectors_written.ok_or_else(missing)?);
    Ok(())
}

fn read_small(path: &Path) -> io::Result<String> {
    let mut text = [0u8; 512];
    let len = File::open(path)?.read_at(&mut text, 0)?;
    Ok(String::from_utf8_lossy(&text[..len]).into_owned())
}

/// FNV-1a with 128 bits: stable for ever, which the standard library's hashes do not promise.
struct Hash(u128);

impl Hash {
    fn new(domain: u8) -> Hash {
        let mut hash = Hash(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
        hash.add(domain.into());
        hash
    }

    fn add(&mut self, value: u64) -> &mut Hash {
        for byte in value.to_le_bytes() {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        self
    }

    /// RFC 9562 §5.8: version 8, variant 10.
    fn into_uuid(self) -> [u8; 16] {
        let mut uuid = self.0.to_be_bytes();
        uuid[6] = uuid[6] & 0x0f | 0x80;
        uuid[8] = uuid[8] & 0x3f | 0x80;
        uuid
    }
}
