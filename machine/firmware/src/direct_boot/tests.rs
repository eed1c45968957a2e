//! Direct boot of small made-up kernels: placement and registers, then the same files mutated.

use super::*;
use alloc::string::String;
use alloc::vec;
use machine_spec::layout::{E820Kind, RamLayout, Span};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;
const CODE_BYTES: usize = 0x1000;
const RSDP: Gpa = Gpa(0xE_0000);

fn set(file: &mut [u8], at: usize, value: &[u8]) {
    file[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage of one setup sector and one page of code.
fn bzimage(long_mode: bool) -> Vec<u8> {
    let mut file = vec![0u8; 1024 + CODE_BYTES];
    file[0x1F1] = 1;
    set(&mut file, 0x1F4, &(CODE_BYTES as u32 / 16).to_le_bytes());
    set(&mut file, 0x1FE, &[0x55, 0xAA, 0xEB, 0x66]);
    set(&mut file, 0x202, b"HdrS");
    set(&mut file, 0x206, &0x020Fu16.to_le_bytes());
    file[0x211] = 1;
    set(&mut file, 0x22C, &0x37FF_FFFFu32.to_le_bytes());
    set(&mut file, 0x230, &0x20_0000u32.to_le_bytes());
    file[0x234] = 1;
    set(&mut file, 0x236, &u16::from(long_mode).to_le_bytes());
    set(&mut file, 0x238, &2047u32.to_le_bytes());
    set(&mut file, 0x258, &(16 * MIB).to_le_bytes());
    set(&mut file, 0x260, &(4 * MIB as u32).to_le_bytes());
    file[1024..].fill(0x90);
    file
}

/// A 64-bit ELF kernel whose segments, each of one page of the file, have these places and sizes;
/// it is entered in the first.
fn elf_with(segments: &[(u64, u64)]) -> Vec<u8> {
    let mut file = vec![0u8; 0x2000];
    set(&mut file, 0, b"\x7FELF\x02\x01\x01");
    set(&mut file, 16, &2u16.to_le_bytes());
    set(&mut file, 18, &62u16.to_le_bytes());
    set(&mut file, 32, &64u64.to_le_bytes());
    set(&mut file, 54, &56u16.to_le_bytes());
    set(&mut file, 56, &(segments.len() as u16 + 1).to_le_bytes());
    let header = |kind: u32, offset: u64, physical: u64, file_size: u64, memory_size: u64| {
        let mut bytes = vec![0u8; 56];
        set(&mut bytes, 0, &kind.to_le_bytes());
        set(&mut bytes, 8, &offset.to_le_bytes());
        set(&mut bytes, 24, &physical.to_le_bytes());
        set(&mut bytes, 32, &file_size.to_le_bytes());
        set(&mut bytes, 40, &memory_size.to_le_bytes());
        set(&mut bytes, 48, &4u64.to_le_bytes());
        bytes
    };
    for (index, (physical, memory_size)) in segments.iter().enumerate() {
        set(&mut file, 64 + index * 56, &header(1, 0x1000, *physical, 0x1000, *memory_size));
    }
    set(&mut file, 64 + segments.len() * 56, &header(4, 0x200, 0, 40, 40));
    // Another note first: the walk must step over it.
    set(&mut file, 0x200, &[4, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0, 0]);
    set(&mut file, 0x20C, b"Xen\0abc\0");
    set(&mut file, 0x214, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    set(&mut file, 0x220, b"Xen\0");
    set(&mut file, 0x224, &(segments[0].0 as u32 + 0x40).to_le_bytes());
    file[0x1000..].fill(0x90);
    file
}

/// One loadable page at 16 MiB with as much bss.
fn pvh_elf() -> Vec<u8> {
    elf_with(&[(16 * MIB, 0x2000)])
}

fn memory(mib: u64) -> Vec<E820Entry> {
    RamLayout::new(mib * MIB).expect("layout").e820()
}

fn files<'a>(kernel: &'a [u8], initrd: Option<&'a [u8]>) -> BootFiles<'a> {
    BootFiles { kernel, initrd, command_line: "console=ttyS0" }
}

fn segment_at<'a, 'b>(boot: &'b DirectBoot<'a>, gpa: u64) -> &'b Segment<'a> {
    boot.segments.iter().find(|s| s.gpa == Gpa(gpa)).expect("segment")
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// What must hold of every result: in RAM, apart, and not larger than RAM.
fn check_segments(boot: &DirectBoot<'_>, memory: &[E820Entry]) {
    let spans: Vec<Span> =
        boot.segments.iter().map(|s| Span::new(s.gpa.0, s.bytes.len() as u64 + s.zeros_after)).collect();
    for (i, a) in spans.iter().enumerate() {
        assert!(memory.iter().any(|e| e.kind == E820Kind::Ram && e.span.contains(a)), "{a:x?}");
        for b in &spans[i + 1..] {
            assert!(!a.overlaps(b), "{a:x?} {b:x?}");
        }
    }
}

#[test]
fn bzimage_64() {
    let kernel = bzimage(true);
    let initrd = vec![7u8; 5000];
    let memory = memory(256);
    let boot = direct_boot(&files(&kernel, Some(&initrd)), &memory, Some(RSDP)).expect("boot");
    check_segments(&boot, &memory);
    assert_eq!(boot.protocol, BootProtocol::Linux64);
    let entry = boot.entry;
    assert_eq!(entry.mode, BootMode::LongMode);
    assert_eq!((entry.rip, entry.rsi), (16 * MIB + 0x200, 0x7000));
    assert_eq!((entry.cr0, entry.cr3, entry.cr4, entry.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
    assert_eq!((entry.cs.selector, entry.data.selector), (0x10, 0x18));
    assert!(entry.cs.attributes.long() && !entry.cs.attributes.big());
    assert_eq!((entry.cs.limit, entry.data.limit, entry.rflags), (u32::MAX, u32::MAX, 2));
    assert!(matches!(segment_at(&boot, 16 * MIB).bytes, Cow::Borrowed(code) if code == &kernel[1024..]));
    assert_eq!(&*segment_at(&boot, 0x2_0000).bytes, b"console=ttyS0\0");

    let params = &segment_at(&boot, 0x7000).bytes;
    assert_eq!(params.len(), 4096);
    assert_eq!(&params[0x202..0x206], b"HdrS");
    assert_eq!((params[0x210], params[0x211]), (0xFF, 1));
    assert_eq!(u32_at(params, 0x228), 0x2_0000);
    assert_eq!(u64_at(params, 0x70), RSDP.0);
    let image = u64::from(u32_at(params, 0x218));
    assert_eq!(u32_at(params, 0x21C), 5000);
    // As high as RAM below the ACPI tables permits.
    let top = RamLayout::new(256 * MIB).expect("layout").acpi_tables().start.0;
    assert_eq!(image, top - 0x2000);
    assert_eq!(&*segment_at(&boot, image).bytes, &initrd[..]);
    assert_eq!(usize::from(params[0x1E8]), memory.len());
    assert_eq!(u64_at(params, 0x2D0), 0);
    assert_eq!(u64_at(params, 0x2D8), 0x9_FC00);
    assert_eq!(u32_at(params, 0x2E0), 1);
}

#[test]
fn page_tables_map_four_gib_to_themselves() {
    let kernel = bzimage(true);
    let boot = direct_boot(&files(&kernel, None), &memory(64), None).expect("boot");
    let tables = &segment_at(&boot, boot.entry.cr3).bytes;
    let base = boot.entry.cr3;
    let entry = |at: u64| u64_at(tables, (at - base) as usize);
    for address in [0u64, 0x20_0000, 0x3FFF_FFFF, 0x4000_0000, 0xFEE0_0123, 0xFFFF_FFFF] {
        let pml4 = entry(base + (address >> 39) * 8);
        let pdpt = entry((pml4 & !0xFFF) + ((address >> 30) & 0x1FF) * 8);
        let pd = entry((pdpt & !0xFFF) + ((address >> 21) & 0x1FF) * 8);
        assert_eq!((pml4 & 3, pdpt & 3, pd & 0x83), (3, 3, 0x83));
        assert_eq!((pd & !0x1F_FFFF) | (address & 0x1F_FFFF), address);
    }
    let gdt = &segment_at(&boot, boot.entry.gdt.base).bytes;
    assert_eq!(usize::from(boot.entry.gdt.limit) + 1, gdt.len());
    assert_eq!(u64_at(gdt, 0x10), 0x00AF_9B00_0000_FFFF);
    assert_eq!(u64_at(gdt, 0x18), 0x00CF_9300_0000_FFFF);
}

#[test]
fn bzimage_32() {
    let kernel = bzimage(false);
    let initrd = vec![7u8; 5000];
    let memory = memory(2048);
    let boot = direct_boot(&files(&kernel, Some(&initrd)), &memory, Some(RSDP)).expect("boot");
    check_segments(&boot, &memory);
    assert_eq!(boot.protocol, BootProtocol::Linux32);
    let entry = boot.entry;
    assert_eq!(entry.mode, BootMode::Protected32);
    assert_eq!((entry.rip, entry.rsi, entry.rbx), (16 * MIB, 0x7000, 0));
    assert_eq!((entry.cr0, entry.cr3, entry.cr4, entry.efer), (0x11, 0, 0, 0));
    assert!(entry.cs.attributes.big() && !entry.cs.attributes.long());
    let params = &segment_at(&boot, 0x7000).bytes;
    // initrd_addr_max holds although RAM goes on.
    assert_eq!(u32_at(params, 0x218), 0x3800_0000 - 0x2000);
    assert_eq!(u32_at(params, 0x214), 16 * MIB as u32);
}

#[test]
fn a_kernel_that_cannot_move_is_loaded_at_one_mib() {
    let mut kernel = bzimage(false);
    kernel[0x234] = 0;
    let boot = direct_boot(&files(&kernel, None), &memory(64), None).expect("boot");
    assert_eq!(boot.entry.rip, MIB);
}

#[test]
fn old_protocol_gets_no_rsdp() {
    let mut kernel = bzimage(true);
    set(&mut kernel, 0x206, &0x020Du16.to_le_bytes());
    let boot = direct_boot(&files(&kernel, None), &memory(64), Some(RSDP)).expect("boot");
    assert_eq!(u64_at(&segment_at(&boot, 0x7000).bytes, 0x70), 0);
}

#[test]
fn pvh() {
    let kernel = pvh_elf();
    let initrd = vec![7u8; 5000];
    let memory = memory(256);
    let boot = direct_boot(&files(&kernel, Some(&initrd)), &memory, Some(RSDP)).expect("boot");
    check_segments(&boot, &memory);
    assert_eq!(boot.protocol, BootProtocol::Pvh);
    assert_eq!((boot.entry.rip, boot.entry.rbx), (16 * MIB + 0x40, 0x6000));
    assert_eq!((boot.entry.cr0, boot.entry.tr.limit), (0x11, 0x67));
    let code = segment_at(&boot, 16 * MIB);
    assert_eq!((code.bytes.len(), code.zeros_after), (0x1000, 0x1000));
    let info = &segment_at(&boot, 0x6000).bytes;
    assert_eq!((u32_at(info, 0), u32_at(info, 4), u32_at(info, 12)), (0x336E_C578, 1, 1));
    assert_eq!((u64_at(info, 24), u64_at(info, 32)), (0x2_0000, RSDP.0));
    let module = (u64_at(info, 16) - 0x6000) as usize;
    assert_eq!(u64_at(info, module + 8), 5000);
    assert_eq!(&*segment_at(&boot, u64_at(info, module)).bytes, &initrd[..]);
    let map = (u64_at(info, 40) - 0x6000) as usize;
    assert_eq!(u32_at(info, 48) as usize, memory.len());
    assert_eq!((u64_at(info, map), u64_at(info, map + 8), u32_at(info, map + 16)), (0, 0x9_FC00, 1));
    assert_eq!(info.len(), map + memory.len() * 24);
}

#[test]
fn refusals_name_file_and_field() {
    let message = |kernel: &[u8], initrd: Option<&[u8]>, line: &str, mib| {
        let files = BootFiles { kernel, initrd, command_line: line };
        match direct_boot(&files, &memory(mib), None) {
            Ok(_) => String::new(),
            Err(error) => alloc::format!("{error}"),
        }
    };
    let good = bzimage(true);
    assert!(message(b"not a kernel", None, "", 64).contains("neither a Linux bzImage"));
    assert!(message(&good[..3000], None, "", 64).contains("file ends before"));
    assert!(message(&good, None, &"x".repeat(3000), 64).contains("at most 2047"));
    assert!(message(&good, None, "a\0b", 64).contains("zero byte at 1"));
    assert!(message(&good, None, "", 16).contains("not in the guest's RAM"));
    assert!(message(&good, Some(&vec![0; 80 << 20]), "", 64).contains("initrd: no room"));
    assert!(message(&good, Some(&[]), "", 64).contains("initrd: file ends"));
    let mut no_note = pvh_elf();
    no_note[0x21C] = 17;
    assert!(message(&no_note, None, "", 64).contains("without the Xen note"));
    let two = elf_with(&[(16 * MIB, 0x2000), (16 * MIB + 0x1000, 0x1000)]);
    assert!(message(&two, None, "", 64).contains("overlaps what is loaded for the kernel"));
    let in_hole = elf_with(&[(0xA_0000, 0x1000)]);
    assert!(message(&in_hole, None, "", 64).contains("not in the guest's RAM"));
}

/// A file with some of its bytes replaced, and perhaps cut.
fn mutated(base: Vec<u8>) -> impl Strategy<Value = Vec<u8>> {
    let header = 0..0x400usize;
    let edits = proptest::collection::vec((header, any::<u8>()), 0..12);
    let cut = prop_oneof![Just(base.len()), 0..base.len()];
    (edits, cut).prop_map(move |(edits, cut)| {
        let mut file = base.clone();
        for (at, value) in edits {
            file[at] = value;
        }
        file.truncate(cut);
        file
    })
}

/// One header field set to an absurd value.
fn absurd(base: Vec<u8>, fields: &'static [usize]) -> impl Strategy<Value = Vec<u8>> {
    let value = prop_oneof![Just(u64::MAX), Just(0), Just(1 << 63), Just(0xFFFF_F000), any::<u64>()];
    let edit = (proptest::sample::select(fields), value, 1..=8usize);
    proptest::collection::vec(edit, 1..4).prop_map(move |edits| {
        let mut file = base.clone();
        for (at, value, width) in edits {
            set(&mut file, at, &value.to_le_bytes()[..width]);
        }
        file
    })
}

const BZIMAGE_FIELDS: &[usize] =
    &[0x1F1, 0x1F4, 0x201, 0x206, 0x211, 0x22C, 0x230, 0x234, 0x236, 0x238, 0x258, 0x260];
const ELF_FIELDS: &[usize] = &[32, 54, 56, 64, 72, 88, 96, 104, 120, 128, 152, 0x200, 0x204, 0x214, 0x224];

proptest! {
    #[test]
    fn any_kernel_gives_a_result_or_an_error(
        kernel in prop_oneof![
            mutated(bzimage(true)),
            mutated(bzimage(false)),
            mutated(pvh_elf()),
            absurd(bzimage(true), BZIMAGE_FIELDS),
            absurd(bzimage(false), BZIMAGE_FIELDS),
            absurd(pvh_elf(), ELF_FIELDS),
            proptest::collection::vec(any::<u8>(), 0..2048),
        ],
        initrd in proptest::option::of(1..40_000usize),
        mib in prop_oneof![Just(16u64), Just(64), Just(5000)],
    ) {
        let memory = memory(mib);
        let initrd = initrd.map(|len| vec![1u8; len]);
        if let Ok(boot) = direct_boot(&files(&kernel, initrd.as_deref()), &memory, Some(RSDP)) {
            check_segments(&boot, &memory);
            prop_assert!(boot.entry.rip < 1 << 32);
        }
    }

    #[test]
    fn segments_anywhere_are_placed_or_refused(
        segments in proptest::collection::vec((0..0x40u64, 1..0x20u64), 1..5),
        base in prop_oneof![Just(0u64), Just(0x8_0000), Just(16 * MIB), Just(62 * MIB), Just(u64::MAX - 0x3_FFFF)],
        initrd in 1..40_000usize,
    ) {
        let segments: Vec<(u64, u64)> = segments
            .iter()
            .map(|(page, pages)| (base.wrapping_add(page * 0x1000), pages * 0x1000))
            .collect();
        let memory = memory(64);
        let (kernel, initrd) = (elf_with(&segments), vec![1u8; initrd]);
        let overlap = segments.iter().enumerate().any(|(index, (start, size))| {
            segments[..index].iter().any(|(other, len)| {
                u128::from(*start) < u128::from(*other) + u128::from(*len)
                    && u128::from(*other) < u128::from(*start) + u128::from(*size)
            })
        });
        match direct_boot(&files(&kernel, Some(&initrd)), &memory, Some(RSDP)) {
            Ok(boot) => {
                prop_assert!(!overlap);
                check_segments(&boot, &memory);
            }
            Err(_) => prop_assert!(overlap || base != 16 * MIB),
        }
    }

    #[test]
    fn any_memory_map_is_survived(
        ranges in proptest::collection::vec((any::<u64>(), any::<u64>()), 0..200),
    ) {
        let memory: Vec<E820Entry> = ranges
            .iter()
            .map(|(start, size)| E820Entry { span: Span::new(*start, *size), kind: E820Kind::Ram })
            .collect();
        for kernel in [bzimage(true), pvh_elf()] {
            if let Ok(boot) = direct_boot(&files(&kernel, Some(&[1; 9000])), &memory, None) {
                check_segments(&boot, &memory);
            }
        }
    }
}
