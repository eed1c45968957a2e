//! Whole distributions on disks: Debian 12 to its login prompt, a file written, a reboot, the file read back;
//! Alpine with its qcow2 disk to a working shell and through OpenRC; stress-ng for half a minute; an idle guest.

use std::time::Duration;

use guest_catalog::DiskFormat;

use super::{Row, cpus_name};
use crate::config::{Boot, VmConfig};
use crate::console::Console;
use crate::shell::Shell;
use crate::stage::{Failure, Stage, Tier};
use crate::vm::Exit;

const STRESS: &str = "stress-ng --cpu 1 --vm 1 --vm-bytes 64M --fault 1 --switch 1 --timeout 30s --verify";
const IDLE_SECONDS: u64 = 20;
const REBOOTS: u32 = 100;

pub(super) fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for cpus in [1, 2] {
        let quick = |this| if this == cpus { Tier::Test } else { Tier::Campaign };
        let name = |what: &str| format!("system/{what}/{}", cpus_name(cpus));
        rows.push(Row::new(name("debian-login-write-reboot"), quick(2), "debian-12", move |stage| {
            debian(stage, cpus)
        }));
        rows.push(Row::new(name("alpine-shell"), quick(1), "alpine", move |stage| alpine(stage, cpus)));
        rows.push(Row::new(name("stress-ng-30s"), Tier::Campaign, "debian-12", move |stage| {
            stress(stage, cpus)
        }));
    }
    let name = format!("system/debian-reboot-x{REBOOTS}/2cpus");
    rows.push(Row::new(name, Tier::Endurance, "debian-12", reboots));
    rows.push(Row::new("system/power-button", Tier::Campaign, "debian-12", power_button).bedplate_only());
    rows.push(Row::new("system/idle-uses-little", Tier::Campaign, "cloud", idle).bedplate_only());
    rows
}

fn debian(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("debian-12")?;
    let master = guest.disk.as_ref().ok_or_else(|| Failure::new("the guest has no disk"))?;
    let disk = stage.disk_copy(&master.0)?;
    let mut config = VmConfig::new(&guest, Boot::BzImage, cpus, "")?.disk(&disk, master.1).net(&[]);
    config.reboots = true;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        let word = format!("written-with-{cpus}-{:x}", stage.seed());
        let mut shell = log_in(stage, vm.console())?;
        shell.run(&format!("echo {word} > /root/kept && sync"))?;
        let count = shell.run("nproc")?;
        Failure::unless(count == cpus.to_string(), || format!("nproc says {count}"))?;
        shell.leave("reboot")?;

        vm.console().expect_any(&["Restarting system", "machine restart"], stage.patience(60))?;
        let mut shell = log_in(stage, vm.console())?;
        let read = shell.run("cat /root/kept")?;
        Failure::unless(read == word, || format!("the file holds {read:?} after the reboot, not {word:?}"))?;
        let state = shell.run("findmnt -no OPTIONS /; dmesg | grep -c 'EXT4-fs error' || true")?;
        Failure::unless(state.starts_with("rw") && state.ends_with('0'), || {
            format!("the root disk: {state}")
        })?;
        shell.leave("poweroff")?;
        let exit = vm.wait(stage.patience(60))?;
        Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
    })();
    stage.keep(&vm);
    outcome
}

/// Nothing may hang in a hundred starts of a whole distribution on two CPUs.
fn reboots(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("debian-12")?;
    let master = guest.disk.as_ref().ok_or_else(|| Failure::new("the guest has no disk"))?;
    let disk = stage.disk_copy(&master.0)?;
    let mut config = VmConfig::new(&guest, Boot::BzImage, 2, "")?.disk(&disk, master.1);
    config.reboots = true;
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        for count in 1..=REBOOTS {
            one_reboot(stage, vm.console())
                .map_err(|failure| Failure::new(format!("start {count}: {failure}")))?;
        }
        vm.stop(stage.patience(5)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

fn one_reboot(stage: &Stage, console: &mut Console) -> Result<(), Failure> {
    let mut shell = log_in(stage, console)?;
    let cpus = shell.run("nproc")?;
    Failure::unless(cpus == "2", || format!("nproc says {cpus}"))?;
    shell.leave("reboot")?;
    console.expect_any(&["Restarting system", "machine restart"], stage.patience(60))?;
    Ok(())
}

/// `ctl stop`: systemd hears the power button and shuts down in order.
fn power_button(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("debian-12")?;
    let master = guest.disk.as_ref().ok_or_else(|| Failure::new("the guest has no disk"))?;
    let disk = stage.disk_copy(&master.0)?;
    let name = format!("button-{}", std::process::id());
    let mut config = VmConfig::new(&guest, Boot::BzImage, 2, "")?.disk(&disk, master.1);
    config.name = Some(name.clone());
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        log_in(stage, vm.console())?;
        stage.ctl(&vm, &name, &["stop"])?;
        vm.console().expect_any(&["Power down", "reboot: Power"], stage.patience(90))?;
        let exit = vm.wait(stage.patience(30))?;
        Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
    })();
    stage.keep(&vm);
    outcome
}

fn log_in<'a>(stage: &Stage, console: &'a mut Console) -> Result<Shell<'a>, Failure> {
    console.expect("bedplate login:", stage.patience(90))?;
    console.send("root\n")?;
    console.expect("Password:", stage.patience(20))?;
    console.send("bedplate\n")?;
    console.expect("root@bedplate", stage.patience(30))?;
    // A shell without line editing: nothing but the commands' own output.
    console.send("exec /bin/sh\n")?;
    Shell::at(console, stage.patience(30))
}

fn alpine(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("alpine")?;
    let master = guest.disk.as_ref().ok_or_else(|| Failure::new("the guest has no disk"))?;
    let disk = stage.disk_copy(&master.0)?;
    let config = VmConfig::new(&guest, Boot::BzImage, cpus, "")?.disk(&disk, DiskFormat::Qcow2).net(&[]);
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        vm.console().expect("~ #", stage.patience(60))?;
        let mut shell = Shell::at(vm.console(), stage.patience(20))?;
        let kernel = shell.run("uname -r")?;
        Failure::unless(kernel == guest.version, || format!("uname says {kernel}"))?;
        // The image has no login on the serial line: give it one, then go through its own init.
        shell.run("mount -o remount,rw / && echo 'ttyS0::respawn:-/bin/sh' >> /etc/inittab && sync")?;
        shell.leave("exec /sbin/init")?;
        vm.console().expect("OpenRC", stage.patience(20))?;
        // This one is a login shell, with a prompt of its own.
        vm.console().expect_any(&["~ #", "~#"], stage.patience(60))?;
        let mut shell = Shell::at(vm.console(), stage.patience(20))?;
        let release = shell.run("cat /etc/alpine-release")?;
        Failure::unless(release.starts_with("3.23"), || format!("/etc/alpine-release says {release}"))?;
        shell.run("ip -4 addr show dev eth0 | grep inet")?;
        shell.leave("poweroff")?;
        let exit = vm.wait(stage.patience(60))?;
        Failure::unless(exit == Exit::Code(0), || format!("power-off ended the process with {exit:?}"))
    })();
    stage.keep(&vm);
    outcome
}

fn stress(stage: &Stage, cpus: u32) -> Result<(), Failure> {
    let guest = stage.guest("debian-12")?;
    let master = guest.disk.as_ref().ok_or_else(|| Failure::new("the guest has no disk"))?;
    let disk = stage.disk_copy(&master.0)?;
    let config = VmConfig::new(&guest, Boot::BzImage, cpus, "")?.disk(&disk, master.1);
    let mut vm = stage.start(&config)?;
    let outcome = (|| {
        let mut shell = log_in(stage, vm.console())?;
        shell.run("dmesg -C")?;
        let output = shell.run(STRESS)?;
        Failure::unless(output.contains("successful run completed"), || {
            format!("stress-ng said:\n{output}")
        })?;
        let complaints = shell.run("dmesg --level=emerg,alert,crit,err")?;
        Failure::unless(complaints.is_empty(), || format!("the kernel complained:\n{complaints}"))?;
        shell.leave("poweroff")?;
        vm.wait(stage.patience(60)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}

/// The promise is a share of processor time, so it holds on a busy host too.
fn idle(stage: &Stage) -> Result<(), Failure> {
    let guest = stage.guest("cloud")?;
    let mut vm = stage.start(&VmConfig::new(&guest, Boot::BzImage, 1, "")?)?;
    let outcome = (|| {
        vm.console().expect("BEDPLATE-SHELL", stage.patience(20))?;
        std::thread::sleep(Duration::from_secs(5));
        let before = vm.processor_time()?;
        std::thread::sleep(Duration::from_secs(IDLE_SECONDS));
        let used = vm.processor_time()?.saturating_sub(before);
        let limit = Duration::from_millis(IDLE_SECONDS * 1000 * 2 / 100);
        Failure::unless(used < limit, || {
            format!(
                "an idle guest used {used:?} of processor time in {IDLE_SECONDS} s; the promise is {limit:?}"
            )
        })?;
        vm.stop(stage.patience(5)).map(|_| ())
    })();
    stage.keep(&vm);
    outcome
}
