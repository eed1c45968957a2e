//! What can go wrong with a disk image, each with the file, the field and the way out.

use std::io;
use std::path::PathBuf;

/// Why a disk could not be opened, identified or overlaid.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The text of `--disk` is wrong.
    #[error("disk `{text}`: {field}: {problem}")]
    Spec {
        /// What was written.
        text: String,
        /// The part that is wrong.
        field: String,
        /// What is wrong with it, and what is expected.
        problem: String,
    },
    /// A system call failed.
    #[error("disk {}: cannot {what}: {source}", path.display())]
    Io {
        /// The image.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// The system's answer.
        source: io::Error,
    },
    /// Somebody else has the image.
    #[error("disk {}: in use by another VM or tool; stop it{}", path.display(), if *.read_only { "" } else { ", or open the disk with `,ro` if the other only reads" })]
    InUse {
        /// The image.
        path: PathBuf,
        /// Whether we only wanted to read.
        read_only: bool,
    },
    /// Neither a file nor a block device.
    #[error("disk {}: is neither a regular file nor a block device", path.display())]
    NotADisk {
        /// The image.
        path: PathBuf,
    },
    /// A writable raw disk must be whole sectors.
    #[error("disk {}: its size of {bytes} bytes is not a multiple of 512; pad it with `truncate -s %512`, or open it with `,ro`", path.display())]
    OddSize {
        /// The image.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// The content of an image is not what its format says.
    #[error("disk {}: {field}: {problem}", path.display())]
    Malformed {
        /// The image.
        path: PathBuf,
        /// The header field or table.
        field: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The image asks for something this program does not do.
    #[error("disk {}: {what} is not supported; {way_out}", path.display())]
    Unsupported {
        /// The image.
        path: PathBuf,
        /// The feature.
        what: String,
        /// What to do instead.
        way_out: String,
    },
    /// The image names a backing file that nobody allowed.
    #[error(
        "disk {}: its backing file {} is not allowed; add `,backing={}` if you trust the image", path.display(), backing.display(), backing.display()
    )]
    BackingNotAllowed {
        /// The image.
        path: PathBuf,
        /// The file it wants.
        backing: PathBuf,
    },
}
