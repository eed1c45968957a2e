//! A virtual machine as a child process: Bedplate's own command, or QEMU to check the trial itself.
//! Called by the rows through [`crate::Stage::start`].
//!
//! Invariants: the same [`VmConfig`] describes the same machine for both; the child is killed and reaped when the
//! [`Vm`] is dropped; what it says on standard error is kept apart from the console.

use std::io::{self, Read};
use std::net::Ipv4Addr;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use guest_catalog::{DiskFormat, Prepared};

use crate::console::Console;
use crate::lab::{self, Lab};
use crate::stage::Failure;

/// Which program runs the guest.
#[derive(Debug, Clone)]
pub enum Vmm {
    /// Bedplate, by the path of its binary and further arguments (such as `--engine soft`).
    Bedplate {
        /// The binary.
        binary: PathBuf,
        /// Appended to `bedplate run …`.
        more: Vec<String>,
    },
    /// Bedplate in the laboratory, on a real KVM.
    Lab {
        /// The laboratory.
        lab: Box<Lab>,
        /// Appended to `bedplate run …`.
        more: Vec<String>,
    },
    /// QEMU with its own translator (TCG).
    Qemu {
        /// The binary.
        binary: PathBuf,
    },
}

impl Vmm {
    /// For summaries.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Bedplate { .. } => "bedplate",
            Self::Lab { .. } => "kvm@lab",
            Self::Qemu { .. } => "qemu",
        }
    }

    /// The engine that Bedplate is told to take.
    pub fn engine(&self) -> Option<&str> {
        match self {
            Self::Bedplate { more, .. } | Self::Lab { more, .. } => {
                more.iter().skip_while(|word| *word != "--engine").nth(1).map(String::as_str)
            }
            Self::Qemu { .. } => None,
        }
    }

    /// Whether it is Bedplate.
    pub fn is_bedplate(&self) -> bool {
        matches!(self, Self::Bedplate { .. } | Self::Lab { .. })
    }
}

/// Which of a guest's kernels is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// The compressed image, by Linux' boot protocol.
    BzImage,
    /// The ELF, by the PVH entry.
    Pvh,
}

impl Boot {
    /// For row names.
    pub fn name(self) -> &'static str {
        match self {
            Self::BzImage => "bzimage",
            Self::Pvh => "pvh",
        }
    }
}

/// A disk of the machine.
#[derive(Debug, Clone)]
pub struct DiskUse {
    /// The image.
    pub path: PathBuf,
    /// Its layout.
    pub format: DiskFormat,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// The user-mode network of the machine.
#[derive(Debug, Clone, Default)]
pub struct NetUse {
    /// (port on the host's 127.0.0.1, port of the guest), TCP.
    pub forwards: Vec<(u16, u16)>,
}

/// A machine and what it boots.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// The kernel command line.
    pub append: String,
    /// vCPUs.
    pub cpus: u32,
    /// RAM.
    pub memory_mib: u32,
    /// Disks, `/dev/vda` first.
    pub disks: Vec<DiskUse>,
    /// A network card, or none.
    pub net: Option<NetUse>,
    /// A guest's reset starts it again (otherwise it ends the VM).
    pub reboots: bool,
    /// Names the VM for `bedplate ctl` (Bedplate only).
    pub name: Option<String>,
    /// Brings a saved VM back instead of booting (Bedplate only).
    pub restore: Option<PathBuf>,
    /// Brings this saved VM back once the VM has ended well, in the same session (in the laboratory only).
    pub then_restore: Option<PathBuf>,
    /// The saved VM's disks are on another mount, between the laboratory and the host.
    pub disks_moved: bool,
    /// Processors of the laboratory (if it runs there); see [`lab::Session::cpus`].
    pub lab_cpus: u32,
    /// The console is a terminal instead of pipes, as for a person (Bedplate only); see [`TERMINAL_CHANGED`].
    pub terminal: bool,
    /// Where the trial's other files are, such as saved VMs.
    pub scratch: Option<PathBuf>,
}

/// Shown behind everything else if the terminal was not left as it was found.
pub const TERMINAL_CHANGED: &str = "TRIAL: terminal settings changed";

impl VmConfig {
    /// Boots a prepared guest; `words` are added to its kernel command line.
    ///
    /// # Errors
    /// PVH was asked for and the guest's kernel has no such entry.
    pub fn new(guest: &Prepared, boot: Boot, cpus: u32, words: &str) -> Result<Self, Failure> {
        let kernel = match boot {
            Boot::BzImage => guest.kernel.clone(),
            Boot::Pvh => guest
                .vmlinux
                .clone()
                .ok_or_else(|| Failure::new(format!("{}'s kernel has no PVH entry", guest.guest)))?,
        };
        let memory_mib = guest_catalog::find(guest.guest).map_or(512, |known| known.memory_mib);
        Ok(Self {
            kernel,
            initrd: guest.initrd.clone(),
            append: format!("{} {words}", guest.append).trim().to_string(),
            cpus,
            memory_mib,
            disks: Vec::new(),
            net: None,
            reboots: false,
            name: None,
            restore: None,
            then_restore: None,
            disks_moved: false,
            lab_cpus: 2,
            terminal: false,
            scratch: None,
        })
    }

    /// Adds a writable disk.
    #[must_use]
    pub fn disk(mut self, path: &Path, format: DiskFormat) -> Self {
        self.disks.push(DiskUse { path: path.to_path_buf(), format, read_only: false });
        self
    }

    /// Adds the network card.
    #[must_use]
    pub fn net(mut self, forwards: &[(u16, u16)]) -> Self {
        self.net = Some(NetUse { forwards: forwards.to_vec() });
        self
    }

    /// The command, and the laboratory that it runs in.
    fn command(&self, vmm: &Vmm) -> io::Result<(Command, Option<lab::Run>)> {
        Ok(match vmm {
            Vmm::Bedplate { binary, more } if self.terminal => {
                (on_a_terminal(&self.bedplate(binary, more, Ipv4Addr::LOCALHOST)), None)
            }
            Vmm::Bedplate { binary, more } => (self.bedplate(binary, more, Ipv4Addr::LOCALHOST), None),
            Vmm::Lab { lab, more } => {
                let (command, run) = lab::Run::prepare(lab, &self.in_lab(more))?;
                (command, Some(run))
            }
            Vmm::Qemu { binary } => (self.qemu(binary), None),
        })
    }

    fn in_lab(&self, more: &[String]) -> lab::Session {
        let command = |config: &Self| config.bedplate(Path::new("bedplate"), more, Ipv4Addr::UNSPECIFIED);
        let mut commands = vec![command(self)];
        if let Some(file) = &self.then_restore {
            commands.push(command(&Self { restore: Some(file.clone()), ..self.clone() }));
        }
        let mut session = lab::Session::of(&commands);
        session.memory_mib = self.memory_mib + lab::OWN_MEMORY_MIB;
        session.cpus = self.lab_cpus;
        for file in std::iter::once(&self.kernel).chain(&self.initrd) {
            session.share_folder_of(file, false);
        }
        for disk in &self.disks {
            session.share_folder_of(&disk.path, !disk.read_only);
        }
        if let Some(scratch) = &self.scratch {
            session.share(scratch, true);
        }
        let forwards = self.net.iter().flat_map(|net| &net.forwards);
        session.ports = forwards.map(|(host, _)| *host).collect();
        // Ports of the host that the guest is told of.
        let told = self.append.split("GATEWAY:").skip(1);
        session.relays =
            told.filter_map(|rest| rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()).collect();
        session
    }

    /// `address`: where ports of the host are opened.
    fn bedplate(&self, binary: &Path, more: &[String], address: Ipv4Addr) -> Command {
        let mut command = Command::new(binary);
        command.arg("run");
        if let Some(name) = &self.name {
            command.args(["--name", name]);
        }
        if let Some(file) = &self.restore {
            command.arg("--restore").arg(file);
            if self.disks_moved {
                command.arg("--disks-moved");
            }
            // The saved VM has everything but where it goes on.
            if let Some(at) = more.iter().position(|word| word == "--engine") {
                command.args(&more[at..(at + 2).min(more.len())]);
            }
            return command;
        }
        command.arg("--kernel").arg(&self.kernel);
        if let Some(initrd) = &self.initrd {
            command.arg("--initrd").arg(initrd);
        }
        command.args(["--append", &self.append]);
        command.args(["--cpus", &self.cpus.to_string(), "--memory", &format!("{}M", self.memory_mib)]);
        for disk in &self.disks {
            let read_only = if disk.read_only { ",ro" } else { "" };
            command.arg("--disk").arg(format!(
                "{}{read_only},format={}",
                disk.path.display(),
                disk.format.name()
            ));
        }
        if let Some(net) = &self.net {
            let mut text = "user,hostloopback=on".to_string();
            for (host, guest) in &net.forwards {
                text.push_str(&format!(",hostfwd=tcp:{address}:{host}-:{guest}"));
            }
            command.args(["--net", &text]);
        }
        if !self.reboots {
            command.args(["--on-reset", "stop"]);
        }
        command.args(more);
        command
    }

    fn qemu(&self, binary: &Path) -> Command {
        let mut command = Command::new(binary);
        command.args(["-M", "q35", "-accel", "tcg", "-cpu", "max", "-nodefaults", "-no-user-config"]);
        command.args(["-display", "none", "-serial", "mon:stdio", "-device", "virtio-rng-pci"]);
        command.args(["-device", "pvpanic", "-action", "panic=exit-failure"]);
        command.args(["-smp", &self.cpus.to_string(), "-m", &self.memory_mib.to_string()]);
        command.arg("-kernel").arg(&self.kernel).args(["-append", &self.append]);
        if let Some(initrd) = &self.initrd {
            command.arg("-initrd").arg(initrd);
        }
        for disk in &self.disks {
            let read_only = if disk.read_only { ",readonly=on" } else { "" };
            command.arg("-drive").arg(format!(
                "file={},if=virtio,format={}{read_only}",
                disk.path.display(),
                disk.format.name()
            ));
        }
        if let Some(net) = &self.net {
            let mut text = "user,model=virtio-net-pci".to_string();
            for (host, guest) in &net.forwards {
                text.push_str(&format!(",hostfwd=tcp:127.0.0.1:{host}-:{guest}"));
            }
            command.args(["-nic", &text]);
        }
        if !self.reboots {
            command.arg("-no-reboot");
        }
        command
    }
}

/// Runs it under util-linux' `script`, which gives it a pseudo-terminal, and compares the terminal's settings.
fn on_a_terminal(inner: &Command) -> Command {
    let quoted = |word: &std::ffi::OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    let words: Vec<_> = std::iter::once(inner.get_program()).chain(inner.get_args()).map(quoted).collect();
    let line = format!(
        "before=$(stty -g); {}; code=$?; [ \"$(stty -g)\" = \"$before\" ] || echo '{TERMINAL_CHANGED}'; exit $code",
        words.join(" ")
    );
    let mut command = Command::new("script");
    command.args(["--quiet", "--return", "--flush", "--command", &line, "/dev/null"]);
    command
}

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

    fn config() -> VmConfig {
        VmConfig {
            kernel: "/g/vmlinuz".into(),
            initrd: Some("/g/initrd.cpio".into()),
            append: "console=ttyS0".into(),
            cpus: 2,
            memory_mib: 512,
            disks: Vec::new(),
            net: None,
            reboots: true,
            name: None,
            restore: None,
            then_restore: None,
            disks_moved: false,
            lab_cpus: 2,
            terminal: false,
            scratch: None,
        }
    }

    fn words(command: &Command) -> String {
        command.get_args().map(|a| a.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_command_line_of_the_issue() {
        let config = config().disk(Path::new("/d.raw"), DiskFormat::Raw).net(&[(2222, 22)]);
        let vmm = Vmm::Bedplate { binary: "bedplate".into(), more: vec!["--engine".into(), "soft".into()] };
        assert_eq!(
            words(&config.command(&vmm).unwrap().0),
            "run --kernel /g/vmlinuz --initrd /g/initrd.cpio --append console=ttyS0 --cpus 2 --memory 512M \
             --disk /d.raw,format=raw --net user,hostloopback=on,hostfwd=tcp:127.0.0.1:2222-:22 --engine soft"
        );
    }

    #[test]
    fn a_restore_names_only_the_file_and_the_engine() {
        let config = VmConfig { restore: Some("/s.vm".into()), name: Some("n".into()), ..config() };
        let vmm = Vmm::Bedplate { binary: "bedplate".into(), more: Vec::new() };
        assert_eq!(words(&config.command(&vmm).unwrap().0), "run --name n --restore /s.vm");
        let more = ["--cpu-model", "max", "--engine", "soft"].map(String::from).to_vec();
        let vmm = Vmm::Bedplate { binary: "bedplate".into(), more };
        assert_eq!(words(&config.command(&vmm).unwrap().0), "run --name n --restore /s.vm --engine soft");
    }

    #[test]
    fn a_terminal_is_given_and_its_settings_are_compared() {
        let run = |script: &str| {
            let mut inner = Command::new("sh");
            inner.args(["-c", script]);
            on_a_terminal(&inner).stdin(Stdio::null()).output().unwrap()
        };
        let good = run("test -t 0 && echo it\\'s a terminal; exit 7");
        let text = String::from_utf8_lossy(&good.stdout).into_owned();
        assert!(text.contains("it's a terminal") && !text.contains(TERMINAL_CHANGED), "{text}");
        assert_eq!(good.status.code(), Some(7));
        let bad = run("stty raw");
        assert!(String::from_utf8_lossy(&bad.stdout).contains(TERMINAL_CHANGED));
    }

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
