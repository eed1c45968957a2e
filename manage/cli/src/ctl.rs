//! `bedplate ps` and `bedplate ctl`: VMs that run, looked after through their control sockets.

use crate::args::Ctl;
use anyhow::Context;
use std::process::ExitCode;
use vmm::control::save::{self, SaveAsked};
use vmm::control::{Answer, Ask, Status, client};

/// Lists them.
pub fn ps(json: bool) -> anyhow::Result<ExitCode> {
    let all = client::list()?;
    if json {
        println!("{}", serde_json::to_string(&all)?);
    } else {
        print!("{}", table(&all));
    }
    Ok(ExitCode::SUCCESS)
}

/// Does one thing to one.
pub fn ctl(name: &str, what: &Ctl, json: bool) -> anyhow::Result<ExitCode> {
    let ask = match what {
        Ctl::Status => Ask::Status,
        Ctl::Pause => Ask::Pause,
        Ctl::Resume => Ask::Resume,
        Ctl::Reset => Ask::Reset,
        Ctl::Stop => Ask::Stop,
        Ctl::Kill => Ask::Kill,
        Ctl::Move { engine } => Ask::Move { engine: (*engine).into() },
        Ctl::Save { file, and_continue, compress } => {
            // For the messages of the VM's process, which may have another current folder.
            let file = std::path::absolute(file).with_context(|| file.display().to_string())?;
            let asked = SaveAsked { file: &file, and_continue: *and_continue, compress: *compress };
            return Ok(show(&save::save(name, asked)?, json)?);
        }
    };
    Ok(show(&client::ask(name, &ask)?, json)?)
}

fn show(answer: &Answer, json: bool) -> serde_json::Result<ExitCode> {
    if json {
        println!("{}", serde_json::to_string(answer)?);
    } else if let Some(status) = &answer.status {
        print!("{}", table(std::slice::from_ref(status)));
        status.counts.iter().for_each(|(name, count)| println!("  {name}: {count}"));
    } else if let Some(message) = &answer.message {
        println!("{message}");
    }
    Ok(ExitCode::SUCCESS)
}

const HEADINGS: [&str; 9] =
    ["NAME", "STATE", "PID", "CPUS", "MEMORY", "ENGINE", "UPTIME", "CPU-TIME", "MIPS"];

fn table(all: &[Status]) -> String {
    let row = |s: &Status| {
        let memory = format!("{} MiB", s.memory_bytes >> 20);
        let (pid, cpus) = (s.pid.to_string(), s.cpus.to_string());
        let mips = s.instructions.filter(|_| s.busy_ms > 0).map(|n| n / 1000 / s.busy_ms);
        [
            s.name.clone(),
            s.state.clone(),
            pid,
            cpus,
            memory,
            s.engine.clone(),
            uptime(s.uptime_ms),
            uptime(s.busy_ms),
            mips.map_or("-".into(), |mips| mips.to_string()),
        ]
    };
    let rows: Vec<[String; 9]> =
        std::iter::once(HEADINGS.map(String::from)).chain(all.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; 9] = std::array::from_fn(width);
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}"));
        text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn uptime(ms: u64) -> String {
    let seconds = ms / 1000;
    match (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60) {
        (0, 0, 0, s) => format!("{s}s"),
        (0, 0, m, s) => format!("{m}m{s:02}s"),
        (0, h, m, _) => format!("{h}h{m:02}m"),
        (d, h, _, _) => format!("{d}d{h:02}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned() {
        let status = |name: &str, uptime_ms| Status {
            name: name.into(),
            state: "running".into(),
            pid: 12,
            cpus: 2,
            memory_bytes: 1 << 30,
            engine: "soft".into(),
            uptime_ms,
            busy_ms: 30_500,
            instructions: Some(3_050_000_000),
            counts: Default::default(),
            version: String::new(),
        };
        let text = table(&[status("a", 61_000), status("a-longer-name", 90_061_000)]);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "NAME           STATE    PID  CPUS  MEMORY    ENGINE  UPTIME  CPU-TIME  MIPS");
        assert_eq!(lines[1], "a              running  12   2     1024 MiB  soft    1m01s   30s       100");
        assert_eq!(lines[2], "a-longer-name  running  12   2     1024 MiB  soft    1d01h   30s       100");
    }
}
