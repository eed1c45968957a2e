//! A virtual machine as a child process: Bedplate's own command, or QEMU to check the trial itself.
//! Called by the rows through [`crate::Stage::start`].
//!
//! Invariants: the child is killed and reaped when the [`Vm`] is dropped; what it says on standard error is kept apart
//! from the console.

use std::io::{self, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::config::{VmConfig, Vmm};
use crate::console::Console;
use crate::lab;
use crate::stage::Failure;

/// How a VM process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl Exit {
    fn of(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, signal) => Self::Signal(signal.unwrap_or(0)),
        }
    }
}

/// A running VM.
#[derive(Debug)]
pub struct Vm {
    child: Child,
    lab: Option<lab::Run>,
    escape_key: bool,
    command_line: String,
    messages: Arc<Mutex<Vec<u8>>>,
    /// Reads the messages until the process closes them.
    reader: Option<JoinHandle<()>>,
    console: Console,
    started: Instant,
}

impl Vm {
    /// Starts the process; its console is its standard input and output.
    ///
    /// # Errors
    /// The program cannot be run.
    pub fn start(vmm: &Vmm, config: &VmConfig) -> io::Result<Self> {
        let (mut command, lab) = config.command(vmm)?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let command_line = format!("{command:?}");
        let started = Instant::now();
        let mut child = command.spawn()?;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(input), Some(output), Some(errors)) = pipes else {
            return Err(io::Error::other("the child has no pipes"));
        };
        let messages = Arc::new(Mutex::new(Vec::new()));
        let kept = Arc::clone(&messages);
        let reader = Some(std::thread::spawn(move || keep_messages(errors, &kept)));
        // Bedplate takes the escape key from terminals only: a pipe may carry any byte.
        let escape_key = config.terminal || !vmm.is_bedplate();
        let console = Console::new(output, input);
        Ok(Self { child, lab, escape_key, command_line, messages, reader, console, started })
    }

    /// The console.
    pub fn console(&mut self) -> &mut Console {
        &mut self.console
    }

    /// Time since the process was started.
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// It is still there when `patience` ends.
    pub fn wait(&mut self, patience: Duration) -> Result<Exit, Failure> {
        self.console.expect_end(patience)?;
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                // Its last words may still be in the pipe.
                if let Some(reader) = self.reader.take() {
                    let _ = reader.join();
                }
                return match &self.lab {
                    Some(lab) => lab.status(status).map(Exit::Code),
                    None => Ok(Exit::of(status)),
                };
            }
            if start.elapsed() > patience {
                return Err(Failure::new("the console has ended but the process has not"));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends the VM from outside: by the console's escape key (Ctrl-A x, the same in Bedplate and QEMU) or by SIGTERM.
    ///
    /// # Errors
    /// It does not end.
    pub fn stop(&mut self, patience: Duration) -> Result<Exit, Failure> {
        if let Some(lab) = &self.lab {
            lab.control("killall -TERM bedplate", patience)?;
        } else if self.escape_key {
            self.console.send("\u{1}x")?;
        } else {
            let line = format!("kill -TERM {}", self.child.id());
            let status = Command::new("sh").args(["-c", &line]).status()?;
            Failure::unless(status.success(), || format!("`{line}` ended with {status}"))?;
        }
        self.wait(patience)
    }

    /// Processor time used so far by the process, all threads, user and system.
    pub fn processor_time(&self) -> io::Result<Duration> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id()))?;
        // Fields 14 and 15, counted behind the name in brackets, in clock ticks of 10 ms.
        let behind = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let ticks = |n: usize| behind.split_whitespace().nth(n).and_then(|t| t.parse::<u64>().ok());
        let total = ticks(11).zip(ticks(12)).map(|(user, system)| user + system);
        total.map(|t| Duration::from_millis(t * 10)).ok_or_else(|| io::Error::other("odd /proc/PID/stat"))
    }

    /// Resident memory of the process apart from the guest's RAM, in KiB: of all mappings that are smaller. What is mapped
    /// twice counts once.
    pub fn own_memory_kib(&self, ram_mib: u32) -> io::Result<u64> {
        let maps = std::fs::read_to_string(format!("/proc/{}/smaps", self.child.id()))?;
        Ok(resident_of_smaller(&maps, u64::from(ram_mib) * 1024))
    }

    /// What the process said on standard error.
    pub fn messages(&self) -> String {
        String::from_utf8_lossy(&self.messages.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
    }

    /// The laboratory that it runs in.
    pub(crate) fn lab(&self) -> Option<&lab::Run> {
        self.lab.as_ref()
    }

    /// How it was started.
    pub fn command_line(&self) -> &str {
        &self.command_line
    }

    /// Everything that was said: how it was started, its console, its messages, the laboratory's console.
    pub fn transcript(&self) -> Vec<u8> {
        // The last words of a process that has just ended may still be in the pipe.
        let start = Instant::now();
        while self.console.has_ended()
            && self.reader.as_ref().is_some_and(|reader| !reader.is_finished())
            && start.elapsed() < LAST_WORDS
        {
            std::thread::sleep(Duration::from_millis(20));
        }
        let mut all = format!("\n===== {}\n", self.command_line).into_bytes();
        all.extend_from_slice(&self.console_transcript());
        all.extend_from_slice(b"\n===== messages\n");
        all.extend_from_slice(self.messages().as_bytes());
        if let Some(lab) = &self.lab {
            all.extend_from_slice(b"\n===== laboratory\n");
            all.extend_from_slice(lab.log().as_bytes());
        }
        all
    }

    /// All that the console showed.
    pub fn console_transcript(&self) -> Vec<u8> {
        self.console.transcript()
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// KiB of /proc/PID/smaps in mappings below `kib`.
fn resident_of_smaller(maps: &str, kib: u64) -> u64 {
    let (mut smaller, mut sum) = (false, 0);
    for line in maps.lines() {
        let mut words = line.split_whitespace();
        let (name, value) = (words.next(), words.next().and_then(|value| value.parse::<u64>().ok()));
        match (name, value) {
            (Some("Size:"), Some(size)) => smaller = size < kib,
            (Some("Pss:"), Some(resident)) if smaller => sum += resident,
            _ => {}
        }
    }
    sum
}

/// How long they may take.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// More than any process has to say about itself.
const MAX_MESSAGE_BYTES: usize = 4 << 20;

fn keep_messages(mut from: impl Read, kept: &Mutex<Vec<u8>>) {
    let mut piece = [0; 4096];
    while let Ok(count @ 1..) = from.read(&mut piece) {
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < MAX_MESSAGE_BYTES {
            kept.extend_from_slice(&piece[..count]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::config;

    #[test]
    fn own_memory_is_without_the_guests() {
        let maps = "1000-2000 rw-p\nSize:  4 kB\nPss:  3 kB\n2000-4000 rw-s\nSize: 8 kB\nPss: 8 kB\n5000-6000 r\nSize: 4 kB\nPss: 1 kB";
        assert_eq!(resident_of_smaller(maps, 8), 4);
    }

    #[test]
    fn the_last_words_are_there_when_it_has_ended() {
        let vmm = Vmm::Bedplate { binary: "/bin/sh".into(), more: Vec::new() };
        for _ in 0..50 {
            let mut vm = Vm::start(&vmm, &config()).unwrap();
            vm.wait(Duration::from_secs(30)).unwrap();
            assert!(!vm.messages().is_empty());
        }
    }

    #[test]
    fn a_dropped_vm_is_gone() {
        let vmm = Vmm::Bedplate { binary: "/bin/sh".into(), more: Vec::new() };
        // `sh run …` ends at once with an error on standard error: enough to see a process come and go.
        let mut vm = Vm::start(&vmm, &config()).unwrap();
        assert!(matches!(vm.wait(Duration::from_secs(30)).unwrap(), Exit::Code(code) if code != 0));
        assert!(vm.command_line().contains("--kernel"));
    }
}
