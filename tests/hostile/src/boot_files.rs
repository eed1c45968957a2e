//! Kernels (bzImage, PVH ELF) and initial RAM disks: cut, with flipped bits and absurd lengths, or noise.

use crate::edits::{Edit, apply_all};
use arbitrary::Arbitrary;
use firmware::direct_boot::{BootFiles, DirectBoot, direct_boot};
use guest_memory::Gpa;
use machine::testing::kernel;
use machine_spec::layout::{E820Entry, E820Kind, RamLayout, Span};

const MIB: u64 = 1 << 20;
/// Bytes at the beginning of a kernel file where headers are.
const HEAD: usize = 0x300;

#[derive(Arbitrary, Debug)]
enum Base {
    Linux64,
    Linux32,
    Pvh,
    Noise,
}

#[derive(Arbitrary, Debug)]
struct Files<'a> {
    base: Base,
    #[arbitrary(with = crate::up_to::<12, _>)]
    edits: Vec<Edit>,
    initrd: Option<u32>,
    memory: u8,
    line: u16,
    noise: &'a [u8],
}

/// Lays the files out in a machine's memory; whatever comes of it lies in RAM, without overlaps.
pub fn run(data: &[u8]) {
    let Some(files) = crate::script::<Files<'_>>(data) else { return };
    let mut file = match files.base {
        Base::Linux64 => bzimage(true),
        Base::Linux32 => bzimage(false),
        Base::Pvh => kernel::pvh(&kernel::IDLE),
        Base::Noise => files.noise.to_vec(),
    };
    apply_all(&files.edits, &mut file, HEAD);
    // The package's side of the same file: what `guest fetch` does with it.
    let _ = guest_catalog::bzimage::protocol(&file);
    let _ = guest_catalog::bzimage::release(&file);
    let _ = guest_catalog::bzimage::extract_vmlinux(&file);

    let mib = [16, 64, 3000, 5000][usize::from(files.memory & 3)];
    let Ok(layout) = RamLayout::new(mib * MIB) else { return };
    let memory = layout.e820();
    // Only its length counts.
    let initrd = files.initrd.map(|bytes| vec![0; (bytes % (80 << 20)) as usize]);
    let line = "x".repeat(usize::from(files.line));
    let boot = BootFiles { kernel: &file, initrd: initrd.as_deref(), command_line: &line };
    match direct_boot(&boot, &memory, Some(Gpa(0xE_0000))) {
        Ok(boot) => check(&boot, &memory),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// What must hold of any result.
fn check(boot: &DirectBoot<'_>, memory: &[E820Entry]) {
    let span = |s: &firmware::Segment<'_>| Span::new(s.gpa.0, s.bytes.len() as u64 + s.zeros_after);
    let spans: Vec<Span> = boot.segments.iter().map(span).collect();
    for (i, a) in spans.iter().enumerate() {
        assert!(memory.iter().any(|e| e.kind == E820Kind::Ram && e.span.contains(a)), "{a:x?} is not in RAM");
        for b in &spans[i + 1..] {
            assert!(!a.overlaps(b), "{a:x?} overlaps {b:x?}");
        }
    }
    assert!(boot.entry.rip < 1 << 32);
}

/// A small kernel with a sound setup header, entered in long or protected mode.
fn bzimage(long_mode: bool) -> Vec<u8> {
    const CODE_BYTES: usize = 0x1000;
    let mut file = vec![0x90; 1024 + CODE_BYTES];
    file[..1024].fill(0);
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(0x1F4, &(CODE_BYTES as u32 / 16).to_le_bytes());
    put(0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    put(0x202, b"HdrS");
    put(0x206, &0x020Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x37FF_FFFFu32.to_le_bytes());
    put(0x230, &0x20_0000u32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &u16::from(long_mode).to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x248, &0x200u32.to_le_bytes());
    put(0x24C, &0x800u32.to_le_bytes());
    put(0x258, &(2 * MIB).to_le_bytes());
    put(0x260, &(MIB as u32).to_le_bytes());
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bases_are_sound() {
        let memory = RamLayout::new(16 * MIB).unwrap().e820();
        for kernel in [bzimage(true), bzimage(false), kernel::pvh(&kernel::IDLE)] {
            let files = BootFiles { kernel: &kernel, initrd: Some(&[1; 5000]), command_line: "a" };
            check(&direct_boot(&files, &memory, None).unwrap(), &memory);
        }
    }
}
