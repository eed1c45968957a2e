//! Overlays: freezes a disk of any format and goes on in a new qcow2 image that is based on it.
//!
//! Called by: every format's `Disk::create_overlay`, for `save --continue` and for images that are to stay as they are.
//!
//! Order, so that a crash at any point leaves a base that is complete: flush the base ► write the overlay and make it
//! durable ► freeze the base and let readers in ► open the overlay. Nothing is opened by name: what is below the overlay
//! is open already, and stays locked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use host_io::file_lock::ImageLock;

use crate::qcow2::{self, Qcow2Disk};
use crate::{Disk, DiskError, DiskSpec, Format};

/// A file that was just made, for an overlay. It never replaces another.
#[derive(Debug)]
pub struct NewFile {
    /// It, empty, for reading and writing.
    pub file: File,
    /// Its path.
    pub path: PathBuf,
}

impl NewFile {
    /// Makes it, durably; only its owner may read it.
    pub fn create(path: &Path) -> Result<NewFile, DiskError> {
        let what = "create the overlay (it must not exist yet)";
        let fail = |source| DiskError::Io { path: path.into(), what, source };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(fail)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)?;
        Ok(NewFile { file, path: path.into() })
    }
}

/// An open image that others are based on.
#[derive(Clone, Debug)]
pub(crate) struct Layer {
    /// Its real path.
    pub(crate) path: PathBuf,
    pub(crate) format: Format,
    pub(crate) file: Arc<File>,
    pub(crate) lock: Arc<ImageLock>,
}

/// The disk that is frozen.
pub(crate) struct Base<'a> {
    pub(crate) disk: &'a dyn Disk,
    pub(crate) spec: &'a DiskSpec,
    pub(crate) own: &'a Layer,
    /// What it is based on itself, nearest first.
    pub(crate) below: &'a [Layer],
    pub(crate) frozen: &'a AtomicBool,
}

pub(crate) fn create(base: &Base<'_>, NewFile { file, path }: NewFile) -> Result<Box<dyn Disk>, DiskError> {
    // Nobody writes to it here, and its lock lets readers in already.
    let still = base.disk.read_only();
    let fail_base = |what| move |source| DiskError::Io { path: base.spec.path.clone(), what, source };
    let fail = |what| {
        let path = path.clone();
        move |source| DiskError::Io { path, what, source }
    };
    base.disk.flush().map_err(fail_base("flush it"))?;
    let new = file.metadata().is_ok_and(|found| found.is_file() && found.len() == 0);
    if !new {
        return Err(fail("use it as an overlay")(io::Error::other("it is no new, empty file")));
    }
    qcow2::format_overlay(&file, base.disk.size_bytes(), &base.own.path, base.own.format)
        .map_err(fail("write the overlay"))?;
    if !still {
        base.frozen.store(true, Ordering::Release);
    }
    let layers: Vec<Layer> = std::iter::once(base.own).chain(base.below).cloned().collect();
    let readers = || if still { Ok(()) } else { base.own.lock.downgrade_to_read() };
    let opened = readers()
        .map_err(fail_base("lock it for reading"))
        .and_then(|()| Qcow2Disk::over(&overlay_spec(base, &path), file, layers));
    if opened.is_err() && !still {
        let _ = base.own.lock.upgrade_to_write();
        base.frozen.store(false, Ordering::Release);
    }
    Ok(Box::new(opened?))
}

/// The overlay may use the base and whatever the base may use.
fn overlay_spec(base: &Base<'_>, path: &Path) -> DiskSpec {
    let mut backing_allow = base.spec.backing_allow.clone();
    backing_allow.push(base.own.path.clone());
    DiskSpec {
        path: path.into(),
        format: Some(Format::Qcow2),
        read_only: false,
        discard: base.spec.discard,
        backing_allow,
    }
}
