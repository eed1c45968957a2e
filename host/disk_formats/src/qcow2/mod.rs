//! qcow2 images: checked by us, read and written by imago, with backing files only from the allow-list.
//!
//! Called by: `open`, and every format's `create_overlay`.
//!
//! Invariants:
//! - imago opens no file by itself: it gets an open file for the image and each layer of its chain.
//! - A chain is at most `MAX_CHAIN` images; a backing file is never written, and locked for reading.
//! - A panic inside imago (a malformed image beyond what the header shows) becomes an I/O error, and the image is closed
//!   to further use.

mod header;

use std::fs::File;
use std::io;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use host_io::block_store::check_range;
use host_io::file_lock::{ImageLock, LockMode};
use imago::file::File as ImagoFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use self::header::Header;
use crate::overlay::{self, Base, Layer, NewFile};
use crate::raw::{layer, open_locked};
use crate::{BlockStore, Disk, DiskError, DiskIdentity, DiskSpec, Format, identity};

/// Images in a chain, the top one included.
const MAX_CHAIN: usize = 16;

type Image = FormatAccess<ImagoFile>;

/// An open qcow2 image with its chain.
pub(crate) struct Qcow2Disk {
    spec: DiskSpec,
    own: Layer,
    /// Reads and writes share; what takes mappings away (discard) is alone. `None` only while it is dropped.
    image: RwLock<Option<Image>>,
    size_bytes: u64,
    /// The backing files, nearest first.
    below: Vec<Layer>,
    opened_as: DiskIdentity,
    /// Set when an overlay took over: no more changes.
    frozen: AtomicBool,
    /// Set when imago panicked.
    broken: AtomicBool,
}

impl std::fmt::Debug for Qcow2Disk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2Disk").field("spec", &self.spec).field("size_bytes", &self.size_bytes).finish()
    }
}

impl Qcow2Disk {
    pub(crate) fn open(spec: &DiskSpec) -> Result<Qcow2Disk, DiskError> {
        let (file, file_bytes, lock) = open_locked(&spec.path, spec.read_only)?;
        let header = Header::read(&file, file_bytes, &spec.path, spec.read_only)?;
        let below = layers_below(spec, &header)?;
        Self::with(spec, &header, layer(&spec.path, Format::Qcow2, file, lock)?, below)
    }

    /// Opens a new overlay of `below`, which is open, and which its header names.
    pub(crate) fn over(spec: &DiskSpec, file: File, below: Vec<Layer>) -> Result<Qcow2Disk, DiskError> {
        let fail = |what| move |source| DiskError::Io { path: spec.path.clone(), what, source };
        check_chain(&spec.path, below.len())?;
        let bytes = file.metadata().map_err(fail("find its size"))?.len();
        let header = Header::read(&file, bytes, &spec.path, false)?;
        let lock = ImageLock::acquire(&file, LockMode::Write).map_err(fail("lock it"))?;
        let (file, lock) = (Arc::new(file), Arc::new(lock));
        let own = Layer { path: spec.path.clone(), format: Format::Qcow2, file, lock };
        Self::with(spec, &header, own, below)
    }

    fn with(spec: &DiskSpec, header: &Header, own: Layer, below: Vec<Layer>) -> Result<Qcow2Disk, DiskError> {
        let opened_as = identify(&spec.path, &own.file, header.size_bytes, &below)?;
        let image = open_image(&spec.path, &own.file, !spec.read_only, open_layers(&below)?)?;
        Ok(Qcow2Disk {
            spec: spec.clone(),
            own,
            size_bytes: header.size_bytes,
            image: RwLock::new(Some(image)),
            below,
            opened_as,
            frozen: AtomicBool::new(false),
            broken: AtomicBool::new(false),
        })
    }

    /// Runs imago's code; a panic closes the image.
    fn guarded<R>(&self, f: impl FnOnce() -> io::Result<R>) -> io::Result<R> {
        if self.broken.load(Ordering::Acquire) {
            return Err(closed());
        }
        std::panic::catch_unwind(AssertUnwindSafe(f)).unwrap_or_else(|_| {
            self.broken.store(true, Ordering::Release);
            Err(io::Error::other("the image is malformed"))
        })
    }

    fn shared<R>(&self, f: impl FnOnce(&Image) -> io::Result<R>) -> io::Result<R> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        self.guarded(|| f(image.as_ref().ok_or_else(closed)?))
    }

    fn alone<R>(&self, f: impl FnOnce(&mut Image) -> io::Result<R>) -> io::Result<R> {
        let mut image = self.image.write().unwrap_or_else(PoisonError::into_inner);
        self.guarded(|| f(image.as_mut().ok_or_else(closed)?))
    }

    /// Zeroes the slow way, for version 2, which knows no zero clusters.
    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        let zeroes = vec![0u8; len.min(256 << 10) as usize];
        while len > 0 {
            let piece = len.min(zeroes.len() as u64);
            self.shared(|image| image.write(&zeroes[..piece as usize], offset))?;
            offset += piece;
            len -= piece;
        }
        Ok(())
    }

    fn check_change(&self, offset: u64, len: u64) -> io::Result<()> {
        if self.read_only() {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        check_range(offset, len, self.size_bytes)
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        // imago writes back its caches when it is dropped; a malformed image must not end us here either.
        let image = self.image.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let _ = std::panic::catch_unwind(AssertUnwindSafe(|| drop(image)));
    }
}

fn closed() -> io::Error {
    io::Error::other("the image is malformed and was closed")
}

impl BlockStore for Qcow2Disk {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn read_only(&self) -> bool {
        self.spec.read_only || self.frozen.load(Ordering::Acquire)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        check_range(offset, buf.len() as u64, self.size_bytes)?;
        self.shared(|image| image.read(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check_change(offset, buf.len() as u64)?;
        self.shared(|image| image.write(buf, offset))
    }

    fn flush(&self) -> io::Result<()> {
        if self.read_only() {
            return Ok(());
        }
        self.shared(|image| {
            image.flush()?;
            image.sync()
        })
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_change(offset, len)?;
        if !self.spec.discard || len == 0 {
            return Ok(());
        }
        match self.alone(|image| image.discard_to_zero(offset, len)) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()), // Version 2; a discard is a hint.
            result => result,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.check_change(offset, len)?;
        let zeroed = match len {
            0 => Ok(()),
            _ if may_unmap && self.spec.discard => self.alone(|image| image.discard_to_zero(offset, len)),
            _ => self.shared(|image| image.write_zeroes(offset, len)),
        };
        match zeroed {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_zero_bytes(offset, len),
            result => result,
        }
    }
}

impl Disk for Qcow2Disk {
    fn format(&self) -> Format {
        Format::Qcow2
    }

    fn path(&self) -> &Path {
        &self.spec.path
    }

    fn opened_as(&self) -> DiskIdentity {
        self.opened_as
    }

    fn identity(&self) -> Result<DiskIdentity, DiskError> {
        identify(&self.spec.path, &self.own.file, self.size_bytes, &self.below)
    }

    fn create_overlay(&self, overlay: NewFile) -> Result<Box<dyn Disk>, DiskError> {
        let Self { spec, own, below, frozen, .. } = self;
        overlay::create(&Base { disk: self, spec, own, below, frozen }, overlay)
    }
}

/// Makes an empty qcow2 image in `file` that is based on `backing`.
pub(crate) fn format_overlay(file: &File, size_bytes: u64, backing: &Path, format: Format) -> io::Result<()> {
    let name = backing.to_str().ok_or_else(|| io::Error::other("the backing file's path is not UTF-8"))?;
    if name.len() > 1023 {
        return Err(io::Error::other("the backing file's path is too long for a qcow2 header"));
    }
    let format = match format {
        Format::Raw => "raw",
        Format::Qcow2 => "qcow2",
    };
    let storage = ImagoFile::try_from(file.try_clone()?)?;
    let builder = Qcow2::<ImagoFile>::create_builder(storage).size(size_bytes);
    builder.backing(name.into(), format.into()).create()?;
    file.sync_all()
}

fn identify(path: &Path, file: &File, size_bytes: u64, below: &[Layer]) -> Result<DiskIdentity, DiskError> {
    let fail = |source| DiskError::Io { path: path.into(), what: "find its identity", source };
    let mut generations = Vec::new();
    for layer in below {
        generations.push(identity::identify(&layer.file, 0, &[]).map_err(fail)?.generation);
    }
    identity::identify(file, size_bytes, &generations).map_err(fail)
}

/// The files that may be opened because an image names them, by their real paths.
struct Allowed {
    paths: Vec<PathBuf>,
}

impl Allowed {
    fn resolve(listed: &[PathBuf]) -> Allowed {
        Allowed { paths: listed.iter().filter_map(|path| path.canonicalize().ok()).collect() }
    }

    /// The real path of the file that `image` calls `name`, if it is allowed.
    fn find(&self, image: &Path, name: &str) -> Result<PathBuf, DiskError> {
        let is_protocol = name.split_once(':').is_some_and(|(scheme, _)| !scheme.contains('/'));
        if is_protocol {
            return Err(DiskError::Unsupported {
                path: image.into(),
                what: format!("the backing file `{}`, which is no plain path,", name.escape_debug()),
                way_out: "change it with `qemu-img rebase -u -b PATH -F raw`".into(),
            });
        }
        let folder = image.parent().unwrap_or(Path::new(""));
        let named = folder.join(name);
        match named.canonicalize() {
            Ok(real) if self.paths.contains(&real) => Ok(real),
            _ => Err(DiskError::BackingNotAllowed { path: image.into(), backing: named }),
        }
    }
}

/// Opens the files that `header`, of the image of `spec`, is based on, nearest first.
fn layers_below(spec: &DiskSpec, header: &Header) -> Result<Vec<Layer>, DiskError> {
    let allowed = Allowed::resolve(&spec.backing_allow);
    let mut layers = Vec::new();
    let (mut image, mut named) = (spec.path.clone(), named_by(header));
    while let Some((name, format)) = named.take() {
        check_chain(&image, layers.len() + 1)?;
        let path = allowed.find(&image, &name)?;
        let format = DiskSpec { format, ..DiskSpec::new(&path) }.resolved_format();
        let (file, file_bytes, lock) = open_locked(&path, true)?;
        if format == Format::Qcow2 {
            named = named_by(&Header::read(&file, file_bytes, &path, true)?);
        }
        layers.push(layer(&path, format, file, lock)?);
        image = path;
    }
    Ok(layers)
}

fn named_by(header: &Header) -> Option<(String, Option<Format>)> {
    Some((header.backing_name.clone()?, header.backing_format))
}

/// Whether `image` may be based on as many.
fn check_chain(image: &Path, below: usize) -> Result<(), DiskError> {
    if below < MAX_CHAIN {
        return Ok(());
    }
    let problem = format!("more than {MAX_CHAIN} images; shorten it with `qemu-img commit` or `convert`");
    Err(DiskError::Malformed { path: image.into(), field: "backing chain", problem })
}

/// Has imago open what is below an image, from the bottom.
fn open_layers(layers: &[Layer]) -> Result<Option<Arc<Image>>, DiskError> {
    let mut below = None;
    for layer in layers.iter().rev() {
        below = Some(Arc::new(match layer.format {
            Format::Raw => open_raw(&layer.path, &layer.file)?,
            Format::Qcow2 => open_image(&layer.path, &layer.file, false, below)?,
        }));
    }
    Ok(below)
}

/// Has imago open a checked image.
fn open_image(
    path: &Path,
    file: &File,
    write: bool,
    backing: Option<Arc<Image>>,
) -> Result<Image, DiskError> {
    imago_open(path, || {
        let storage = ImagoFile::try_from(file.try_clone()?)?;
        let builder =
            Qcow2::<ImagoFile, Arc<Image>>::builder(storage).write(write).backing(backing).data_file(None);
        Ok(FormatAccess::new(builder.open(DenyImplicitOpenGate::default())?))
    })
}

fn open_raw(path: &Path, file: &File) -> Result<Image, DiskError> {
    imago_open(path, || {
        let storage = ImagoFile::try_from(file.try_clone()?)?;
        Ok(FormatAccess::new(Raw::builder(storage).write(false).open(DenyImplicitOpenGate::default())?))
    })
}

fn imago_open(path: &Path, open: impl FnOnce() -> io::Result<Image>) -> Result<Image, DiskError> {
    let malformed = |problem: String| DiskError::Malformed { path: path.into(), field: "tables", problem };
    match std::panic::catch_unwind(AssertUnwindSafe(open)) {
        Ok(Ok(image)) => Ok(image),
        Ok(Err(error)) => Err(malformed(error.to_string())),
        Err(_) => Err(malformed("contradict each other".into())),
    }
}
