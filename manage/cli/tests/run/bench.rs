//! Runs the command with kernels of a few bytes.

use machine::testing::kernel;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Nothing here takes long; a test that waits longer has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder for one test: kernels, disks, and the runtime folder of control sockets.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("run")).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A kernel file of `code`.
    pub fn kernel(&self, code: &[u8]) -> PathBuf {
        let path = self.path("kernel");
        std::fs::write(&path, kernel::pvh(code)).unwrap();
        path
    }

    /// A raw disk of 1 MiB.
    pub fn disk(&self) -> PathBuf {
        let path = self.path("disk.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        path
    }

    /// The command, with its own runtime folder.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bedplate"));
        command.args(args).env("XDG_RUNTIME_DIR", self.path("run")).current_dir(self.folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the command to its end.
    pub fn output(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// Runs `bedplate run` with a kernel of `code`, 16 MiB and more arguments, to its end.
    pub fn run(&self, code: &[u8], more: &[&str]) -> Output {
        self.output(&run_args(&self.kernel(code), more))
    }

    /// Starts a VM that goes on while the test does other things.
    pub fn start(&self, args: &[&str]) -> Running {
        let mut child = self.command(args).stdin(Stdio::piped()).spawn().unwrap();
        let mut output = child.stdout.take().unwrap();
        let (sender, arrived) = channel();
        std::thread::spawn(move || {
            let mut byte = [0];
            while output.read(&mut byte).is_ok_and(|n| n == 1) && sender.send(byte[0]).is_ok() {}
        });
        let input = child.stdin.take();
        Running { child, input, arrived }
    }
}

/// Arguments of `bedplate run` for a small machine.
pub fn run_args<'a>(kernel: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    let mut args = vec!["run", "--kernel", kernel.to_str().unwrap(), "--memory", "16M"];
    args.extend(more);
    args
}

pub struct Running {
    child: Child,
    input: Option<ChildStdin>,
    arrived: Receiver<u8>,
}

impl Running {
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Types at the serial console.
    pub fn send(&mut self, text: &str) {
        self.input.as_mut().unwrap().write_all(text.as_bytes()).unwrap();
    }

    /// Waits for `text` on the serial console.
    pub fn expect(&mut self, text: &str) {
        let mut seen = String::new();
        let deadline = Instant::now() + PATIENCE;
        while !seen.ends_with(text) {
            let left = deadline.saturating_duration_since(Instant::now());
            let byte =
                self.arrived.recv_timeout(left).unwrap_or_else(|_| panic!("{text:?} did not come: {seen:?}"));
            seen.push(char::from(byte));
        }
    }

    /// Waits for the process's end: its exit code and what it said.
    pub fn wait(mut self) -> (i32, String) {
        drop(self.input.take());
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < deadline, "the process does not end");
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (status.code().unwrap_or(-1), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A guest that answers every byte from COM1 with the next digit, and powers off on `q`.
pub fn counter() -> Vec<u8> {
    let mut code = vec![
        0xBB, 0x00, 0x00, 0x20, 0x00, // mov ebx, 200000h
        0xC6, 0x03, b'0', // mov byte [ebx], '0'
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 3F8h
        0xB0, b'>', 0xEE, // mov al, '>'; out dx, al
        // wait:
        0x66, 0xBA, 0xFD, 0x03, // mov dx, 3FDh
        0xF3, 0x90, // pause
        0xEC, // in al, dx
        0xA8, 0x01, // test al, 1
        0x74, 0xF5, // jz wait
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 3F8h
        0xEC, // in al, dx
        0x3C, b'q', // cmp al, 'q'
        0x74, 0x07, // je off
        0xFE, 0x03, // inc byte [ebx]
        0x8A, 0x03, // mov al, [ebx]
        0xEE, // out dx, al
        0xEB, 0xE3, // jmp wait
              // off:
    ];
    code.extend(kernel::power_off());
    code
}

/// A guest that greets and sleeps.
pub fn halter() -> Vec<u8> {
    vec![
        0x66, 0xBA, 0xF8, 0x03, // mov dx, 3F8h
        0xB0, b'>', 0xEE, // mov al, '>'; out dx, al
        0xF4, 0xEB, 0xFD, // again: hlt; jmp again
    ]
}
