//! The verdicts of `cargo xtask metal test`: what the image must say on its serial line, boot by boot.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use guest_trials::{FileServer, Outcome, pattern, pattern_sum};

use super::bundle::{self, BundleOptions};
use super::emulator::{self, Boot, Ending, Qemu};
use super::{bochs_rows, build, build_efi, build_exit_bench, iommu, isolation, loadable, screen, state};
use crate::summary::Summary;
use crate::{exec, workspace};

/// The guest of the boot rows.
pub const GUEST: &str = "cloud";
const ROUNDS: u32 = 4;
const POOL_KIB: usize = 64;
/// Disk and network move this much.
const KIB: usize = 512;
/// The VM that serves: an address that QEMU's DHCP server does not give away.
const SERVER: &str = "10.0.2.101";
/// The most that the hypervisor may take with two VMs, besides their RAM and disks.
const OWN_MEMORY_KIB: u64 = 16 << 10;
/// A boot takes this long (in seconds) only if it hangs: emulated virtualization on a busy machine is slow.
pub const PATIENCE: u64 = 900;

/// Why a row with Linux does not run.
pub const NO_GUEST: &str = "its guest could not be prepared";

/// A row: its name and what it does with the image and the UEFI application.
type Row = (&'static str, fn(&Images) -> Result<Outcome>);

/// What is booted.
pub struct Images {
    pvh: PathBuf,
    efi: PathBuf,
}

/// Boots without a guest.
const BOOTS: &[Row] = &[
    ("metal: PVH boot, memory map on serial", |images| memory_map(images.pvh())),
    ("metal: too little memory is refused", too_little_memory),
    ("metal: a processor without virtualization is refused", no_svm),
    ("metal: a damaged bundle is refused", damaged_bundle),
    ("metal: a refusal on a text screen", |images| screen::text(images.pvh()?)),
];
/// The same with firmware.
const UEFI_BOOTS: &[Row] = &[
    ("metal: UEFI boot without a bundle, memory map on serial", |images| memory_map(images.uefi())),
    ("metal: a refusal on UEFI's screen", |images| screen::pixels(images.uefi()?)),
];
/// Boots with a guest of our own.
const OWN_GUESTS: &[Row] = &[
    ("metal: what exits cost, in instructions", exit_costs),
    ("metal: the monitor, typed at", isolation::monitor),
    ("metal: a disk that goes astray, with and without an IOMMU", iommu::stray),
    ("metal: a panic of the hypervisor is told", isolation::panic),
    ("metal: a stack that overflows is told", isolation::stack_overflow),
];
/// Boots with Linux.
const GUESTS: &[Row] = &[
    ("metal: Linux boots, 1 vCPU", |images| linux(&images.pvh()?, 1)),
    ("metal: Linux boots, 2 vCPUs", |images| linux(&images.pvh()?, 2)),
    ("metal: Linux boots, 2 vCPUs on 2 processors", two_processors),
    ("metal: two VMs, RAM disk, network between them", |images| two_vms(images, 1)),
    ("metal: two VMs on 2 processors, RAM disk, network between them", |images| two_vms(images, 2)),
    ("metal: the machine's disk and network card", machine_devices),
    ("metal: disk and network card behind AMD's IOMMU", |images| iommu::devices(images, iommu::AMD)),
    ("metal: disk and network card behind Intel's IOMMU", |images| iommu::devices(images, iommu::INTEL)),
    ("metal: a VM from a host goes on, and goes back", state::from_a_host_and_back),
    ("metal: a VM saved on bare metal goes on there, and on a host", state::from_metal_to_a_host),
    ("metal: VMs that crash, spin and fault beside one that computes", isolation::beside_each_other),
];
const UEFI_GUESTS: &[Row] =
    &[("metal: UEFI boot, Linux from the boot volume", |images| linux(&images.uefi()?, 1))];

/// All verdicts of the image, or those with `only` in their name; also part of `cargo xtask test`. `long`: those too that
/// are the campaign's.
pub fn test(summary: &mut Summary, only: Option<&str>, long: bool) {
    if exec::find(emulator::QEMU).is_none() {
        return summary.not_run("metal", "QEMU is not installed: cargo xtask setup");
    }
    let mut images = None;
    summary.step("metal: build", || {
        let pvh = build()?;
        images = Some(Images { efi: build_efi(&pvh)?, pvh });
        Ok(Outcome::Passed)
    });
    let Some(images) = images else {
        return summary.not_run("metal: boots", "the image was not built");
    };
    summary.step("metal: guest", || bundle::fetch(GUEST).map(|_| Outcome::Passed));
    // Each emulator keeps one processor busy.
    summary.side_by_side(
        |summary| in_qemu(summary, &images, only),
        |summary| {
            bochs_rows::steps(summary, &images.efi, |row| (long || !row.long) && chosen(row.name, only))
        },
    );
}

fn in_qemu(summary: &mut Summary, images: &Images, only: Option<&str>) {
    let guest = bundle::is_ready(GUEST);
    let groups = [
        (BOOTS, false, false),
        (UEFI_BOOTS, true, false),
        (OWN_GUESTS, false, false),
        (GUESTS, false, true),
        (UEFI_GUESTS, true, true),
    ];
    for (rows, firmware, with_guest) in groups {
        for (name, row) in rows.iter().filter(|(name, _)| chosen(name, only)) {
            if firmware && !emulator::has_ovmf() {
                summary.not_run(name, "OVMF is not installed: cargo xtask setup");
            } else if with_guest && !guest {
                summary.not_run(name, NO_GUEST);
            } else {
                summary.step(name, || row(images));
            }
        }
    }
}

/// Whether the row's name was asked for.
fn chosen(name: &str, only: Option<&str>) -> bool {
    only.is_none_or(|only| name.contains(only))
}

impl Images {
    /// The image in an emulator.
    pub fn pvh(&self) -> Result<Qemu> {
        Qemu::new(Boot::Pvh(self.pvh.clone()))
    }
    fn uefi(&self) -> Result<Qemu> {
        Qemu::new(Boot::Uefi(self.efi.clone()))
    }
}

fn memory_map(qemu: Result<Qemu>) -> Result<Outcome> {
    let (log, ending) = qemu?.run(PATIENCE)?;
    expect(
        &log,
        &[
            "bedplate-metal ",
            "memory map:",
            "usable memory: 10",
            "TSC ",
            "free memory: ",
            "there is no bundle",
        ],
    )?;
    if ending != Ending::Good {
        bail!("it did not end well:\n{log}");
    }
    Ok(Outcome::Passed)
}

fn too_little_memory(images: &Images) -> Result<Outcome> {
    let (log, ending) = Qemu { memory_mib: 16, ..images.pvh()? }.run(PATIENCE)?;
    expect(&log, &["REFUSED: too little memory", "HALTED"])?;
    if ending == Ending::Good {
        bail!("it ended as if all was well:\n{log}");
    }
    Ok(Outcome::Passed)
}

fn no_svm(images: &Images) -> Result<Outcome> {
    let bundle = bundle_file("no-svm.cpio", b"any")?;
    let (log, _) = Qemu { cpu: "max,-svm", bundle: Some(bundle), ..images.pvh()? }.run(PATIENCE)?;
    expect(&log, &["REFUSED: this processor has no virtualization", "HALTED"])?;
    Ok(Outcome::Passed)
}

fn damaged_bundle(images: &Images) -> Result<Outcome> {
    let bundle = bundle_file("damaged.cpio", &[0x30; 5000])?;
    let (log, _) = Qemu { bundle: Some(bundle), ..images.pvh()? }.run(PATIENCE)?;
    expect(&log, &["REFUSED: the bundle is no cpio archive at byte 0", "HALTED"])?;
    Ok(Outcome::Passed)
}

/// A file among the bundles.
pub fn bundle_file(name: &str, content: &[u8]) -> Result<PathBuf> {
    let folder = workspace::target_folder()?.join("metal");
    fs::create_dir_all(&folder).context("cannot make a folder for bundles")?;
    let path = folder.join(name);
    fs::write(&path, content).context("cannot write a bundle")?;
    Ok(path)
}

/// A VM of a row: what its guest does besides computing a checksum, its devices, and what it must say.
pub struct Guest {
    verbs: String,
    lines: Vec<&'static str>,
    says: Vec<String>,
}

/// The bundle that runs these guests, at `output` or where bundles are.
pub fn bundle_of(cpus: u32, guests: &[Guest], output: Option<&Path>) -> Result<PathBuf> {
    let words = |guest: &Guest| {
        format!("quiet {} bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff", guest.verbs)
    };
    let options = BundleOptions {
        guest: GUEST.into(),
        vm: guests.iter().map(words).collect(),
        cpus,
        memory: 256,
        lines: Vec::new(),
        own_lines: guests.iter().map(|g| g.lines.iter().map(ToString::to_string).collect()).collect(),
        blank_mib: 8,
        cpu_model: "x86-64-v3,-vme".into(),
        output: output.map(Path::to_owned),
    };
    bundle::make(&options)
}

/// Boots the guests; each reaches the initrd's marker, says what it must, gets its checksum right and switches itself
/// off. The serial log.
fn boot(qemu: Qemu, cpus: u32, guests: &[Guest]) -> Result<String> {
    let started = Instant::now();
    let bundle = Some(bundle_of(cpus, guests, None)?);
    // Firmware waits in loops, which take long where instructions are time.
    let counted = matches!(qemu.boot, Boot::Pvh(_));
    let (log, ending) = Qemu { bundle, counted, ..qemu }.run(PATIENCE)?;
    expect_guests(&log, cpus, guests)?;
    if ending != Ending::Good {
        bail!("it did not end well:\n{log}");
    }
    eprintln!("{} VMs of {cpus} vCPUs: {:.1} s", guests.len(), started.elapsed().as_secs_f64());
    Ok(log)
}

/// Whether all said what they must, and ended.
pub fn expect_guests(log: &str, cpus: u32, guests: &[Guest]) -> Result<()> {
    let sum = format!("BEDPLATE-CHECKSUM final {}", guest_trials::checksum_job(ROUNDS, POOL_KIB));
    let ready = format!("{} {cpus} cpus", guest_catalog::READY_MARKER);
    for (vm, guest) in (1..).zip(guests) {
        let mark = if guests.len() > 1 { format!("[vm{vm}] ") } else { String::new() };
        let own: Vec<&str> = log.lines().filter(|line| line.contains(&mark)).collect();
        let mut words = vec![guest_catalog::INIT_MARKER, &ready];
        words.extend(guest.says.iter().map(String::as_str));
        words.push(&sum);
        expect(&own.join("\n"), &words).with_context(|| format!("VM {vm}; the whole log:\n{log}"))?;
        expect(log, &[&format!("VM `vm{vm}` has ended: PoweredOff")])?;
    }
    Ok(())
}

/// A guest without devices.
const PLAIN: Guest = Guest { verbs: String::new(), lines: vec![], says: vec![] };

fn linux(qemu: &Qemu, cpus: u32) -> Result<Outcome> {
    boot(qemu.clone(), cpus, &[PLAIN])?;
    Ok(Outcome::Passed)
}

/// The bundle with one guest without devices.
pub fn linux_bundle(cpus: u32, output: &Path) -> Result<PathBuf> {
    bundle_of(cpus, &[PLAIN], Some(output))
}

/// Whether that guest did what it must.
pub fn expect_linux(log: &str, cpus: u32) -> Result<()> {
    expect_guests(log, cpus, &[PLAIN])
}

fn two_processors(images: &Images) -> Result<Outcome> {
    let log = boot(Qemu { cpus: 2, ..images.pvh()? }, 2, &[PLAIN])?;
    all_worked(&log, 2)?;
    Ok(Outcome::Passed)
}

/// Whether each of the machine's processors ran guests.
fn all_worked(log: &str, processors: u32) -> Result<()> {
    expect(log, &[&format!("processors that run guests: {processors}")])?;
    for number in 0..processors {
        let line = log.lines().find(|line| line.starts_with(&format!("processor {number}: idle for ")));
        let busy =
            line.and_then(|line| line.strip_suffix(" % busy")?.rsplit(' ').next()?.parse::<u32>().ok());
        if busy.is_none_or(|percent| percent == 0) {
            bail!("processor {number} was not busy:\n{log}");
        }
    }
    Ok(())
}

/// The first serves a file to the second through the switch; both get addresses from QEMU's DHCP server. Each waits for
/// the other: where instructions are time, QEMU may keep one processor waiting for as long as the other computes.
fn two_vms(images: &Images, processors: u32) -> Result<Outcome> {
    let served = pattern_sum("bedplate-served", KIB);
    let (disk, net) = ("disk = \"ram:blank.img\"", "net = \"switch\"");
    let guests = [
        Guest {
            verbs: format!(
                "bedplate.net=address,{SERVER}/24 bedplate.net=serve,8080,{KIB} bedplate.checksum=12,512 bedplate.net=listen,8081"
            ),
            lines: vec![net],
            says: vec![format!("BEDPLATE-NET serving {served}"), "BEDPLATE-NET called on port 8081".into()],
        },
        Guest {
            verbs: format!(
                "bedplate.blk={KIB} bedplate.net=reach,{SERVER},8080 bedplate.net=fetch,http://{SERVER}:8080/file bedplate.checksum=12,512 bedplate.net=reach,{SERVER},8081"
            ),
            lines: vec![disk, net],
            says: vec![
                format!("BEDPLATE-BLK ok {}", pattern_sum("bedplate-disk", KIB)),
                format!("BEDPLATE-NET fetched {served} {} bytes", KIB * 1024),
            ],
        },
    ];
    let qemu = Qemu { more: network_card(), cpus: processors, ..images.pvh()? };
    let log = boot(qemu, 1, &guests)?;
    if processors > 1 {
        all_worked(&log, processors)?;
    }
    let own = log.lines().filter_map(|line| line.split_once("own memory: "));
    let kib = own.filter_map(|(_, rest)| rest.split(' ').next()?.parse::<u64>().ok()).max();
    match kib {
        Some(kib) if kib <= OWN_MEMORY_KIB => eprintln!("the hypervisor's own memory: {kib} KiB"),
        other => bail!("the hypervisor's own memory is {other:?} KiB, {OWN_MEMORY_KIB} are the limit"),
    }
    Ok(Outcome::Passed)
}

fn network_card() -> Vec<String> {
    ["-netdev", "user,id=n0", "-device", "virtio-net-pci,netdev=n0"].map(String::from).into()
}

/// A guest writes to a disk of the machine, where it is found afterwards, and fetches a file from outside.
fn machine_devices(images: &Images) -> Result<Outcome> {
    let machine = DeviceMachine::new("")?;
    let log = boot(Qemu { more: machine.more.clone(), ..images.pvh()? }, 1, &[machine.guest()])?;
    machine.judge(&log)?;
    Ok(Outcome::Passed)
}

/// A machine with a disk and a network card, and a server in its network.
pub struct DeviceMachine {
    disk: PathBuf,
    server: FileServer,
    /// QEMU's words for it.
    pub more: Vec<String>,
}

impl DeviceMachine {
    /// With more properties of its virtio devices.
    pub fn new(properties: &str) -> Result<Self> {
        let disk = bundle_file("disk.img", &vec![0; 8 << 20])?;
        let server = FileServer::start(pattern("from-the-host", KIB)).context("no server for the guest")?;
        let drive = format!("if=none,id=d0,format=raw,file={}", disk.display());
        let (card, block) =
            (format!("virtio-net-pci,netdev=n0{properties}"), format!("virtio-blk-pci,drive=d0{properties}"));
        let more = ["-netdev", "user,id=n0", "-device", &card, "-drive", &drive, "-device", &block];
        Ok(Self { more: more.map(String::from).into(), disk, server })
    }

    /// The guest that uses both.
    pub fn guest(&self) -> Guest {
        Guest {
            verbs: format!(
                "bedplate.blk={KIB} bedplate.net=dhcp bedplate.net=fetch,http://GATEWAY:{}/file",
                self.server.port()
            ),
            lines: vec!["disk = \"machine:0\"", "net = \"switch\"", "console = \"virtio\""],
            says: vec![
                format!("BEDPLATE-BLK ok {}", pattern_sum("bedplate-disk", KIB)),
                "BEDPLATE-NET address 10.0.2.15".into(),
                format!("BEDPLATE-NET fetched {} {} bytes", pattern_sum("from-the-host", KIB), KIB * 1024),
            ],
        }
    }

    /// Whether the log tells of both, and what the guest wrote is on the disk.
    pub fn judge(&self, log: &str) -> Result<()> {
        expect(log, &["disk 0: virtio, 8 MiB"])?;
        expect(log, &["network card: virtio"])?;
        let written = fs::read(&self.disk).context("cannot read the machine's disk")?;
        if written.get(..KIB * 1024) != Some(&pattern("bedplate-disk", KIB)) {
            bail!("what the guest wrote is not on the machine's disk");
        }
        Ok(())
    }
}

/// Pinned within [`TOLERANCE`] percent: instructions of guest and hypervisor together, rounds without a timer interrupt.
const EXIT_COSTS: &[(&str, u64)] = &[
    ("CPUID, leaf 0", 487),
    ("CPUID, leaf 1", 492),
    ("IN from the UART model", 548),
    ("OUT to the UART model", 460),
    ("IN from the host bridge model", 505),
    ("OUT to the host bridge model", 464),
    ("RDMSR", 5747),
    ("MMIO read", 6325),
    ("virtio-blk read, kick to interrupt", 47265),
];
const TOLERANCE: u64 = 10;

/// The guest of our own says what its exits cost; QEMU counts instructions, so that it is the same on every host.
fn exit_costs(images: &Images) -> Result<Outcome> {
    let bundle = Some(exit_bench_bundle(None)?);
    let (log, _) = Qemu { bundle, counted: true, ..images.pvh()? }.run(PATIENCE)?;
    compare_costs(&log, EXIT_COSTS)
}

/// The bundle with that guest.
pub fn exit_bench_bundle(output: Option<&Path>) -> Result<PathBuf> {
    let spec = "[[vm]]\nmemory_mib = 64\ncpu_model = \"x86-64-v3,-vme\"\nkernel = \"bench\"\nappend = \"x87\"\ndisk = \"ram:blank.img\"\n";
    let bench = fs::read(build_exit_bench()?).context("cannot read the guest")?;
    let files = [("bench", loadable::loadable(&bench)?), (bundle::BLANK, vec![0; 1 << 20])];
    bundle::write(spec, &files, output)
}

/// Whether the guest says what was pinned, and that its x87 unit is its own.
pub fn compare_costs(log: &str, costs: &[(&str, u64)]) -> Result<Outcome> {
    expect(log, &["X87 with a full stack: 1 + -1 = 0", "X87 while an error waits: 1 + 1 = 2"])?;
    let mut wrong = Vec::new();
    for (what, pinned) in costs {
        let line = log.lines().find_map(|line| line.split_once(&format!("EXIT-COST {what}: ")));
        let cost: u64 = match line.map(|(_, number)| number.trim().parse()) {
            Some(Ok(cost)) => cost,
            _ => bail!("the guest does not say what `{what}` costs:\n{log}"),
        };
        eprintln!("{what}: {cost} instructions");
        if cost.abs_diff(*pinned) * 100 > pinned * TOLERANCE {
            wrong.push(format!("{what}: {cost} instead of {pinned}"));
        }
    }
    if !wrong.is_empty() {
        bail!("exits cost other than before:\n{}", wrong.join("\n"));
    }
    Ok(Outcome::Passed)
}

/// Whether all words are in the log, in this order.
pub fn expect(log: &str, words: &[&str]) -> Result<()> {
    let mut rest = log;
    for word in words {
        let Some(at) = rest.find(word) else {
            bail!("`{word}` is not in the serial log, or too early:\n{log}")
        };
        rest = &rest[at + word.len()..];
    }
    Ok(())
}
