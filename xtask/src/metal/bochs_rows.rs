//! Rows on Bochs's processors: Intel's VMX, an AMD with next RIPs and flushing by address space, and some that are refused.

use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use guest_trials::Outcome;

use super::bochs::{AMD, Bochs, INTEL, OLD_INTEL, PLAIN};
use super::emulator::Ending;
use super::rows::{self, exit_bench_bundle, expect};

/// A boot takes this long (in seconds) only if it hangs: Bochs is slow, and slower on a busy machine.
const PATIENCE: u64 = 1800;

/// A row: its name, what it does with the UEFI application, and whether its guest is of the catalogue.
pub struct Row {
    pub name: &'static str,
    pub run: fn(&Path) -> Result<Outcome>,
    pub with_guest: bool,
}

pub const ROWS: &[Row] = &[
    Row { name: "metal: Bochs, processors that are refused", run: refused, with_guest: false },
    Row { name: "metal: Bochs, what exits cost on VMX", run: exits_on_vmx, with_guest: false },
    Row { name: "metal: Bochs, what exits cost on SVM with next RIPs", run: exits_on_svm, with_guest: false },
    Row {
        name: "metal: Bochs, Linux boots on VMX",
        run: |efi| linux(efi, INTEL, "VMX: EPT"),
        with_guest: true,
    },
    Row {
        name: "metal: Bochs, Linux boots on SVM with next RIPs",
        run: |efi| linux(efi, AMD, "next RIP true, flush by space true"),
        with_guest: true,
    },
];

/// Ticks of Bochs's time-stamp counter, which counts instructions: guest and hypervisor together.
const COSTS_ON_VMX: &[(&str, u64)] = &[
    ("CPUID, leaf 0", 236),
    ("CPUID, leaf 1", 236),
    ("IN from the UART model", 539),
    ("OUT to the UART model", 453),
    ("RDMSR", 6891),
    ("MMIO read", 7491),
    ("virtio-blk read, kick to interrupt", 53534),
];
const COSTS_ON_SVM: &[(&str, u64)] = &[
    ("CPUID, leaf 0", 239),
    ("CPUID, leaf 1", 239),
    ("IN from the UART model", 532),
    ("OUT to the UART model", 446),
    ("RDMSR", 6440),
    ("MMIO read", 7024),
    ("virtio-blk read, kick to interrupt", 50880),
];

/// Without virtualization, and with VMX of before EPT.
fn refused(application: &Path) -> Result<Outcome> {
    let bundle = exit_bench_bundle()?;
    for (model, reason) in [
        (PLAIN, "REFUSED: this processor has no virtualization"),
        (OLD_INTEL, "REFUSED: this processor's VMX has no nested paging (EPT)"),
    ] {
        let machine = Bochs { bundle: Some(bundle.clone()), ..Bochs::new(application, model) };
        let (log, _) = machine.run(PATIENCE)?;
        expect(&log, &["bedplate-metal ", reason, "HALTED"])?;
    }
    Ok(Outcome::Passed)
}

fn exits_on_vmx(application: &Path) -> Result<Outcome> {
    exits(application, INTEL, "VMX: EPT with pages of 1 GiB", COSTS_ON_VMX)
}

fn exits_on_svm(application: &Path) -> Result<Outcome> {
    exits(application, AMD, "SVM: ", COSTS_ON_SVM)
}

/// The guest of our own says what its exits cost.
fn exits(application: &Path, model: &str, engine: &str, costs: &[(&str, u64)]) -> Result<Outcome> {
    let machine = Bochs { bundle: Some(exit_bench_bundle()?), ..Bochs::new(application, model) };
    let (log, ending) = machine.run(PATIENCE)?;
    expect(&log, &[engine, "EXIT-COST end", "VM `vm1` has ended: PoweredOff", "all VMs have ended"])?;
    finished(ending, &log)?;
    rows::compare_costs(&log, costs)
}

/// Debian's cloud kernel with busybox reaches its marker, computes, and switches itself off.
fn linux(application: &Path, model: &str, engine: &str) -> Result<Outcome> {
    let started = Instant::now();
    let machine = Bochs { bundle: Some(rows::linux_bundle(1)?), ..Bochs::new(application, model) };
    let (log, ending) = machine.run(PATIENCE)?;
    expect(&log, &[engine, "all VMs have ended"])?;
    rows::expect_linux(&log, 1)?;
    finished(ending, &log)?;
    eprintln!("{model}: {:.1} s", started.elapsed().as_secs_f64());
    Ok(Outcome::Passed)
}

fn finished(ending: Ending, log: &str) -> Result<()> {
    if ending != Ending::Good {
        bail!("Bochs was still running:\n{log}");
    }
    Ok(())
}
