//! ACPICA, the reference implementation, reads our tables: `iasl` must disassemble every one and
//! compile the result again without a complaint, `acpiexec` must evaluate the methods to what the
//! board does. Where the tools are missing (package acpica-tools) the tests fail.

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

/// Runs a tool of ACPICA: whether it succeeded, and what it printed.
fn acpica(tool: &str, args: &[&str], folder: &Path) -> (bool, String) {
    let output = Command::new(tool).args(args).current_dir(folder).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|error| panic!("{tool}: {error}; install the package acpica-tools"));
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.success(), text)
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
            let (ok, text) = acpica("iasl", &["-d", &file], &folder.0);
            assert!(ok, "{signature}: {text}");
            assert_quiet(&signature, &text);
            let source = std::fs::read_to_string(folder.0.join(format!("{signature}.dsl"))).expect("dsl");
            assert_quiet(&signature, &source.replace("Error Source", ""));
            if signature == "DSDT" {
                let (ok, text) = acpica("iasl", &["-ve", "-f", "DSDT.dsl"], &folder.0);
                assert!(ok, "{text}");
                let (_, text) = acpica("iasl", &["DSDT.dsl"], &folder.0);
                assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
            }
        }
    }
}

/// What `acpiexec` prints when it runs these commands on the DSDT.
fn evaluate(name: &str, commands: &str) -> String {
    let (tables, layout) = tables(2, true, &[0]);
    let folder = Folder::new(name);
    let loaded = split(&tables.load(&layout).expect("load"));
    let (_, dsdt) = loaded.iter().find(|(signature, _)| signature == "DSDT").expect("DSDT");
    std::fs::write(folder.0.join("DSDT.dat"), dsdt).expect("write");
    let (ok, text) = acpica("acpiexec", &["-b", commands, "DSDT.dat"], &folder.0);
    assert!(ok && !text.contains("ACPI Error") && !text.contains("ACPI Warning"), "{text}");
    text
}

#[test]
fn routing_follows_the_interrupt_mode() {
    let text = evaluate("prt-apic", "execute \\_PIC 1;execute \\_SB.PCI0._PRT");
    let values: Vec<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("[Integer] = ")).collect();
    assert_eq!(values.len(), 31 * 4 * 4);
    for (index, entry) in values.chunks_exact(4).enumerate() {
        let (device, pin) = (1 + index / 4, index % 4);
        let expected = [device << 16 | 0xFFFF, pin, 0, 16 + (device + pin) % 8];
        assert_eq!(entry, expected.map(|value| format!("{value:016X}")), "device {device} pin {pin}");
    }
}

/// The PIC-mode table is longer than `acpiexec` can print: read it from the disassembly.
#[test]
fn pic_mode_routes_to_the_same_lines() {
    let (tables, layout) = tables(1, false, &[0]);
    let folder = Folder::new("prt-pic");
    let loaded = split(&tables.load(&layout).expect("load"));
    let (_, dsdt) = loaded.iter().find(|(signature, _)| signature == "DSDT").expect("DSDT");
    std::fs::write(folder.0.join("DSDT.dat"), dsdt).expect("write");
    let (ok, text) = acpica("iasl", &["-d", "DSDT.dat"], &folder.0);
    assert!(ok, "{text}");
    let source = std::fs::read_to_string(folder.0.join("DSDT.dsl")).expect("dsl");
    let table = source.split("Name (PRTP").nth(1).and_then(|rest| rest.split("Name (PRTA").next());
    let links: Vec<u8> = table
        .expect("both tables")
        .lines()
        .filter_map(|line| line.trim().strip_prefix("LNK")?.bytes().next())
        .collect();
    let expected: Vec<u8> =
        (1..32).flat_map(|device| (0..4).map(move |pin| b'A' + (device + pin) % 8)).collect();
    assert_eq!(links, expected);
    let choice: String = source.split("Method (_PRT").nth(1).expect("_PRT").split_whitespace().collect();
    assert!(choice.contains("If(PICF){Return(PRTA"), "{choice}");
    assert!(choice.contains("Else{Return(PRTP"), "{choice}");
}

#[test]
fn links_choose_report_and_disconnect() {
    // Extended interrupt, level, low, shared, IRQ 11; then the end tag.
    let commands = "execute \\_SB.LNKF._SRS (89 06 00 0D 01 0B 00 00 00 79 00);\
                    execute \\_SB.LNKF._CRS;execute \\_SB.LNKF._STA;\
                    execute \\_SB.LNKF._DIS;execute \\_SB.LNKF._STA";
    let text = evaluate("links", commands);
    assert!(text.contains("89 06 00 0D 01 0B 00 00 00 79 00"), "{text}");
    let states: Vec<&str> =
        text.lines().filter_map(|line| line.trim().strip_prefix("[Integer] = ")).collect();
    assert_eq!(states, ["000000000000000B", "0000000000000009"]);
}

#[test]
fn the_bridge_grants_what_it_can() {
    // The UUID, revision 1, three words: no query, all support, control 0x1F asked for.
    let commands = "execute \\_SB.PCI0._OSC \
                    (5B 4D DB 33 F7 1F 1C 40 96 57 74 41 C0 3D D7 66) 1 3 \
                    (00 00 00 00 FF 00 00 00 1F 00 00 00)";
    let text = evaluate("osc", commands);
    assert!(text.contains("10 00 00 00 FF 00 00 00 1D 00 00 00"), "{text}");
}
