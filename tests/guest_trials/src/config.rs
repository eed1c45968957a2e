//! What a trial's machine is, and the command lines by which Bedplate and QEMU make it.
//!
//! Invariant: the same [`VmConfig`] describes the same machine for both.

use std::io;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_catalog::{DiskFormat, Prepared};

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
    pub(crate) fn command(&self, vmm: &Vmm) -> io::Result<(Command, Option<lab::Run>)> {
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::process::Stdio;

    pub(crate) fn config() -> VmConfig {
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
}
