//! QEMU's TCG with AMD SVM, started for one boot: by PVH (`-kernel`), or by OVMF from a volume with the UEFI
//! application. The serial log is read up to the end that the image itself makes, or to a timeout.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::workspace;

pub const QEMU: &str = "qemu-system-x86_64";

/// isa-debug-exit makes the status 2·value + 1; `metal`'s `power_off` writes 0x10 or 0x11.
const GOOD: i32 = 0x21;

/// How a boot ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The image said that all went well.
    Good,
    /// The image stopped for a reason that it told.
    Bad,
    /// It was still running when its time was over.
    Timeout,
}

impl Ending {
    pub fn of(status: ExitStatus) -> Self {
        if status.code() == Some(GOOD) { Self::Good } else { Self::Bad }
    }
}

/// What is booted, and how.
#[derive(Clone)]
pub enum Boot {
    /// The image, by QEMU itself.
    Pvh(PathBuf),
    /// The UEFI application, by OVMF.
    Uefi(PathBuf),
}

/// UEFI firmware of the package ovmf: code, and the variables that it starts with.
const OVMF: [&str; 2] = ["/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"];

/// Whether OVMF is installed.
pub fn has_ovmf() -> bool {
    OVMF.iter().all(|file| Path::new(file).is_file())
}

/// A machine to boot the image in.
#[derive(Clone)]
pub struct Qemu {
    pub boot: Boot,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Module: the bundle.
    pub bundle: Option<PathBuf>,
    /// `-cpu`.
    pub cpu: &'static str,
    /// Time is instructions executed: 1 ns each, whatever else the host does.
    pub counted: bool,
    /// The image ends the emulator when it stops; otherwise it halts, and its monitor is at the serial line (Ctrl-A c).
    pub ends: bool,
    /// More arguments.
    pub more: Vec<String>,
}

impl Qemu {
    pub fn new(boot: Boot) -> Result<Self> {
        if crate::exec::find(QEMU).is_none() {
            bail!("{QEMU} is not installed: cargo xtask setup");
        }
        let (memory_mib, cpus, bundle, cpu) = (1024, 1, None, "max");
        Ok(Self { boot, memory_mib, cpus, bundle, cpu, counted: false, ends: true, more: Vec::new() })
    }

    /// The command, its serial line at `serial`.
    pub fn command(&self, serial: &str) -> Result<Command> {
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-cpu", self.cpu, "-m", &self.memory_mib.to_string(), "-smp", &self.cpus.to_string()]);
        command.args(["-serial", serial]).args(&self.more);
        if self.ends {
            command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]);
        }
        if self.counted {
            command.args(["-icount", "shift=0,sleep=off"]);
        }
        match &self.boot {
            Boot::Pvh(image) => {
                command.arg("-kernel").arg(image);
                if let Some(bundle) = &self.bundle {
                    command.arg("-initrd").arg(bundle);
                }
            }
            Boot::Uefi(application) => {
                let volume = self.volume(application)?;
                for (unit, file) in OVMF.iter().enumerate() {
                    let drive = format!("if=pflash,unit={unit},format=raw,file={file},snapshot=on");
                    command.arg("-drive").arg(drive);
                }
                command
                    .arg("-drive")
                    .arg(format!("if=ide,format=raw,file=fat:{},snapshot=on", volume.display()));
            }
        }
        Ok(command)
    }

    /// A folder that is the firmware's boot volume.
    fn volume(&self, application: &Path) -> Result<PathBuf> {
        let volume = workspace::target_folder()?.join("metal/volume");
        if volume.exists() {
            fs::remove_dir_all(&volume).context("cannot remove the last boot volume")?;
        }
        let mut files = vec![(application, volume.join("EFI/BOOT/BOOTX64.EFI"))];
        files.extend(self.bundle.as_deref().map(|bundle| (bundle, volume.join("bedplate/bundle.cpio"))));
        for (from, to) in files {
            fs::create_dir_all(to.parent().unwrap_or(&volume)).context("cannot make a boot volume")?;
            fs::copy(from, &to).with_context(|| format!("cannot write {}", to.display()))?;
        }
        Ok(volume)
    }

    /// Boots; the serial log and how it ended.
    pub fn run(&self, seconds: u64) -> Result<(String, Ending)> {
        self.talk(seconds, &[])
    }

    /// Boots, and types: the keys of each step once the log is as it waits for.
    pub fn talk(&self, seconds: u64, steps: &[Step<'_>]) -> Result<(String, Ending)> {
        let mut command = self.command(if self.ends { "stdio" } else { "mon:stdio" })?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run QEMU")?;
        let mut keys = child.stdin.take().context("QEMU has no input")?;
        let mut output = child.stdout.take().context("QEMU has no output")?;
        let log = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let log = log.clone();
            move || {
                let mut piece = [0; 4096];
                // What was read so far is the log, however it ends.
                while let Ok(bytes @ 1..) = output.read(&mut piece) {
                    lock(&log).extend_from_slice(&piece[..bytes]);
                }
            }
        });
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut steps = steps.iter().peekable();
        let ending = loop {
            let due = |step: &&Step<'_>| (step.until)(&String::from_utf8_lossy(&lock(&log)));
            if let Some(step) = steps.next_if(due) {
                // One that has ended takes no keys; its log tells.
                let _ = keys.write_all(step.keys.as_bytes()).and_then(|()| keys.flush());
                continue;
            }
            if let Some(status) = child.try_wait().context("cannot wait for QEMU")? {
                break Ending::of(status);
            }
            if Instant::now() >= deadline {
                child.kill().context("cannot end QEMU")?;
                child.wait().context("cannot wait for QEMU")?;
                break Ending::Timeout;
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        reader.join().map_err(|_| anyhow::anyhow!("the log's reader ended early"))?;
        let log = String::from_utf8_lossy(&lock(&log)).into_owned();
        match steps.next() {
            Some(step) => bail!("{} did not come ({ending:?}):\n{log}", step.what),
            None => Ok((log, ending)),
        }
    }
}

/// Something to type.
pub struct Step<'a> {
    /// What is waited for, for people.
    pub what: &'a str,
    /// Whether it has come, as the log tells.
    pub until: &'a dyn Fn(&str) -> bool,
    /// What is typed then.
    pub keys: &'a str,
}

fn lock(log: &Mutex<Vec<u8>>) -> MutexGuard<'_, Vec<u8>> {
    log.lock().unwrap_or_else(PoisonError::into_inner)
}
