//! `cargo xtask lab`: Bedplate on a real KVM, without a processor that has virtualization. See `guest_trials::lab`.

pub mod costs;
mod native_start;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::{Args, Subcommand};
use guest_catalog::{Cache, INIT_MARKER, READY_MARKER};
use guest_trials::lab::{self, Ends, Folder, Lab, Run, Session};
use guest_trials::{Boot, Outcome, Tier, Vm, VmConfig, Vmm};

use crate::progress::Bars;
use crate::summary::Summary;
use crate::{setup, trials, workspace};

#[derive(Debug, Subcommand)]
pub enum LabTask {
    /// Boot a guest with --engine kvm on AMD's KVM under QEMU; a verdict, and the log in target/lab.
    Kvm(KvmOptions),
    /// Count what port, MMIO and disk accesses cost beside QEMU on the same KVM; start and memory of the VMM.
    Costs(costs::CostsOptions),
}

#[derive(Debug, Default, Args)]
pub struct KvmOptions {
    /// A shell in the laboratory on this terminal instead; `bedplate` and the guests are there.
    #[arg(long)]
    shell: bool,
    /// Run the engine's own tests there instead; words behind `--` are theirs.
    #[arg(long, conflicts_with = "shell")]
    tests: bool,
    /// vCPUs of the guest.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// Which guest of the catalogue boots.
    #[arg(long, default_value = "cloud")]
    guest: String,
    /// Seconds that the whole run may take.
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Use this static bedplate binary instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

pub fn run(task: &LabTask) -> Result<()> {
    let options = match task {
        LabTask::Kvm(options) => options,
        LabTask::Costs(options) => return costs::run(options),
    };
    if options.tests {
        return tests(options);
    }
    let vmm = vmm(options.binary.as_deref(), &options.more)?;
    if options.shell { shell(&vmm, options) } else { boot(&vmm, options) }
}

/// Families of trials that the campaign runs in the laboratory.
const CAMPAIGN: &[&str] = &["boot/cloud/", "ending/", "disk/", "network/", "moving/"];

/// The campaign's part: trials on a real KVM, the engine's own tests there, costs beside QEMU.
pub fn steps(summary: &mut Summary, seed: u64) -> Result<()> {
    let vmm = vmm(None, &[])?;
    eprintln!("\n── the laboratory");
    for family in CAMPAIGN {
        let report = trials::run_rows(&vmm, Tier::Campaign, Some((*family).into()), seed)?;
        summary.add("kvm@lab/", &trials::only_run(&report));
    }
    summary.step("kvm@lab/tests of cpu_kvm", || {
        tests(&KvmOptions { limit: 3600, ..KvmOptions::default() }).map(|()| Outcome::Passed)
    });
    summary.step("kvm@lab/costs", || costs::run(&costs::CostsOptions::default()).map(|()| Outcome::Passed));
    Ok(())
}

/// Bedplate in the laboratory.
pub fn vmm(binary: Option<&Path>, more: &[String]) -> Result<Vmm> {
    setup::packages()?;
    let bedplate = match binary {
        Some(binary) => fs::canonicalize(binary).with_context(|| format!("{}", binary.display()))?,
        None => workspace::static_bedplate()?,
    };
    let mut all = Vec::new();
    for (option, value) in [("--engine", "kvm"), ("--cpu-model", lab::CPU_MODEL)] {
        if !more.iter().any(|word| word == option) {
            all.extend([option.to_string(), value.to_string()]);
        }
    }
    all.extend_from_slice(more);
    Ok(Vmm::Lab { lab: Box::new(laboratory(bedplate)?), more: all })
}

pub fn laboratory(bedplate: PathBuf) -> Result<Lab> {
    let qemu = trials::qemu_binary()?;
    let ground = Cache::of_user()?.fetch(guest_catalog::find(lab::GROUND)?, &mut Bars::new())?;
    Ok(Lab { qemu, ground, bedplate })
}

/// Boots a guest to its marker and off, and tells what happened on the way.
fn boot(vmm: &Vmm, options: &KvmOptions) -> Result<()> {
    let guest = Cache::of_user()?.fetch(guest_catalog::find(&options.guest)?, &mut Bars::new())?;
    let config = VmConfig::new(&guest, Boot::BzImage, options.cpus, "bedplate.poweroff");
    let mut vm = Vm::start(vmm, &config.map_err(|e| anyhow!("{e}"))?)?;
    let deadline = Instant::now() + Duration::from_secs(options.limit);
    let left = || deadline.saturating_duration_since(Instant::now());
    let result = (|| {
        for (text, meaning) in [
            ("Linux version", "the guest's kernel runs"),
            (INIT_MARKER, "its init runs"),
            (READY_MARKER, "its modules are loaded"),
            ("Power down", "it powers off"),
        ] {
            vm.console().expect(text, left())?;
            eprintln!("{:6.1} s  {meaning}", vm.age().as_secs_f64());
        }
        vm.wait(left())
    })();
    let log = keep_log(&vm)?;
    for line in vm.messages().lines() {
        eprintln!("          {line}");
    }
    match result {
        Ok(guest_trials::Exit::Code(0)) => {
            eprintln!("passed: {} with {} CPUs on KVM; log: {}", options.guest, options.cpus, log.display());
            Ok(())
        }
        Ok(exit) => bail!("bedplate ended with {exit:?}; log: {}", log.display()),
        Err(failure) => bail!("{failure}\nlog: {}", log.display()),
    }
}

/// Everything that was said, in target/lab.
fn keep_log(vm: &Vm) -> Result<PathBuf> {
    let folder = workspace::target_folder()?.join("lab");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("kvm.log");
    fs::write(&path, vm.transcript()).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// Runs the engine's unit and guest tests, which skip themselves where there is no KVM.
fn tests(options: &KvmOptions) -> Result<()> {
    setup::packages()?;
    let programs = workspace::static_engine_tests()?;
    let mut failed = Vec::new();
    for program in &programs {
        let mut command = Command::new(program);
        // One after the other: two virtual processors take their turns as it is.
        command.arg("--test-threads=1").args(&options.more);
        // One processor: each test makes VMs and takes them away.
        let session = Session { cpus: 1, ..Session::of(&[command]) };
        let (mut qemu, run) = Run::prepare(&laboratory(program.clone())?, &session)?;
        let mut child = start(&mut qemu)?;
        if let Err(error) = finish(&run, &mut child, Duration::from_secs(options.limit)) {
            eprintln!("FAILED: {}: {error}", program.display());
            failed.push(program.display().to_string());
        }
    }
    if !failed.is_empty() {
        bail!("{} failed on KVM", failed.join(" and "));
    }
    eprintln!("passed: {} test programs of cpu_kvm on KVM", programs.len());
    Ok(())
}

/// Starts a session. Its messages are copied: where standard error is a file, QEMU would open it anew, and empty it.
pub fn start(qemu: &mut Command) -> Result<Child> {
    // The port's input stays open as long as somebody could write.
    let mut child = qemu.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().context("cannot run QEMU")?;
    if let Some(mut messages) = child.stderr.take() {
        std::thread::spawn(move || std::io::copy(&mut messages, &mut std::io::stderr()));
    }
    Ok(child)
}

/// Waits for a session's end, which must be good.
pub fn finish(run: &Run, qemu: &mut Child, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = qemu.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            qemu.kill()?;
            qemu.wait()?;
            bail!(
                "it did not end within {} s (--limit); the laboratory said:\n{}",
                limit.as_secs(),
                run.log()
            );
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    match run.status(status) {
        Ok(0) => Ok(()),
        Ok(code) => bail!("the session ended with code {code}"),
        Err(failure) => bail!("{failure}"),
    }
}

fn shell(vmm: &Vmm, options: &KvmOptions) -> Result<()> {
    let Vmm::Lab { lab, more } = vmm else { bail!("not in the laboratory") };
    let guest = Cache::of_user()?.fetch(guest_catalog::find(&options.guest)?, &mut Bars::new())?;
    let initrd = guest.initrd.iter().map(|path| format!(" --initrd {}", path.display())).collect::<String>();
    let line = format!(
        "bedplate run --kernel {}{initrd} --append '{}' --cpus {} {}",
        guest.kernel.display(),
        guest.append,
        options.cpus,
        more.join(" ")
    );
    let script = format!(
        "echo; echo 'To boot {}: sh /tmp/guest'; echo \"{line}\" > /tmp/guest\nsetsid cttyhack sh\n",
        guest.guest
    );
    let mut session = Session::script(script, Ends::Terminal);
    session.share(&guest.folder, false);
    let folder = workspace::target_folder()?.join("lab");
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let folder = Folder(folder);
    eprintln!("a shell in the laboratory in some seconds; `exit` leaves it, Ctrl-A x kills it");
    let status = lab.command(&session, &folder)?.stdin(Stdio::inherit()).status()?;
    match status.code().and_then(lab::status_of) {
        Some(_) => Ok(()),
        None => bail!("the laboratory ended with {status}; log: {}", folder.log().display()),
    }
}
