//! What was translated, for people and for tools, if somebody asks: guest and host code side by side, and a map for `perf`
//! (Linux, tools/perf/Documentation/jit-interface.txt).
//!
//! Called by: `block.rs` behind each translation. Files are opened by who asks, before a jail closes; what cannot be
//! written is not.

use crate::block::Source;
use cpu_soft::translate::Place;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use x86_decode::{Decoded, decode};
use x86_defs::cpuid::{Feature, FeatureSet};

/// See the module's header.
#[derive(Debug, Default)]
pub struct Journal {
    listing: Option<Mutex<File>>,
    perf_map: Option<Mutex<File>>,
}

impl Journal {
    /// With a listing at `listing`, and with a map where `perf` looks for that of this process.
    ///
    /// # Errors
    /// A file cannot be made; its name is in the text, and what to do.
    pub fn create(listing: Option<&Path>, perf_map: bool) -> io::Result<Self> {
        let perf = perf_map.then(|| format!("/tmp/perf-{}.map", std::process::id()));
        let made = |path: &Path, file: io::Result<File>| {
            file.map(Mutex::new).map_err(|error| io::Error::new(error.kind(), way_out(path, &error)))
        };
        // A new file: the folder is everybody's.
        let new = |path: String| made(path.as_ref(), File::create_new(&path));
        Ok(Self {
            listing: listing.map(|path| made(path, File::create(path))).transpose()?,
            perf_map: perf.map(new).transpose()?,
        })
    }

    /// Code `code` at host address `base` was made of `source`; `marks`: where in it each instruction's begins.
    pub(crate) fn note(&self, place: &Place, source: &Source, base: u64, code: &[u8], marks: &[usize]) {
        if let Some(map) = &self.perf_map {
            put(map, &format!("{base:x} {:x} guest_{:x}\n", code.len(), place.linear));
        }
        if let Some(listing) = &self.listing {
            put(listing, &text(place, source, base, code, marks));
        }
    }
}

fn way_out(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::AlreadyExists => {
            format!("{} is there already, of an earlier process: remove it", path.display())
        }
        _ => format!("{}: {error}", path.display()),
    }
}

fn put(file: &Mutex<File>, text: &str) {
    // A full disk ends no guest.
    let _ = file.lock().unwrap_or_else(PoisonError::into_inner).write_all(text.as_bytes());
}

fn text(place: &Place, source: &Source, base: u64, code: &[u8], marks: &[usize]) -> String {
    let mut text = format!("block {:x}, in RAM at {:x}, CPL {}\n", place.linear, place.at, place.mode.cpl());
    let first = marks.first().copied().unwrap_or(code.len());
    host(&mut text, base, code, 0..first);
    for (item, bounds) in source.items.iter().zip(marks.windows(2)) {
        let at = (place.linear & !0xFFF).wrapping_add(item.insn.ip());
        let _ = writeln!(text, "  {at:x}  {}  {:?}", hex(item.bytes()), item.insn.code());
        host(&mut text, base, code, bounds[0]..bounds[1]);
    }
    let end = marks.last().copied().unwrap_or(code.len());
    let _ = writeln!(text, "  out of line");
    host(&mut text, base, code, end..code.len());
    text
}

/// Host instructions of `code` in `range`.
fn host(text: &mut String, base: u64, code: &[u8], range: std::ops::Range<usize>) {
    let mut at = range.start;
    while at < range.end {
        let address = base + at as u64;
        let Decoded::Instruction(insn) = decode(&code[at..], 64, address, FeatureSet::of(Feature::ALL))
        else {
            return;
        };
        let bytes = hex(&code[at..at + insn.len()]);
        let _ = writeln!(text, "      {address:x}  {bytes}  {:?}", insn.code());
        at += insn.len();
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_names_guest_and_host_code() {
        let folder = std::env::temp_dir().join(format!("journal-{}", std::process::id()));
        let journal = Journal::create(Some(&folder), true).unwrap();
        let (ram, features) = (guest_memory::GuestRam::for_test(1 << 20), FeatureSet::of(Feature::ALL));
        let mut engine = crate::engine::Engine::for_golden(&ram, features);
        let mode = x86_emulate::ModeKey(
            x86_emulate::ModeKey::LONG | x86_emulate::ModeKey::LMA | x86_emulate::ModeKey::PROTECTED,
        );
        let place = Place { linear: 0x40_0100, at: 0x100, mode, checks_itself: false };
        let mut scratch = crate::block::Scratch::default();
        scratch.page.fill(0xF4);
        scratch.page[0x100..0x103].copy_from_slice(&[0x48, 0x01, 0xD8]); // add rax, rbx
        let ways = crate::path::Ways::counted(&|_| 0, crate::path::HOT);
        let source = crate::block::read(&engine, &place, &engine.host(0), scratch, None, ways);
        let base = engine.memory.next();
        let mut emitter = crate::emit::Emitter::new(base, &place, 2, 0, &mut engine);
        emitter.block(&source);
        let finished = emitter.finish();
        journal.note(&place, &source, base, &finished.code, &finished.marks);
        let map = format!("/tmp/perf-{}.map", std::process::id());
        let again = Journal::create(None, true).unwrap_err().to_string();
        assert!(again.contains(&map) && again.contains("remove it"), "{again}");
        let nowhere = Journal::create(Some(Path::new("/nowhere/x")), false).unwrap_err().to_string();
        assert!(nowhere.contains("/nowhere/x: No such file"), "{nowhere}");
        let (listing, names) = (std::fs::read_to_string(&folder), std::fs::read_to_string(&map));
        std::fs::remove_file(&folder).unwrap();
        std::fs::remove_file(&map).unwrap();
        let (listing, names) = (listing.unwrap(), names.unwrap());
        assert!(listing.contains("block 400100, in RAM at 100, CPL 0"), "{listing}");
        assert!(listing.contains("  400100  4801d8  Add_rm64_r64\n      "), "{listing}");
        assert_eq!(names, format!("{base:x} {:x} guest_400100\n", finished.code.len()));
    }
}
