//! Bochs, started for one boot: Intel's VMX, and an AMD processor whose SVM has what QEMU's lacks. OVMF is its firmware, the
//! UEFI application is on a FAT disk beside the bundle, and the serial log is a file.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::emulator::Ending;
use crate::{exec, workspace};

pub const BOCHS: &str = "bochs-bin";
/// Makes FAT volumes without a mount.
const MTOOLS: [&str; 3] = ["mformat", "mmd", "mcopy"];
/// OVMF's build of 2 MiB, variables first: what fits below 4 GiB as Bochs maps firmware.
const FIRMWARE: &str = "/usr/share/ovmf/OVMF.fd";
/// A link of Bochs's package to a file of another one, which that one does not insist on.
pub const VGA: &str = "/usr/share/bochs/VGABIOS-lgpl-latest";
const MEMORY_MIB: u32 = 512;
/// Instructions that Bochs takes for a second.
const SPEED: u32 = 50_000_000;
/// Room on the volume besides the files.
const SPARE: u64 = 4 << 20;
const MIB: u64 = 1 << 20;

/// Processors, as Bochs calls them.
pub const INTEL: &str = "corei7_skylake_x";
pub const AMD: &str = "ryzen";
/// VMX without EPT.
pub const OLD_INTEL: &str = "core2_penryn_t9600";
/// Neither VMX nor SVM.
pub const PLAIN: &str = "athlon64_venice";

/// What is not installed; empty: nothing is missing.
pub fn missing() -> Vec<&'static str> {
    let programs = MTOOLS.into_iter().chain([BOCHS]).filter(|program| exec::find(program).is_none());
    programs.chain([FIRMWARE, VGA].into_iter().filter(|file| !Path::new(file).is_file())).collect()
}

/// A machine to boot the UEFI application in.
#[derive(Clone)]
pub struct Bochs {
    pub application: PathBuf,
    pub bundle: Option<PathBuf>,
    /// One of the models above, or another of `bochs-bin -help cpu`.
    pub model: String,
    /// The serial log goes to the terminal as it comes.
    pub shown: bool,
}

impl Bochs {
    pub fn new(application: &Path, model: &str) -> Self {
        Self { application: application.to_owned(), bundle: None, model: model.into(), shown: false }
    }

    /// Boots; the serial log, and whether it ended by itself: how, only the log tells.
    pub fn run(&self, seconds: u64) -> Result<(String, Ending)> {
        let missing = missing();
        if !missing.is_empty() {
            bail!("{} not installed: cargo xtask setup", missing.join(", "));
        }
        let folder = workspace::target_folder()?.join("metal/bochs");
        if folder.exists() {
            // A killed run leaves locks.
            fs::remove_dir_all(&folder).context("cannot remove the last run's folder")?;
        }
        fs::create_dir_all(&folder).context("cannot make a folder for Bochs")?;
        self.volume(&folder.join("volume.img"))?;
        let log = folder.join("serial.log");
        fs::write(&log, "").context("cannot make the serial log")?;
        fs::write(folder.join("bochsrc"), self.configuration())
            .context("cannot write Bochs's configuration")?;
        // Debian's build has the debugger, which waits for a command.
        fs::write(folder.join("commands"), "c\n").context("cannot write Bochs's commands")?;
        let output = File::create(folder.join("output")).context("cannot make a file for Bochs's output")?;
        let mut child = Command::new(BOCHS)
            .args(["-q", "-f", "bochsrc", "-rc", "commands"])
            .current_dir(&folder)
            .stdin(Stdio::null())
            .stdout(output.try_clone().context("cannot share Bochs's output")?)
            .stderr(output)
            .spawn()
            .context("cannot run Bochs")?;
        let deadline = Instant::now() + Duration::from_secs(seconds);
        let mut serial =
            Tail { file: File::open(&log).context("cannot read the serial log")?, text: Vec::new() };
        let ending = loop {
            let ended = child.try_wait().context("cannot wait for Bochs")?.is_some();
            serial.follow(self.shown)?;
            if ended {
                break Ending::Good;
            }
            if Instant::now() >= deadline {
                child.kill().context("cannot end Bochs")?;
                child.wait().context("cannot wait for Bochs")?;
                break Ending::Timeout;
            }
            std::thread::sleep(Duration::from_millis(100));
        };
        Ok((String::from_utf8_lossy(&serial.text).into_owned(), ending))
    }

    /// A FAT file system, without partitions, with what the loader looks for.
    fn volume(&self, image: &Path) -> Result<()> {
        let mut files = vec![(self.application.as_path(), "::EFI/BOOT/BOOTX64.EFI")];
        files.extend(self.bundle.as_deref().map(|bundle| (bundle, "::bedplate/bundle.cpio")));
        let mut bytes = SPARE;
        for (from, _) in &files {
            bytes += fs::metadata(from).with_context(|| format!("cannot read {}", from.display()))?.len();
        }
        let bytes = bytes.next_multiple_of(MIB);
        File::create(image).and_then(|file| file.set_len(bytes)).context("cannot make a boot volume")?;
        let image = image.display().to_string();
        let sectors = (bytes / 512).to_string();
        let run = |program: &str, arguments: &[&str]| {
            let mut all = vec!["-i", &image];
            all.extend(arguments);
            exec::output(&workspace::root(), program, &all).map(|_| ())
        };
        run("mformat", &["-T", &sectors, "-h", "16", "-s", "63", "::"])?;
        run("mmd", &["::EFI", "::EFI/BOOT", "::bedplate"])?;
        files.iter().try_for_each(|(from, to)| run("mcopy", &[&from.display().to_string(), to]))
    }

    /// `bochsrc`: no display that anybody must look at; the time is what was executed; "Shutdown" written to port 0x8900
    /// ends it, as `metal`'s `power_off` does.
    fn configuration(&self) -> String {
        let model = &self.model;
        format!(
            "plugin_ctrl: unmapped=1, biosdev=1, speaker=0, extfpuirq=1, parallel=0, serial=1, iodebug=0
config_interface: textconfig
display_library: rfb, options=\"timeout=0\"
cpu: model={model}, count=1, ips={SPEED}, reset_on_triple_fault=0, ignore_bad_msrs=1
memory: guest={MEMORY_MIB}, host={MEMORY_MIB}
romimage: file={FIRMWARE}
vgaromimage: file={VGA}
boot: disk
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path=volume.img, mode=flat
com1: enabled=1, mode=file, dev=serial.log
clock: sync=none, time0=local
log: bochs.log
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"
        )
    }
}

/// A file that grows.
struct Tail {
    file: File,
    text: Vec<u8>,
}

impl Tail {
    /// Reads what is new.
    fn follow(&mut self, shown: bool) -> Result<()> {
        let from = self.text.len();
        self.file.seek(SeekFrom::Start(from as u64)).context("cannot read the serial log")?;
        self.file.read_to_end(&mut self.text).context("cannot read the serial log")?;
        if shown && self.text.len() > from {
            let mut terminal = std::io::stdout();
            terminal
                .write_all(&self.text[from..])
                .and_then(|()| terminal.flush())
                .context("cannot write to the terminal")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_names_the_processor() {
        let text = Bochs::new(Path::new("a.efi"), AMD).configuration();
        assert!(text.contains("cpu: model=ryzen, count=1") && text.contains("path=volume.img"));
        assert!(text.lines().all(|line| line.contains(':')), "every line is an option:\n{text}");
    }

    #[test]
    fn a_log_is_followed_as_it_grows() {
        let path = std::env::temp_dir().join(format!("bedplate-tail-{}", std::process::id()));
        fs::write(&path, "one\n").unwrap();
        let mut tail = Tail { file: File::open(&path).unwrap(), text: Vec::new() };
        tail.follow(false).unwrap();
        fs::write(&path, "one\ntwo\n").unwrap();
        tail.follow(false).unwrap();
        tail.follow(false).unwrap();
        assert_eq!(tail.text, b"one\ntwo\n");
        fs::remove_file(&path).unwrap();
    }
}
