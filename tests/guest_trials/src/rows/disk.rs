//! Block devices under the cloud kernel: what is written is read back, in the guest and on the host; a read-only
//! disk refuses writes and stays as it was.

use std::fs;

use guest_catalog::DiskFormat;

use super::{Row, cpus_name};
use crate::config::{Boot, DiskUse, VmConfig};
use crate::expected::{pattern, pattern_sum};
use crate::shell::Shell;
use crate::stage::{Failure, Stage, Tier};

const KIB: usize = 4096;
const DISK_BYTES: u64 = 64 << 20;

/// INTx through the I/O APIC; through the 8259; with routes as firmware leaves them; registers of the APIC in memory.
const INTERRUPT_MODES: [(&str, &str); 4] = [
    ("ioapic", "pci=nomsi"),
    ("pic", "noapic pci=nomsi"),
    ("no-acpi", "acpi=off pci=nomsi"),
    ("xapic", "nox2apic"),
];

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for cpus in [1, 2] {
        let tier = if cpus == 2 { Tier::Test } else { Tier::Campaign };
        let name = format!("disk/raw-write-read/{}", cpus_name(cpus));
        rows.push(Row::new(name, tier, "cloud", move |stage| write_read(stage, cpus)));
    }
    rows.push(Row::new("disk/read-only", Tier::Campaign, "cloud", read_only));
    for (name, words) in INTERRUPT_MODES {
        rows.push(Row::new(format!("disk/interrupts/{name}"), Tier::Campaign, "cloud", move |stage| {
            interrupts(stage, words)
        }));
    }
    rows
}

fn write_read(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let disk = stage.empty_disk("data.raw", DISK_BYTES)?;
    let words = format!("bedplate.blk={KIB} bedplate.poweroff");
    let config = VmConfig::new(&guest, Boot::BzImage, cpus, &words)?.disk(&disk, DiskFormat::Raw);
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        let sum = vm.console().expect_line("BEDPLATE-BLK ok ", stage.patience(30))?;
        Failure::unless(sum == pattern_sum("bedplate-disk", KIB), || format!("the guest read back {sum}"))?;
        vm.wait(stage.patience(10))?;
        let content = fs::read(&disk)?;
        Failure::unless(content.get(..KIB * 1024) == Some(&pattern("bedplate-disk", KIB)), || {
            "the image on the host does not hold what the guest wrote and flushed".into()
        })
    })();
    stage.keep(&vm);
    outcome
}

/// Disk and network where the kernel is told to use other interrupts than MSI-X through the local APIC.
fn interrupts(stage: &Stage, words: &str) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let disk = stage.empty_disk("data.raw", DISK_BYTES)?;
    let words = format!("{words} bedplate.blk={KIB} bedplate.net=dhcp");
    let config = VmConfig::new(&guest, Boot::BzImage, 1, &words)?.disk(&disk, DiskFormat::Raw).net(&[]);
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        let sum = vm.console().expect_line("BEDPLATE-BLK ok ", stage.patience(30))?;
        Failure::unless(sum == pattern_sum("bedplate-disk", KIB), || format!("the guest read back {sum}"))?;
        vm.console().expect_line("BEDPLATE-NET address ", stage.patience(30))?;
        vm.stop(stage.patience(10)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

fn read_only(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let disk = stage.empty_disk("data.raw", DISK_BYTES)?;
    fs::write(&disk, vec![0x5a; 1 << 20])?;
    let mut config = VmConfig::new(&guest, Boot::BzImage, 1, "")?;
    config.disks.push(DiskUse { path: disk.clone(), format: DiskFormat::Raw, read_only: true });
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-SHELL", stage.patience(20))?;
        let mut shell = Shell::at(vm.console(), stage.patience(10))?;
        let flag = shell.run("cat /sys/block/vda/ro")?;
        Failure::unless(flag == "1", || format!("/sys/block/vda/ro says {flag}"))?;
        let (status, _) = shell.status("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync")?;
        Failure::unless(status != 0, || "a write to the read-only disk was accepted".into())?;
        shell.leave("poweroff -f")?;
        vm.wait(stage.patience(10))?;
        Failure::unless(fs::read(&disk)? == vec![0x5a; 1 << 20], || "the read-only image changed".into())
    })();
    stage.keep(&vm);
    outcome
}
