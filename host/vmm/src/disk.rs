//! virtio-blk's backend on the host: requests go to worker threads, which run them against an open disk image.
//!
//! Called by: [`crate::host`] when a machine is built; then by the device. The disks themselves are kept in
//! [`OpenDisk`], for saves that name them or move them to overlays.

use crate::services::lock;
use crate::wire::DiskSpec;
use device::Waker;
use disk_formats::{Disk, DiskError, NewFile};
use guest_memory::DmaSpace;
use host_io::block_pool::{self, BlockPool, BufferGone, IoBuffer, PoolConfig};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use virtio::Buffer;
use virtio_devices::{BlockBackend, BlockError, BlockInfo, BlockOp, BlockRequest, Busy, Completion};

const BLOCK_BYTES: u32 = 512;
const PHYSICAL_BLOCK_BYTES: u32 = 4096;

type Pool = BlockPool<u64, GuestBuffers>;

/// Guest memory of a request: places in the span of RAM, which were checked when the request was taken.
struct GuestBuffers {
    memory: DmaSpace,
    buffers: Arc<[Buffer]>,
}

impl GuestBuffers {
    /// Calls `f` with the place in RAM and the place in the transfer of each piece of `at..at + len`.
    fn pieces(
        &self,
        mut at: u64,
        len: usize,
        mut f: impl FnMut(u64, Range<usize>),
    ) -> Result<(), BufferGone> {
        if !self.memory.is_enabled() {
            return Err(BufferGone);
        }
        let mut done = 0;
        for buffer in self.buffers.iter() {
            let bytes = u64::from(buffer.len);
            if at >= bytes {
                at -= bytes;
                continue;
            }
            let piece = (bytes - at).min((len - done) as u64) as usize;
            if piece > 0 {
                f(buffer.offset + at, done..done + piece);
            }
            done += piece;
            at = 0;
        }
        if done == len { Ok(()) } else { Err(BufferGone) }
    }
}

impl IoBuffer for GuestBuffers {
    fn len(&self) -> u64 {
        self.buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
    }
    fn copy_out(&self, at: u64, to: &mut [u8]) -> Result<(), BufferGone> {
        let ram = self.memory.ram();
        self.pieces(at, to.len(), |offset, piece| ram.load_bytes(offset, &mut to[piece]))
    }
    fn copy_in(&mut self, at: u64, from: &[u8]) -> Result<(), BufferGone> {
        let ram = self.memory.ram();
        self.pieces(at, from.len(), |offset, piece| {
            ram.store_bytes(offset, &from[piece.clone()]);
            ram.note_write(offset, piece.len() as u64);
        })
    }
}

/// A disk that is open, with the workers that serve it.
pub struct OpenDisk {
    /// The image that is written now.
    image: Mutex<Arc<dyn Disk>>,
    pool: Pool,
    waker: Arc<Mutex<Option<Waker>>>,
    /// How the image that is written now would be opened again.
    spec: Mutex<DiskSpec>,
}

impl OpenDisk {
    /// Starts workers for `image`, which was opened as `spec` says.
    pub fn new(image: Box<dyn Disk>, spec: DiskSpec) -> io::Result<Arc<Self>> {
        let image: Arc<dyn Disk> = image.into();
        let waker = Arc::new(Mutex::new(None));
        let theirs: Arc<Mutex<Option<Waker>>> = waker.clone();
        let wake = move || {
            let waker = lock(&theirs).clone();
            if let Some(waker) = waker {
                waker.wake();
            }
        };
        let pool = Pool::start(image.clone(), PoolConfig::default(), Box::new(wake))?;
        Ok(Arc::new(Self { image: Mutex::new(image), pool, waker, spec: Mutex::new(spec) }))
    }

    /// The image that is written now.
    pub fn image(&self) -> Arc<dyn Disk> {
        lock(&self.image).clone()
    }

    /// How it would be opened again.
    pub fn spec(&self) -> DiskSpec {
        lock(&self.spec).clone()
    }

    /// Freezes the image and goes on in an overlay. Nothing is in flight.
    pub fn continue_in(&self, overlay: NewFile) -> Result<(), DiskError> {
        let path = overlay.path.clone();
        let overlay: Arc<dyn Disk> = self.image().create_overlay(overlay)?.into();
        self.pool.replace_store(overlay.clone());
        *lock(&self.image) = overlay;
        let mut spec = lock(&self.spec);
        let base = std::mem::replace(&mut spec.path, path);
        spec.format = Some("qcow2".into());
        spec.backing.push(base);
        spec.frozen = false;
        Ok(())
    }

    /// For an image that is to stay as it is: goes on in an overlay beside it before the guest runs; the overlay's path.
    pub fn leave_frozen(&self) -> Result<Option<PathBuf>, DiskError> {
        let spec = self.spec();
        if !spec.frozen || spec.read_only {
            return Ok(None);
        }
        let path = overlay_path(self.image().path());
        let done = self.continue_in(NewFile::create(&path)?);
        if done.is_err() {
            let _ = std::fs::remove_file(&path);
        }
        done.map(|()| Some(path))
    }
}

/// The first free name for an overlay of `image`: `disk.raw` goes on in `disk.raw.1.qcow2`, that in `disk.raw.2.qcow2`.
pub fn overlay_path(image: &Path) -> PathBuf {
    let name = image.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let stem = name.strip_suffix(".qcow2").and_then(|rest| rest.rsplit_once('.'));
    let (stem, first) = match stem {
        Some((stem, number)) if number.parse::<u32>().is_ok() => {
            (stem.to_string(), number.parse().unwrap_or(0))
        }
        _ => (name, 0u32),
    };
    let candidate = |number: u32| image.with_file_name(format!("{stem}.{number}.qcow2"));
    (first.saturating_add(1)..u32::MAX)
        .map(candidate)
        .find(|path| !path.exists())
        .unwrap_or_else(|| candidate(u32::MAX))
}

/// The device's end of an [`OpenDisk`].
pub struct Backend(pub Arc<OpenDisk>);

impl BlockBackend for Backend {
    fn info(&self) -> BlockInfo {
        let (image, spec) = (self.0.image(), self.0.spec());
        BlockInfo {
            bytes: image.size_bytes(),
            // A frozen image gets its overlay before the guest runs.
            read_only: spec.read_only,
            block_bytes: BLOCK_BYTES,
            physical_block_bytes: PHYSICAL_BLOCK_BYTES,
            discard: !spec.ignore_discard,
            write_zeroes: true,
        }
    }

    fn set_waker(&mut self, waker: Waker) {
        *lock(&self.0.waker) = Some(waker);
    }

    fn submit(&mut self, request: BlockRequest, mem: &DmaSpace) -> Result<(), Busy> {
        let op = match request.op {
            BlockOp::Read { offset } => block_pool::BlockOp::Read { offset },
            BlockOp::Write { offset } => block_pool::BlockOp::Write { offset },
            BlockOp::Flush => block_pool::BlockOp::Flush,
            BlockOp::Discard { offset, bytes } => block_pool::BlockOp::Discard { offset, len: bytes },
            BlockOp::WriteZeroes { offset, bytes, unmap } => block_pool::BlockOp::WriteZeroes {
                offset,
                len: bytes,
                may_unmap: unmap && !lock(&self.0.spec).ignore_discard,
            },
        };
        let buffer = GuestBuffers { memory: mem.clone(), buffers: request.buffers };
        self.0.pool.submit(block_pool::BlockRequest { token: request.id, op, buffer }).map_err(|_| Busy)
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let done = self.0.pool.next_completion()?;
        let result = done.result.map_err(|error| match error {
            block_pool::BlockError::Store(error) => match error.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => BlockError::NoSpace,
                io::ErrorKind::Unsupported => BlockError::Unsupported,
                _ => BlockError::Io,
            },
            block_pool::BlockError::Buffer(_) => BlockError::Io,
        });
        Some(Completion { id: done.token, result })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use guest_memory::GuestRam;
    use std::sync::mpsc::channel;
    use virtio_devices::backend::SECTOR_BYTES;

    #[test]
    fn overlays_are_numbered() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        assert_eq!(overlay_path(&path("a.raw")), path("a.raw.1.qcow2"));
        std::fs::write(path("a.raw.1.qcow2"), "").unwrap();
        assert_eq!(overlay_path(&path("a.raw")), path("a.raw.2.qcow2"));
        assert_eq!(overlay_path(&path("a.raw.1.qcow2")), path("a.raw.2.qcow2"));
        assert_eq!(overlay_path(&path("debian.qcow2")), path("debian.qcow2.1.qcow2"));
    }

    #[test]
    fn a_frozen_image_stays_what_overlays_are_based_on() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, vec![7; 8192]).unwrap();
        let spec = DiskSpec::from_option(path.to_str().unwrap()).unwrap();
        let open = |spec: &DiskSpec| {
            let image = disk_formats::open(&spec.to_disk_format().unwrap()).unwrap();
            OpenDisk::new(image, spec.clone()).unwrap()
        };
        // The VM that was saved and went on.
        let first = open(&spec);
        assert_eq!(first.leave_frozen().unwrap(), None);
        first.continue_in(NewFile::create(&overlay_path(&path)).unwrap()).unwrap();
        first.image().write_at(&[1; 512], 0).unwrap();

        // The VM that is restored from the save, beside it.
        let second = open(&DiskSpec { frozen: true, ..spec });
        assert!(!Backend(second.clone()).info().read_only);
        let overlay = second.leave_frozen().unwrap();
        assert_eq!(overlay, Some(folder.path().join("disk.raw.2.qcow2")));
        assert!(!second.spec().frozen);
        second.image().write_at(&[2; 512], 512).unwrap();
        second.image().flush().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 8192]);
        let mut sectors = [0; 1024];
        first.image().read_at(&mut sectors, 0).unwrap();
        assert_eq!((&sectors[..512], &sectors[512..]), (&[1; 512][..], &[7; 512][..]));
        second.image().read_at(&mut sectors, 0).unwrap();
        assert_eq!((&sectors[..512], &sectors[512..]), (&[7; 512][..], &[2; 512][..]));
    }

    #[test]
    fn what_is_written_through_the_backend_is_in_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk.raw");
        std::fs::write(&path, vec![0; 8192]).unwrap();
        let image = disk_formats::open(&disk_formats::DiskSpec::new(&path)).unwrap();
        let disk = OpenDisk::new(image, DiskSpec::from_option(path.to_str().unwrap()).unwrap()).unwrap();
        let mut backend = Backend(disk.clone());
        let (sender, completed) = channel();
        backend.set_waker(Waker::new(move || _ = sender.send(())));
        assert_eq!((backend.info().bytes, backend.info().read_only), (8192, false));

        let dma = DmaSpace::new(GuestRam::for_test(0x4000));
        dma.set_enabled(true);
        dma.write(0x1000, &[7; 512]).unwrap();
        let request = |id, op, len: u32| {
            let half = len / 2;
            let second = Buffer { offset: 0x1000 + u64::from(half), len: half };
            BlockRequest { id, op, buffers: Arc::new([Buffer { offset: 0x1000, len: half }, second]) }
        };
        backend.submit(request(1, BlockOp::Write { offset: SECTOR_BYTES }, 512), &dma).unwrap();
        completed.recv().unwrap();
        assert_eq!(backend.next_completion(), Some(Completion { id: 1, result: Ok(()) }));
        assert_eq!(std::fs::read(&path).unwrap()[512..1024], [7; 512]);
        backend.submit(request(2, BlockOp::Read { offset: 8192 }, 512), &dma).unwrap();
        completed.recv().unwrap();
        assert_eq!(backend.next_completion(), Some(Completion { id: 2, result: Err(BlockError::Io) }));
        assert_eq!(backend.next_completion(), None);
    }
}
