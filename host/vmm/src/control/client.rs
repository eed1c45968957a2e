//! Asks a VM something.
//!
//! Called by: the `bedplate` command (`ps`, `ctl`).

use super::folder::{self, FolderError};
use super::{Answer, Ask, MAX_LINE_BYTES, Status};
use std::io::{self, BufRead, BufReader, Read, Write};
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

/// Asks the VM called `name`, and waits for it to be done.
pub fn ask(name: &str, what: &Ask) -> Result<Answer, ClientError> {
    let path = folder::socket(name)?;
    let broken = |source| ClientError::Broken { name: name.into(), source };
    let answer = match UnixStream::connect(&path) {
        Ok(stream) => converse(stream, what).map_err(broken)?,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Err(ClientError::NotRunning { name: name.into(), path });
        }
        Err(error) => return Err(broken(error)),
    };
    if answer.ok {
        return Ok(answer);
    }
    let reason = answer.error.unwrap_or_else(|| "it did not say why".into());
    Err(ClientError::Refused { name: name.into(), reason })
}

pub(super) fn converse(mut stream: UnixStream, what: &Ask) -> io::Result<Answer> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut answer = String::new();
    BufReader::new(stream.take(MAX_LINE_BYTES)).read_line(&mut answer)?;
    if answer.is_empty() {
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ended before it answered"));
    }
    Ok(serde_json::from_str(&answer)?)
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
