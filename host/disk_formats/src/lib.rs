//! disk_formats: opens disk images for a VM and says which disk they are.
//!
//! Called by: `vmm` (disks of a VM, overlays for `save --continue`, the identity check of `restore`).
//!
//! Invariants:
//! - An image is never probed: qcow2 only by `format=` or by its file name, everything else is raw. A guest that writes
//!   a qcow2 header into its raw disk changes nothing.
//! - Files that an image names (backing files) are opened only when the allow-list has them.
//! - An image file is hostile input: its header is validated before anything is allocated for it.
//! - A writable image is locked against every other user (see `host_io::file_lock`).
#![forbid(unsafe_code)]

mod error;
mod identity;
mod overlay;
mod qcow2;
mod raw;
mod spec;

use std::path::Path;

pub use error::DiskError;
pub use host_io::block_store::BlockStore;
pub use identity::DiskIdentity;
pub use overlay::NewFile;
pub use spec::{DiskSpec, Format};

/// An open disk image. Content is reached through `BlockStore`.
pub trait Disk: BlockStore + std::fmt::Debug {
    /// The image's format.
    fn format(&self) -> Format;

    /// The path it was opened by.
    fn path(&self) -> &Path;

    /// Which disk this was when it was opened, before anything was done to it: what `restore` compares with what `save`
    /// noted. Equal identities mean equal content.
    fn opened_as(&self) -> DiskIdentity;

    /// Which disk this is now: what `save` notes, after a `flush` and with nothing in flight.
    fn identity(&self) -> Result<DiskIdentity, DiskError>;

    /// Freezes this disk and goes on in a new qcow2 image in `overlay` that is based on it: everything so far is
    /// flushed and stays as it is (further writes here are refused), the returned disk holds what changes from now on.
    /// When it fails, this disk is as writable as before; the file is its maker's. A disk that was opened to be read
    /// only needs no freezing. Nothing is opened by name.
    fn create_overlay(&self, overlay: NewFile) -> Result<Box<dyn Disk>, DiskError>;
}

/// Opens the image that `spec` names.
pub fn open(spec: &DiskSpec) -> Result<Box<dyn Disk>, DiskError> {
    match spec.resolved_format() {
        Format::Raw => Ok(Box::new(raw::RawDisk::open(spec)?)),
        Format::Qcow2 => Ok(Box::new(qcow2::Qcow2Disk::open(spec)?)),
    }
}
