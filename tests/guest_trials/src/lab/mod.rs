//! The laboratory: QEMU emulates a machine with AMD's virtualization (SVM, nested paging), a Debian kernel in it offers
//! a real `/dev/kvm`, and our static binary runs there.
//!
//! What it is: [`Lab`] has what every session needs, [`Session`] says what one does; [`Lab::command`] makes the QEMU
//! command. Called by [`crate::Vm`] for the engine `kvm@lab`, and by `cargo xtask lab`.
//!
//! ```text
//! session's standard input, output ── port bedplate.console  ── QEMU's standard input, output
//! its standard error               ── port bedplate.messages ── QEMU's standard error
//! commands beside it               ── port bedplate.control  ── a socket in the session's folder (run.rs)
//! the laboratory's own console     ── first serial line      ── a log in the session's folder
//! its exit status                  ── isa-debug-exit         ── QEMU's exit status (status_of)
//! folders of the host              ── virtio-9p              ── mounted at the same paths
//! ```
//!
//! Invariant: a session writes to its own folder and to the folders that it shares for writing, and nowhere else.

mod run;

pub use run::Run;

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_catalog::Prepared;
use guest_catalog::cpio::CpioWriter;

/// The guest of the catalogue whose kernel the laboratory runs on.
pub const GROUND: &str = "kvm-lab";
/// The CPU model that QEMU's processor, KVM and the interpreter can all give. Without XSAVE: it seems that QEMU 7.2
/// does not intercept XSETBV, so that KVM never learns of the guest's XCR0.
pub const CPU_MODEL: &str = "x86-64-v3,-vme,-invtsc,-xsave";
/// The line in the log that says that KVM is there.
pub const READY: &str = "LAB-READY";

/// Opens the session's input and output as descriptor 3, its messages as 4.
pub const OPEN_PORTS: &str = "exec 3<>\"$(port bedplate.console)\" 4>\"$(port bedplate.messages)\"\n";

/// RAM that the laboratory needs besides its guest's.
pub const OWN_MEMORY_MIB: u32 = 768;

const INIT: &str = include_str!("init.sh");
/// The laboratory's own kernel does not slow down what is measured in it.
const APPEND: &str = "console=ttyS0 rdinit=/lab/init mitigations=off no5lvl tsc=reliable no_timer_check panic=-1 quiet \
    loglevel=5";
/// The host's loopback, as QEMU's network has it.
const HOST: &str = "10.0.2.2";
/// Linux wants each of several joined archives at a multiple of four bytes; a page is tidier.
const ARCHIVE_ALIGN: usize = 4096;

/// What every session needs.
#[derive(Debug, Clone)]
pub struct Lab {
    /// `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// [`GROUND`], prepared.
    pub ground: Prepared,
    /// `bedplate`, linked statically.
    pub bedplate: PathBuf,
}

/// A folder of the host in the laboratory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Share {
    /// Its path on both sides.
    pub folder: PathBuf,
    /// The session may write to it.
    pub writable: bool,
}

/// Where a session's input and output are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ends {
    /// Standard input, output and error of the QEMU process.
    Pipes,
    /// The terminal, which then is the laboratory's own console, too.
    Terminal,
}

/// What one run of the laboratory does.
#[derive(Debug, Clone)]
pub struct Session {
    /// A shell script; its end is the session's. `bedplate` is in its path.
    pub script: String,
    /// Folders of the host.
    pub shares: Vec<Share>,
    /// TCP ports of the host's loopback that lead to the same port of the laboratory.
    pub ports: Vec<u16>,
    /// TCP ports of the laboratory's loopback that lead to the same port of the host's.
    pub relays: Vec<u16>,
    /// Input and output.
    pub ends: Ends,
    /// Processors. With more than one, QEMU 7.2 now and then executes for ever an INT3 that another processor has put
    /// there and taken back, as Linux patches its own code; KVM does that for the first VM and behind the last.
    pub cpus: u32,
    /// RAM.
    pub memory_mib: u32,
    /// Files of the host that are in the laboratory's own RAM, each at its path.
    pub files: Vec<PathBuf>,
    /// Time in the laboratory is the count of its instructions: one for each nanosecond, and for each tick of its TSC.
    pub counts_instructions: bool,
}

impl Session {
    /// Runs `script`, which has the whole terminal or uses the ports itself.
    pub fn script(script: String, ends: Ends) -> Self {
        Self {
            script,
            shares: Vec::new(),
            ports: Vec::new(),
            relays: Vec::new(),
            ends,
            cpus: 2,
            memory_mib: 512 + OWN_MEMORY_MIB,
            files: Vec::new(),
            counts_instructions: false,
        }
    }

    /// Runs `commands` as long as each ends well, their standard input, output and error being the session's.
    pub fn of(commands: &[Command]) -> Self {
        let line = |command: &Command| {
            let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).collect();
            format!("{} <&3 >&3 2>&4 3>&- 4>&-", quoted(&words))
        };
        let lines: Vec<_> = commands.iter().map(line).collect();
        Self::script(format!("{OPEN_PORTS}{}\n", lines.join(" &&\n")), Ends::Pipes)
    }

    /// Shares the folder of `file`.
    pub fn share_folder_of(&mut self, file: &Path, writable: bool) {
        self.share(file.parent().unwrap_or(Path::new("/")), writable);
    }

    /// Shares `folder`.
    pub fn share(&mut self, folder: &Path, writable: bool) {
        match self.shares.iter_mut().find(|share| share.folder == folder) {
            Some(share) => share.writable |= writable,
            None => self.shares.push(Share { folder: folder.to_path_buf(), writable }),
        }
    }
}

/// Paths in a session's folder.
#[derive(Debug, Clone)]
pub struct Folder(pub PathBuf);

impl Folder {
    /// The laboratory's own console.
    pub fn log(&self) -> PathBuf {
        self.0.join("lab.log")
    }

    /// The socket of `bedplate.control`; see [`Run::control`].
    pub fn control(&self) -> PathBuf {
        self.0.join("control")
    }

    /// What QEMU notes about resets of its processors: how a laboratory ends that triple-faults.
    pub fn resets(&self) -> PathBuf {
        self.0.join("resets.log")
    }

    /// The socket of QEMU's monitor, for people who look into a laboratory that hangs (`info registers -a`).
    pub fn monitor(&self) -> PathBuf {
        self.0.join("monitor")
    }

    fn initrd(&self) -> PathBuf {
        self.0.join("lab.cpio")
    }
}

impl Lab {
    /// The command that runs `session`, whose files go to `folder`.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn command(&self, session: &Session, folder: &Folder) -> io::Result<Command> {
        let mut session = session.clone();
        session.share_folder_of(&self.bedplate, false);
        fs::write(folder.initrd(), self.initrd(&session)?)?;
        let mut command = Command::new(&self.qemu);
        command.args(["-M", "q35", "-cpu", "max", "-nodefaults", "-accel"]);
        if session.counts_instructions {
            command.args(["tcg,thread=single", "-icount", "shift=0,sleep=off"]);
        } else {
            command.arg("tcg,thread=multi");
        }
        command.args(["-no-user-config", "-display", "none", "-no-reboot"]);
        command.args(["-smp", &session.cpus.to_string(), "-m", &session.memory_mib.to_string()]);
        command.arg("-kernel").arg(&self.ground.kernel).arg("-initrd").arg(folder.initrd());
        command.args(["-append", APPEND, "-device", "isa-debug-exit,iobase=0xf4,iosize=1"]);
        command.args(["-device", "virtio-serial-pci", "-device", "virtio-rng-pci"]);
        command.args(["-d", "cpu_reset", "-D", &text(&folder.resets())?]);
        let monitor = option(&["unix:", &text(&folder.monitor())?, ",server=on,wait=off"]);
        command.args(["-monitor", &monitor]);
        let log = folder.log();
        match session.ends {
            Ends::Pipes => {
                command.arg("-serial").arg(option(&["file:", &text(&log)?]));
                port(&mut command, "console", "stdio,signal=off");
                port(&mut command, "messages", "file,path=/dev/fd/2");
            }
            Ends::Terminal => {
                let both = option(&["stdio,mux=on,signal=off,logfile=", &text(&log)?, ",id=terminal"]);
                command.args(["-chardev", &both, "-serial", "chardev:terminal", "-mon", "terminal"]);
            }
        }
        let socket = option(&["socket,server=on,wait=off,path=", &text(&folder.control())?]);
        port(&mut command, "control", &socket);
        for (number, share) in session.shares.iter().enumerate() {
            let mode = if share.writable { "" } else { ",readonly=on" };
            let path = option(&["path=", &text(&share.folder)?]);
            let device = format!("local,id=share{number},{path},security_model=none,multidevs=remap{mode}");
            command.args(["-fsdev", &device]);
            command.args(["-device", &format!("virtio-9p-pci,fsdev=share{number},mount_tag=share{number}")]);
        }
        let mut net = "user,model=virtio-net-pci".to_string();
        for port in &session.ports {
            net.push_str(&format!(",hostfwd=tcp:127.0.0.1:{port}-:{port}"));
        }
        command.args(["-nic", &net]);
        Ok(command)
    }

    /// The ground's initrd with the session behind it.
    fn initrd(&self, session: &Session) -> io::Result<Vec<u8>> {
        let ground = self.ground.initrd.as_ref().ok_or_else(|| io::Error::other("no initrd"))?;
        let mut archive = fs::read(ground)?;
        archive.resize(archive.len().next_multiple_of(ARCHIVE_ALIGN), 0);
        let mut cpio = CpioWriter::new(archive);
        cpio.directory("lab")?;
        cpio.executable("lab/init", INIT.as_bytes())?;
        cpio.symlink("lab/bedplate", &text(&self.bedplate)?)?;
        for file in &session.files {
            add(&mut cpio, file)?;
        }
        let mut script = String::new();
        for port in &session.relays {
            script.push_str(&format!("nc -ll -p {port} -e nc {HOST} {port} &\n"));
        }
        script.push_str(&session.script);
        cpio.file("lab/session", script.as_bytes())?;
        let mut shares = String::new();
        for (number, share) in session.shares.iter().enumerate() {
            // Without a cache, both sides see each other's writes.
            let options = if share.writable { "rw,cache=none" } else { "ro,cache=loose" };
            shares.push_str(&format!("share{number} {options} {}\n", text(&share.folder)?));
        }
        cpio.file("lab/shares", shares.as_bytes())?;
        cpio.finish()
    }
}

/// Adds `file` and the folders above it.
fn add(cpio: &mut CpioWriter<Vec<u8>>, file: &Path) -> io::Result<()> {
    let path = text(file)?;
    let path = path.trim_start_matches('/');
    for (at, _) in path.match_indices('/') {
        cpio.directory(&path[..at])?;
    }
    cpio.executable(path, &fs::read(file)?)
}

/// How the session ended, from QEMU's exit status; `None`: QEMU ended otherwise.
pub fn status_of(qemu: i32) -> Option<i32> {
    // init.sh writes one more than the status; the device shifts it and sets bit 0.
    (qemu >= 3 && qemu % 2 == 1).then_some(qemu / 2 - 1)
}

/// Words as a POSIX shell reads them.
pub(crate) fn quoted(words: &[&OsStr]) -> String {
    let one = |word: &&OsStr| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
    words.iter().map(one).collect::<Vec<_>>().join(" ")
}

fn port(command: &mut Command, name: &str, end: &str) {
    command.args(["-chardev", &format!("{end},id={name}")]);
    command.args(["-device", &format!("virtserialport,chardev={name},name=bedplate.{name}")]);
}

/// A QEMU option; a comma in its last part is doubled.
fn option(parts: &[&str]) -> String {
    let (mut all, mut parts) = (String::new(), parts.iter());
    all.push_str(parts.next().unwrap_or(&""));
    for (n, part) in parts.enumerate() {
        all.push_str(&if n == 0 { part.replace(',', ",,") } else { (*part).to_string() });
    }
    all
}

/// A path that the laboratory's init and QEMU can be told.
fn text(path: &Path) -> io::Result<String> {
    let wrong = || io::Error::other(format!("{} cannot be shared: a blank in its name", path.display()));
    let text = path.to_str().filter(|text| !text.contains(char::is_whitespace)).ok_or_else(wrong)?;
    Ok(text.to_string())
}

#[cfg(test)]
mod tests;
