//! `cargo xtask lab costs`: what operations cost Bedplate and QEMU on the same KVM, as counts of instructions of the
//! laboratory's processor; what their start costs, and the memory that they take for themselves.
//!
//! One payload (`xtask/payload`) runs in each. QEMU is the host's own program, copied into the laboratory with its
//! libraries. The laboratory has one processor, whose time is the count of what it executes.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use guest_trials::lab::{self, Ends, Run, Session};
use serde_json::json;

use super::{finish, laboratory, native_start, start};
use crate::{exec, setup, workspace};

const SCRIPT: &str = include_str!("costs.sh");
const MEMORY_MIB: u32 = 1280;
const ROUNDS: u32 = 3;
/// Only ends a hang. Seconds.
const LIMIT: u64 = 1800;
/// As in the script. The first is held against the others.
const CONTENDERS: [&str; 3] = ["bedplate", "qemu-q35", "qemu-microvm"];
/// What the payload says, in its order, and what it means.
const OPERATIONS: &[(&str, &str)] = &[
    ("cpuid", "CPUID, answered by KVM (for comparison)"),
    ("pio-write", "OUT to a device model and back"),
    ("pio-read", "IN from a device model and back"),
    ("mmio-write", "MMIO write to a device model and back"),
    ("mmio-read", "MMIO read from a device model, completed"),
    ("virtio-blk", "virtio-blk: notification to interrupt, 512 bytes read"),
];
/// A row that no contender can win: KVM alone decides it.
const NOT_JUDGED: &str = "cpuid";
/// QEMU's files besides its libraries.
const ROMS: &[&str] = &[
    "bios-256k.bin",
    "bios-microvm.bin",
    "kvmvapic.bin",
    "linuxboot_dma.bin",
    "pvh.bin",
    "multiboot_dma.bin",
];
const ROM_FOLDERS: &[&str] = &["/usr/share/qemu", "/usr/share/seabios"];

#[derive(Debug, Args)]
pub struct CostsOptions {
    /// Measured runs of each.
    #[arg(long, default_value_t = ROUNDS)]
    rounds: u32,
    /// Seconds that the whole run may take.
    #[arg(long, default_value_t = LIMIT)]
    limit: u64,
    /// Use this static bedplate binary instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
}

impl Default for CostsOptions {
    fn default() -> Self {
        Self { rounds: ROUNDS, limit: LIMIT, binary: None }
    }
}

/// What was measured, by name: of an operation instructions, of a start instructions, of memory KiB.
type Measured = BTreeMap<String, Vec<f64>>;

pub fn run(options: &CostsOptions) -> Result<()> {
    setup::packages()?;
    let bedplate = match &options.binary {
        Some(binary) => fs::canonicalize(binary).with_context(|| format!("{}", binary.display()))?,
        None => workspace::static_bedplate()?,
    };
    let folder = workspace::target_folder()?.join("lab");
    fs::create_dir_all(&folder)?;
    let lab = laboratory(bedplate)?;
    let (payload, idle) = (build(&folder, "payload", &[])?, build(&folder, "idle", &["-DIDLE"])?);
    let variables = [
        ("QEMU", lab.qemu.display().to_string()),
        ("PAYLOAD", payload.display().to_string()),
        ("IDLE", idle.display().to_string()),
        ("MODEL", lab::CPU_MODEL.to_string()),
        ("ROUNDS", options.rounds.to_string()),
    ];
    let variables: String = variables.iter().map(|(name, value)| format!("{name}='{value}'\n")).collect();
    let script = format!("{}exec >&3 2>&4 3>&- 4>&-\n{variables}{SCRIPT}", lab::OPEN_PORTS);
    let mut files = needed_by(&lab.qemu)?;
    files.extend([payload, idle.clone()]);
    let session = Session {
        files,
        counts_instructions: true,
        cpus: 1,
        memory_mib: MEMORY_MIB,
        ..Session::script(script, Ends::Pipes)
    };
    let (mut qemu, run) = Run::prepare(&lab, &session)?;
    let mut child = start(qemu.stdout(Stdio::piped()))?;
    let output = child.stdout.take().ok_or_else(|| anyhow!("QEMU has no output"))?;
    let reader = std::thread::spawn(move || std::io::read_to_string(output));
    finish(&run, &mut child, Duration::from_secs(options.limit))?;
    let said = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    fs::write(folder.join("costs.log"), format!("{said}\n===== laboratory\n{}", run.log()))?;
    let mut all = parse(&said)?;
    let here = native_start::measure(on_the_host(&lab, &idle).each_mut())?;
    for (contender, values) in CONTENDERS.iter().zip(here) {
        all.entry((*contender).into()).or_default().insert("start-here".into(), values);
    }
    report(options, &lab, &folder, &all)
}

/// The same VMMs without the laboratory.
fn on_the_host(lab: &lab::Lab, idle: &Path) -> [Command; 3] {
    let mut bedplate = Command::new(&lab.bedplate);
    bedplate.args(["run", "--memory", "256M", "--kernel"]).arg(idle);
    let qemu = |machine: &str| {
        let mut qemu = Command::new(&lab.qemu);
        let words =
            "-accel kvm -accel tcg -S -nodefaults -no-user-config -display none -serial stdio -m 256 -M";
        qemu.args(words.split(' ')).args([machine, "-kernel"]).arg(idle);
        qemu
    };
    [bedplate, qemu("q35"), qemu("microvm")]
}

/// The payload as a PVH ELF.
fn build(folder: &Path, name: &str, more: &[&str]) -> Result<PathBuf> {
    let program = folder.join(name).with_extension("elf");
    let flags = "-O2 -Wall -Wextra -Werror -ffreestanding -fno-pic -no-pie -mno-red-zone -mgeneral-regs-only \
                 -fno-stack-protector -fcf-protection=none -nostdlib -static -Wl,-T,payload.ld -Wl,--build-id=none \
                 -Wl,-z,noexecstack -Wl,--no-warn-rwx-segments entry.S payload.c -o";
    let mut words: Vec<String> = flags.split_whitespace().map(str::to_string).collect();
    words.push(program.display().to_string());
    words.extend(more.iter().map(ToString::to_string));
    exec::run(&workspace::root().join("xtask/payload"), "gcc", &words)
        .context("this needs the package gcc")?;
    Ok(program)
}

/// The program, its libraries and its firmware.
pub fn needed_by(qemu: &Path) -> Result<Vec<PathBuf>> {
    let said = exec::output(Path::new("/"), "ldd", &[&qemu.to_string_lossy()])?;
    let mut files = vec![qemu.to_path_buf()];
    files.extend(said.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from));
    for rom in ROMS {
        let found = ROM_FOLDERS.iter().map(|folder| Path::new(folder).join(rom)).find(|path| path.is_file());
        files.push(found.ok_or_else(|| anyhow!("QEMU's {rom} is not installed"))?);
    }
    Ok(files)
}

/// What each contender's run said.
fn parse(said: &str) -> Result<BTreeMap<String, Measured>> {
    let mut all: BTreeMap<String, Measured> = BTreeMap::new();
    let (mut contender, mut nothing) = (String::new(), 0.0);
    for line in said.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let mut add = |name: &str, value: f64| {
            let place = all.entry(contender.clone()).or_default().entry(name.into()).or_default();
            place.push(value);
        };
        match words[..] {
            ["CONTENDER", name] => contender = name.to_string(),
            ["COST", "nothing", count, ticks] => nothing = ticks.parse::<f64>()? / count.parse::<f64>()?,
            // The loop around a short operation is not its cost.
            ["COST", name, count, ticks] => {
                add(name, ticks.parse::<f64>()? / count.parse::<f64>()? - nothing)
            }
            ["START", ns] => add("start", ns.parse()?),
            ["MEMORY", own, files, "1"] => {
                add("own", own.parse()?);
                add("files", files.parse()?);
            }
            ["MEMORY", ..] => bail!("{contender}: guest RAM was not told from other memory: {line}"),
            ["FAILED", ..] => bail!("{contender}: {line}"),
            _ => {}
        }
    }
    for (contender, name) in CONTENDERS.iter().flat_map(|c| OPERATIONS.iter().map(move |(name, _)| (c, name)))
    {
        if !all.get(*contender).is_some_and(|measured| measured.contains_key(*name)) {
            bail!("{contender} did not come to {name}; it said:\n{said}");
        }
    }
    Ok(all)
}

fn report(
    options: &CostsOptions,
    lab: &lab::Lab,
    folder: &Path,
    all: &BTreeMap<String, Measured>,
) -> Result<()> {
    let value =
        |contender: &str, name: &str| all.get(contender).and_then(|m| crate::bench::median(m.get(name)?));
    let mut table =
        "| operation | Bedplate | QEMU q35 | QEMU microvm | Bedplate ≤ both |\n|---|---:|---:|---:|---|\n"
            .to_string();
    let mut behind = Vec::new();
    let facts = [
        (
            "start",
            "VMM start to the guest's first instruction, ms of processor time, an instruction being 1 ns",
            1e6,
        ),
        ("start-here", "the same on this host, by the clock", 1e6),
        ("own", "private resident memory of the VMM, guest RAM apart, MiB", 1024.0),
        ("files", "resident of its program and libraries, which VMs share, MiB", 1024.0),
    ];
    let operations = OPERATIONS.iter().map(|(name, meaning)| (*name, *meaning, 1.0));
    for (name, meaning, unit) in operations.chain(facts) {
        let values = CONTENDERS.map(|contender| value(contender, name).map(|v| v / unit));
        let [Some(ours), others @ ..] = values else { bail!("{name} was not measured") };
        let good = others.iter().flatten().all(|other| ours <= *other);
        if !good && name != NOT_JUDGED {
            behind.push(meaning);
        }
        let shown = values.map(|v| v.map_or("–".into(), |v| format!("{v:.*}", usize::from(unit > 1.0))));
        let verdict = match name {
            NOT_JUDGED => "–",
            _ if good => "yes",
            _ => "no",
        };
        table.push_str(&format!("| {meaning} | {} | {verdict} |\n", shown.join(" | ")));
    }
    let qemu = exec::output(Path::new("/"), &lab.qemu.to_string_lossy(), &["--version"])?;
    let qemu = qemu.lines().next().unwrap_or_default();
    let json = json!({
        "bench": "lab costs", "commit": workspace::commit(), "host": workspace::processor(), "qemu": qemu,
        "kernel": lab.ground.version, "rounds": options.rounds, "results": all,
    });
    let path = folder.join("costs.json");
    fs::write(&path, serde_json::to_string_pretty(&json)?)?;
    println!(
        "Costs in instructions on {} (SVM in QEMU TCG, -icount shift=0,sleep=off), beside {qemu}, medians of {} \
         rounds, commit {}\n\n{table}\n{}",
        lab.ground.version,
        options.rounds,
        workspace::commit(),
        path.display()
    );
    if !behind.is_empty() {
        bail!("QEMU needs less: {}", behind.join("; "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(cost: u32) -> String {
        CONTENDERS.iter().fold(String::new(), |mut all, contender| {
            all.push_str(&format!("CONTENDER {contender}\nSTART 9000000\nMEMORY 100 20 1\r\n"));
            all.push_str("COST nothing 10 100\r\n");
            for (name, _) in OPERATIONS {
                all.push_str(&format!("COST {name} 10 {cost}\r\n"));
            }
            all
        })
    }

    #[test]
    fn costs_are_of_one_without_the_loop() {
        let all = parse(&said(1100)).unwrap();
        assert_eq!(all["qemu-q35"]["pio-read"], [100.0]);
        assert_eq!((&all["bedplate"]["own"][..], &all["bedplate"]["start"][..]), (&[100.0][..], &[9e6][..]));
    }

    #[test]
    fn what_is_missing_or_failed_is_an_error() {
        assert!(
            parse(&said(1).replace("COST virtio-blk", "COST x"))
                .unwrap_err()
                .to_string()
                .contains("virtio-blk")
        );
        assert!(parse("CONTENDER bedplate\nFAILED a read of the disk\n").is_err());
        assert!(parse(&said(1).replace("MEMORY 100 20 1", "MEMORY 100 20 2")).is_err());
    }
}
