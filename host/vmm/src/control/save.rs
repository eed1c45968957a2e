//! Saving a VM, from outside: makes the files, has the VM write them, and puts the saved file in its place.
//!
//! Called by: the `bedplate` command (`ctl save`). The VM itself is in its jail and can open nothing.
//!
//! Invariants:
//! - The file is written under a temporary name in the same folder, made durable, and renamed: a crash leaves the
//!   old file or none. Only its owner may read it: it holds the guest's memory.
//! - Nothing but an earlier save is ever replaced.
//! - A VM that is to end with its save ends only after the file has its name. A save that fails leaves nothing behind.

use super::client::{ClientError, converse, open};
use super::lines::{Lines, send};
use super::{Answer, Ask, Overlay};
use crate::disk::overlay_path;
use disk_formats::{DiskError, NewFile};
use machine::saved_vm::MAGIC;
use rustix::rand::GetRandomFlags;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Why there is no place for a save.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// The file cannot be made, or not given its name.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// What is there must stay.
    #[error("{}: {problem}; choose another name", path.display())]
    Occupied {
        /// The file.
        path: PathBuf,
        /// What it is.
        problem: &'static str,
    },
    /// A file for an overlay cannot be made.
    #[error(transparent)]
    Overlay(#[from] DiskError),
}

/// How a VM is saved.
#[derive(Clone, Copy, Debug)]
pub struct SaveAsked<'a> {
    /// To this file.
    pub file: &'a Path,
    /// Go on afterwards, with every writable disk in an overlay.
    pub and_continue: bool,
    /// Compress RAM.
    pub compress: bool,
}

/// Saves the VM called `name`.
pub fn save(name: &str, asked: SaveAsked<'_>) -> Result<Answer, ClientError> {
    let stream = open(name)?;
    let broken = |source| ClientError::Broken { name: name.into(), source };
    let refused = |answer: Answer| match answer.ok {
        true => Ok(answer),
        false => Err(ClientError::refused(name, answer)),
    };
    let files = refused(converse(&stream, &Ask::Files).map_err(broken)?)?.files.unwrap_or_default();
    check_target(asked.file, files.used)?;
    let written = if asked.and_continue { files.written } else { Vec::new() };
    let mut made = Made::new(asked.file, written)?;
    let answer = made.hand_over(&stream, asked);
    if !answer.as_ref().is_ok_and(|answer| answer.written) {
        made.keep_overlays_in_use(&stream);
        return refused(answer.map_err(broken)?);
    }
    // From here on the VM's disks are in them.
    made.overlays.clear();
    made.put_in_place(asked.file)?;
    refused(converse(&stream, &Ask::Placed).map_err(broken)?)
}

/// The files of a save that is not done. Dropped, it removes them.
struct Made {
    temporary: Option<PathBuf>,
    file: File,
    overlays: Vec<(PathBuf, NewFile)>,
}

impl Made {
    fn new(target: &Path, images: Vec<PathBuf>) -> Result<Self, PlaceError> {
        let fail = |source| PlaceError::Io { path: target.into(), source };
        let (temporary, file) = create_temporary(target).map_err(fail)?;
        let mut made = Self { temporary: Some(temporary), file, overlays: Vec::new() };
        for image in images {
            let overlay = NewFile::create(&overlay_path(&image))?;
            made.overlays.push((image, overlay));
        }
        Ok(made)
    }

    fn hand_over(&self, stream: &UnixStream, asked: SaveAsked<'_>) -> io::Result<Answer> {
        let overlay = |(of, new): &(PathBuf, NewFile)| Overlay { of: of.clone(), path: new.path.clone() };
        let ask = Ask::Save {
            file: asked.file.into(),
            and_continue: asked.and_continue,
            compress: asked.compress,
            overlays: self.overlays.iter().map(overlay).collect(),
        };
        let overlays = self.overlays.iter().map(|(_, new)| new.file.as_fd());
        let files: Vec<BorrowedFd<'_>> = std::iter::once(self.file.as_fd()).chain(overlays).collect();
        let mut line = serde_json::to_vec(&ask)?;
        line.push(b'\n');
        send(stream, &line, &files)?;
        super::client::answer(&mut Lines::new(stream))
    }

    /// A save that failed late may have moved disks to their overlays.
    fn keep_overlays_in_use(&mut self, stream: &UnixStream) {
        let files = converse(stream, &Ask::Files).ok().and_then(|answer| answer.files);
        self.overlays.retain(|(_, new)| match &files {
            Some(files) => !files.used.contains(&new.path),
            // Nobody can say: nothing was ever in an empty one.
            None => new.file.metadata().is_ok_and(|found| found.len() == 0),
        });
    }

    fn put_in_place(&mut self, target: &Path) -> Result<(), PlaceError> {
        let fail = |source| PlaceError::Io { path: target.into(), source };
        if let Some(temporary) = &self.temporary {
            std::fs::rename(temporary, target).map_err(fail)?;
        }
        self.temporary = None;
        let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(fail)
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let overlays = self.overlays.iter().map(|(_, new)| &new.path);
        for path in self.temporary.iter().chain(overlays) {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A new file beside `target`, of a name that nobody can know before.
fn create_temporary(target: &Path) -> io::Result<(PathBuf, File)> {
    let mut random = [0; 8];
    rustix::rand::getrandom(&mut random, GetRandomFlags::empty())?;
    let mut name = target.file_name().unwrap_or_default().to_os_string();
    name.push(format!(".{:016x}.tmp", u64::from_ne_bytes(random)));
    let path = target.with_file_name(name);
    let file = File::options().write(true).create_new(true).mode(0o600).open(&path)?;
    Ok((path, file))
}

/// Whether `target` may be written: it is new or an earlier save, and none of the VM's own `files`.
fn check_target(target: &Path, files: Vec<PathBuf>) -> Result<(), PlaceError> {
    let fail = |source| PlaceError::Io { path: target.into(), source };
    let occupied = |problem| Err(PlaceError::Occupied { path: target.into(), problem });
    let there = match std::fs::metadata(target) {
        Ok(there) => there,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(fail(error)),
    };
    if there.is_dir() {
        return occupied("it is a folder");
    }
    if !there.is_file() {
        return occupied("it is no regular file");
    }
    let is_target = |file: &PathBuf| {
        std::fs::metadata(file).is_ok_and(|file| (file.dev(), file.ino()) == (there.dev(), there.ino()))
    };
    if files.iter().any(is_target) {
        return occupied("the VM itself uses this file");
    }
    let mut magic = [0; MAGIC.len()];
    match File::open(target).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == MAGIC => Ok(()),
        Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => Err(fail(error)),
        _ => occupied("there is another file, which is no saved VM"),
    }
}
