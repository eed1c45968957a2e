//! Raw images and block devices: the file's bytes are the disk's bytes.
//!
//! Called by: `open`. Invariants: every transfer is one positioned read or write loop, so requests from many threads do
//! not disturb each other; the size is fixed when the image is opened.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host_io::block_store::check_range;
use host_io::file_lock::{ImageLock, LockMode};
use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use crate::overlay::{self, Base, Layer, NewFile};
use crate::{BlockStore, Disk, DiskError, DiskIdentity, DiskSpec, Format, identity};

const SECTOR: u64 = 512;

/// An open raw image.
#[derive(Debug)]
pub(crate) struct RawDisk {
    spec: DiskSpec,
    own: Layer,
    size_bytes: u64,
    /// Bytes the file really has; only a read-only image may end inside its last sector.
    file_bytes: u64,
    opened_as: DiskIdentity,
    /// Set when an overlay took over: no more changes.
    frozen: AtomicBool,
    /// The file system cannot punch holes: discards are hints, so stop asking.
    no_holes: AtomicBool,
}

/// Opens an image file of any format with its lock; says how many bytes it has.
pub(crate) fn open_locked(path: &Path, read_only: bool) -> Result<(File, u64, ImageLock), DiskError> {
    let fail = |what| move |source: io::Error| DiskError::Io { path: path.into(), what, source };
    // Non-blocking, so that a path which is a pipe without a reader fails instead of hanging.
    let flags = (OFlags::CLOEXEC | OFlags::NONBLOCK).bits() as i32;
    let file = File::options()
        .read(true)
        .write(!read_only)
        .custom_flags(flags)
        .open(path)
        .map_err(fail("open it"))?;
    let kind = file.metadata().map_err(fail("examine it"))?.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        return Err(DiskError::NotADisk { path: path.into() });
    }
    let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|e| fail("find its size")(e.into()))?;
    let mode = if read_only { LockMode::Read } else { LockMode::Write };
    let lock = ImageLock::acquire(&file, mode).map_err(|source| match source.kind() {
        io::ErrorKind::WouldBlock => DiskError::InUse { path: path.into(), read_only },
        _ => DiskError::Io { path: path.into(), what: "lock it", source },
    })?;
    Ok((file, bytes, lock))
}

fn identify(path: &Path, file: &File, size_bytes: u64) -> Result<DiskIdentity, DiskError> {
    identity::identify(file, size_bytes, &[]).map_err(|source| DiskError::Io {
        path: path.into(),
        what: "find its identity",
        source,
    })
}

/// An image that was opened with its lock.
pub(crate) fn layer(path: &Path, format: Format, file: File, lock: ImageLock) -> Result<Layer, DiskError> {
    let fail = |source| DiskError::Io { path: path.into(), what: "find its real path", source };
    let path = path.canonicalize().map_err(fail)?;
    Ok(Layer { path, format, file: Arc::new(file), lock: Arc::new(lock) })
}

impl RawDisk {
    pub(crate) fn open(spec: &DiskSpec) -> Result<RawDisk, DiskError> {
        let (file, file_bytes, lock) = open_locked(&spec.path, spec.read_only)?;
        if file_bytes % SECTOR != 0 && !spec.read_only {
            return Err(DiskError::OddSize { path: spec.path.clone(), bytes: file_bytes });
        }
        let size_bytes = file_bytes.next_multiple_of(SECTOR);
        Ok(RawDisk {
            spec: spec.clone(),
            opened_as: identify(&spec.path, &file, size_bytes)?,
            own: layer(&spec.path, Format::Raw, file, lock)?,
            size_bytes,
            file_bytes,
            frozen: AtomicBool::new(false),
            no_holes: AtomicBool::new(false),
        })
    }

    fn check_change(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        check_range(offset, len, self.size_bytes)
    }

    /// Punches a hole; `false` when the file system cannot.
    fn punch(&self, offset: u64, len: u64) -> io::Result<bool> {
        if self.no_holes.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match rustix::fs::fallocate(
            &*self.own.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            Ok(()) => Ok(true),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.no_holes.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(Errno::INVAL) => Ok(false), // A block device whose sectors are larger than the range.
            Err(error) => Err(error.into()),
        }
    }
}

impl BlockStore for RawDisk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_only(&self) -> bool {
        self.spec.read_only || self.frozen.load(Ordering::Acquire)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size_bytes)?;
        let in_file = self.file_bytes.saturating_sub(offset).min(buf.len() as u64) as usize;
        let (head, tail) = buf.split_at_mut(in_file);
        tail.fill(0);
        self.own.file.read_exact_at(head, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check_change(offset, buf.len() as u64)?;
        self.own.file.write_all_at(buf, offset)
    }

    fn flush(&self) -> io::Result<()> {
        if self.spec.read_only { Ok(()) } else { self.own.file.sync_data() }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_change(offset, len)?;
        if self.spec.discard && len > 0 {
            self.punch(offset, len)?;
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_change(offset, len)?;
        if len == 0 || (may_unmap && self.spec.discard && self.punch(offset, len)?) {
            return Ok(());
        }
        match rustix::fs::fallocate(
            &*self.own.file,
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE,
            offset,
            len,
        ) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                write_zero_bytes(&self.own.file, offset, len)
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Zeroes the slow way, for file systems and devices without a faster one.
fn write_zero_bytes(file: &File, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = vec![0u8; len.min(256 << 10) as usize];
    while len > 0 {
        let piece = len.min(zeroes.len() as u64);
        file.write_all_at(&zeroes[..piece as usize], offset)?;
        offset += piece;
        len -= piece;
    }
    Ok(())
}

impl Disk for RawDisk {
    fn format(&self) -> Format {
        Format::Raw
    }

    fn path(&self) -> &Path {
        &self.spec.path
    }

    fn opened_as(&self) -> DiskIdentity {
        self.opened_as
    }

    fn identity(&self) -> Result<DiskIdentity, DiskError> {
        identify(&self.spec.path, &self.own.file, self.size_bytes)
    }

    fn create_overlay(&self, overlay: NewFile) -> Result<Box<dyn Disk>, DiskError> {
        let Self { spec, own, frozen, .. } = self;
        overlay::create(&Base { disk: self, spec, own, below: &[], frozen }, overlay)
    }
}
