//! A session under way: commands beside its own, its status, its log.
//!
//! A command is a line to the laboratory's init, which answers with what the command says and a last line
//! `LAB-STATUS n`.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use super::{Folder, Lab, Session, status_of};
use crate::stage::Failure;

const STATUS: &str = "LAB-STATUS ";
/// The most that a command may say.
const MAX_BYTES: u64 = 1 << 20;
/// QEMU's words, followed by the processors' states (`-d cpu_reset`).
const TRIPLE_FAULT: &str = "Triple fault";
/// How much of the log an error shows.
const TAIL_BYTES: usize = 1500;

/// A session and its folder, which goes away with it.
#[derive(Debug)]
pub struct Run {
    folder: tempfile::TempDir,
}

impl Run {
    /// The command that starts `session` in a folder of its own.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn prepare(lab: &Lab, session: &Session) -> io::Result<(Command, Self)> {
        let run = Self { folder: tempfile::Builder::new().prefix("bedplate-lab-").tempdir()? };
        Ok((lab.command(session, &run.folder())?, run))
    }

    /// Its files.
    pub fn folder(&self) -> Folder {
        Folder(self.folder.path().to_path_buf())
    }

    /// Runs the shell command `line` in the laboratory; what it said.
    ///
    /// # Errors
    /// It fails, the laboratory is gone, or it does not answer within `patience`.
    pub fn control(&self, line: &str, patience: Duration) -> Result<String, Failure> {
        let mut stream = UnixStream::connect(self.folder().control())?;
        stream.set_read_timeout(Some(patience))?;
        stream.write_all(format!("{}\n", line.replace('\n', " ")).as_bytes())?;
        let (status, said) = answer(BufReader::new(io::Read::take(stream, MAX_BYTES)))?;
        Failure::unless(status == 0, || format!("in the laboratory, `{line}` ended with {status}: {said}"))?;
        Ok(said)
    }

    /// The session's status, from that of the QEMU process.
    ///
    /// # Errors
    /// The laboratory ended before the session did.
    pub fn status(&self, qemu: ExitStatus) -> Result<i32, Failure> {
        let ended =
            || Failure::new(format!("the laboratory ended with {qemu}; its last words:\n{}", self.tail()));
        qemu.code().and_then(status_of).ok_or_else(ended)
    }

    /// What the laboratory's own console showed, and whether its processor came to its end.
    pub fn log(&self) -> String {
        let text = |path| {
            std::fs::read(path).map_or(String::new(), |log| String::from_utf8_lossy(&log).into_owned())
        };
        let mut log = text(self.folder().log());
        if let Some((_, state)) = text(self.folder().resets()).split_once(TRIPLE_FAULT) {
            let state: String = state.chars().take(TAIL_BYTES / 2).collect();
            log.push_str(&format!("\nThe laboratory itself came to a triple fault: {state}"));
        }
        log
    }

    fn tail(&self) -> String {
        let log = self.log();
        let start = log.len().saturating_sub(TAIL_BYTES);
        let start = (start..log.len()).find(|at| log.is_char_boundary(*at)).unwrap_or(log.len());
        log[start..].to_string()
    }
}

fn answer(mut from: impl BufRead) -> io::Result<(i32, String)> {
    let mut said = String::new();
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? == 0 {
            return Err(io::Error::other(format!("the laboratory ended; it said {said:?}")));
        }
        match line.trim_end().strip_prefix(STATUS).map(str::parse) {
            Some(Ok(status)) => return Ok((status, said)),
            Some(Err(_)) | None => said.push_str(&line),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_answer_ends_with_its_status() {
        assert_eq!(answer(&b"one\ntwo\nLAB-STATUS 3\nmore"[..]).unwrap(), (3, "one\ntwo\n".into()));
        assert!(answer(&b"one\n"[..]).unwrap_err().to_string().contains("one"));
    }
}
