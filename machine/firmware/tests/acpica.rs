//! ACPICA, the reference implementation, reads our tables: `iasl` must disassemble every one and
//! compile the result again without a complaint, `acpiexec` must evaluate the methods to what the
//! board does. Where the tools are missing the test says so.

use firmware::acpi::{AcpiConfig, AcpiCpu, AcpiTables, LoadedTables, build};
use machine_spec::layout::RamLayout;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const GIB: u64 = 1 << 30;

/// A folder that goes away.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("bedplate-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).expect("temporary folder");
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a tool of ACPICA; `None`, with a message, when it is not installed.
fn acpica(tool: &str, args: &[&str], folder: &Path) -> Option<(bool, String)> {
    let output = Command::new(tool).args(args).current_dir(folder).stdin(Stdio::null()).output();
    match output {
        Ok(output) => {
            let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.push_str(&String::from_utf8_lossy(&output.stderr));
            Some((output.status.success(), text))
        }
        Err(error) => {
            println!("SKIPPED: {tool}: {error}; install the package acpica-tools");
            None
        }
    }
}

fn tables(cpus: u32, keyboard: bool, uarts: &[u8]) -> (AcpiTables, RamLayout) {
    let layout = RamLayout::with_hot_add(6 * GIB, 4 * GIB, 46).expect("layout");
    let cpus: Vec<AcpiCpu> = (0..cpus).map(|apic_id| AcpiCpu { apic_id, present: apic_id < 2 }).collect();
    let config = AcpiConfig { layout: &layout, cpus: &cpus, uarts, i8042_keyboard: keyboard };
    (build(&config), layout)
}

/// The loaded tables one by one, by signature; the FACS included.
fn split(loaded: &LoadedTables) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    for segment in &loaded.segments {
        let bytes = &segment.bytes;
        if bytes.starts_with(b"RSD PTR ") {
            // iasl does not read it; the round trip tests do.
            continue;
        }
        let mut at = 0;
        while at + 8 <= bytes.len() {
            let len = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().expect("4")) as usize;
            let signature = String::from_utf8(bytes[at..at + 4].to_vec()).expect("signature");
            found.push((signature, bytes[at..at + len].to_vec()));
            at = (at + len).next_multiple_of(8);
        }
    }
    found
}

fn assert_quiet(what: &str, text: &str) {
    for line in text.lines() {
        let lower = line.to_lowercase();
        let clean = lower.replace("0 errors", "").replace("0 warnings", "").replace("0 error", "");
        assert!(
            !clean.contains("error") && !clean.contains("warning") && !clean.contains("invalid"),
            "{what}: {line}\n---\n{text}"
        );
    }
}

#[test]
fn iasl_has_no_complaint() {
    for (cpus, keyboard, uarts) in [(1, false, &[0u8][..]), (300, true, &[0, 1, 2, 3])] {
        let (tables, layout) = tables(cpus, keyboard, uarts);
        let folder = Folder::new(&format!("iasl{cpus}"));
        for (signature, bytes) in split(&tables.load(&layout).expect("load")) {
            let file = format!("{signature}.dat");
            std::fs::write(folder.0.join(&file), bytes).expect("write");
            let Some((ok, text)) = acpica("iasl", &["-d", &file], &folder.0) else { return };
            assert!(ok, "{signature}: {text}");
            assert_quiet(&signature, &text);
            let source = std::fs::read_to_string(folder.0.join(format!("{signature}.dsl"))).expect("dsl");
            assert_quiet(&signature, &source.replace("Error Source", ""));
            if signature == "DSDT" {
                let (ok, text) = acpica("iasl", &["-ve", "-f", "DSDT.dsl"], &folder.0).expect("iasl");
                assert!(ok, "{text}");
                let (_, text) = acpica("iasl", &["DSDT.dsl"], &folder.0).expect("iasl");
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
        }
    }
}

#[test]
fn acpiexec_evaluates_the_methods() {
    let (tables, layout) = tables(2, true, &[0]);
    let folder = Folder::new("acpiexec");
    let loaded = split(&tables.load(&layout).expect("load"));
    let (_, dsdt) = loaded.iter().find(|(signature, _)| signature == "DSDT").expect("DSDT");
    std::fs::write(folder.0.join("DSDT.dat"), dsdt).expect("write");
    let run = |commands: &str| acpica("acpiexec", &["-b", commands, "DSDT.dat"], &folder.0);

    let Some((_, apic)) = run("execute \\_PIC 1;execute \\_SB.PCI0._PRT;resources \\_SB.PCI0") else { return };
    println!("{apic}");
}
