//! A guest's console as a conversation: wait for a text with a deadline, send a line, keep the transcript.
//! One thread reads the process's output into a shared buffer; the script looks for texts behind a cursor.
//!
//! Invariants: the cursor only moves forward; a text is matched once; a console that closes or a kernel that
//! panics ends a wait at once instead of at the deadline; the transcript is capped.

use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A guest that writes more than this is out of hand.
const MAX_TRANSCRIPT_BYTES: usize = 64 << 20;
/// How much of the transcript an error shows.
const SHOWN_BYTES: usize = 2500;
const PANIC: &str = "Kernel panic - not syncing";

/// Why a wait ended without its text. The transcript's end is part of the message.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The deadline passed.
    #[error("waited {waited_s} s for {wanted:?} in vain; the console's last words:\n{tail}")]
    Deadline {
        /// The text.
        wanted: String,
        /// The patience that was given.
        waited_s: u64,
        /// End of the transcript.
        tail: String,
    },
    /// The process closed its output.
    #[error("the console closed before {wanted:?}; its last words:\n{tail}")]
    Closed {
        /// The text.
        wanted: String,
        /// End of the transcript.
        tail: String,
    },
    /// The guest's kernel panicked while another text was awaited.
    #[error("the guest's kernel panicked before {wanted:?}; the console's last words:\n{tail}")]
    Panicked {
        /// The text.
        wanted: String,
        /// End of the transcript.
        tail: String,
    },
    /// Nothing more can be sent.
    #[error("cannot write to the console: {0}")]
    Write(std::io::Error),
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    arrived: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The script's end of a console.
pub struct Console {
    shared: Arc<Shared>,
    input: Option<Box<dyn Write + Send>>,
    cursor: usize,
}

impl std::fmt::Debug for Console {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Console").field("cursor", &self.cursor).finish_non_exhaustive()
    }
}

impl Console {
    /// Starts to read `output` on a thread of its own, which ends when the output does.
    pub fn new(output: impl Read + Send + 'static, input: impl Write + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let writer = Arc::clone(&shared);
        std::thread::spawn(move || collect(output, &writer));
        Self { shared, input: Some(Box::new(input)), cursor: 0 }
    }

    /// Whether the process closed its output.
    pub fn has_ended(&self) -> bool {
        self.shared.lock().closed
    }

    /// Waits for `text` behind the cursor, moves the cursor behind it and gives what stood before it.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn expect(&mut self, text: &str, patience: Duration) -> Result<String, ConsoleError> {
        self.expect_any(&[text], patience).map(|(_, before)| before)
    }

    /// Waits for the first of several texts; gives its index too.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn expect_any(
        &mut self,
        texts: &[&str],
        patience: Duration,
    ) -> Result<(usize, String), ConsoleError> {
        let start = Instant::now();
        let panic_awaited = texts.iter().any(|text| text.contains("panic"));
        let shared = Arc::clone(&self.shared);
        let mut buffer = shared.lock();
        let mut searched = self.cursor;
        let longest = texts.iter().map(|text| text.len()).max().unwrap_or(0).max(PANIC.len());
        loop {
            let fresh = &buffer.bytes[searched..];
            let hit = texts
                .iter()
                .enumerate()
                .filter_map(|(index, text)| Some((find(fresh, text)? + searched, index, text.len())))
                .min();
            if let Some((at, index, length)) = hit {
                let before = String::from_utf8_lossy(&buffer.bytes[self.cursor..at]).into_owned();
                self.cursor = at + length;
                return Ok((index, before));
            }
            let (wanted, tail) = (texts.join("\" or \""), || tail(&buffer.bytes));
            if !panic_awaited && find(fresh, PANIC).is_some() {
                // A moment for the rest of the message to arrive.
                drop(buffer);
                std::thread::sleep(Duration::from_millis(300));
                return Err(ConsoleError::Panicked { wanted, tail: self.tail() });
            }
            if buffer.closed {
                return Err(ConsoleError::Closed { wanted, tail: tail() });
            }
            let Some(left) = patience.checked_sub(start.elapsed()) else {
                return Err(ConsoleError::Deadline { wanted, waited_s: patience.as_secs(), tail: tail() });
            };
            // A text may arrive in two pieces.
            searched = self.cursor.max(buffer.bytes.len().saturating_sub(longest));
            buffer = shared.arrived.wait_timeout(buffer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a line that begins with (or holds) `start` and gives the rest of that line.
    ///
    /// # Errors
    /// See [`ConsoleError`].
    pub fn expect_line(&mut self, start: &str, patience: Duration) -> Result<String, ConsoleError> {
        self.expect(start, patience)?;
        let rest = self.expect("\n", patience)?;
        Ok(rest.trim().to_string())
    }

    /// Waits until the output ends.
    ///
    /// # Errors
    /// [`ConsoleError::Deadline`].
    pub fn expect_end(&mut self, patience: Duration) -> Result<(), ConsoleError> {
        let start = Instant::now();
        let mut buffer = self.shared.lock();
        while !buffer.closed {
            let Some(left) = patience.checked_sub(start.elapsed()) else {
                let wanted = "the end of the process".into();
                return Err(ConsoleError::Deadline {
                    wanted,
                    waited_s: patience.as_secs(),
                    tail: tail(&buffer.bytes),
                });
            };
            buffer = self.shared.arrived.wait_timeout(buffer, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// [`ConsoleError::Write`].
    pub fn send(&mut self, text: &str) -> Result<(), ConsoleError> {
        let input =
            self.input.as_mut().ok_or_else(|| ConsoleError::Write(std::io::ErrorKind::BrokenPipe.into()))?;
        input.write_all(text.as_bytes()).and_then(|()| input.flush()).map_err(ConsoleError::Write)
    }

    /// Closes the way in, as when a user closes the terminal.
    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// All that was written so far.
    pub fn transcript(&self) -> Vec<u8> {
        self.shared.lock().bytes.clone()
    }

    /// The transcript's end, for messages.
    pub fn tail(&self) -> String {
        tail(&self.shared.lock().bytes)
    }
}

fn collect(mut output: impl Read, shared: &Shared) {
    let mut piece = [0; 4096];
    loop {
        let count = match output.read(&mut piece) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            // A pseudo-terminal ends with EIO.
            Err(_) => 0,
        };
        let mut buffer = shared.lock();
        if count == 0 || buffer.bytes.len() > MAX_TRANSCRIPT_BYTES {
            buffer.closed = true;
            shared.arrived.notify_all();
            return;
        }
        buffer.bytes.extend_from_slice(&piece[..count]);
        shared.arrived.notify_all();
    }
}

fn find(haystack: &[u8], needle: &str) -> Option<usize> {
    haystack.windows(needle.len().max(1)).position(|window| window == needle.as_bytes())
}

fn tail(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(&bytes[bytes.len().saturating_sub(SHOWN_BYTES)..]);
    text.replace('\r', "").lines().map(|line| format!("    | {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command, Stdio};

    const PATIENCE: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> (Child, Console) {
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell starts");
        let console = Console::new(child.stdout.take().unwrap(), child.stdin.take().unwrap());
        (child, console)
    }

    #[test]
    fn a_conversation() {
        let (mut child, mut console) = shell("echo login:; read name; echo hello $name, have 42 points");
        console.expect("login:", PATIENCE).unwrap();
        console.send("ann\n").unwrap();
        assert_eq!(console.expect_line("hello ", PATIENCE).unwrap(), "ann, have 42 points");
        console.expect_end(PATIENCE).unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_text_in_two_pieces_is_found() {
        let (mut child, mut console) = shell("printf 'abcde'; sleep 0.2; printf 'fghi\\n'");
        assert_eq!(console.expect("defg", PATIENCE).unwrap(), "abc");
        child.wait().unwrap();
    }

    #[test]
    fn the_earliest_of_several_texts_wins() {
        let (mut child, mut console) = shell("echo one two three");
        assert_eq!(console.expect_any(&["three", "two"], PATIENCE).unwrap().0, 1);
        assert_eq!(console.expect_any(&["three", "two"], PATIENCE).unwrap().0, 0);
        child.wait().unwrap();
    }

    #[test]
    fn an_early_end_and_a_panic_are_told_at_once() {
        let (mut child, mut console) = shell("echo last words");
        let error = console.expect("never", PATIENCE).unwrap_err();
        assert!(matches!(error, ConsoleError::Closed { .. }) && error.to_string().contains("last words"));
        child.wait().unwrap();
        let (mut child, mut console) = shell("echo Kernel panic - not syncing: oh; read wait");
        assert!(matches!(console.expect("never", PATIENCE), Err(ConsoleError::Panicked { .. })));
        console.expect("panic - not", PATIENCE).unwrap();
        console.close_input();
        child.wait().unwrap();
    }

    #[test]
    fn a_deadline_shows_the_transcript() {
        let (mut child, mut console) = shell("echo still here; read wait");
        console.expect("still", PATIENCE).unwrap();
        let error = console.expect("never", Duration::from_millis(50)).unwrap_err();
        assert!(matches!(error, ConsoleError::Deadline { .. }) && error.to_string().contains("| still here"));
        console.send("\n").unwrap();
        child.wait().unwrap();
    }
}
