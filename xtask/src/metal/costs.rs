//! `cargo xtask metal costs`: what exits cost, how far it is from power-on to the first guest, and what memory the
//! hypervisor takes, beside Xen and beside KVM, on the same emulated machine (QEMU, SVM), counted in instructions.
//!
//! One guest (`bedplate-exit-bench`) runs under each. The machine's time-stamp counter counts instructions from
//! power-on: we and Xen write it to our logs; on KVM a program beside the VMM reads it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use guest_trials::lab::{self, Ends, Run, Session};

use super::emulator::{Boot, Qemu};
use super::{build, build_exit_bench, bundle, loadable, rows};
use crate::lab::costs::needed_by;
use crate::lab::{finish, laboratory, start};
use crate::{exec, setup, workspace};

const SCRIPT: &str = include_str!("costs.sh");
/// Debian's Xen, which QEMU wants unpacked.
const XEN: &str = "/boot/xen-4.17-amd64.gz";
/// As KVM's laboratory: nobody pays for mitigations. Raw time stamps are the time-stamp counter.
const XEN_WORDS: &str = "console=com2 com2=115200,8n1,0x2f8,3 console_timestamps=raw noreboot spec-ctrl=no";
/// Xen's first domain; its kernel has what a first domain needs.
const DOM0: &str = "generic";
const LIMIT: u64 = 1800;
const LAB_MEMORY_MIB: u32 = 1280;
const OPERATIONS: &[&str] = &[
    "CPUID, leaf 0",
    "CPUID, leaf 1",
    "OUT to the UART model",
    "IN from the UART model",
    "OUT to the host bridge model",
    "IN from the host bridge model",
    "RDMSR",
    "MMIO read",
    "virtio-blk read, kick to interrupt",
];
/// Under Xen the first domain has the machine's UART itself, and what is nobody's.
const NO_EXIT_IN_XEN: &[&str] = &["OUT to the UART model", "IN from the UART model", "MMIO read"];
const INTERPRETED: &[&str] = &["RDMSR", "MMIO read"];
/// The first is held against the others.
const CONTENDERS: [&str; 4] = ["metal", "xen", "bedplate", "qemu"];
const FIRST: &str = "power-on to the guest's first words";
const DOM0_FIRST: &str = "power-on to the first process of a Linux that is Xen's first domain";
const MEMORY: &str = "own memory, KiB";

/// What a contender was measured at, by name.
type Measured = BTreeMap<String, u64>;

#[derive(Debug, Default, Args)]
pub struct CostsOptions {
    /// Use this static bedplate binary on KVM instead of building one.
    #[arg(long)]
    binary: Option<PathBuf>,
}

pub fn run(options: &CostsOptions) -> Result<()> {
    setup::packages()?;
    let folder = workspace::target_folder()?.join("metal");
    fs::create_dir_all(&folder)?;
    let bench = folder.join("exit-bench.elf");
    fs::write(&bench, loadable::loadable(&fs::read(build_exit_bench()?)?)?)?;
    let mut all = BTreeMap::from([("metal", metal()?)]);
    match xen(&folder, &bench) {
        Ok(measured) => _ = all.insert("xen", measured),
        Err(error) => eprintln!("NOT RUN: Xen: {error:#}"),
    }
    all.extend(kvm(options, &folder, &bench)?);
    println!("{}", table(&all));
    let behind = behind(&all);
    if !behind.is_empty() {
        bail!("another hypervisor needs less: {}", behind.join("; "));
    }
    Ok(())
}

/// What somebody else needs less for. What is interpreted is not held against anybody yet.
fn behind(all: &BTreeMap<&str, Measured>) -> Vec<String> {
    let judged = OPERATIONS.iter().filter(|what| !INTERPRETED.contains(what)).chain(&[FIRST, MEMORY]);
    let less = judged.filter(|what| {
        let values = |who: &&str| all.get(who).and_then(|measured| measured.get(**what)).copied();
        let others = CONTENDERS[1..].iter().filter_map(values).min();
        others.is_some_and(|least| values(&CONTENDERS[0]).is_none_or(|ours| ours > least))
    });
    less.map(ToString::to_string).collect()
}

/// The machine of all contenders; its clock shows the same time in every run.
fn machine(boot: Boot, more: &[&str]) -> Result<Qemu> {
    let clock = ["-rtc", "base=2026-01-01,clock=vm"];
    let more = clock.iter().chain(more).map(ToString::to_string).collect();
    Ok(Qemu { counted: true, more, ..Qemu::new(boot)? })
}

fn metal() -> Result<Measured> {
    let bundle = Some(rows::exit_bench_bundle(None)?);
    let (log, _) = Qemu { bundle, ..machine(Boot::Pvh(build()?), &[])? }.run(LIMIT)?;
    let mut measured = costs(&log);
    measured.insert(FIRST.into(), number_behind(&log, "time-stamp counter: ")?);
    measured.insert(
        MEMORY.into(),
        log.lines().filter_map(|l| number_behind(l, "own memory: ").ok()).max().unwrap_or(0),
    );
    Ok(measured)
}

/// Our guest as Xen's first domain (PVH, which wants an IOMMU); then Linux as such (PV, which QEMU 7.2's is too little
/// for), to its first process: before that nobody can make another domain.
fn xen(folder: &Path, bench: &Path) -> Result<Measured> {
    if exec::find(XEN).is_none() {
        bail!("{XEN} is not there: cargo xtask setup");
    }
    let unpacked = folder.join("xen.elf");
    let done = Command::new("gzip").args(["-dc", XEN]).output().context("cannot run gzip")?;
    fs::write(&unpacked, done.stdout)?;
    let log = folder.join("xen.log");
    let boot = |words: &str, modules: &str, more: &[&str]| -> Result<(String, String)> {
        let (second, words) = (format!("file:{}", log.display()), format!("{XEN_WORDS} {words}"));
        let common = ["-serial", &second, "-append", &words, "-initrd", modules];
        let qemu = machine(Boot::Pvh(unpacked.clone()), &[&common, more].concat())?;
        // Xen faults early where the processor has SMAP.
        let (said, _) = Qemu { cpu: "max,-smap", ..qemu }.run(LIMIT)?;
        Ok((said, fs::read_to_string(&log)?))
    };
    let (said, log) =
        boot("dom0=pvh dom0_mem=128M", &bench.display().to_string(), &["-device", "amd-iommu"])?;
    let mut measured = costs(&said);
    NO_EXIT_IN_XEN.iter().for_each(|what| _ = measured.remove(*what));
    measured.insert(FIRST.into(), last_stamp(&log)?);
    measured.insert(MEMORY.into(), number_behind(&said, "XEN-MEMORY ")?);
    let (_, files) = bundle::guest_files(DOM0)?;
    let mut places = Vec::new();
    for (name, content) in files {
        places.push(rows::bundle_file(&format!("dom0-{name}"), &content)?.display().to_string());
    }
    let [kernel, initrd] = &places[..] else { bail!("{DOM0} has no initrd") };
    let modules = format!("{kernel} console=hvc0 quiet rdinit=/bin/busybox -- poweroff -f,{initrd}");
    let (_, log) = boot("dom0_mem=512M", &modules, &[])?;
    rows::expect(&log, &["Entering ACPI S5 state"])?;
    measured.insert(DOM0_FIRST.into(), last_stamp(&log)?);
    Ok(measured)
}

fn kvm(options: &CostsOptions, folder: &Path, bench: &Path) -> Result<[(&'static str, Measured); 2]> {
    let bedplate = match &options.binary {
        Some(binary) => fs::canonicalize(binary).with_context(|| format!("{}", binary.display()))?,
        None => workspace::static_bedplate()?,
    };
    let lab = laboratory(bedplate)?;
    let first = folder.join("first");
    let words = ["-O2", "-Wall", "-Werror", "-static", "first.c", "-o"].map(String::from);
    let words = [&words[..], &[first.display().to_string()]].concat();
    exec::run(&workspace::root().join("xtask/payload"), "gcc", &words)
        .context("this needs the package gcc")?;
    let variables = format!(
        "QEMU='{}' BENCH='{}' FIRST='{}' MODEL='{}'\n",
        lab.qemu.display(),
        bench.display(),
        first.display(),
        lab::CPU_MODEL
    );
    let script = format!("{}exec >&3 2>&4 3>&- 4>&-\n{variables}{SCRIPT}", lab::OPEN_PORTS);
    let mut files = needed_by(&lab.qemu)?;
    files.extend([bench.to_owned(), first]);
    let session = Session {
        files,
        counts_instructions: true,
        cpus: 1,
        memory_mib: LAB_MEMORY_MIB,
        ..Session::script(script, Ends::Pipes)
    };
    let (mut qemu, run) = Run::prepare(&lab, &session)?;
    let mut child = start(qemu.stdout(Stdio::piped()))?;
    let output = child.stdout.take().ok_or_else(|| anyhow!("QEMU has no output"))?;
    let reader = std::thread::spawn(move || std::io::read_to_string(output));
    finish(&run, &mut child, Duration::from_secs(LIMIT))?;
    let said = reader.join().map_err(|_| anyhow!("the reader panicked"))??;
    fs::write(folder.join("costs.log"), &said)?;
    parse_kvm(&said)
}

/// What the laboratory's session said. Our VMM is taken to start when QEMU did.
fn parse_kvm(said: &str) -> Result<[(&'static str, Measured); 2]> {
    let (_, said) = said.split_once("CONTENDER qemu").context("the laboratory did not begin")?;
    let (qemu, ours) = said.split_once("CONTENDER bedplate").context("QEMU did not end")?;
    let ticks = |part: &str| -> Result<(u64, u64)> {
        let all: Vec<u64> = part.lines().filter_map(|line| number_behind(line, "TSC ").ok()).collect();
        match all[..] {
            [start, first, ..] => Ok((start, first)),
            _ => bail!("no guest came to its first word:\n{part}"),
        }
    };
    let ((start, first), (our_start, our_first)) = (ticks(qemu)?, ticks(ours)?);
    let with = |part: &str, first: u64| {
        let mut measured = costs(part);
        measured.insert(FIRST.into(), first);
        measured
    };
    Ok([("qemu", with(qemu, first)), ("bedplate", with(ours, start + our_first - our_start))])
}

/// What the guest said of its exits.
fn costs(log: &str) -> Measured {
    let cost =
        |what: &&str| Some(((*what).to_string(), number_behind(log, &format!("EXIT-COST {what}: ")).ok()?));
    OPERATIONS.iter().filter_map(cost).collect()
}

fn number_behind(text: &str, word: &str) -> Result<u64> {
    let (_, rest) = text.split_once(word).with_context(|| format!("`{word}` is not said:\n{text}"))?;
    let digits = rest.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().with_context(|| format!("no number behind `{word}`"))
}

/// The last time stamp of Xen's log.
fn last_stamp(log: &str) -> Result<u64> {
    let mut stamps = log.lines().filter_map(|line| line.split_once("(XEN) [")?.1.split(']').next());
    let last = stamps.next_back().with_context(|| format!("Xen's log has no time stamps:\n{log}"))?;
    u64::from_str_radix(last, 16).with_context(|| format!("odd time stamp {last}"))
}

fn table(all: &BTreeMap<&str, Measured>) -> String {
    let mut table = format!(
        "In instructions, QEMU's SVM with -icount shift=0,sleep=off, commit {}\n\n| | Bedplate on bare metal | \
         Xen 4.17 | Bedplate on KVM | QEMU q35 on KVM |\n|---|---:|---:|---:|---:|\n",
        workspace::commit()
    );
    for what in OPERATIONS.iter().chain(&[FIRST, DOM0_FIRST, MEMORY]) {
        let values =
            CONTENDERS.map(|who| all.get(who).and_then(|m| m.get(*what)).map_or("–".into(), u64::to_string));
        table.push_str(&format!("| {what} | {} |\n", values.join(" | ")));
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logs_are_read() {
        let xen = "(XEN) [000000000000000a] a\n(XEN) [0000000000000010] b\nx\n";
        assert_eq!(last_stamp(xen).unwrap(), 16);
        assert!(last_stamp("nothing").is_err());
        let said =
            "CONTENDER qemu\nTSC 100\nTSC 150\nEXIT-COST RDMSR: 7\r\nCONTENDER bedplate\nTSC 300\nTSC 310\n";
        let [(_, qemu), (_, ours)] = parse_kvm(said).unwrap();
        assert_eq!((qemu[FIRST], qemu["RDMSR"], ours[FIRST]), (150, 7, 110));
        let all = BTreeMap::from([("metal", Measured::from([(FIRST.into(), 200)])), ("qemu", qemu)]);
        assert_eq!(behind(&all), [FIRST]);
        assert!(parse_kvm("CONTENDER qemu\nTSC 1\nCONTENDER bedplate\n").is_err());
    }
}
