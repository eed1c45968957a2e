//! Rows in which a VM goes from a host to bare metal and back, in the middle of its work.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use guest_trials::{Outcome, checksum_job};

use super::bundle::{self, INITRD, KERNEL, NamedFile};
use super::emulator::{Ending, Qemu, Step};
use super::rows::{GUEST, Images, PATIENCE, bundle_file, expect};
use crate::workspace;

const ROUNDS: u32 = 40;
const POOL_KIB: usize = 256;
const DISK_KIB: usize = 512;
const DISK_BYTES: usize = 16 << 20;
/// For the saved VM; it is sparse.
const SAVE_BYTES: u64 = 512 << 20;
const SAVED: &str = "vm.saved";
/// What QEMU's processors have.
const ADDRESS_BITS: u32 = 40;

fn words() -> String {
    format!("bedplate.busy=disk,{DISK_KIB} bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff")
}

/// The disk that the guest writes, and the one that it is saved to.
struct Disks {
    work: PathBuf,
    saved: PathBuf,
}

impl Disks {
    fn new() -> Result<Self> {
        let work = bundle_file("state-work.img", &vec![0; DISK_BYTES])?;
        let saved = bundle_file("state-saved.img", &[])?;
        File::options().write(true).open(&saved)?.set_len(SAVE_BYTES)?;
        Ok(Self { work, saved })
    }

    fn arguments(&self) -> Vec<String> {
        let disks = [&self.work, &self.saved].into_iter().enumerate();
        let argument = |(n, path): (usize, &PathBuf)| {
            let drive = format!("if=none,id=d{n},format=raw,file={}", path.display());
            ["-drive".into(), drive, "-device".into(), format!("virtio-blk-pci,drive=d{n}")]
        };
        disks.flat_map(argument).collect()
    }
}

/// Runs the VM of `spec` on bare metal until round `round` of its job, and saves it there; the serial log.
fn run_and_save(
    images: &Images,
    spec: &str,
    files: &[NamedFile],
    disks: &Disks,
    round: u32,
) -> Result<String> {
    let bundle = Some(bundle::write(spec, files, None)?);
    let far = format!("BEDPLATE-CHECKSUM {round}/");
    let steps =
        [Step { what: "the round to save in", until: &|log| log.contains(&far), keys: "\x010save 1\r" }];
    let qemu = Qemu { bundle, counted: true, more: disks.arguments(), ..images.pvh()? };
    let (log, ending) = qemu.talk(PATIENCE, &steps)?;
    expect(&log, &["VM `vm` is saved", "VM `vm` has ended: Saved"])?;
    if ending != Ending::Good || log.contains("BEDPLATE-CLOCK") {
        bail!("it ended {ending:?}, or the guest's clock went back:\n{log}");
    }
    Ok(log)
}

/// A hosted VM with its console in a file.
struct Hosted {
    bedplate: PathBuf,
    name: String,
    console: PathBuf,
}

impl Hosted {
    fn new() -> Result<Self> {
        let console = bundle_file("state-console.log", &[])?;
        Ok(Self {
            bedplate: workspace::bedplate("release")?,
            name: format!("metal-state-{}", std::process::id()),
            console,
        })
    }

    /// Starts `bedplate run` with `arguments`, and calls `then` with what its console says until it gives `true`. Waits
    /// for the end; the console's text.
    fn run(&self, arguments: &[&str], mut then: impl FnMut(&str) -> Result<bool>) -> Result<String> {
        let mut command = Command::new(&self.bedplate);
        command.args(["run", "--engine", "soft", "--name", &self.name]).args(arguments);
        command.stdin(Stdio::null()).stdout(File::create(&self.console)?).stderr(Stdio::piped());
        let mut child = command.spawn().context("cannot run bedplate")?;
        let deadline = Instant::now() + Duration::from_secs(PATIENCE);
        let mut done = false;
        let status = loop {
            let said = String::from_utf8_lossy(&fs::read(&self.console)?).into_owned();
            done = done || then(&said)?;
            if let Some(status) = child.try_wait().context("cannot wait for bedplate")? {
                break status;
            }
            if Instant::now() >= deadline {
                child.kill().context("cannot end bedplate")?;
                child.wait().context("cannot wait for bedplate")?;
                bail!("the hosted VM did not come to an end:\n{said}");
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        let said = String::from_utf8_lossy(&fs::read(&self.console)?).into_owned();
        if !status.success() {
            let mut reason = String::new();
            if let Some(mut errors) = child.stderr.take() {
                std::io::Read::read_to_string(&mut errors, &mut reason)?;
            }
            bail!("bedplate ended with {status}: {reason}\n{said}");
        }
        Ok(said)
    }

    fn save(&self, file: &Path) -> Result<()> {
        let output = Command::new(&self.bedplate).args(["ctl", &self.name, "save"]).arg(file).output()?;
        if !output.status.success() {
            bail!("bedplate ctl save: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(())
    }

    /// Brings the VM back from a disk that bare metal saved it to, and sees it to its end.
    fn finish(&self, disks: &Disks) -> Result<()> {
        let (saved, work) =
            (disks.saved.display().to_string(), format!("{},format=raw", disks.work.display()));
        let said = self.run(&["--restore", &saved, "--disk", &work, "--disks-moved"], |_| Ok(true))?;
        let sum = format!("BEDPLATE-CHECKSUM final {}", checksum_job(ROUNDS, POOL_KIB));
        expect(&said, &["BEDPLATE-BUSY disk ok", &sum])?;
        if said.contains("BEDPLATE-CLOCK") {
            bail!("the guest's clock went back:\n{said}");
        }
        Ok(())
    }
}

/// From a host in a file of the bundle, and back on a disk.
pub fn from_a_host_and_back(images: &Images) -> Result<Outcome> {
    let (append, guest) = bundle::guest_files(GUEST)?;
    let disks = Disks::new()?;
    let hosted = Hosted::new()?;
    let mut boot = String::new();
    for (name, content) in guest {
        let file = bundle_file(&format!("state-{name}"), &content)?;
        let key = if name == KERNEL { "kernel" } else { "initrd" };
        boot.push_str(&format!("{key} = \"{}\"\n", file.display()));
    }
    let spec = format!(
        "memory = \"256M\"\ncpu_model = \"x86-64-v3,-vme\"\naddress_bits = {ADDRESS_BITS}\n[boot]\n{boot}append = \"{append} quiet {}\"\n[[disk]]\npath = \"{}\"\nformat = \"raw\"\n",
        words(),
        disks.work.display()
    );
    let spec = bundle_file("state.toml", spec.as_bytes())?;
    let file = spec.with_file_name(SAVED);
    if file.exists() {
        fs::remove_file(&file)?;
    }
    let said = hosted.run(&[&spec.display().to_string()], |said| {
        let due = said.contains("BEDPLATE-CHECKSUM 5/");
        if due {
            hosted.save(&file)?;
        }
        Ok(due)
    })?;
    expect(&said, &["BEDPLATE-CHECKSUM 5/"])?;
    let saved = fs::read(&file).context("the host has saved nothing")?;
    let spec = format!(
        "[[vm]]\nname = \"vm\"\nrestore = \"bundle:{SAVED}\"\ndisk = \"machine:0\"\nsave = \"machine:1\"\n"
    );
    let log = run_and_save(images, &spec, &[(SAVED, saved)], &disks, 20)?;
    if log.contains("BEDPLATE-MARKER") {
        bail!("it booted instead of going on:\n{log}");
    }
    hosted.finish(&disks)?;
    Ok(Outcome::Passed)
}

/// From bare metal, by way of a disk, to bare metal, and from there to a host.
pub fn from_metal_to_a_host(images: &Images) -> Result<Outcome> {
    let (append, files) = bundle::guest_files(GUEST)?;
    let disks = Disks::new()?;
    let vm =
        |more: &str| format!("[[vm]]\nname = \"vm\"\ndisk = \"machine:0\"\nsave = \"machine:1\"\n{more}");
    let born = format!(
        "memory_mib = 256\ncpu_model = \"x86-64-v3,-vme\"\nkernel = \"{KERNEL}\"\ninitrd = \"{INITRD}\"\nappend = \"{append} quiet {}\"\n",
        words()
    );
    run_and_save(images, &vm(&born), &files, &disks, 5)?;
    let log = run_and_save(images, &vm("restore = \"machine:1\"\n"), &[], &disks, 15)?;
    if log.contains("BEDPLATE-MARKER") {
        bail!("it booted instead of going on:\n{log}");
    }
    Hosted::new()?.finish(&disks)?;
    Ok(Outcome::Passed)
}
