//! The rows with an IOMMU, AMD's or Intel's: the machine's devices work through it, and one that goes astray is kept from
//! memory, and told of.

use anyhow::{Result, bail};
use guest_trials::Outcome;

use super::emulator::{Ending, Qemu, Step};
use super::isolation;
use super::rows::{DeviceMachine, Images, PATIENCE, bundle_file, bundle_of, expect, expect_guests};

/// Ctrl-A 0, and what has a disk that is no VM's read to memory that was not given to it.
const STRAY: &str = "\x010crash dma\r";
const BEHIND: &str = ",iommu_platform=on,disable-legacy=on";
/// What the hypervisor says then.
const TOLD: &str = "a disk was told to write where it must not: it has";
const KEPT: &str = "was kept from";

/// QEMU's devices, and what we call them. Intel's works beside an AMD processor there.
pub const AMD: (&str, &str) = ("amd-iommu", "IOMMU: AMD-Vi, 1 in use");
pub const INTEL: (&str, &str) = ("intel-iommu", "IOMMU: Intel VT-d, 1 in use");

/// A guest moves data by the machine's disk and network card, while another disk goes astray.
pub fn devices(images: &Images, (device, name): (&str, &str)) -> Result<Outcome> {
    let machine = DeviceMachine::new(BEHIND)?;
    let mut more: Vec<String> = ["-device", device].map(String::from).into();
    more.extend(machine.more.clone());
    more.extend(spare_disk()?);
    let guests = [machine.guest()];
    let bundle = Some(bundle_of(1, &guests, None)?);
    let runs = |log: &str| log.contains(guest_catalog::INIT_MARKER);
    let steps = [Step { what: "the guest's init", until: &runs, keys: STRAY }];
    let (log, ending) = Qemu { bundle, counted: true, more, ..images.pvh()? }.talk(PATIENCE, &steps)?;
    expect(&log, &[&format!("{name}: 3 devices"), guest_catalog::INIT_MARKER])?;
    expect(&log, &[&format!("{TOLD} not written"), KEPT])?;
    expect_guests(&log, 1, &guests)?;
    machine.judge(&log)?;
    if log.matches(KEPT).count() > 8 || ending != Ending::Good {
        bail!("other devices were kept from memory, too, or it did not end well:\n{log}");
    }
    if let Some(line) = log.lines().find(|line| line.contains(KEPT)) {
        eprintln!("{line}");
    }
    Ok(Outcome::Passed)
}

/// QEMU's words for a disk that no VM has.
fn spare_disk() -> Result<Vec<String>> {
    let spare = bundle_file("spare.img", &vec![0xA5; 1 << 20])?;
    let drive = format!("if=none,id=d1,format=raw,file={}", spare.display());
    Ok(["-drive", &drive, "-device", &format!("virtio-blk-pci,drive=d1{BEHIND}")].map(String::from).into())
}

/// The same disk without an IOMMU that is used does write: so it is the IOMMU that keeps it.
pub fn stray(images: &Images) -> Result<Outcome> {
    let none = (None, "IOMMU: none".to_string());
    let used = |(device, name)| (Some(device), format!("{name}: 1 devices reach 4096 KiB and nothing else"));
    for (iommu, says) in [used(AMD), used(INTEL), none] {
        let kept = iommu.is_some();
        let mut more = spare_disk()?;
        more.extend(iommu.iter().flat_map(|iommu| ["-device".to_string(), (*iommu).to_string()]));
        let started = |log: &str| log.contains("VMs run;");
        let told = |log: &str| log.contains(TOLD);
        let steps = [
            Step { what: "the start", until: &started, keys: STRAY },
            Step { what: "what the disk did", until: &told, keys: "stop 1\r" },
        ];
        let bundle = Some(isolation::spinning(1)?);
        let (log, _) = Qemu { bundle, counted: true, more, ..images.pvh()? }.talk(PATIENCE, &steps)?;
        let did = if kept { "not written" } else { "written" };
        expect(&log, &[&says, &format!("{TOLD} {did}")])?;
        if log.contains(KEPT) != kept {
            bail!("what a device was kept from is told wrongly:\n{log}");
        }
    }
    Ok(Outcome::Passed)
}
