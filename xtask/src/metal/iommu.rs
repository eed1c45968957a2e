//! The row with AMD's IOMMU: the machine's devices work through it, and one that goes astray is kept from it, and told of.

use anyhow::{Result, bail};
use guest_trials::Outcome;

use super::emulator::{Ending, Qemu, Step};
use super::rows::{DeviceMachine, Images, PATIENCE, bundle_file, bundle_of, expect, expect_guests};

/// Ctrl-A 0, and what has a disk that is no VM's read to memory that was not given to it.
const STRAY: &str = "\x010crash dma\r";
const USED: &str = "IOMMU: AMD-Vi, 1 in use: 3 devices reach 4096 KiB and nothing else";
const KEPT: &str = "was kept from";

/// A guest moves data by the machine's disk and network card, while another disk goes astray.
pub fn devices(images: &Images) -> Result<Outcome> {
    let behind = ",iommu_platform=on,disable-legacy=on";
    let machine = DeviceMachine::new(behind)?;
    let spare = bundle_file("spare.img", &vec![0xA5; 1 << 20])?;
    let drive = format!("if=none,id=d1,format=raw,file={}", spare.display());
    let (iommu, disk) = ("amd-iommu", format!("virtio-blk-pci,drive=d1{behind}"));
    let mut more: Vec<String> = ["-device", iommu].map(String::from).into();
    more.extend(machine.more.clone());
    more.extend(["-drive", &drive, "-device", &disk].map(String::from));
    let guests = [machine.guest()];
    let bundle = Some(bundle_of(1, &guests)?);
    let runs = |log: &str| log.contains(guest_catalog::INIT_MARKER);
    let steps = [Step { what: "the guest's init", until: &runs, keys: STRAY }];
    let (log, ending) = Qemu { bundle, counted: true, more, ..images.pvh()? }.talk(PATIENCE, &steps)?;
    expect(
        &log,
        &[USED, guest_catalog::INIT_MARKER, "told to write where it must not: it has not written", KEPT],
    )?;
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
