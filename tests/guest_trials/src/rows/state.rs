//! Save and restore: a busy guest (checksum job, disk and network traffic, two CPUs) is saved at random moments, each
//! time brought back in a new process, and must end its job with the right answer. Bedplate only.

use std::path::Path;
use std::time::Duration;

use guest_catalog::DiskFormat;

use super::{Row, reach_round};
use crate::config::{Boot, VmConfig};
use crate::expected::{checksum_job, pattern};
use crate::http::FileServer;
use crate::stage::{Failure, Stage, Tier};
use crate::vm::{Exit, Vm};

const POOL_KIB: usize = 256;
const DISK_KIB: usize = 512;
const NET_KIB: usize = 512;
const DISK_BYTES: u64 = 16 << 20;

pub(super) fn rows() -> Vec<Row> {
    let mut rows: Vec<Row> = [(3, 60, Tier::Test), (50, 900, Tier::Campaign)]
        .into_iter()
        .map(|(saves, rounds, tier)| {
            let name = format!("state/save-restore-x{saves}/2cpus");
            Row::new(name, tier, "cloud", move |stage| save_restore(stage, saves, rounds)).bedplate_only()
        })
        .collect();
    rows.push(
        Row::new("state/save-and-continue/2cpus", Tier::Campaign, "cloud", save_and_continue).bedplate_only(),
    );
    rows
}

/// A VM that is saved and goes on, and then the VM of that moment beside it: both end their jobs, each with a disk of
/// its own from that moment on.
fn save_and_continue(stage: &Stage) -> Result<(), Failure> {
    const ROUNDS: u32 = 60;
    let guest = stage.guest("cloud")?;
    let disk = stage.empty_disk("busy.raw", DISK_BYTES)?;
    let words =
        format!("bedplate.busy=disk,{DISK_KIB} bedplate.checksum={ROUNDS},{POOL_KIB} bedplate.poweroff");
    let mut config = VmConfig::new(&guest, Boot::BzImage, 2, &words)?.disk(&disk, DiskFormat::Raw);
    let name = format!("trial-{}", std::process::id());
    config.name = Some(name.clone());
    let mut vm = stage.start(&config)?;
    let file = stage.scratch().join("moment.save");
    let outcome = (|| {
        vm.console().expect("BEDPLATE-CHECKSUM 5/", stage.patience(60))?;
        stage.ctl(&vm, &name, &["save", "--continue", &file.to_string_lossy()])?;
        let frozen = std::fs::read(&disk)?;
        ends_well(stage, &mut vm, ROUNDS)?;
        stage.keep(&vm);
        vm = stage.start(&VmConfig { restore: Some(file.clone()), ..config.clone() })?;
        ends_well(stage, &mut vm, ROUNDS)?;
        Failure::unless(std::fs::read(&disk)? == frozen, || {
            "the image of the moment of the save changed afterwards".into()
        })
    })();
    stage.keep(&vm);
    outcome
}

fn ends_well(stage: &Stage, vm: &mut Vm, rounds: u32) -> Result<(), Failure> {
    let busy = vm.console().expect_line("BEDPLATE-BUSY disk ", stage.patience(300))?;
    Failure::unless(busy.starts_with("ok"), || format!("the disk job: {busy}"))?;
    let sum = vm.console().expect_line("BEDPLATE-CHECKSUM final ", stage.patience(20))?;
    let expected = checksum_job(rounds, POOL_KIB);
    Failure::unless(sum == expected, || format!("the checksum job gave {sum} instead of {expected}"))?;
    let exit = vm.wait(stage.patience(20))?;
    Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
}

fn save_restore(stage: &Stage, saves: u32, rounds: u32) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let server = FileServer::start(pattern("from-the-host", NET_KIB))?;
    let disk = stage.empty_disk("busy.raw", DISK_BYTES)?;
    let words = format!(
        "bedplate.busy=disk,{DISK_KIB} bedplate.busy=net,http://GATEWAY:{}/file \
         bedplate.checksum={rounds},{POOL_KIB} bedplate.poweroff",
        server.port()
    );
    let mut config = VmConfig::new(&guest, Boot::BzImage, 2, &words)?.disk(&disk, DiskFormat::Raw).net(&[]);
    let name = format!("trial-{}", std::process::id());
    config.name = Some(name.clone());
    let mut vm = stage.start(&config)?;
    let outcome = run_through_saves(stage, &mut vm, &config, &name, saves, rounds);
    stage.keep(&vm);
    outcome
}

fn run_through_saves(
    stage: &Stage,
    vm: &mut Vm,
    config: &VmConfig,
    name: &str,
    saves: u32,
    rounds: u32,
) -> Result<(), Failure> {
    let mut random = Random(stage.seed());
    let between = rounds / (saves + 1);
    for count in 0..saves {
        reach_round(stage, vm, (count + 1) * between)?;
        std::thread::sleep(Duration::from_millis(random.next() % 50));
        let file = stage.scratch().join(format!("{count}.save"));
        save(stage, vm, name, &file)?;
        let exit = vm.wait(stage.patience(20))?;
        Failure::unless(exit == Exit::Code(0), || format!("save {count} ended the process with {exit:?}"))?;
        stage.keep(vm);
        *vm = stage.start(&VmConfig { restore: Some(file.clone()), ..config.clone() })?;
        vm.console().expect("BEDPLATE-", stage.patience(40))?;
        std::fs::remove_file(&file)?;
    }
    let busy = vm.console().expect_line("BEDPLATE-BUSY disk ", stage.patience(600))?;
    Failure::unless(busy.starts_with("ok"), || format!("the disk job: {busy}"))?;
    let busy = vm.console().expect_line("BEDPLATE-BUSY net ", stage.patience(20))?;
    Failure::unless(busy.starts_with("ok"), || format!("the network job: {busy}"))?;
    let sum = vm.console().expect_line("BEDPLATE-CHECKSUM final ", stage.patience(20))?;
    let expected = checksum_job(rounds, POOL_KIB);
    Failure::unless(sum == expected, || format!("the checksum job gave {sum} instead of {expected}"))?;
    let text = String::from_utf8_lossy(&stage.transcripts()).into_owned();
    Failure::unless(!text.contains("BEDPLATE-CLOCK"), || "the guest's clock went backwards".into())?;
    let exit = vm.wait(stage.patience(20))?;
    Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
}

fn save(stage: &Stage, vm: &Vm, name: &str, file: &Path) -> Result<(), Failure> {
    stage.ctl(vm, name, &["save", &file.to_string_lossy()]).map(|_| ())
}

/// SplitMix64: reproducible from the seed in the summary.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}
