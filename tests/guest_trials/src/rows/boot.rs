//! Every kernel, by every way to boot it, with one and two CPUs: to the initrd's marker, with all CPUs up, through
//! a RAM and checksum job, to a clean power-off with exit code 0.

use super::{Row, cpus_name};
use crate::config::{Boot, VmConfig};
use crate::expected::checksum_job;
use crate::stage::{Failure, Stage, Tier};
use crate::vm::Exit;

const ROUNDS: u32 = 4;
const POOL_KIB: usize = 64;

pub(super) fn rows() -> Vec<Row> {
    // Kernel, ways to boot, CPU counts, and which of these are in the test tier.
    let table: [(&'static str, &[Boot], &[u32]); 5] = [
        ("cloud", &[Boot::BzImage, Boot::Pvh], &[1, 2]),
        ("generic", &[Boot::BzImage, Boot::Pvh], &[1, 2]),
        ("rt", &[Boot::BzImage, Boot::Pvh], &[1, 2]),
        ("686-pae", &[Boot::BzImage, Boot::Pvh], &[1, 2]),
        // Built without SMP and without a PVH entry.
        ("686", &[Boot::BzImage], &[1]),
    ];
    let mut rows = Vec::new();
    for (guest, boots, counts) in table {
        for &boot in boots {
            for &cpus in counts {
                let quick = matches!(
                    (guest, boot, cpus),
                    ("cloud", Boot::BzImage, _) | ("cloud", Boot::Pvh, 1) | ("686-pae", Boot::BzImage, 2)
                );
                let name = format!("boot/{guest}/{}/{}", boot.name(), cpus_name(cpus));
                let tier = if quick { Tier::Test } else { Tier::Campaign };
                rows.push(Row::new(name, tier, guest, move |stage| boot_row(stage, guest, boot, cpus)));
            }
        }
    }
    rows
}

fn boot_row(stage: &Stage, name: &str, boot: Boot, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest(name)?;
    let words = format!("bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff");
    let mut vm = stage.start(&VmConfig::new(&guest, boot, cpus, &words)?)?;
    let outcome = (|| {
        let console = vm.console();
        console.expect(guest_catalog::INIT_MARKER, stage.patience(15))?;
        let kernel = console.expect_line("Linux ", stage.patience(5))?;
        Failure::unless(kernel.contains(&guest.version), || {
            format!("uname says {kernel:?}, not {}", guest.version)
        })?;
        let ready = console.expect_line(guest_catalog::READY_MARKER, stage.patience(10))?;
        Failure::unless(ready == format!("{cpus} cpus"), || format!("{ready} are up instead of {cpus}"))?;
        let sum = console.expect_line("BEDPLATE-CHECKSUM final ", stage.patience(20))?;
        let expected = checksum_job(ROUNDS, POOL_KIB);
        Failure::unless(sum == expected, || format!("the checksum job gave {sum} instead of {expected}"))?;
        console.expect("Power down", stage.patience(10))?;
        let exit = vm.wait(stage.patience(10))?;
        Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
    })();
    stage.keep(&vm);
    outcome
}
