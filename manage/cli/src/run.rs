//! `bedplate run`: from the command line to a VM, and from its end to an exit code.

use crate::args::{self, RunArgs};
use anyhow::Context;
use std::process::ExitCode;
use vmm::launch::Manner;
use vmm::wire::{BootSpec, DiskSpec, EngineChoice, NetSpec, OnPanic, OnReset, VmSpec};

/// Runs it.
pub fn run(args: &RunArgs) -> anyhow::Result<ExitCode> {
    // For scripts there is one line of JSON and no other.
    let say = |text: &str| {
        if !args.json {
            eprintln!("bedplate: {text}");
        }
    };
    let manner = Manner {
        say: &say,
        jailed: !args.no_sandbox,
        blocks: args.trace_blocks.as_deref(),
        perf_map: args.perf_map,
    };
    if let Some(file) = &args.restore {
        let folder = std::env::current_dir().context("the current folder")?;
        let disks: Result<Vec<_>, _> = args.disk.iter().map(|disk| DiskSpec::from_option(disk)).collect();
        let mut disks = disks?;
        disks.iter_mut().for_each(|disk| disk.path = folder.join(&disk.path));
        let changes = vmm::launch::Changes {
            disks: &disks,
            name: args.name.as_deref(),
            engine: args.engine.map(EngineChoice::from),
            disks_moved: args.disks_moved,
        };
        return Ok(ended(&vmm::launch::restore(file, changes, manner)?, args));
    }
    let spec = spec(args)?;
    // The machine's own rules, too.
    vmm::convert::machine(&spec)?;
    if args.dry_run {
        spec.check_files()?;
        match args.json {
            true => println!("{}", serde_json::to_string(&spec)?),
            false => print!("{}", spec.to_toml()),
        }
        return Ok(ExitCode::SUCCESS);
    }
    Ok(ended(&vmm::launch::run(&spec, manner)?, args))
}

/// Says how it ended; on standard error, because standard output is the guest's.
fn ended(ended: &vmm::launch::Ended, args: &RunArgs) -> ExitCode {
    let (code, message) = (vmm::exit::exit_code(&ended.verdict), vmm::exit::message(&ended.verdict));
    let statistics = &ended.statistics;
    if args.json {
        let (busy_ms, mips) = (statistics.busy_ns / 1_000_000, statistics.mips());
        eprintln!(
            "{}",
            serde_json::json!({
                "code": code, "message": message, "instructions": statistics.instructions, "busy_ms": busy_ms, "mips": mips,
            })
        );
        return ExitCode::from(code);
    }
    eprintln!("bedplate: {message}");
    if args.statistics {
        eprintln!("bedplate: {}", in_words(statistics));
    }
    ExitCode::from(code)
}

/// `1.2 billion instructions in 9.8 s of CPU time, 122 MIPS`.
fn in_words(statistics: &vmm::Statistics) -> String {
    let time = format!("{:.1} s of CPU time", statistics.busy_ns as f64 / 1e9);
    match (statistics.instructions, statistics.mips()) {
        (Some(n), Some(mips)) => {
            format!("{:.2} billion instructions in {time}, {mips:.0} MIPS", n as f64 / 1e9)
        }
        _ => time,
    }
}

/// The spec file, completed and overridden by the command line, and resolved.
pub fn spec(args: &RunArgs) -> anyhow::Result<VmSpec> {
    let mut spec = match &args.spec {
        Some(path) => VmSpec::load(path)?,
        None => VmSpec::default(),
    };
    boot(args, &mut spec)?;
    for disk in &args.disk {
        spec.disks.push(DiskSpec::from_option(disk)?);
    }
    for net in &args.net {
        spec.nets.push(NetSpec::from_option(net)?);
    }
    if !args.serial.is_empty() {
        spec.serial = args.serial.clone();
    }
    spec.consoles.extend(args.console.iter().cloned());
    replace(&mut spec.cpus, args.cpus);
    if let Some(memory) = &args.memory {
        spec.memory = memory.parse().map_err(|error| anyhow::anyhow!("--memory: {error}"))?;
    }
    spec.cpu_model = args.cpu_model.clone().or(spec.cpu_model.take());
    replace(&mut spec.engine, args.engine.map(EngineChoice::from));
    replace(
        &mut spec.on_reset,
        args.on_reset.map(|policy| match policy {
            args::OnReset::Reboot => OnReset::Reboot,
            args::OnReset::Stop => OnReset::Stop,
        }),
    );
    replace(
        &mut spec.on_panic,
        args.on_panic.map(|policy| match policy {
            args::OnPanic::Stop => OnPanic::Stop,
            args::OnPanic::Keep => OnPanic::Keep,
        }),
    );
    spec.clock_rate = args.clock_rate.clone().or(spec.clock_rate);
    spec.name = args.name.clone().or(spec.name);
    let folder = std::env::current_dir().context("the current folder")?;
    Ok(spec.resolve(&folder)?)
}

fn replace<T>(field: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *field = value;
    }
}

fn boot(args: &RunArgs, spec: &mut VmSpec) -> anyhow::Result<()> {
    if let Some(kernel) = &args.kernel {
        // Another kernel does not want the file's initrd or command line.
        spec.boot = Some(BootSpec { kernel: kernel.clone(), ..BootSpec::default() });
    }
    let Some(boot) = &mut spec.boot else {
        anyhow::ensure!(
            args.initrd.is_none() && args.append.is_none(),
            "--initrd and --append need --kernel FILE"
        );
        return Ok(());
    };
    boot.initrd = args.initrd.clone().or(boot.initrd.take());
    replace(&mut boot.append, args.append.clone());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn the_command_line_overrides_the_file_and_adds_to_its_lists() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("vm.toml");
        std::fs::write(
            &file,
            "cpus = 4\nmemory = \"2G\"\n[boot]\nkernel = \"k\"\nappend = \"a\"\n[[disk]]\npath = \"one\"\n",
        )
        .unwrap();
        let args = RunArgs {
            spec: Some(file),
            cpus: Some(1),
            append: Some("b".into()),
            disk: vec!["/two,ro".into()],
            ..RunArgs::default()
        };
        let spec = spec(&args).unwrap();
        assert_eq!((spec.cpus, spec.memory.to_string()), (1, "2G".into()));
        assert_eq!(spec.disks[0].path, folder.path().join("one"));
        assert_eq!(spec.disks[1].path, Path::new("/two"));
        let boot = spec.boot.unwrap();
        assert_eq!((boot.kernel, boot.append.as_str()), (folder.path().join("k"), "b"));
    }

    #[test]
    fn mistakes_are_told_with_the_option() {
        let message = |args: RunArgs| format!("{:#}", spec(&args).unwrap_err());
        assert!(message(RunArgs { memory: Some("much".into()), ..RunArgs::default() }).contains("--memory"));
        assert!(message(RunArgs { initrd: Some("i".into()), ..RunArgs::default() }).contains("--kernel"));
        let missing = RunArgs { spec: Some("/no/such.toml".into()), ..RunArgs::default() };
        assert!(message(missing).contains("/no/such.toml"));
    }
}
