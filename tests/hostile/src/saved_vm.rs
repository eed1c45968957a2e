//! Saved VMs that were tampered with: records whose bodies were changed and whose checksums are right again, records
//! that are missing, doubled or out of order, or noise.
//!
//! A file that is refused says why. One that is taken makes a machine that works: it can be run, touched, stopped, and
//! saved again.

use crate::board::FuzzBoard;
use crate::edits::{Edit, apply_all};
use arbitrary::Arbitrary;
use cpu_soft::SoftHypervisor;
use machine::KIND_SPEC;
use machine::saved_vm::{LoadError, Reader, Record, Writer};
use machine::testing::TestMachine;
use machine::testing::host::TestHost;
use machine_spec::MachineSpec;
use std::sync::OnceLock;

#[derive(Arbitrary, Debug)]
struct Script<'a> {
    noise: bool,
    #[arbitrary(with = crate::up_to::<16, _>)]
    changes: Vec<Change>,
    /// Changes to the finished file, which the checksums notice.
    #[arbitrary(with = crate::up_to::<2, _>)]
    afterwards: Vec<Edit>,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Change {
    Edit { record: u8, edit: Edit },
    Flags { record: u8, flags: u16 },
    Remove { record: u8 },
    Double { record: u8 },
    Swap { one: u8, other: u8 },
}

/// Restores a changed file, and uses the machine if that works.
pub fn run(data: &[u8]) {
    let Some(script) = crate::script::<Script<'_>>(data) else { return };
    let mut file = if script.noise { noise(script.bytes) } else { changed(&script.changes) };
    apply_all(&script.afterwards, &mut file, 0x100);
    match restored(&file) {
        Ok(test) => FuzzBoard::around(test).finish(),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// As `vmm` does it: the spec first, then the machine that it describes.
fn restored(file: &[u8]) -> Result<TestMachine<SoftHypervisor>, LoadError> {
    let mut source = file;
    let mut reader = Reader::begin(&mut source)?;
    let mismatch = |what: &str| LoadError::Mismatch(what.into());
    let first = reader.next_record()?.ok_or_else(|| mismatch("it is empty"))?;
    if first.kind != KIND_SPEC {
        return Err(mismatch("no spec"));
    }
    let spec = first.state::<MachineSpec>()?;
    spec.validate().map_err(|error| LoadError::Mismatch(error.to_string()))?;
    if spec.ram.bytes > 64 << 20 || spec.cpus.count > 4 {
        return Err(mismatch("too large for a test"));
    }
    let test = TestMachine::build_on(SoftHypervisor::default(), TestHost::default(), |s| *s = spec)
        .map_err(|error| LoadError::Mismatch(error.to_string()))?;
    test.machine.restore(&mut reader)?;
    test.machine.resume();
    test.host.start();
    Ok(test)
}

fn noise(bytes: &[u8]) -> Vec<u8> {
    let mut file = b"BEDPLATE\x01\0\0\0".to_vec();
    file.extend_from_slice(bytes);
    file
}

/// The records of a machine that has done something with every part.
fn sound() -> &'static [Record] {
    static SOUND: OnceLock<Vec<Record>> = OnceLock::new();
    SOUND.get_or_init(|| {
        let mut board = FuzzBoard::new();
        board.stir();
        let saved = board.saved();
        let mut source = &saved[..];
        let mut reader = Reader::begin(&mut source).expect("a file that was just written");
        let next = || reader.next_record().expect("a file that was just written");
        std::iter::from_fn(next).collect()
    })
}

fn changed(changes: &[Change]) -> Vec<u8> {
    let mut records = sound().to_vec();
    for change in changes {
        let count = records.len().max(1);
        let at = |record: u8| usize::from(record) % count;
        match *change {
            _ if records.is_empty() => {}
            Change::Edit { record, edit } => edit.apply(&mut records[at(record)].body, usize::MAX),
            Change::Flags { record, flags } => records[at(record)].flags = flags,
            Change::Remove { record } => _ = records.remove(at(record)),
            Change::Double { record } => records.insert(at(record), records[at(record)].clone()),
            Change::Swap { one, other } => records.swap(at(one), at(other)),
        }
    }
    let mut file = Vec::new();
    let mut writer = Writer::begin(&mut file).expect("memory takes everything");
    for Record { kind, flags, version, body } in &records {
        writer.versioned(*kind, *flags, *version, body).expect("memory takes everything");
    }
    writer.finish().expect("memory takes everything");
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_base_is_sound() {
        FuzzBoard::around(restored(&changed(&[])).unwrap()).finish();
        // RAM, devices, vCPUs and the rest are all there to be changed.
        let kinds: std::collections::BTreeSet<_> = sound().iter().map(|record| record.kind).collect();
        assert!(kinds.len() >= 5, "{kinds:?}");
        assert!(restored(&changed(&[Change::Remove { record: 1 }])).is_err());
    }
}
