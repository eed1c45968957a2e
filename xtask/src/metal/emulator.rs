//! QEMU's TCG with AMD SVM, started for one boot. The serial log is read up to the end that the image itself makes, or
//! to a timeout.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

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

/// A machine to boot the image in.
pub struct Qemu {
    pub image: PathBuf,
    pub memory_mib: u32,
    pub cpus: u32,
    /// Module: the bundle.
    pub bundle: Option<PathBuf>,
    /// `-cpu`.
    pub cpu: &'static str,
}

impl Qemu {
    pub fn new(image: PathBuf) -> Result<Self> {
        if crate::exec::find(QEMU).is_none() {
            bail!("{QEMU} is not installed: cargo xtask setup");
        }
        Ok(Self { image, memory_mib: 1024, cpus: 1, bundle: None, cpu: "max" })
    }

    /// The command, its serial line at `serial`.
    pub fn command(&self, serial: &str) -> Command {
        let mut command = Command::new(QEMU);
        command.args(["-accel", "tcg", "-machine", "q35", "-nodefaults", "-display", "none", "-no-reboot"]);
        command.args(["-cpu", self.cpu, "-m", &self.memory_mib.to_string(), "-smp", &self.cpus.to_string()]);
        command.args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-serial", serial, "-kernel"]);
        command.arg(&self.image);
        if let Some(bundle) = &self.bundle {
            command.arg("-initrd").arg(bundle);
        }
        command
    }

    /// Boots; the serial log and how it ended.
    pub fn run(&self, seconds: u64) -> Result<(String, Ending)> {
        let mut command = self.command("stdio");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run QEMU")?;
        let mut output = child.stdout.take().context("QEMU has no output")?;
        let reader = std::thread::spawn(move || {
            let mut log = Vec::new();
            // What was read so far is the log, however it ends.
            let _ = output.read_to_end(&mut log);
            String::from_utf8_lossy(&log).into_owned()
        });
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let ending = loop {
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
        let log = reader.join().map_err(|_| anyhow::anyhow!("the log's reader ended early"))?;
        Ok((log, ending))
    }
}
