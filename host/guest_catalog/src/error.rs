//! The one error of this crate: each variant names the thing that failed and the way out.
//! Made by every module here; shown to the user by the command line as it is.

use std::io;
use std::path::{Path, PathBuf};

/// Why a guest could not be listed, fetched or prepared.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// No entry of the catalogue has this name.
    #[error("no guest is called {name:?}; known guests: {known}")]
    UnknownGuest {
        /// What was asked for.
        name: String,
        /// All names, comma-separated.
        known: String,
    },
    /// A host program is not installed.
    #[error(
        "{program} is needed to {purpose} and is not installed; install it with: apt-get install {package}"
    )]
    ToolMissing {
        /// The program's name.
        program: &'static str,
        /// What it would have done.
        purpose: &'static str,
        /// The Debian package that holds it.
        package: &'static str,
    },
    /// A host program ended with an error.
    #[error("{command} failed with {status}; its last words:\n{output}\n{hint}")]
    ToolFailed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: String,
        /// The end of its output.
        output: String,
        /// What to try next.
        hint: String,
    },
    /// A package is not known to the package sources of this host.
    #[error(
        "package {package} is in none of this host's package sources; Bedplate's guests come from Debian 12 \
         (bookworm) sources: add them under /etc/apt/sources.list.d, then run the same command again"
    )]
    PackageMissing {
        /// The package.
        package: String,
    },
    /// A package did not hold what its guest needs.
    #[error("package {package} does not hold {wanted}; a newer recipe is needed, please report this")]
    PackageShape {
        /// The package.
        package: String,
        /// The file that was looked for.
        wanted: String,
    },
    /// A kernel image or module is malformed.
    #[error("{}: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A file of the cache is not what was put there.
    #[error("{} changed since it was prepared ({reason}); prepare it again with: bedplate guest fetch {guest} --again", path.display())]
    Spoiled {
        /// The guest it belongs to.
        guest: String,
        /// The file.
        path: PathBuf,
        /// How it differs.
        reason: String,
    },
    /// There is no folder to keep guests in.
    #[error("no cache folder: set XDG_CACHE_HOME or HOME to a folder that you may write to")]
    NoCacheFolder,
    /// An operation on a file failed.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        doing: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Adds the file and the verb to an I/O error.
pub(crate) trait IoContext<T> {
    /// `doing` completes the sentence "cannot … PATH".
    fn context(self, doing: &'static str, path: &Path) -> Result<T, CatalogError>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, doing: &'static str, path: &Path) -> Result<T, CatalogError> {
        self.map_err(|source| CatalogError::Io { doing, path: path.to_path_buf(), source })
    }
}
