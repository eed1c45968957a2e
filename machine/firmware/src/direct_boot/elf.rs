//! ELF executables, 32- and 64-bit, as far as a PVH kernel needs: loadable segments and the Xen
//! note that names the entry.
//!
//! Called by `pvh`. ELF specification 1.2 and the ELF-64 object file format.

use super::error::DirectBootError;
use super::fields::FileView;
use alloc::vec::Vec;

const MAGIC: &[u8; 4] = b"\x7FELF";
const CLASS_32: u8 = 1;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const TYPE_EXECUTABLE: u16 = 2;
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// More program headers than any kernel has.
const PROGRAM_HEADERS_MAX: u16 = 128;
const NOTE_NAME: &[u8; 4] = b"Xen\0";
const NOTE_PHYS32_ENTRY: u32 = 18;

/// Whether the file begins as ELF files do.
pub(super) fn matches(kernel: &[u8]) -> bool {
    kernel.get(..4) == Some(MAGIC)
}

/// One loadable segment.
pub(super) struct LoadSegment<'a> {
    pub physical: u64,
    pub bytes: &'a [u8],
    pub zeros_after: u64,
}

/// A parsed kernel.
pub(super) struct ElfKernel<'a> {
    pub is_64_bit: bool,
    pub segments: Vec<LoadSegment<'a>>,
    /// From the Xen note: physical address of the 32-bit entry.
    pub pvh_entry: Option<u64>,
}

/// A program header of either class.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    physical: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

impl<'a> ElfKernel<'a> {
    pub fn parse(file: &FileView<'a>) -> Result<Self, DirectBootError> {
        let is_64_bit = check_identity(file)?;
        let (table, entry_size, count) = if is_64_bit {
            (file.u64(32, "e_phoff")?, file.u16(54, "e_phentsize")?, file.u16(56, "e_phnum")?)
        } else {
            (file.u32(28, "e_phoff")?.into(), file.u16(42, "e_phentsize")?, file.u16(44, "e_phnum")?)
        };
        let expected = if is_64_bit { 56 } else { 32 };
        if entry_size != expected {
            return Err(file.refuse("e_phentsize", entry_size.into(), "not the size of a program header"));
        }
        if count == 0 || count > PROGRAM_HEADERS_MAX {
            return Err(file.refuse("e_phnum", count.into(), "not between 1 and 128"));
        }
        let mut kernel = Self { is_64_bit, segments: Vec::new(), pvh_entry: None };
        for index in 0..u64::from(count) {
            let at = table.saturating_add(index * u64::from(entry_size));
            let header = ProgramHeader::parse(file, at, is_64_bit)?;
            match header.kind {
                PT_LOAD => kernel.segments.extend(load_segment(file, &header)?),
                PT_NOTE if kernel.pvh_entry.is_none() => {
                    kernel.pvh_entry = find_entry_note(file, &header)?;
                }
                _ => {}
            }
        }
        Ok(kernel)
    }
}

/// Checks the identification; true for 64-bit.
fn check_identity(file: &FileView<'_>) -> Result<bool, DirectBootError> {
    let class = file.u8(4, "EI_CLASS")?;
    let is_64_bit = match class {
        CLASS_32 => false,
        CLASS_64 => true,
        _ => return Err(file.refuse("EI_CLASS", class.into(), "neither 32- nor 64-bit")),
    };
    let data = file.u8(5, "EI_DATA")?;
    if data != LITTLE_ENDIAN {
        return Err(file.refuse("EI_DATA", data.into(), "not little-endian"));
    }
    let kind = file.u16(16, "e_type")?;
    if kind != TYPE_EXECUTABLE {
        return Err(file.refuse("e_type", kind.into(), "not an executable"));
    }
    let machine = file.u16(18, "e_machine")?;
    if machine != MACHINE_386 && machine != MACHINE_X86_64 {
        return Err(file.refuse("e_machine", machine.into(), "not an x86 kernel"));
    }
    Ok(is_64_bit)
}

impl ProgramHeader {
    fn parse(file: &FileView<'_>, at: u64, is_64_bit: bool) -> Result<Self, DirectBootError> {
        let field = |offset: u64| at.saturating_add(offset);
        let kind = file.u32(at, "p_type")?;
        if is_64_bit {
            return Ok(Self {
                kind,
                offset: file.u64(field(8), "p_offset")?,
                physical: file.u64(field(24), "p_paddr")?,
                file_size: file.u64(field(32), "p_filesz")?,
                memory_size: file.u64(field(40), "p_memsz")?,
                align: file.u64(field(48), "p_align")?,
            });
        }
        Ok(Self {
            kind,
            offset: file.u32(field(4), "p_offset")?.into(),
            physical: file.u32(field(12), "p_paddr")?.into(),
            file_size: file.u32(field(16), "p_filesz")?.into(),
            memory_size: file.u32(field(20), "p_memsz")?.into(),
            align: file.u32(field(28), "p_align")?.into(),
        })
    }
}

fn load_segment<'a>(
    file: &FileView<'a>,
    header: &ProgramHeader,
) -> Result<Option<LoadSegment<'a>>, DirectBootError> {
    if header.memory_size == 0 {
        return Ok(None);
    }
    let Some(zeros_after) = header.memory_size.checked_sub(header.file_size) else {
        return Err(file.refuse("p_filesz", header.file_size, "larger than p_memsz"));
    };
    let bytes = file.slice(header.offset, header.file_size, "the end of a PT_LOAD segment")?;
    Ok(Some(LoadSegment { physical: header.physical, bytes, zeros_after }))
}

/// Walks one note segment. Name and descriptor are padded to the segment's alignment of 4 or 8.
fn find_entry_note(file: &FileView<'_>, header: &ProgramHeader) -> Result<Option<u64>, DirectBootError> {
    let notes = file.slice(header.offset, header.file_size, "the end of a PT_NOTE segment")?;
    let notes = FileView { role: file.role, bytes: notes };
    let pad = |len: u32| u64::from(len).next_multiple_of(if header.align == 8 { 8 } else { 4 });
    let mut at = 0;
    // The last note may be cut short by padding: fewer than a note header's bytes end the walk.
    while at + 12 <= notes.bytes.len() as u64 {
        let name_size = notes.u32(at, "note n_namesz")?;
        let value_size = notes.u32(at + 4, "note n_descsz")?;
        let kind = notes.u32(at + 8, "note n_type")?;
        let name = notes.slice(at + 12, name_size.into(), "note name")?;
        let value_at = at + 12 + pad(name_size);
        if kind == NOTE_PHYS32_ENTRY && name == NOTE_NAME {
            let value = match value_size {
                4 => notes.u32(value_at, "PHYS32_ENTRY")?.into(),
                8 => notes.u64(value_at, "PHYS32_ENTRY")?,
                _ => {
                    return Err(file.refuse("PHYS32_ENTRY n_descsz", value_size.into(), "neither 4 nor 8"));
                }
            };
            return Ok(Some(value));
        }
        at = value_at + pad(value_size);
    }
    Ok(None)
}
