//! Asks a VM something.
//!
//! Called by: the `bedplate` command (`ps`, `ctl`).

use super::folder::{self, FolderError};
use super::lines::{Lines, send};
use super::save::PlaceError;
use super::{Answer, Ask, Status};
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The folder of sockets.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// No such VM.
    #[error("no VM called `{name}` is running (looked for {}); bedplate ps lists those that are", path.display())]
    NotRunning {
        /// As asked.
        name: String,
        /// Its socket.
        path: PathBuf,
    },
    /// There is no place for a save.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The connection broke.
    #[error("VM `{name}` does not answer: {source}")]
    Broken {
        /// The VM.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// It said no.
    #[error("VM `{name}`: {reason}")]
    Refused {
        /// The VM.
        name: String,
        /// Its words.
        reason: String,
    },
}

impl ClientError {
    pub(super) fn refused(name: &str, answer: Answer) -> Self {
        let reason = answer.error.unwrap_or_else(|| "it did not say why".into());
        Self::Refused { name: name.into(), reason }
    }
}

/// Asks the VM called `name`, and waits for it to be done.
pub fn ask(name: &str, what: &Ask) -> Result<Answer, ClientError> {
    let stream = open(name)?;
    let answer =
        converse(&stream, what).map_err(|source| ClientError::Broken { name: name.into(), source })?;
    if answer.ok { Ok(answer) } else { Err(ClientError::refused(name, answer)) }
}

/// A connection to the VM called `name`.
pub(super) fn open(name: &str) -> Result<UnixStream, ClientError> {
    let path = folder::socket(name)?;
    UnixStream::connect(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            ClientError::NotRunning { name: name.into(), path }
        }
        _ => ClientError::Broken { name: name.into(), source },
    })
}

pub(super) fn converse(stream: &UnixStream, what: &Ask) -> io::Result<Answer> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    send(stream, &line, &[])?;
    answer(&mut Lines::new(stream))
}

/// The answer to what was asked.
pub(super) fn answer(lines: &mut Lines<'_>) -> io::Result<Answer> {
    let gone = || io::Error::new(io::ErrorKind::UnexpectedEof, "it ended before it answered");
    Ok(serde_json::from_slice(&lines.next()?.ok_or_else(gone)?.bytes)?)
}

/// How all running VMs are. Sockets of VMs that are gone are removed.
pub fn list() -> Result<Vec<Status>, ClientError> {
    let mut all = Vec::new();
    for name in folder::names()? {
        match ask(&name, &Ask::Status) {
            Ok(answer) => all.extend(answer.status),
            Err(ClientError::NotRunning { path, .. }) => remove_stale(&path),
            // Too busy to answer is alive all the same.
            Err(_) => all.push(Status { name, state: "unknown".into(), ..Status::default() }),
        }
    }
    Ok(all)
}

fn remove_stale(path: &Path) {
    let _ = std::fs::remove_file(path);
}
