//! Overlays: freezes a disk of any format and goes on in a new qcow2 image that is based on it.
//!
//! Called by: every format's `Disk::create_overlay`, for `save --continue` and for images that are to stay as they are.
//!
//! Order, so that a crash at any point leaves a base that is complete: flush the base ► write the overlay and make it
//! durable ► freeze the base and let readers in ► open the overlay. The overlay never replaces an existing file.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use host_io::file_lock::ImageLock;

use crate::{Disk, DiskError, DiskSpec, Format, qcow2};

/// The disk that is frozen.
pub(crate) struct Base<'a> {
    pub(crate) disk: &'a dyn Disk,
    pub(crate) spec: &'a DiskSpec,
    pub(crate) lock: &'a ImageLock,
    pub(crate) frozen: &'a AtomicBool,
}

pub(crate) fn create(base: &Base<'_>, path: &Path) -> Result<Box<dyn Disk>, DiskError> {
    // Nobody writes to it here, and its lock lets readers in already.
    let still = base.disk.read_only();
    let fail_base = |what| move |source| DiskError::Io { path: base.spec.path.clone(), what, source };
    let fail = |what| move |source| DiskError::Io { path: path.into(), what, source };
    base.disk.flush().map_err(fail_base("flush it"))?;
    let real = base.spec.path.canonicalize().map_err(fail_base("find its real path"))?;

    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).create_new(true).mode(0o600).open(path);
    let file = file.map_err(fail("create the overlay (it must not exist yet)"))?;
    let made = qcow2::format_overlay(&file, base.disk.size_bytes(), &real, base.disk.format())
        .and_then(|()| sync_folder(path))
        .map_err(fail("write the overlay"));
    drop(file);
    let opened = made.and_then(|()| {
        if !still {
            base.frozen.store(true, Ordering::Release);
            base.lock.downgrade_to_read().map_err(fail_base("lock it for reading"))?;
        }
        crate::open(&overlay_spec(base.spec, path, real))
    });
    if opened.is_err() {
        if !still {
            let _ = base.lock.upgrade_to_write();
            base.frozen.store(false, Ordering::Release);
        }
        let _ = std::fs::remove_file(path);
    }
    opened
}

/// The overlay may use the base and whatever the base may use.
fn overlay_spec(base: &DiskSpec, path: &Path, real: PathBuf) -> DiskSpec {
    let mut backing_allow = base.backing_allow.clone();
    backing_allow.push(real);
    DiskSpec {
        path: path.into(),
        format: Some(Format::Qcow2),
        read_only: false,
        discard: base.discard,
        backing_allow,
    }
}

/// Makes the new name durable.
fn sync_folder(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}
