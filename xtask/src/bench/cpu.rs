//! `cargo xtask bench cpu`: a static program of small workloads (`xtask/workloads`), natively, in QEMU's translator (TCG)
//! and in Bedplate, interleaved. In a guest it is the kernel's init. What counts are ratios of medians; sums prove
//! that all computed the same.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use guest_catalog::cpio::CpioWriter;
use guest_catalog::{Cache, Prepared};
use guest_trials::{Boot, Vm, VmConfig, Vmm};
use serde_json::json;

use super::goals::{self, Measured};
use super::{PATIENCE, geomean, median, times};
use crate::progress::Bars;
use crate::{exec, setup, trials, workspace};

const MEMORY_MIB: u32 = 512;
/// The libraries behind the applications, in the linker's order.
const LIBRARIES: &[&str] = &["-lsqlite3", "-llua5.4", "-lz", "-lm", "-lpthread", "-ldl"];
const PACKAGES: &[&str] = &["gcc", "libc6-dev", "zlib1g-dev", "libsqlite3-dev", "liblua5.4-dev"];

#[derive(Debug, Args)]
pub struct CpuOptions {
    /// Measured runs of each.
    #[arg(long, default_value_t = super::DEFAULT_ROUNDS)]
    rounds: u32,
    /// Only these workloads or classes.
    #[arg(long)]
    only: Vec<String>,
    /// vCPUs.
    #[arg(long, default_value_t = 1)]
    cpus: u32,
    /// More arguments for `bedplate run`.
    #[arg(last = true)]
    more: Vec<String>,
}

/// One line of the program's.
#[derive(Debug, PartialEq)]
struct Line {
    class: String,
    name: String,
    /// Nanoseconds for one, and the sum; `None`: the processor lacks something.
    measured: Option<(f64, String)>,
}

/// A workload and what was measured, by contender.
#[derive(Default)]
struct Row {
    class: String,
    name: String,
    nanoseconds: [Vec<f64>; 3],
    /// Sums that were seen.
    sums: Vec<String>,
}

const CONTENDERS: [&str; 3] = ["native", "TCG", "Bedplate"];

pub fn run(options: &CpuOptions) -> Result<()> {
    setup::packages()?;
    let folder = workspace::target_folder()?.join("bench");
    fs::create_dir_all(&folder)?;
    let program = build(&folder)?;
    let guest = Cache::of_user()?.fetch(guest_catalog::find("cloud")?, &mut Bars::new())?;
    let mut config =
        VmConfig::new(&guest, Boot::BzImage, options.cpus, &format!("-- {}", options.only.join(" ")))
            .map_err(|e| anyhow!("{e}"))?;
    config.initrd = Some(initrd(&folder, &program)?);
    config.memory_mib = MEMORY_MIB;
    let bedplate =
        Vmm::Bedplate { binary: workspace::bedplate("release")?, more: trials::options(&options.more) };
    let qemu = trials::qemu()?;
    let mut rows: Vec<Row> = Vec::new();
    for round in 1..=options.rounds {
        let runs = [
            native(&program, &options.only).context("native")?,
            in_guest(&qemu, &config).context("QEMU")?,
            in_guest(&bedplate, &config).context("Bedplate")?,
        ];
        eprintln!("round {round} of {}", options.rounds);
        for (who, lines) in runs.into_iter().enumerate() {
            lines.into_iter().for_each(|line| add(&mut rows, who, line));
        }
    }
    report(options, &guest, &folder, &rows)
}

fn add(rows: &mut Vec<Row>, who: usize, line: Line) {
    let at = rows.iter().position(|row| row.name == line.name).unwrap_or_else(|| {
        rows.push(Row { class: line.class, name: line.name, ..Row::default() });
        rows.len() - 1
    });
    if let Some((nanoseconds, sum)) = line.measured {
        rows[at].nanoseconds[who].push(nanoseconds);
        if !rows[at].sums.contains(&sum) {
            rows[at].sums.push(sum);
        }
    }
}

fn build(folder: &Path) -> Result<PathBuf> {
    let sources = workspace::root().join("xtask/workloads");
    let program = folder.join("workloads");
    let mut words: Vec<String> =
        ["-O2", "-ffp-contract=off", "-static", "-I/usr/include/lua5.4", "-o"].map(String::from).to_vec();
    words.push(program.display().to_string());
    let mut files: Vec<_> = fs::read_dir(&sources)?.collect::<Result<_, _>>()?;
    files.sort_by_key(std::fs::DirEntry::path);
    words.extend(files.iter().map(|f| f.path().display().to_string()).filter(|name| name.ends_with(".c")));
    words.extend(LIBRARIES.iter().map(ToString::to_string));
    exec::run(&sources, "gcc", &words)
        .with_context(|| format!("the workloads need these packages: {}", PACKAGES.join(" ")))?;
    Ok(program)
}

fn initrd(folder: &Path, program: &Path) -> Result<PathBuf> {
    let path = folder.join("workloads.cpio");
    let mut cpio = CpioWriter::new(Vec::new());
    cpio.directory("dev")?;
    cpio.char_device("dev/console", 5, 1)?;
    cpio.executable("init", &fs::read(program)?)?;
    fs::write(&path, cpio.finish()?)?;
    Ok(path)
}

fn native(program: &Path, only: &[String]) -> Result<Vec<Line>> {
    let output = Command::new(program).args(only).output()?;
    parse(&String::from_utf8_lossy(&output.stdout))
}

fn in_guest(vmm: &Vmm, config: &VmConfig) -> Result<Vec<Line>> {
    let mut vm = Vm::start(vmm, config)?;
    vm.console().expect("WORKLOADS END", PATIENCE)?;
    let text = String::from_utf8_lossy(&vm.console_transcript()).into_owned();
    vm.stop(PATIENCE).map_err(|e| anyhow!("{e}"))?;
    parse(&text)
}

/// The lines of workloads in what was printed.
fn parse(text: &str) -> Result<Vec<Line>> {
    let mut lines = Vec::new();
    for line in text.lines().filter_map(|line| line.trim().strip_prefix("WORKLOAD ")) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [class, name, nanoseconds, sum] = words[..] else { bail!("the workloads said: {line}") };
        let measured = match nanoseconds {
            "-" => None,
            number => Some((number.parse()?, sum.to_string())),
        };
        lines.push(Line { class: class.into(), name: name.into(), measured });
    }
    Ok(lines)
}

impl Row {
    fn median(&self, who: usize) -> Option<f64> {
        median(&self.nanoseconds[who])
    }
    fn measured(&self) -> Measured<'_> {
        let (faster, slower) = (self.ratio(TCG, BEDPLATE), self.ratio(BEDPLATE, NATIVE));
        Measured { class: &self.class, name: &self.name, faster, slower }
    }
    /// How many times as long `a` takes as `b`.
    fn ratio(&self, a: usize, b: usize) -> Option<f64> {
        Some(self.median(a)? / self.median(b)?)
    }
}

fn time(nanoseconds: Option<f64>) -> String {
    match nanoseconds {
        None => "–".into(),
        Some(ns) if ns < 1e4 => format!("{ns:.0} ns"),
        Some(ns) if ns < 1e7 => format!("{:.1} µs", ns / 1e3),
        Some(ns) => format!("{:.1} ms", ns / 1e6),
    }
}

/// Indices of [`CONTENDERS`].
const NATIVE: usize = 0;
const TCG: usize = 1;
const BEDPLATE: usize = 2;

fn table_of_rows(rows: &[Row]) -> String {
    let mut table = "| class | workload | native | TCG | Bedplate | faster than TCG | slower than native |\n\
        |---|---|---:|---:|---:|---:|---:|\n"
        .to_string();
    for row in rows {
        let doubt = if row.sums.len() > 1 { " (sums differ)" } else { "" };
        table.push_str(&format!(
            "| {} | {}{doubt} | {} | {} | {} | {} | {} |\n",
            row.class,
            row.name,
            time(row.median(NATIVE)),
            time(row.median(TCG)),
            time(row.median(BEDPLATE)),
            times(row.ratio(TCG, BEDPLATE)),
            times(row.ratio(BEDPLATE, NATIVE)),
        ));
    }
    table
}

fn table_of_classes(rows: &[Row]) -> String {
    let mut classes: BTreeMap<&str, Vec<&Row>> = BTreeMap::new();
    rows.iter().for_each(|row| classes.entry(&row.class).or_default().push(row));
    classes.insert("all", rows.iter().collect());
    let mut table =
        "| class | faster than TCG | least | slower than native |\n|---|---:|---:|---:|\n".to_string();
    for (class, rows) in &classes {
        let against = || rows.iter().filter_map(|row| row.ratio(TCG, BEDPLATE));
        let least = against().min_by(f64::total_cmp);
        let slowdown = geomean(rows.iter().filter_map(|row| row.ratio(BEDPLATE, NATIVE)));
        let (mean, least, slowdown) = (times(geomean(against())), times(least), times(slowdown));
        table.push_str(&format!("| {class} | {mean} | {least} | {slowdown} |\n"));
    }
    table
}

fn report(options: &CpuOptions, guest: &Prepared, folder: &Path, rows: &[Row]) -> Result<()> {
    let entries: Vec<_> = rows
        .iter()
        .map(|row| json!({ "class": row.class, "name": row.name, "sums": row.sums, "nanoseconds": row.nanoseconds }))
        .collect();
    let facts = json!({
        "bench": "cpu", "commit": workspace::commit(), "host": workspace::processor(), "kernel": guest.version,
        "cpus": options.cpus, "rounds": options.rounds, "more": options.more, "contenders": CONTENDERS,
        "rows": entries,
    });
    let path = folder.join("cpu.json");
    fs::write(&path, serde_json::to_string_pretty(&facts)?)?;
    println!(
        "{} workloads, {} CPU, {} rounds interleaved, {}, commit {}\n\n{}\n{}\n{}\n{}",
        rows.len(),
        options.cpus,
        options.rounds,
        workspace::processor(),
        workspace::commit(),
        goals::table(&rows.iter().map(Row::measured).collect::<Vec<_>>()),
        table_of_classes(rows),
        table_of_rows(rows),
        path.display()
    );
    let wrong: Vec<_> = rows.iter().filter(|row| row.sums.len() > 1).map(|row| row.name.as_str()).collect();
    if !wrong.is_empty() {
        bail!("not all computed the same: {}", wrong.join(" "));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_console() {
        let text = "[ 0.1] Linux\r\nWORKLOADS BEGIN\r\nWORKLOAD x87 pi 12.50 00ff\r\nWORKLOAD avx2 m - -\r\n";
        let line =
            |class: &str, name: &str, measured| Line { class: class.into(), name: name.into(), measured };
        let want = vec![line("x87", "pi", Some((12.5, "00ff".to_string()))), line("avx2", "m", None)];
        assert_eq!(parse(text).unwrap(), want);
        assert!(parse("WORKLOAD x87 pi").is_err());
    }

    #[test]
    fn rows_keep_medians_and_doubts() {
        let mut rows = Vec::new();
        for (who, ns, sum) in [(1, 40.0, "a"), (1, 60.0, "a"), (2, 10.0, "b")] {
            add(
                &mut rows,
                who,
                Line { class: "c".into(), name: "n".into(), measured: Some((ns, sum.into())) },
            );
        }
        assert_eq!((rows.len(), rows[0].ratio(1, 2), rows[0].sums.len()), (1, Some(5.0), 2));
        assert_eq!(rows[0].ratio(2, 0), None);
    }
}
