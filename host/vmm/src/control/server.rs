//! The VM's end of its control socket: a thread that accepts, and one for each connection.
//!
//! Called by: `launch`. Requests become [`Request`]s of the driver; the answer comes when they are done.

use super::folder::{self, FolderError};
use super::lines::Lines;
use super::{Answer, Ask, Status};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Most connections at a time.
const MAX_CONNECTIONS: usize = 16;

/// Who answers.
pub trait Answers: Send + Sync + 'static {
    /// How the VM is.
    fn status(&self) -> Status;
    /// Does what is asked and waits for its end.
    fn answer(&self, ask: Ask, client: &mut dyn Client) -> Answer;
}

/// Who asks, for what is more than a question and an answer.
pub trait Client {
    /// The files that came with what is asked.
    fn files(&mut self) -> Vec<File>;
    /// Tells that a save is written, and waits until it is in its place.
    fn place(&mut self, message: &str) -> Result<(), String>;
}

/// How long a client may take to give a written file its name.
const PLACE_TIME: Duration = Duration::from_secs(60);

/// One connection.
struct Connection<'a> {
    stream: &'a UnixStream,
    lines: Lines<'a>,
    files: Vec<File>,
}

impl Client for Connection<'_> {
    fn files(&mut self) -> Vec<File> {
        std::mem::take(&mut self.files)
    }

    fn place(&mut self, message: &str) -> Result<(), String> {
        let gone = |error: io::Error| format!("who asked for the save is gone: {error}");
        let written = Answer { written: true, ..Answer::done(Some(message.into())) };
        reply(self.stream, &written).map_err(gone)?;
        self.stream.set_read_timeout(Some(PLACE_TIME)).map_err(gone)?;
        let line = self.lines.next().map_err(gone)?.map(|line| serde_json::from_slice::<Ask>(&line.bytes));
        self.stream.set_read_timeout(None).map_err(gone)?;
        match line {
            Some(Ok(Ask::Placed)) => Ok(()),
            _ => Err("who asked for the save did not give it its name".into()),
        }
    }
}

/// Why there is no socket.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// Another VM has the name.
    #[error(
        "a VM called `{name}` is already running; choose another --name, or end it with bedplate ctl {name} kill"
    )]
    NameTaken {
        /// The name.
        name: String,
    },
    /// The socket cannot be made.
    #[error("control socket {}: {source}", path.display())]
    Socket {
        /// Its path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A control socket; dropping it closes it and removes its file.
pub struct ControlSocket {
    path: PathBuf,
    /// Whose file it is: another VM may have taken the name since.
    inode: (u64, u64),
    shared: Arc<Shared>,
    /// What the thread waits at.
    waiting: UnixListener,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    ending: AtomicBool,
    connections: AtomicUsize,
    /// Requests that were read and not answered yet.
    unanswered: AtomicUsize,
}

/// How long the end of a VM waits until those who asked for it have heard of it.
const LAST_ANSWERS: Duration = Duration::from_secs(2);

impl ControlSocket {
    /// Listens for the VM called `name`.
    pub fn open(name: &str, answers: Arc<dyn Answers>) -> Result<Self, ServeError> {
        let path = folder::socket(name)?;
        let fail = |source| ServeError::Socket { path: path.clone(), source };
        if UnixStream::connect(&path).is_ok() {
            return Err(ServeError::NameTaken { name: name.into() });
        }
        match std::fs::remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(fail(error)),
        }
        let listener = UnixListener::bind(&path).map_err(fail)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).map_err(fail)?;
        let found = std::fs::symlink_metadata(&path).map_err(fail)?;
        let inode = (found.dev(), found.ino());
        let shared = Arc::new(Shared::default());
        let theirs = shared.clone();
        let waiting = listener.try_clone().map_err(fail)?;
        let accept = move || {
            jail::enter(jail::Thread::Control, &[]);
            accept(&listener, &theirs, &answers);
        };
        let thread = std::thread::Builder::new().name("control".into()).spawn(accept).map_err(fail)?;
        Ok(Self { path, inode, shared, waiting, thread: Some(thread) })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        let deadline = Instant::now() + LAST_ANSWERS;
        while self.shared.unanswered.load(Ordering::SeqCst) > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.shared.ending.store(true, Ordering::SeqCst);
        // Wakes the thread (Linux: accept fails then), which sees that it is to end.
        let woken = rustix::net::shutdown(&self.waiting, rustix::net::Shutdown::Both).is_ok();
        // Where the jail has taken root's rights the file stays; who looks for the VM next removes it.
        let ours = std::fs::symlink_metadata(&self.path).is_ok_and(|f| (f.dev(), f.ino()) == self.inode);
        if ours {
            let _ = std::fs::remove_file(&self.path);
        }
        if let Some(thread) = self.thread.take()
            && woken
        {
            let _ = thread.join();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, answers: &Arc<dyn Answers>) {
    for stream in listener.incoming() {
        if shared.ending.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        if shared.connections.fetch_add(1, Ordering::SeqCst) >= MAX_CONNECTIONS {
            shared.connections.fetch_sub(1, Ordering::SeqCst);
            let _ = reply(&stream, &Answer::refused("too many connections"));
            continue;
        }
        let (answers, theirs) = (answers.clone(), shared.clone());
        let serve = move || {
            jail::inherit(jail::Thread::Control);
            let _ = serve(&stream, &theirs, &*answers);
            theirs.connections.fetch_sub(1, Ordering::SeqCst);
        };
        if std::thread::Builder::new().name("control-client".into()).spawn(serve).is_err() {
            shared.connections.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn serve(stream: &UnixStream, shared: &Shared, answers: &dyn Answers) -> io::Result<()> {
    let mut client = Connection { stream, lines: Lines::new(stream), files: Vec::new() };
    while let Some(mut line) = client.lines.next()? {
        shared.unanswered.fetch_add(1, Ordering::SeqCst);
        client.files = std::mem::take(&mut line.files);
        let answer = match serde_json::from_slice::<Ask>(&line.bytes) {
            Ok(Ask::Status) => Answer { status: Some(answers.status()), ..Answer::done(None) },
            Ok(ask) => answers.answer(ask, &mut client),
            Err(error) => Answer::refused(format!("not understood: {error}")),
        };
        client.files.clear();
        let replied = reply(stream, &answer);
        shared.unanswered.fetch_sub(1, Ordering::SeqCst);
        replied?;
        if !line.is_whole() {
            // Longer than any line may be: what follows would be nonsense.
            return Ok(());
        }
    }
    Ok(())
}

fn reply(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    use super::super::MAX_LINE_BYTES;
    use super::super::client::converse;
    use super::*;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsFd;

    struct Echo;
    impl Answers for Echo {
        fn status(&self) -> Status {
            Status { name: "echo".into(), ..Status::default() }
        }
        fn answer(&self, ask: Ask, _: &mut dyn Client) -> Answer {
            Answer::done(Some(format!("{ask:?}")))
        }
    }

    fn connected() -> (UnixStream, JoinHandle<io::Result<()>>) {
        let (client, server) = UnixStream::pair().unwrap();
        (client, std::thread::spawn(move || serve(&server, &Shared::default(), &Echo)))
    }

    #[test]
    fn lines_are_answered_in_order_and_nonsense_too() {
        let (client, server) = connected();
        assert_eq!(converse(&client, &Ask::Pause).unwrap().message.as_deref(), Some("Pause"));
        let status = converse(&client, &Ask::Status).unwrap().status.unwrap();
        assert_eq!(status.name, "echo");
        (&client).write_all(b"{\"op\":\"dance\"}\n").unwrap();
        let mut line = String::new();
        BufReader::new(&client).read_line(&mut line).unwrap();
        assert!(line.contains("not understood"), "{line}");
        drop(client);
        server.join().unwrap().unwrap();
    }

    /// A save that is written at once, and then waits for its place.
    struct Saves;
    impl Answers for Saves {
        fn status(&self) -> Status {
            Status::default()
        }
        fn answer(&self, _: Ask, client: &mut dyn Client) -> Answer {
            let files = client.files().len();
            client.place(&format!("{files} files")).map_or_else(Answer::refused, |()| Answer::done(None))
        }
    }

    #[test]
    fn a_save_is_done_when_its_client_says_so_and_not_when_it_goes_away() {
        let file = tempfile::tempfile().unwrap();
        let ask_to_save = |stream: &UnixStream| {
            let line = br#"{"op":"save","file":"/x"}"#;
            super::super::lines::send(stream, &[&line[..], b"\n"].concat(), &[file.as_fd()]).unwrap();
            super::super::client::answer(&mut Lines::new(stream)).unwrap()
        };
        let shared = Shared::default();
        let (client, server) = UnixStream::pair().unwrap();
        std::thread::scope(|scope| {
            let served = scope.spawn(|| serve(&server, &shared, &Saves));
            let answer = ask_to_save(&client);
            assert!(answer.ok && answer.written, "{answer:?}");
            assert_eq!(answer.message.as_deref(), Some("1 files"));
            assert!(converse(&client, &Ask::Placed).unwrap().ok);
            assert!(ask_to_save(&client).written);
            let answer = converse(&client, &Ask::Status).unwrap();
            assert!(!answer.ok && answer.error.unwrap().contains("did not give it its name"));
            drop(client);
            served.join().unwrap().unwrap();
        });
    }

    #[test]
    fn an_endless_line_ends_the_connection() {
        let (client, server) = connected();
        let mut writer = client.try_clone().unwrap();
        let flood = std::thread::spawn(move || writer.write_all(&vec![b'x'; 4 * MAX_LINE_BYTES as usize]));
        let mut line = String::new();
        let _ = BufReader::new(&client).read_line(&mut line);
        assert!(line.contains("not understood"), "{line}");
        let _ = server.join().unwrap();
        let _ = flood.join().unwrap();
    }
}
