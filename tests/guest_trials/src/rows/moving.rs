//! Between engines: a busy guest moves from `kvm` to `soft` and back while it runs, and goes on elsewhere from a file.
//! Its job must end with the right answer, and its clock may not step back. In the laboratory, where KVM is real; between
//! the tiers of `soft` on the host.

use std::path::Path;
use std::time::Duration;

use guest_catalog::DiskFormat;
use machine::testing::kernel;

use super::{Row, cpus_name, reach_round};
use crate::config::{Boot, VmConfig, Vmm};
use crate::expected::checksum_job;
use crate::stage::{Failure, Stage, Tier};
use crate::vm::{Exit, Vm};

const MOVES: u32 = 20;
/// More than the moves take.
const ROUNDS: u32 = 400;
const POOL_KIB: usize = 64;
const DISK_KIB: usize = 128;
const DISK_BYTES: u64 = 16 << 20;

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for cpus in [1, 2] {
        let name = format!("moving/kvm-soft-x{MOVES}/{}", cpus_name(cpus));
        let trial = move |stage: &Stage| there_and_back(stage, cpus, ["soft", "kvm"]);
        rows.push(Row::new(name, Tier::Campaign, "cloud", trial).lab_only());
    }
    let tiers = |stage: &Stage| {
        let (interpreter, both) = ("soft,tier=interp", "soft");
        let on_interpreter = stage.vmm().engine() == Some(interpreter);
        there_and_back(stage, 2, if on_interpreter { [both, interpreter] } else { [interpreter, both] })
    };
    let name = format!("moving/tiers-x{MOVES}/2cpus");
    rows.push(Row::new(name, Tier::Test, "cloud", tiers).bedplate_only().not_in_lab("no KVM takes part"));
    rows.push(Row::new("moving/served-badly", Tier::Campaign, "cloud", served_badly).lab_only());
    rows.push(Row::new("moving/file/kvm-to-soft", Tier::Campaign, "cloud", kvm_to_soft).lab_only());
    rows.push(Row::new("moving/file/host-to-kvm", Tier::Campaign, "cloud", host_to_kvm).lab_only());
    rows.push(Row::new("moving/file/soft-to-kvm", Tier::Campaign, "cloud", soft_to_kvm).lab_only());
    rows
}

fn config(stage: &Stage, cpus: u32) -> Result<VmConfig, Failure> {
    let guest = stage.guest("cloud")?;
    let disk = stage.empty_disk("busy.raw", DISK_BYTES)?;
    let words =
        format!("bedplate.busy=disk,{DISK_KIB} bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff");
    let mut config = VmConfig::new(&guest, Boot::BzImage, cpus, &words)?.disk(&disk, DiskFormat::Raw);
    config.name = Some("mover".into());
    // Each move makes a VM of KVM or takes one away.
    config.lab_cpus = 1;
    Ok(config)
}

fn there_and_back(stage: &Stage, cpus: u32, engines: [&str; 2]) -> Result<(), Failure> {
    let config = config(stage, cpus)?;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        let mut seed = stage.seed();
        for count in 0..MOVES {
            reach_round(stage, &mut vm, 1 + count * (ROUNDS / (MOVES + 2)))?;
            // Reproducible from the seed (Knuth's MMIX constants).
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(Duration::from_millis(seed >> 58));
            let engine = engines[count as usize % 2];
            stage.ctl(&vm, "mover", &["move", "--engine", engine])?;
        }
        ends_well(stage, &mut vm)
    })();
    stage.keep(&vm);
    outcome
}

/// A guest that reads a device as no KVM can goes over by itself, in the midst of that, and loses nothing.
fn served_badly(stage: &Stage) -> Result<(), Failure> {
    let kernel = stage.scratch().join("kernel.elf");
    let code = [kernel::read_devices_with_x87(200_000), kernel::power_off()].concat();
    std::fs::write(&kernel, kernel::pvh(&code)).map_err(|e| Failure::new(format!("the kernel: {e}")))?;
    let config = VmConfig {
        kernel,
        initrd: None,
        append: String::new(),
        lab_cpus: 1,
        ..VmConfig::new(&stage.guest("cloud")?, Boot::BzImage, 1, "")?
    };
    let mut vm = stage.start(&config)?;
    let exit = vm.wait(stage.patience(120));
    stage.keep(&vm);
    let exit = exit?;
    Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))?;
    let console = String::from_utf8_lossy(&vm.console_transcript()).into_owned();
    Failure::unless(console.trim() == "done", || format!("the guest said {console:?}"))?;
    let words = vm.messages();
    Failure::unless(words.contains("goes on on soft"), || format!("it stayed: {words}"))
}

/// From the laboratory's KVM to the interpreter on the host.
fn kvm_to_soft(stage: &Stage) -> Result<(), Failure> {
    let config = config(stage, 2)?;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm = to_the_host(stage, &mut vm, &config)?;
        ends_well(stage, &mut vm)
    })();
    stage.keep(&vm);
    outcome
}

/// The same, and from there to KVM in another session of the laboratory.
fn host_to_kvm(stage: &Stage) -> Result<(), Failure> {
    let config = config(stage, 2)?;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm = to_the_host(stage, &mut vm, &config)?;
        let there = saved(stage, &mut vm, &config, "BEDPLATE-CHECKSUM 60/")?;
        vm = stage.start(&there)?;
        ends_well(stage, &mut vm)
    })();
    stage.keep(&vm);
    outcome
}

fn to_the_host(stage: &Stage, vm: &mut Vm, config: &VmConfig) -> Result<Vm, Failure> {
    let there = saved(stage, vm, config, "BEDPLATE-CHECKSUM 2/")?;
    stage.start_on(&on_the_host(stage)?, &there)
}

/// Saves the VM once it has said `text`; how it goes on elsewhere.
fn saved(stage: &Stage, vm: &mut Vm, config: &VmConfig, text: &str) -> Result<VmConfig, Failure> {
    let number = text.trim_matches(|c: char| !c.is_ascii_digit());
    let file = stage.scratch().join(format!("moment{number}.save"));
    save_at(stage, vm, text, &file)?;
    let exit = vm.wait(stage.patience(20))?;
    Failure::unless(exit == Exit::Code(0), || format!("the save ended the process with {exit:?}"))?;
    stage.keep(vm);
    Ok(VmConfig { restore: Some(file), disks_moved: true, ..config.clone() })
}

/// Saved on the interpreter, restored on KVM. All in one session: the laboratory's KVM cannot scale the TSC, whose rate
/// each of its boots measures anew.
fn soft_to_kvm(stage: &Stage) -> Result<(), Failure> {
    let file = stage.scratch().join("moment.save");
    let config = VmConfig { then_restore: Some(file.clone()), ..config(stage, 2)? };
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-CHECKSUM 1/", stage.patience(60))?;
        stage.ctl(&vm, "mover", &["move", "--engine", "soft"])?;
        save_at(stage, &mut vm, "BEDPLATE-CHECKSUM 3/", &file)?;
        ends_well(stage, &mut vm)
    })();
    stage.keep(&vm);
    outcome
}

fn save_at(stage: &Stage, vm: &mut Vm, text: &str, file: &Path) -> Result<(), Failure> {
    vm.console().expect(text, stage.patience(60))?;
    stage.ctl(vm, "mover", &["save", &file.to_string_lossy()]).map(|_| ())
}

/// The same binary and CPU model outside the laboratory.
fn on_the_host(stage: &Stage) -> Result<Vmm, Failure> {
    let Vmm::Lab { lab, more } = stage.vmm() else {
        return Err(Failure::new("this trial runs in the laboratory"));
    };
    let mut more = more.clone();
    if let Some(at) = more.iter().position(|word| word == "--engine") {
        more.drain(at..(at + 2).min(more.len()));
    }
    more.extend(["--engine".into(), "soft".into()]);
    Ok(Vmm::Bedplate { binary: lab.bedplate.clone(), more })
}

fn ends_well(stage: &Stage, vm: &mut Vm) -> Result<(), Failure> {
    let busy = vm.console().expect_line("BEDPLATE-BUSY disk ", stage.patience(120))?;
    Failure::unless(busy.starts_with("ok"), || format!("the disk job: {busy}"))?;
    let sum = vm.console().expect_line("BEDPLATE-CHECKSUM final ", stage.patience(20))?;
    let expected = checksum_job(ROUNDS, POOL_KIB);
    Failure::unless(sum == expected, || format!("the checksum job gave {sum} instead of {expected}"))?;
    let exit = vm.wait(stage.patience(20))?;
    Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))?;
    let text = String::from_utf8_lossy(&vm.console_transcript()).into_owned();
    Failure::unless(!text.contains("BEDPLATE-CLOCK"), || "the guest's clock went backwards".into())
}
