//! The ends a console can have: this terminal, a unix socket that listens, a file, or nothing.
//!
//! Called by: `serial::console`, which owns the thread that polls them.
//!
//! Invariants:
//! - Nothing here blocks: descriptors are non-blocking, or are polled first and written in pieces that fit.
//! - A unix socket is made with mode 0600, serves one client at a time, and its file is removed with the end.
//! - A terminal that somebody else shares (the user's shell) keeps its flags: we open our own description of it.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use jail::FileUse;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

use super::raw_terminal::RawTerminal;

/// A pipe that polls writable takes this much without blocking (PIPE_BUF).
const WRITE_PIECE: usize = 4096;

/// Where a console goes, as a person writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleSpec {
    /// `stdio`: this process's terminal (made raw, with the escape key), or its pipes as they are.
    Stdio,
    /// `unix:PATH`: listen on a socket.
    Unix(PathBuf),
    /// `file:PATH`: append the output to a file.
    File(PathBuf),
    /// `none`: output is dropped, there is no input.
    Null,
}

impl FromStr for ConsoleSpec {
    type Err = ConsoleError;

    fn from_str(text: &str) -> Result<ConsoleSpec, ConsoleError> {
        match text.split_once(':') {
            None if text == "stdio" => Ok(ConsoleSpec::Stdio),
            None if text == "none" => Ok(ConsoleSpec::Null),
            Some(("unix", path)) if !path.is_empty() => Ok(ConsoleSpec::Unix(path.into())),
            Some(("file", path)) if !path.is_empty() => Ok(ConsoleSpec::File(path.into())),
            _ => Err(ConsoleError::Parse { text: text.into() }),
        }
    }
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The text is none of the known forms.
    #[error("console `{text}`: expected stdio, unix:PATH, file:PATH or none")]
    Parse {
        /// What was written.
        text: String,
    },
    /// The file cannot be opened.
    #[error("console file {}: {source}", path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("console socket {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// Another process listens there.
    #[error("console socket {}: another process listens on it; stop that VM or choose another path", path.display())]
    SocketInUse {
        /// Its path.
        path: PathBuf,
    },
    /// The path exists and is no socket, so it is not ours to replace.
    #[error("console socket {}: the path exists and is not a socket; remove it or choose another path", path.display())]
    NotASocket {
        /// Its path.
        path: PathBuf,
    },
    /// The terminal refused raw mode.
    #[error("cannot put the terminal into raw mode: {0}")]
    Terminal(#[source] io::Error),
    /// The thread or its doorbell could not be made.
    #[error("cannot start the console thread: {0}")]
    Start(#[source] io::Error),
}

/// Who is at the other end right now.
pub(super) struct Peer {
    pub(super) input: Option<OwnedFd>,
    pub(super) output: Option<OwnedFd>,
    is_socket: bool,
}

/// A listening socket and the file that names it.
pub(super) struct Listener {
    pub(super) socket: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

/// One opened console end.
pub(super) struct End {
    pub(super) peer: Option<Peer>,
    pub(super) listener: Option<Listener>,
    /// Present when a person types at a terminal: then the escape key works.
    pub(super) terminal: Option<RawTerminal>,
}

impl End {
    pub(super) fn open(spec: &ConsoleSpec) -> Result<End, ConsoleError> {
        match spec {
            ConsoleSpec::Null => Ok(End { peer: None, listener: None, terminal: None }),
            ConsoleSpec::File(path) => {
                let file = OpenOptions::new()
                    .create(true)
                    .append(true)
                    .mode(0o600)
                    .custom_flags(OFlags::NONBLOCK.bits() as i32)
                    .open(path)
                    .map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                let peer = Peer { input: None, output: Some(file.into()), is_socket: false };
                Ok(End { peer: Some(peer), listener: None, terminal: None })
            }
            ConsoleSpec::Unix(path) => {
                Ok(End { peer: None, listener: Some(Listener::bind(path)?), terminal: None })
            }
            ConsoleSpec::Stdio => open_stdio(),
        }
    }
}

impl End {
    /// What is done with files by name once it is open: the socket's goes.
    pub(super) fn files(&self) -> Vec<FileUse> {
        let folder = self.listener.as_ref().and_then(|listener| listener.path.parent());
        let folder = folder.map(|folder| if folder.as_os_str().is_empty() { Path::new(".") } else { folder });
        folder.map(|folder| FileUse::RemoveIn(folder.into())).into_iter().collect()
    }
}

fn open_stdio() -> Result<End, ConsoleError> {
    let input = own_description(io::stdin(), OFlags::RDONLY).map_err(ConsoleError::Start)?;
    let output = own_description(io::stdout(), OFlags::WRONLY).map_err(ConsoleError::Start)?;
    let is_terminal = rustix::termios::isatty(&input);
    let terminal =
        if is_terminal { Some(RawTerminal::enter(&input).map_err(ConsoleError::Terminal)?) } else { None };
    let peer = Peer { input: Some(input), output: Some(output), is_socket: false };
    Ok(End { peer: Some(peer), listener: None, terminal })
}

/// A terminal is opened again, non-blocking, so that the shell's own description keeps its flags; anything else is
/// only duplicated (opening a redirected file again would start at its beginning).
fn own_description(fd: impl AsFd, access: OFlags) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let fd = fd.as_fd();
    if rustix::termios::isatty(fd) {
        let name = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        if let Ok(own) = rustix::fs::open(name, flags, Mode::empty()) {
            return Ok(own);
        }
    }
    fd.try_clone_to_owned()
}

impl Listener {
    fn bind(path: &Path) -> Result<Listener, ConsoleError> {
        let fail = |source: io::Error| ConsoleError::Socket { path: path.into(), source };
        remove_stale_socket(path)?;
        let address = SocketAddr::from_pathname(path).map_err(fail)?;
        // The mode of the file is the mode of the socket when it is bound: no moment in which others may connect.
        let socket = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
            None,
        )
        .map_err(|e| fail(e.into()))?;
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR).map_err(|e| fail(e.into()))?;
        let name = address.as_pathname().unwrap_or(path);
        let name = rustix::net::SocketAddrUnix::new(name).map_err(|e| fail(e.into()))?;
        rustix::net::bind(&socket, &name).map_err(|e| fail(e.into()))?;
        rustix::net::listen(&socket, 8).map_err(|e| fail(e.into()))?;
        let meta = std::fs::symlink_metadata(path).map_err(fail)?;
        Ok(Listener { socket: socket.into(), path: path.into(), inode: (meta.dev(), meta.ino()) })
    }

    /// Takes a waiting client; a second one beside `present` is told so and sent away.
    pub(super) fn accept(&self, present: bool) -> Option<Peer> {
        let (client, _) = self.socket.accept().ok()?;
        client.set_nonblocking(true).ok()?;
        if present {
            let text = b"Another client is connected to this console.\r\n";
            let _ = rustix::net::send(&client, text, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
            return None;
        }
        let output = client.try_clone().ok()?;
        Some(Peer { input: Some(client.into()), output: Some(output.into()), is_socket: true })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A socket file nobody listens on is left over from a crash; anything else at the path is not ours.
fn remove_stale_socket(path: &Path) -> Result<(), ConsoleError> {
    use std::os::unix::fs::FileTypeExt;
    let Ok(meta) = std::fs::symlink_metadata(path) else { return Ok(()) };
    if !meta.file_type().is_socket() {
        return Err(ConsoleError::NotASocket { path: path.into() });
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(|source| ConsoleError::Socket { path: path.into(), source })
        }
        _ => Err(ConsoleError::SocketInUse { path: path.into() }),
    }
}

impl Peer {
    /// Reads what is there; `Ok(0)` is the end of the input.
    pub(super) fn read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        match &self.input {
            Some(fd) => rustix::io::read(fd, buf),
            None => Err(Errno::AGAIN),
        }
    }

    /// Writes a first piece of `bytes` without blocking (the caller has polled).
    pub(super) fn write(&self, bytes: &[u8]) -> Result<usize, Errno> {
        let piece = &bytes[..bytes.len().min(WRITE_PIECE)];
        match &self.output {
            Some(fd) if self.is_socket => {
                rustix::net::send(fd, piece, SendFlags::DONTWAIT | SendFlags::NOSIGNAL)
            }
            Some(fd) => rustix::io::write(fd, piece),
            None => Ok(bytes.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn specs_parse_or_say_what_is_expected() {
        assert_eq!("stdio".parse::<ConsoleSpec>().unwrap(), ConsoleSpec::Stdio);
        assert_eq!("unix:/run/a:b".parse::<ConsoleSpec>().unwrap(), ConsoleSpec::Unix("/run/a:b".into()));
        assert_eq!("file:log".parse::<ConsoleSpec>().unwrap(), ConsoleSpec::File("log".into()));
        assert_eq!("none".parse::<ConsoleSpec>().unwrap(), ConsoleSpec::Null);
        for text in ["", "tty", "unix:", "file:", "stdio:x"] {
            let error = text.parse::<ConsoleSpec>().unwrap_err().to_string();
            assert!(error.contains("expected stdio, unix:PATH"), "{error}");
        }
    }
}
