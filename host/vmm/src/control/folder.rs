//! The folder of control sockets: `$XDG_RUNTIME_DIR/bedplate`, or `/tmp/bedplate-UID` where there is no runtime folder.
//!
//! Called by: [`super::server`], [`super::client`].
//!
//! Invariant: the folder is ours (owner, mode 0700, no symbolic link), or it is not used.

use crate::wire::check_name;
use std::fs::{DirBuilder, symlink_metadata};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

const SUFFIX: &str = ".sock";

/// Why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// It cannot be made or looked at.
    #[error("control folder {}: {source}", path.display())]
    Io {
        /// The folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// It belongs to somebody else, or others may write to it.
    #[error("control folder {}: {problem}; remove it, or set XDG_RUNTIME_DIR to a folder of your own", path.display())]
    NotOurs {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        problem: &'static str,
    },
    /// No name for a VM.
    #[error(transparent)]
    Name(#[from] crate::wire::SpecError),
}

/// Where it is.
pub fn path() -> PathBuf {
    let uid = rustix::process::getuid().as_raw();
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => Path::new(&dir).join("bedplate"),
        None => PathBuf::from(format!("/tmp/bedplate-{uid}")),
    }
}

/// Makes it if need be, and checks that it is ours.
pub fn open() -> Result<PathBuf, FolderError> {
    open_at(path())
}

fn open_at(path: PathBuf) -> Result<PathBuf, FolderError> {
    let fail = |source| FolderError::Io { path: path.clone(), source };
    match DirBuilder::new().mode(0o700).create(&path) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(fail(error)),
    }
    let found = symlink_metadata(&path).map_err(fail)?;
    let problem = if !found.is_dir() {
        Some("it is not a folder")
    } else if found.uid() != rustix::process::getuid().as_raw() {
        Some("it belongs to somebody else")
    } else if found.permissions().mode() & 0o077 != 0 {
        Some("others may use it")
    } else {
        None
    };
    match problem {
        Some(problem) => Err(FolderError::NotOurs { path, problem }),
        None => Ok(path),
    }
}

/// The socket of the VM called `name`.
pub fn socket(name: &str) -> Result<PathBuf, FolderError> {
    check_name(name)?;
    Ok(open()?.join(format!("{name}{SUFFIX}")))
}

/// Names of all sockets there, in order; some may be of VMs that are gone.
pub fn names() -> Result<Vec<String>, FolderError> {
    let path = open()?;
    let entries =
        std::fs::read_dir(&path).map_err(|source| FolderError::Io { path: path.clone(), source })?;
    let name = |entry: io::Result<std::fs::DirEntry>| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        name.strip_suffix(SUFFIX).map(str::to_string).filter(|name| check_name(name).is_ok())
    };
    let mut names: Vec<String> = entries.filter_map(name).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_that_others_may_use_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let ours = open_at(root.path().join("ours")).unwrap();
        assert_eq!(std::fs::metadata(&ours).unwrap().permissions().mode() & 0o777, 0o700);
        open_at(ours.clone()).unwrap();
        std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(matches!(open_at(ours.clone()), Err(FolderError::NotOurs { .. })));
        let link = root.path().join("link");
        std::fs::set_permissions(&ours, std::fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&ours, &link).unwrap();
        assert!(matches!(open_at(link), Err(FolderError::NotOurs { .. })));
        assert!(matches!(open_at(root.path().join("no/such")), Err(FolderError::Io { .. })));
    }
}
